//! A new version booted in a copy-on-write host of a living server: it comes to rest, or is refused by name,
//! and the server serves on.

mod support;

use mcr_restore::boot::{BootError, BootOutcome, BootSpec, Host, boot};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use support::{Server, build_source, example};

/// Freezes, forks, lets the server go on, boots `new` in the host and ends the host.
fn try_boot(server: &Server, new: &Path, timeout: Duration) -> Result<BootOutcome, BootError> {
    use mcr_criu_lite::{FreezeOptions, Frozen, QuiesceOptions};
    let mut frozen = Frozen::seize(server.pid(), &FreezeOptions::default()).expect("seize");
    let states = frozen.quiesce(&QuiesceOptions::default()).expect("quiesce");
    let mut collected = frozen.collect(&states).expect("collect");
    // A copy that held on to the descriptors would keep what the server closes in its epoll.
    collected.let_go();
    let mut tracee = frozen.fork_host().expect("fork");
    tracee.syscall(libc::SYS_close_range, &[3, u64::from(u32::MAX), 0]).expect("close_range");
    frozen.thaw().expect("thaw");
    let pid = tracee.pid();
    tracee.leak();
    let mut host = Host::attach(pid).expect("attach");
    let new_elf = Arc::new(mcr_image::ElfFile::open(new).expect("new binary"));
    let spec = BootSpec {
        new: new_elf,
        new_path: new.to_owned(),
        old: &collected.process,
        old_modules: &collected.modules,
        argv: collected.process.argv.clone(),
        envp: collected.process.envp.clone(),
        random: None,
        pid: None,
        reserve: Vec::new(),
        timeout,
    };
    let r = boot(&mut host, &spec);
    host.kill();
    assert!(
        !Path::new(&format!("/proc/{pid}/task")).exists() || support::is_zombie(pid),
        "host {pid} is gone"
    );
    r
}

const LONG: Duration = Duration::from_secs(10);

#[test]
fn the_same_program_comes_to_rest_twenty_times() {
    let kv = example("v1");
    let server = Server::start(&kv, &["PORT", "LOG"]);
    let mut client = server.connect();
    assert!(client.ask("SET a 1").starts_with("OK"), "server works");
    for round in 0..20 {
        let out = try_boot(&server, &kv, LONG).unwrap_or_else(|e| panic!("round {round}: {e}"));
        let b = out.booted;
        assert_eq!(b.threads.len(), 2, "round {round}: {:?}", b.threads);
        assert!(b.threads.iter().all(|t| t.old_tid.is_some()), "all paired");
        for t in &b.threads {
            assert_eq!(t.regs.rax as i64, t.syscall, "just before the call");
            assert!(t.frames.iter().any(|f| f.in_program));
        }
        // Log file, epoll, timer and listener at their natural numbers.
        assert!(b.fds.iter().all(|f| f.new_fd == f.old_fd), "{:?}", b.fds);
        assert_eq!(b.fds.len(), 4, "{:?}", b.fds);
        assert!(b.epolls.iter().any(|e| e.watches.len() == 2), "{:?}", b.epolls);
        let libc = b.modules.iter().find(|m| m.path.ends_with("libc.so.6")).expect("libc");
        assert!(libc.same_as_old, "libc is where old has it");
        let reply = client.ask("GET a");
        let state = server.state();
        assert!(reply.contains('1'), "round {round}: the old connection serves on, said {reply:?}; {state}");
        assert!(server.connect().ask("GET a").contains('1'), "new connections are accepted");
    }
}

#[test]
fn another_version_comes_to_rest() {
    let server = Server::start(&example("v1"), &["PORT", "LOG"]);
    let out = try_boot(&server, &example("v2"), LONG).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(out.booted.threads.iter().filter(|t| t.old_tid.is_some()).count(), 2);
    assert!(server.connect().ask("SET b 2").starts_with("OK"));
}

/// A server in few lines: `BODY` runs before it listens.
fn variant(name: &str, flags: &[&str]) -> std::path::PathBuf {
    build_source("boot_server.c", name, flags)
}

