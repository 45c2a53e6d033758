//! Live updates: the whole transaction, and its rollbacks.

mod support;

use mcr_image::Pid;
use mcr_restore::transaction::{UpdateError, UpdateOptions, UpdateReport, update};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;
use support::{Server, build_source, example};

fn options() -> UpdateOptions {
    UpdateOptions { boot_timeout: Duration::from_secs(10), ..UpdateOptions::default() }
}

fn plain() -> PathBuf {
    build_source("boot_server.c", "plain", &[])
}

fn show(r: &UpdateReport) {
    for p in &r.phases {
        eprintln!("{:>8} us {} {}", p.duration_us, if p.frozen { "frozen" } else { "      " }, p.name);
    }
}

fn exe(pid: Pid) -> PathBuf {
    std::fs::read_link(format!("/proc/{pid}/exe")).unwrap()
}

fn there_and_back(new_pid: bool) {
    let server = Server::start(&plain(), &["PORT"]);
    let mut a = server.connect();
    let mut b = server.connect();
    assert_eq!(a.ask("PING"), "PONG");
    assert_eq!(b.ask("PING"), "PONG");
    let new = build_source("boot_server.c", "again", &["-DAGAIN"]);
    let mut last = server.pid();
    for round in 0..3 {
        let to = if round % 2 == 0 { &new } else { &plain() };
        let r = update(last, to, &UpdateOptions { new_pid, ..options() })
            .unwrap_or_else(|e| panic!("round {round}: {e}"));
        let reaper = new_pid.then(|| support::Reaper(r.pid));
        show(&r);
        assert_eq!(r.pid != last, new_pid);
        assert_eq!(&exe(r.pid), to);
        assert!(!new_pid || support::gone(last), "the old one has ended");
        assert_eq!(a.ask("PING"), "PONG", "round {round}");
        assert_eq!(b.ask("PING"), "PONG", "round {round}");
        assert_eq!(server.connect().ask("PING"), "PONG", "round {round}");
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", r.pid)).unwrap();
        assert_eq!(children, "", "no child is left");
        last = r.pid;
        std::mem::forget(reaper);
    }
    if new_pid {
        drop(support::Reaper(last));
    }
}

#[test]
fn a_server_changes_in_place_under_its_connections() {
    there_and_back(false);
}

#[test]
fn a_server_is_replaced_under_its_connections() {
    there_and_back(true);
}

#[test]
fn a_dry_run_leaves_everything_as_it_is() {
    let server = Server::start(&plain(), &["PORT"]);
    let mut a = server.connect();
    assert_eq!(a.ask("PING"), "PONG");
    let r = update(server.pid(), &plain(), &UpdateOptions { dry_run: true, ..options() })
        .unwrap_or_else(|e| panic!("{e}"));
    assert!(r.dry_run);
    assert_eq!(a.ask("PING"), "PONG");
    assert_eq!(server.connect().ask("PING"), "PONG");
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", server.pid())).unwrap();
    assert_eq!(children, "", "no child is left");
}

fn rolls_back(new: &Path) -> UpdateError {
    let server = Server::start(&plain(), &["PORT"]);
    let mut a = server.connect();
    assert_eq!(a.ask("PING"), "PONG");
    let e = update(server.pid(), new, &options()).map(|r| r.pid).expect_err("refused");
    assert_eq!(a.ask("PING"), "PONG", "the old connection serves on");
    assert_eq!(server.connect().ask("PING"), "PONG", "the old one accepts");
    assert_eq!(exe(server.pid()), plain());
    e
}

#[test]
fn a_new_version_that_fails_is_rolled_back() {
    for (name, flag) in [
        ("crash", "-DCRASH"),
        ("exit0", "-DEXIT=0"),
        ("pause", "-DPAUSE"),
        ("elsewhere", "-DPORT_OFFSET=1000"),
    ] {
        let e = rolls_back(&build_source("boot_server.c", name, &[flag]));
        assert!(matches!(e, UpdateError::Boot(_)), "{name}: {e}");
        assert_eq!(e.exit_code(), 1, "{name}: {e}");
    }
}

#[test]
fn record_locks_go_with_the_update() {
    let lock = support::scratch("lock").join("lock");
    let program = build_source("boot_server.c", "lock", &["-DLOCK"]);
    let server = Server::start(&program, &["PORT", lock.to_str().unwrap()]);
    let mut a = server.connect();
    assert_eq!(a.ask("PING"), "PONG");
    let r = update(server.pid(), &program, &options()).unwrap_or_else(|e| panic!("{e}"));
    let _new = support::Reaper(r.pid);
    assert_eq!(a.ask("PING"), "PONG");
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    let pid = r.pid.to_string();
    let held = locks.lines().any(|l| l.contains("POSIX") && l.split_whitespace().any(|w| w == pid));
    assert!(held, "process {pid} holds the lock: {locks}");
}

