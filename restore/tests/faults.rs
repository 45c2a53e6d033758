//! A live update under faults: whatever dies, fails or comes in between, the server is wholly old or wholly new,
//! serves, and can be updated later.

mod support;

use mcr_criu_lite::tracee::{commit, fault};
use mcr_criu_lite::{FreezeOptions, Frozen};
use mcr_image::{Memory, Pid, Regs};
use mcr_restore::transaction::{UpdateOptions, UpdateReport, update};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use support::{Client, Server, build_source};

fn version(new: bool) -> PathBuf {
    let (name, flags): (_, &[&str]) = if new { ("new", &["-DB"]) } else { ("old", &[]) };
    build_source("relation.c", name, flags)
}

/// A server with some items and connections.
struct Target {
    server: Server,
    clients: Vec<Client>,
    workers: usize,
    items: usize,
    new: bool,
}

impl Target {
    fn start(workers: usize) -> Self {
        let server = Server::start(&version(false), &["PORT", &workers.to_string()]);
        let mut clients: Vec<Client> = (0..3).map(|_| server.connect()).collect();
        let items = 40;
        for i in 0..items {
            assert_eq!(clients[i % 3].ask("ADD"), "OK");
        }
        Self { server, clients, workers, items, new: false }
    }

    fn pid(&self) -> Pid {
        self.server.pid()
    }

    /// Asks over an open connection and a new one; `new` is what it is now.
    fn judge(&mut self, what: &str) {
        let said = self.clients[0].ask("CHECK");
        self.new = said.starts_with("OK new ");
        let version = if self.new { "new" } else { "old" };
        let want = format!("OK {version} items {} workers {} ", self.items, self.workers);
        assert!(said.starts_with(&want), "{what}: {said}");
        let exe = std::fs::read_link(format!("/proc/{}/exe", self.pid())).unwrap();
        assert_eq!(exe, self::version(self.new), "{what}: the exe link");
        assert_eq!(self.clients[1].ask("ADD"), "OK", "{what}");
        self.items += 1;
        assert!(self.server.connect().ask("CHECK").starts_with("OK "), "{what}");
        assert_eq!(mcr_criu_lite::tids(self.pid()).unwrap().len(), self.workers + 1, "{what}");
    }

    /// An engine of its own process that updates to the other version.
    fn engine(&self, prepare: impl FnOnce()) -> Engine {
        let to = version(!self.new);
        Engine::start(self.pid(), &to, prepare)
    }

    /// An update that has to work, and leaves nothing behind.
    fn updates(&mut self, what: &str) {
        let was = self.new;
        let end = self.engine(|| ()).end();
        assert!(end.done, "{what}: {}", end.text);
        self.judge(what);
        assert_ne!(self.new, was, "{what}");
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid())).unwrap();
        assert_eq!(children, "", "{what}: a child is left");
    }
}

/// A process that updates: ptrace belongs to a thread, and this one may die.
struct Engine {
    pid: libc::pid_t,
    said: std::io::PipeReader,
}

/// How it ended.
struct End {
    status: i32,
    /// The update was done.
    done: bool,
    /// Calls that it made on the target and the copy.
    calls: u64,
    /// The error, or the findings.
    text: String,
}

fn options() -> UpdateOptions {
    UpdateOptions { boot_timeout: Duration::from_secs(20), ..UpdateOptions::default() }
}

