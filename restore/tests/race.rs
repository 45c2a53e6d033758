//! Start-up objects whose order is a race: a list says nothing about which worker has which. A client would
//! not notice; the workers themselves are asked.
#![allow(missing_docs)]

mod support;

use mcr_restore::transaction::{UpdateOptions, update};
use support::{Server, build_source};

#[test]
fn every_worker_keeps_its_own_logger() {
    let program = build_source("race.c", "a", &[]);
    let other = build_source("race.c", "b", &["-DOTHER"]);
    for (round, new_pid) in [false, false, false, true, true, true].into_iter().enumerate() {
        let server = Server::start(&program, &["PORT"]);
        std::thread::sleep(std::time::Duration::from_millis(60));
        assert_eq!(server.connect().ask("CHECK"), "1:ok 1:ok 1:ok 1:ok", "before");
        let report = update(server.pid(), &other, &UpdateOptions { new_pid, ..UpdateOptions::default() });
        let report = report.unwrap_or_else(|e| panic!("round {round}: {e}"));
        let reply = server.connect().ask("CHECK");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(report.pid.0), nix::sys::signal::Signal::SIGKILL)
            .unwrap();
        assert_eq!(reply, "2:ok 2:ok 2:ok 2:ok", "round {round}: {:?}", report.findings);
    }
}