/// Updates a server that was started with descriptors at these numbers to one that has a descriptor more, made
/// by this expression, and looks whether both versions' own are there.
fn grows_by_one(inherited: &[(RawFd, RawFd)], name: &str, extra: &str) {
    let new = build_source("boot_server.c", &format!("extra-{name}"), &[&format!("-DEXTRA={extra}")]);
    // The lowest number that is free lies between those that are used, or behind them.
    for (gap, new_pid) in [(true, false), (false, false), (true, true), (false, true)] {
        let server = Server::start_with(&plain(), &["PORT"], inherited);
        let own = |links: &BTreeMap<i32, String>| {
            links
                .iter()
                .filter(|(n, l)| l.starts_with("socket:") && !inherited.iter().any(|(i, _)| i == *n))
                .count()
        };
        let has = |n| support::eventually(|| Some(support::links(server.pid())).filter(|l| own(l) == n));
        let connected = || {
            let mut c = server.connect();
            assert_eq!(c.ask("PING"), "PONG");
            c
        };
        // Once this is answered, the one that Server::start made has been seen, too.
        drop(connected());
        has(1);
        let before_it = gap.then(connected);
        let mut a = connected();
        drop(before_it);
        let before = has(2);
        let r = update(server.pid(), &new, &UpdateOptions { new_pid, ..options() });
        let r = r.unwrap_or_else(|e| panic!("{inherited:?}: {e}"));
        let _new = new_pid.then(|| support::Reaper(r.pid));
        let after = support::links(r.pid);
        assert_eq!(a.ask("PING"), "PONG", "{before:?} {after:?}");
        assert_eq!(server.connect().ask("PING"), "PONG", "{before:?} {after:?}");
        for (n, link) in &before {
            assert_eq!(after.get(n), Some(link), "new pid: {new_pid}; {before:?} {after:?}");
        }
        let more: Vec<_> = after.iter().filter(|(n, _)| !before.contains_key(n)).collect();
        let [(number, link)] = more[..] else { panic!("{before:?} {after:?}") };
        let kind = extra.starts_with("eventfd").then_some("anon_inode:[eventfd]");
        assert_eq!(link, kind.unwrap_or("anon_inode:[eventpoll]"));
        let closes = mcr_restore::fds::open_flags(r.pid.0, *number) & libc::O_CLOEXEC != 0;
        assert_eq!(closes, extra.contains("CLOEXEC"));
    }
}

#[test]
fn an_added_descriptor_closes_on_exec_if_the_new_version_says_so() {
    grows_by_one(&[], "closing", "eventfd(7,EFD_CLOEXEC)");
}

#[test]
fn an_added_descriptor_makes_room_for_the_old_ones() {
    grows_by_one(&[], "eventfd", "eventfd(7,0)");
}

#[test]
fn an_added_epoll_object_makes_room_for_the_old_ones() {
    grows_by_one(&[], "epoll", "epoll_create1(EPOLL_CLOEXEC)");
}

#[test]
fn descriptors_that_old_was_started_with_shift_nothing() {
    // One end each: with both, a pipe could be the server's own.
    let (reader, _writer) = std::io::pipe().unwrap();
    let (_reader, writer) = std::io::pipe().unwrap();
    let (p, w) = (reader.as_raw_fd(), writer.as_raw_fd());
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").unwrap();
    let n = null.as_raw_fd();
    let sets: [&[(RawFd, RawFd)]; 7] = [
        &[(3, w)],
        &[(4, p)],
        &[(5, n)],
        &[(6, w)],
        &[(7, n)],
        &[(3, p), (5, w), (7, n)],
        &[(3, n), (4, n), (5, w), (6, w), (8, p), (9, n), (30, w)],
    ];
    for inherited in sets {
        grows_by_one(inherited, "eventfd", "eventfd(7,0)");
    }
}