impl Engine {
    fn start(pid: Pid, to: &Path, prepare: impl FnOnce()) -> Self {
        let (said, mut out) = std::io::pipe().unwrap();
        // SAFETY: the child runs nothing but our own code and ends by _exit; it takes no lock that another thread
        // of this test holds (allocation is safe after fork in glibc).
        let child = unsafe { libc::fork() };
        if child == 0 {
            let before = fault::passed();
            let whole = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                prepare();
                update(pid, to, &options())
            }));
            let text = match &whole {
                Ok(Ok(UpdateReport { findings, .. })) => {
                    findings.iter().map(|f| format!("{}: {}\n", f.code, f.message)).collect()
                }
                Ok(Err(e)) => format!("{e}"),
                Err(_) => String::from("panic"),
            };
            let _ = write!(out, "{}\n{text}", fault::passed() - before);
            let code = match whole {
                Ok(Ok(_)) => 0,
                Ok(Err(e)) => i32::from(e.exit_code()),
                Err(_) => 100,
            };
            // SAFETY: ends the child.
            unsafe { libc::_exit(code) };
        }
        Self { pid: child, said }
    }

    /// Whether it has something to say within a millisecond: it does so when it is about to end.
    fn has_said(&self) -> bool {
        self.said_within(1)
    }

    fn said_within(&self, ms: i32) -> bool {
        let mut poll = [libc::pollfd {
            fd: std::os::fd::AsRawFd::as_raw_fd(&self.said),
            events: libc::POLLIN,
            revents: 0,
        }];
        // SAFETY: one pollfd of ours.
        unsafe { libc::poll(poll.as_mut_ptr(), 1, ms) == 1 }
    }

    /// Waits for its end; one that hangs fails the test instead of hanging it.
    fn end(mut self) -> End {
        if !self.said_within(300_000) {
            let at = |what| std::fs::read_to_string(format!("/proc/{}/{what}", self.pid)).unwrap_or_default();
            let (wchan, call) = (at("wchan"), at("syscall"));
            // SAFETY: our child.
            unsafe { libc::kill(self.pid, libc::SIGABRT) };
            panic!("the engine hangs in {wchan}, call {call}");
        }
        let mut text = String::new();
        self.said.read_to_string(&mut text).unwrap();
        let mut status = 0;
        // SAFETY: our child.
        assert_eq!(unsafe { libc::waitpid(self.pid, &mut status, 0) }, self.pid);
        let (calls, text) = text.split_once('\n').unwrap_or(("0", ""));
        End { status, done: status == 0, calls: calls.parse().unwrap(), text: text.to_owned() }
    }
}

/// Kills `engine`s of a server with so many workers before every `step`-th call. Returns how many there were.
fn killed(workers: usize, step: impl Fn(u64) -> u64) -> u64 {
    let mut t = Target::start(workers);
    // The second update is like all that follow: the first one has no history.
    t.updates("first");
    let whole = t.engine(|| ()).end();
    assert!(whole.done, "{}", whole.text);
    t.judge("counted");
    let step = step(whole.calls);
    let (mut n, mut done, mut stays, mut changes) = (1 + workers as u64, 0, 0, 0);
    // How often a wait looks differs from run to run: the last calls come at several numbers.
    while done < 2 {
        let was = t.new;
        let end = t.engine(|| fault::kill_before(fault::passed() + n)).end();
        let what = format!("{workers} workers, killed before call {n} of about {}", whole.calls);
        assert!(end.done || libc::WIFSIGNALED(end.status), "{what}: {:#x} {}", end.status, end.text);
        t.judge(&what);
        assert!(!end.done || t.new != was, "{what}");
        *(if t.new == was { &mut stays } else { &mut changes }) += 1;
        done += u32::from(end.done);
        if (stays + changes) % 200 == 0 {
            // Not through the test harness, which keeps it until the end.
            let _ = writeln!(std::io::stderr(), "{what}: {stays} as before, {changes} changed so far");
        }
        // The pause and the commit are in the last third.
        n += if n > whole.calls * 2 / 3 { step.div_ceil(3) } else { step };
    }
    eprintln!(
        "{workers} workers, {} calls, every {step}th: {stays} as before, {changes} changed",
        whole.calls
    );
    assert!(stays > 3 && changes >= 2);
    t.updates("afterwards");
    whole.calls
}

/// Rounds of a normal run; MCR_FAULT_STEP=1 kills before every call.
fn killed_by_steps(workers: usize) {
    let given: Option<u64> = std::env::var("MCR_FAULT_STEP").ok().and_then(|v| v.parse().ok());
    killed(workers, |calls| given.unwrap_or((calls / 9).max(1)));
}

#[test]
fn an_engine_killed_before_its_calls_leaves_old_or_new() {
    killed_by_steps(0);
}

#[test]
fn an_engine_killed_before_its_calls_leaves_four_threads_old_or_new() {
    killed_by_steps(3);
}