fn refusal(name: &str, flags: &[&str], timeout: Duration) -> (BootError, Server) {
    let server = Server::start(&variant("plain", &[]), &["PORT"]);
    let Err(e) = try_boot(&server, &variant(name, flags), timeout) else {
        panic!("{name} was accepted");
    };
    assert_eq!(server.connect().ask("PING"), "PONG", "the old version serves on");
    (e, server)
}

#[test]
fn a_plain_server_boots() {
    let server = Server::start(&variant("plain", &[]), &["PORT"]);
    try_boot(&server, &variant("plain", &[]), LONG).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(server.connect().ask("PING"), "PONG");
}

#[test]
fn a_crash_is_refused() {
    let (e, _s) = refusal("crash", &["-DCRASH"], LONG);
    let BootError::Crashed { signal, place, output } = &e else { panic!("{e}") };
    assert_eq!(signal, "SIGSEGV");
    assert_eq!(place.stack.first().map(String::as_str), Some("break_down"), "{place}");
    assert!(output.contains("about to crash"), "{output}");
}

#[test]
fn an_exit_is_refused_whatever_its_status() {
    let (e, _s) = refusal("exit0", &["-DEXIT=0"], LONG);
    assert!(matches!(&e, BootError::Exited { status: 0, .. }), "{e}");
    let (e, _s) = refusal("exit3", &["-DEXIT=3"], LONG);
    let BootError::Exited { status: 3, place, output } = &e else { panic!("{e}") };
    assert!(place.stack.iter().any(|f| f == "start_up"), "{place}");
    assert!(output.contains("cannot start"), "{output}");
}

#[test]
fn a_hang_is_refused() {
    // Asleep for good in a call that old never rests in: no need to wait for the deadline.
    let (e, _s) = refusal("pause", &["-DPAUSE"], LONG);
    let BootError::Hangs { places, missing, .. } = &e else { panic!("{e}") };
    assert_eq!(places[0].call, "pause", "{e}");
    assert!(missing[0].stack.iter().any(|f| f == "event_loop"), "{e}");
    // Computing for good.
    let (e, _s) = refusal("spin", &["-DSPIN"], Duration::from_millis(700));
    let BootError::Hangs { places, .. } = &e else { panic!("{e}") };
    assert!(places[0].stack.iter().any(|f| f == "start_up"), "{e}");
}

#[test]
fn listening_elsewhere_is_refused() {
    let (e, s) = refusal("elsewhere", &["-DPORT_OFFSET=1000"], LONG);
    let BootError::ListensElsewhere { wanted, had } = &e else { panic!("{e}") };
    assert!(wanted.ends_with(&(s.port() + 1000).to_string()), "{wanted}");
    assert!(had.ends_with(&s.port().to_string()), "{had}");
}

#[test]
fn a_fork_is_refused() {
    let (e, _s) = refusal("fork", &["-DFORK"], LONG);
    assert!(matches!(&e, BootError::Forks { .. }), "{e}");
    let (e, _s) = refusal("system", &["-DSYSTEM"], LONG);
    assert!(matches!(&e, BootError::Forks { .. }), "{e}");
}

#[test]
fn old_files_are_left_alone() {
    let dir = support::scratch("files");
    let (state, pid) = (dir.join("state"), dir.join("pid"));
    std::fs::write(&state, "precious").unwrap();
    let args = ["PORT", state.to_str().unwrap(), pid.to_str().unwrap()];
    let server = Server::start(&variant("files", &["-DFILES"]), &args);
    server.connect().ask("PING");
    std::fs::write(&state, "precious").unwrap();
    let before = std::fs::read_to_string(&pid).unwrap();
    let out = try_boot(&server, &variant("files", &["-DFILES"]), LONG).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(std::fs::read_to_string(&state).unwrap(), "precious", "O_TRUNC was withheld");
    assert_eq!(std::fs::read_to_string(&pid).unwrap(), before, "the pid file still names the old one");
    let codes: Vec<&str> = out.booted.findings.iter().map(|f| f.code.as_str()).collect();
    assert!(codes.contains(&"truncate-withheld") && codes.contains(&"pid-file"), "{codes:?}");
    assert!(codes.contains(&"signal-withheld"), "{codes:?}");
}