/// The ends of pipes and pairs that the new version makes meet those of the old one, although what the old one was
/// started with lies in between.
#[test]
fn pipes_stay_together_whatever_old_was_started_with() {
    let program = build_source("boot_server.c", "pipes", &["-DPIPES"]);
    let again = build_source("boot_server.c", "pipes-again", &["-DPIPES", "-DAGAIN"]);
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").unwrap();
    let n = null.as_raw_fd();
    let sets: [&[i32]; 7] = [&[], &[3], &[4], &[3, 4], &[5, 6, 8], &[3, 6, 10], &[4, 5, 7, 9, 11, 30]];
    for inherited in sets {
        let given: Vec<_> = inherited.iter().map(|i| (*i, n)).collect();
        let server = Server::start_with(&program, &["PORT"], &given);
        let mut a = server.connect();
        assert_eq!(a.ask("PING"), "PONG");
        // Two pairs, the listener and this connection: Server::start has closed its own.
        let ours = support::links(Pid(std::process::id() as i32));
        let own = |l: &String| l.starts_with("socket:") && !ours.values().any(|o| o == l);
        let before = support::eventually(|| {
            Some(support::links(server.pid())).filter(|l| l.values().filter(|l| own(l)).count() == 6)
        });
        for (new_pid, to) in [(false, &again), (true, &program)] {
            let o = UpdateOptions { new_pid, ..options() };
            let r = update(server.pid(), to, &o).unwrap_or_else(|e| panic!("{inherited:?}: {e}"));
            let _new = new_pid.then(|| support::Reaper(r.pid));
            assert_eq!(a.ask("PING"), "PONG", "{inherited:?}");
            assert_eq!(support::links(r.pid), before, "{inherited:?}");
        }
    }
}

/// Sockets of netlink(7) and raw(7), and what inotify(7) watches: images do not hold them, a living process keeps them.
#[test]
fn what_no_image_holds_stays_where_it_is() {
    let dir = support::scratch("foreign");
    std::fs::create_dir_all(&dir).unwrap();
    let versions = ["-DAGAIN", "-DTWICE"]
        .map(|v| build_source("boot_server.c", &format!("foreign{v}"), &["-DFOREIGN", v]));
    let server = Server::start(&versions[0], &["PORT", dir.to_str().unwrap()]);
    let mut a = server.connect();
    assert_eq!(a.ask("PING"), "PONG");
    let looked = |pid: Pid| {
        let info = |n: &i32| std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{n}")).unwrap();
        let all = support::links(pid);
        let kept = |l: &str| l == "anon_inode:inotify" || l.starts_with("socket:");
        let all: Vec<_> = all.into_iter().filter(|(n, l)| *n < 6 && kept(l)).collect();
        let said: Vec<String> = all.iter().map(|(n, _)| info(n)).collect();
        (all, said)
    };
    let before = looked(server.pid());
    assert_eq!(before.0.len(), 3, "{before:?}");
    assert!(before.1[2].contains("inotify wd:1"), "{before:?}");
    let r = update(server.pid(), &versions[1], &options()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(looked(r.pid), before);
    let r = update(r.pid, &versions[0], &UpdateOptions { new_pid: true, ..options() })
        .unwrap_or_else(|e| panic!("{e}"));
    let _new = support::Reaper(r.pid);
    assert_eq!(looked(r.pid), before);
    assert_eq!(a.ask("PING"), "PONG");
    // The watch is alive: it has something to say now.
    std::fs::write(dir.join("news"), "").unwrap();
    assert_eq!(a.ask("PING"), "PONG news");
    let image = dir.join("image");
    let e = mcr_criu_lite::dump::dump(r.pid, &image, &Default::default(), &mut |_, _| Ok(Default::default()));
    assert!(e.err().unwrap().to_string().contains("family 16"));
}

#[test]
fn a_taken_number_is_refused() {
    let e = rolls_back(&build_source("boot_server.c", "over", &["-DOVER"]));
    assert!(e.to_string().contains("I2: descriptor"), "{e}");
}

#[test]
fn the_bundled_server_goes_from_one_to_two_to_three() {
    let server = Server::start(&example("v1"), &["PORT", "LOG"]);
    let mut a = server.connect();
    for i in 0..200 {
        assert!(a.ask(&format!("SET key{i} value{i}")).starts_with("OK"));
    }
    let mut last = server.pid();
    for version in ["v2", "v3"] {
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../examples/kv/{version}.toml"));
        let mut o = options();
        o.transform.rules = mcr_plugin::Rules::load(&rules).expect("rules");
        let r = update(last, &example(version), &o).unwrap_or_else(|e| panic!("to {version}: {e}"));
        show(&r);
        last = r.pid;
        let _new = support::Reaper(last);
        for i in 0..200 {
            assert!(a.ask(&format!("GET key{i}")).contains(&format!("value{i}")), "{version}: key{i}");
        }
        assert!(a.ask("SELFCHECK").starts_with("OK"), "{version}");
        assert!(server.connect().ask("SELFCHECK").starts_with("OK"), "{version}");
        std::mem::forget(_new);
    }
    drop(support::Reaper(last));
}