#[test]
fn sixty_four_threads_change_together() {
    let mut t = Target::start(63);
    for round in 0..3 {
        t.updates(&format!("update {round} of 64 threads"));
    }
}

/// What the server's heap gains between the rehearsal and the pause is there afterwards, and libc knows where it ends.
#[test]
fn a_heap_that_grows_meanwhile_stays_whole() {
    let mut t = Target::start(2);
    let mut busy = t.server.connect();
    for round in 0..3 {
        let stop = std::sync::atomic::AtomicBool::new(false);
        let added = std::thread::scope(|s| {
            let adding = s.spawn(|| {
                let mut n = 0;
                // Over the whole rehearsal, each time more than malloc asks the kernel for in one go.
                while !stop.load(std::sync::atomic::Ordering::Relaxed) && n < 20_000 {
                    std::thread::sleep(Duration::from_millis(10));
                    assert_eq!(busy.ask("MANY"), "OK");
                    n += 500;
                }
                n
            });
            let end = t.engine(|| ()).end();
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            let added = adding.join().unwrap();
            assert!(end.done, "round {round}: {}", end.text);
            added
        });
        t.items += added;
        t.judge(&format!("round {round}, {added} items came meanwhile"));
        assert_eq!(busy.ask("MANY"), "OK");
        t.items += 500;
        t.judge("and more after it");
    }
}

#[test]
fn a_panic_of_the_engine_leaves_old_or_new() {
    let mut t = Target::start(1);
    let whole = t.engine(|| ()).end();
    assert!(whole.done, "{}", whole.text);
    t.judge("counted");
    for part in 1..12 {
        let n = whole.calls * part / 12;
        let was = t.new;
        let end = t.engine(|| fault::panic_before(fault::passed() + n)).end();
        let what = format!("panic before call {n} of {}: {}", whole.calls, end.text);
        t.judge(&what);
        assert!(!end.done || t.new != was, "{what}");
        assert!(libc::WIFEXITED(end.status), "{what}: status {:#x}", end.status);
    }
    t.updates("after panics");
}

fn children(pid: Pid) -> Vec<i32> {
    let all = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    all.split_whitespace().filter_map(|w| w.parse().ok()).collect()
}

#[test]
fn a_copy_killed_from_outside_costs_nothing() {
    let mut t = Target::start(2);
    let mut seen = 0;
    for round in 0..8u64 {
        let was = t.new;
        let engine = t.engine(|| ());
        // A busy machine may let the engine end before its copy was seen here.
        let copy = loop {
            match children(t.pid()).first() {
                Some(c) => break Some(*c),
                None if engine.has_said() => break None,
                None => {}
            }
        };
        if let Some(copy) = copy {
            // The instant is the point, not an event.
            std::thread::sleep(Duration::from_millis(round * 9));
            // SAFETY: a child of our server.
            unsafe { libc::kill(copy, libc::SIGKILL) };
            seen += 1;
        }
        let end = engine.end();
        let what = format!("copy {copy:?} killed after {} ms: {}", round * 9, end.text);
        assert!(libc::WIFEXITED(end.status) && libc::WEXITSTATUS(end.status) != 100, "{what}");
        t.judge(&what);
        assert_eq!(t.new != was, end.done, "{what}");
        assert!(matches!(libc::WEXITSTATUS(end.status), 0 | 1 | 3), "{what}");
    }
    assert!(seen > 1, "only {seen} copies were there to be killed");
    t.updates("afterwards");
}

#[test]
fn signals_for_the_server_arrive_once_and_nothing_is_lost() {
    let mut t = Target::start(2);
    let signals = |t: &mut Target| -> u64 {
        let said = t.clients[2].ask("CHECK");
        said.rsplit(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("{said}"))
    };
    let mut sent = 0;
    for _ in 0..4 {
        let engine = t.engine(|| ());
        while !engine.has_said() {
            // SAFETY: a child of ours.
            unsafe { libc::kill(t.pid().0, libc::SIGUSR1) };
            sent += 1;
        }
        let end = engine.end();
        assert!(end.done || end.text.contains("goes on"), "{}", end.text);
        t.judge("under signals");
    }
    let taken = signals(&mut t);
    assert!(taken > 3 && taken <= sent, "{taken} of {sent} signals");
    // SAFETY: a child of ours.
    unsafe { libc::kill(t.pid().0, libc::SIGUSR1) };
    assert_eq!(signals(&mut t), taken + 1);
    t.updates("afterwards");
}

fn limit_memory(pid: Pid, bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: prlimit(2) reads the one structure.
    let r = unsafe { libc::prlimit(pid.0, libc::RLIMIT_AS, &limit, std::ptr::null_mut()) };
    assert_eq!(r, 0);
}

#[test]
fn a_server_out_of_memory_stays_what_it_is() {
    let mut t = Target::start(1);
    let status = std::fs::read_to_string(format!("/proc/{}/status", t.pid())).unwrap();
    let size = status.lines().find_map(|l| l.strip_prefix("VmSize:")?.split_whitespace().next()).unwrap();
    let size = size.parse::<u64>().unwrap() * 1024;
    let (mut refused, mut taken_back, mut room) = (0, 0, 0);
    loop {
        limit_memory(t.pid(), size + room);
        let end = t.engine(|| ()).end();
        limit_memory(t.pid(), libc::RLIM_INFINITY);
        let what = format!("{} KiB of room: {}", room / 1024, end.text);
        eprintln!("{what}");
        t.judge(&what);
        assert_eq!(t.new, end.done, "{what}");
        if end.done {
            break;
        }
        refused += 1;
        taken_back += u32::from(end.text.contains("taken back"));
        assert!(libc::WEXITSTATUS(end.status) != 100, "{what}");
        room += 128 << 10;
        assert!(room < 64 << 20, "{what}");
    }
    assert!(refused > 0, "no limit was felt");
    eprintln!("{refused} refused, {taken_back} of them taken back");
    t.updates("afterwards");
}

/// What the engine says whose state directory is `dir` after `prepare`.
fn with_state_dir(t: &mut Target, dir: &Path, prepare: impl FnOnce()) -> String {
    let name = std::ffi::CString::new(dir.to_str().unwrap()).unwrap();
    let prepare = || {
        prepare();
        // SAFETY: the forked engine has one thread when it sets this.
        unsafe { libc::setenv(c"MCR_STATE_DIR".as_ptr(), name.as_ptr(), 1) };
    };
    let end = t.engine(prepare).end();
    assert!(end.done, "{}", end.text);
    t.judge("without a record");
    end.text
}

#[test]
fn an_update_that_cannot_be_recorded_is_done_and_says_so() {
    let mut t = Target::start(1);
    let said = with_state_dir(&mut t, Path::new("/dev/null/state"), || ());
    assert!(said.contains("history: the update could not be recorded"), "{said}");
    // No space: a file system of one page that is in use.
    let full = support::scratch("full");
    let at = std::ffi::CString::new(full.to_str().unwrap()).unwrap();
    let fill = || {
        let (all, null) = (libc::MS_REC | libc::MS_PRIVATE, std::ptr::null());
        // SAFETY: strings that live on; the mount is seen by the engine alone.
        unsafe {
            assert_eq!(libc::unshare(libc::CLONE_NEWNS), 0);
            assert_eq!(libc::mount(null, c"/".as_ptr(), null, all, null.cast()), 0);
            let how = c"size=4096".as_ptr().cast();
            assert_eq!(libc::mount(c"full".as_ptr(), at.as_ptr(), c"tmpfs".as_ptr(), 0, how), 0);
        }
        std::fs::write(full.join("page"), [1; 4096]).unwrap();
    };
    let said = with_state_dir(&mut t, &full, fill);
    assert!(said.contains("history: the update could not be recorded: No space left"), "{said}");
    t.updates("afterwards");
}

/// Everything of a process that a rollback must leave as it was.
struct Picture {
    maps: Vec<String>,
    memory: Vec<(u64, Vec<u8>)>,
    threads: Vec<(Regs, Vec<u8>, u64, u64)>,
    fds: std::collections::BTreeMap<i32, String>,
    status: String,
}

fn picture(pid: Pid) -> Picture {
    let mut f = Frozen::seize(pid, &FreezeOptions::default()).unwrap();
    commit::sweep(&mut f).unwrap();
    f.memory().refresh();
    let maps = f.memory().maps().unwrap();
    let rseq: Vec<u64> = f.threads().iter().map(|t| t.rseq().unwrap().0.0).collect();
    let writable = maps.iter().filter(|m| m.prot & 2 != 0 && !m.name.starts_with(b"[v"));
    let memory = writable.map(|m| {
        let mut b = f.memory().bytes(m.start, m.end.since(m.start) as usize).unwrap();
        // The kernel writes to the registered structure as it likes.
        for r in rseq.iter().filter(|&&r| (m.start.0..m.end.0).contains(&r)) {
            b[(r - m.start.0) as usize..][..32].fill(0);
        }
        (m.start.0, b)
    });
    let memory = memory.collect();
    let threads = f.threads().iter().map(|t| {
        let r = t.regs().unwrap();
        // How often a call was restarted is not a state.
        let (rax, orig_rax) = (0, u64::from(r.orig_rax as i64 >= 0));
        (Regs { rax, orig_rax, ..r }, t.xstate().unwrap(), t.sigmask().unwrap(), t.rseq().unwrap().0.0)
    });
    let threads = threads.collect();
    f.thaw().unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let kept = ["SigPnd:", "ShdPnd:", "SigBlk:", "SigIgn:", "SigCgt:", "Threads:", "VmSize:"];
    let status =
        status.lines().filter(|l| kept.iter().any(|k| l.starts_with(k))).collect::<Vec<_>>().join("\n");
    Picture {
        maps: maps.iter().map(|m| format!("{m:?}")).collect(),
        memory,
        threads,
        fds: support::links(pid),
        status,
    }
}

/// Connections that were closed at the other end are closed (the listener and three stay), and every thread sleeps
/// in a call.
fn settle(pid: Pid) {
    support::eventually(|| {
        let sockets = support::links(pid).values().filter(|l| l.starts_with("socket:")).count();
        (sockets == 4).then_some(())
    });
    for tid in mcr_criu_lite::tids(pid).unwrap() {
        let asleep = |n: &str| [libc::SYS_epoll_wait, libc::SYS_futex].iter().any(|s| n == s.to_string());
        while !std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall"))
            .is_ok_and(|s| asleep(s.split(' ').next().unwrap_or_default()))
        {
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_commit_that_fails_at_its_end_leaves_the_server_byte_for_byte() {
    for workers in [0, 3] {
        let mut t = Target::start(workers);
        t.updates("first");
        settle(t.pid());
        let before = picture(t.pid());
        let end = t.engine(|| fault::spoil_commits(true)).end();
        assert_eq!(libc::WEXITSTATUS(end.status), 3, "{}", end.text);
        assert!(end.text.contains("EBADF") && end.text.contains("everything was taken back"), "{}", end.text);
        settle(t.pid());
        let after = picture(t.pid());
        assert_eq!(before.maps, after.maps);
        assert_eq!(before.fds, after.fds);
        assert_eq!(before.status, after.status);
        assert_eq!(before.threads.len(), after.threads.len());
        for (b, a) in before.threads.iter().zip(&after.threads) {
            assert_eq!((b.0, b.2, b.3), (a.0, a.2, a.3));
            assert_eq!(b.1, a.1, "vector registers");
        }
        for ((at, b), (_, a)) in before.memory.iter().zip(&after.memory) {
            if let Some(n) = b.iter().zip(a).position(|(x, y)| x != y) {
                let sp: Vec<String> = before.threads.iter().map(|t| format!("{:#x}", t.0.rsp)).collect();
                panic!("byte at {:#x} was {:#x}, is {:#x}; stack pointers {sp:?}", at + n as u64, b[n], a[n]);
            }
        }
        let bytes: usize = before.memory.iter().map(|m| m.1.len()).sum();
        eprintln!("{workers} workers: {bytes} writable bytes, {} mappings are the same", before.maps.len());
        t.judge("taken back");
        t.updates("afterwards");
    }
}
