//! Freezing, quiescence, and bad targets.

mod common;

use common::Program;

use mcr_criu_lite::{
    Call, FreezeError, FreezeOptions, Frozen, QuiesceError, QuiesceOptions, TraceError, reap_hidden,
};
use mcr_image::Pid;
use std::time::{Duration, Instant};

fn seize(pid: i32) -> Result<Frozen, FreezeError> {
    Frozen::seize(Pid(pid), &FreezeOptions::default())
}

/// Threads in read, futex, nanosleep, poll with a timeout and a condition variable; each checks that no call
/// ended early. One makes and joins threads all the time.
const MANY: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>
static volatile int stop, bad, eintr; static int p[2], ep;
static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER; static pthread_cond_t c = PTHREAD_COND_INITIALIZER;
static long ns(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000L + t.tv_nsec; }
static void *reader(void *a) { char b[8]; ssize_t r = read(p[0], b, 8); if (r != 1) { bad = 1; printf("read %zd %s\n", r, strerror(errno)); } return 0; }
static void *sleeper(void *a) { while (!stop) { long t = ns(); struct timespec d = {0, 20000000};
    if (clock_nanosleep(CLOCK_MONOTONIC, 0, &d, 0)) bad = 2; if (ns() - t < 20000000) bad = 3; } return 0; }
static void *poller(void *a) { struct pollfd f = { p[0], POLLPRI, 0 }; while (!stop) { long t = ns();
    int r = poll(&f, 1, 15); if (r) { bad = 4; printf("poll %d %d\n", r, errno); } if (ns() - t < 14900000) bad = 5; } return 0; }
static void *waiter(void *a) { pthread_mutex_lock(&m); while (!stop) pthread_cond_wait(&c, &m); pthread_mutex_unlock(&m); return 0; }
static void *epoller(void *a) { struct epoll_event e; int r; while ((r = epoll_wait(ep, &e, 1, -1)) < 0 && errno == EINTR) eintr++;
    if (r != 1 || e.data.u64 != 0xabcdef0102030405) { bad = 6; printf("epoll %d %s\n", r, strerror(errno)); } return 0; }
static void *nothing(void *a) { return a; }
static void *maker(void *a) { while (!stop) { pthread_t t; if (pthread_create(&t, 0, nothing, 0)) bad = 7; else pthread_join(t, 0); } return 0; }
static void *mixer(void *a) { double x = 1; unsigned n = 0; while (!stop) { for (int i = 0; i < 1000; i++) x = x * 0.5 + 1; if (x < 1.99 || x > 2.01) bad = 8; n++; if (n % 64 == 0) getpid(); } return 0; }
int main(int argc, char **argv) {
    pipe(p); ep = epoll_create1(0); int q[2]; pipe(q);
    struct epoll_event e = { EPOLLIN, { .u64 = 0xabcdef0102030405 } }; epoll_ctl(ep, EPOLL_CTL_ADD, q[0], &e);
    void *(*f[])(void *) = { reader, sleeper, poller, waiter, epoller, maker, mixer };
    pthread_t t[7]; for (int i = 0; i < 7; i++) pthread_create(&t[i], 0, f[i], 0);
    puts("ready"); fflush(stdout);
    char b[64]; ssize_t r; while ((r = read(0, b, 64)) > 0) {}
    if (r < 0) bad = 9;
    pthread_mutex_lock(&m); stop = 1; pthread_cond_broadcast(&c); pthread_mutex_unlock(&m);
    write(p[1], "x", 1); write(q[1], "x", 1);
    for (int i = 0; i < 7; i++) pthread_join(t[i], 0);
    printf("bad %d eintr %d\n", bad, eintr); return bad;
}
"#;

#[test]
fn blocked_and_busy_threads_do_not_notice() {
    let p = Program::start(MANY);
    for _ in 0..100 {
        let mut f = seize(p.pid()).unwrap();
        let n = f.threads().len();
        assert!(n >= 8, "{n} threads");
        let tid = f.threads()[n / 2].tid();
        f.syscall(tid, libc::SYS_getpid, &[]).unwrap();
        f.thaw().unwrap();
    }
    let out = p.finish_ok();
    assert_eq!(out.trim(), "bad 0 eintr 0");
}

/// A copy that somebody else killed is a zombie that only its tracer may collect first: a parent that was made to
/// wait for it would wait for ever, and so would we.
#[test]
fn a_copy_killed_from_outside_never_holds_up_its_parent() {
    let p = Program::start(MANY);
    let pid = Pid(p.pid());
    let children = || std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    for _ in 0..20 {
        let mut f = seize(pid.0).unwrap();
        let copy = f.fork_hidden().unwrap();
        let child = copy.pid();
        copy.leak();
        f.thaw().unwrap();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.0), nix::sys::signal::Signal::SIGKILL)
            .unwrap();
        reap_hidden(pid, child).unwrap();
        assert_eq!(children(), "");
    }
    // One that lives on is told, not waited for.
    let mut f = seize(pid.0).unwrap();
    let copy = f.fork_hidden().unwrap();
    let child = copy.pid();
    f.thaw().unwrap();
    assert!(matches!(reap_hidden(pid, child), Err(TraceError::Timeout { tid }) if tid.0 == child.0));
    copy.kill().unwrap();
    reap_hidden(pid, child).unwrap();
    assert_eq!(children(), "");
    assert_eq!(p.finish_ok().trim(), "bad 0 eintr 0");
}

/// vfork(2) sleeps uninterruptibly until the child has ended; the main thread says back what it is told.
const VFORK: &str = r#"
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
static int p[2];
static void *forks(void *a) {
    char b;
    if (vfork() == 0) { while (read(p[0], &b, 1) == 0); _exit(0); }
    return a;
}
int main(void) {
    char line[99]; pthread_t t;
    pipe(p);
    pthread_create(&t, NULL, forks, NULL);
    puts("ready"); fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        fputs(line, stdout); fflush(stdout);
        if (*line == 'e') { write(p[1], "x", 1); pthread_join(t, NULL); }
    }
    return 0;
}
"#;

fn other_thread(p: &Program) -> i32 {
    let t = mcr_criu_lite::tids(Pid(p.pid())).unwrap().into_iter().find(|t| t.0 != p.pid()).unwrap();
    p.wait_blocked(t.0, libc::SYS_vfork);
    t.0
}

#[test]
fn a_thread_that_cannot_stop_is_told_with_what_it_does() {
    let mut p = Program::start(VFORK);
    let (pid, stuck) = (p.pid(), other_thread(&p));
    // In a thread of its own, with whose end the target's is let go.
    let tried = std::thread::spawn(move || {
        let timeout = Duration::from_millis(300);
        Frozen::seize(Pid(pid), &FreezeOptions { timeout }).map(drop).unwrap_err()
    });
    let e = tried.join().unwrap();
    let FreezeError::NotStopping { tid, doing, .. } = &e else { panic!("{e}") };
    assert_eq!(tid.0, stuck);
    assert!(doing.contains("state D") && doing.contains(&format!("call {},", libc::SYS_vfork)), "{e}");
    p.tell("end");
    assert_eq!(p.line(), "end");
    p.tell("still there");
    assert_eq!(p.finish_ok().trim(), "still there");
}

#[test]
fn nobody_stands_still_for_a_thread_that_cannot_stop() {
    let mut p = Program::start(VFORK);
    let (pid, stuck) = (p.pid(), other_thread(&p));
    let traced = |tid: i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap();
        !status.lines().any(|l| l == "TracerPid:\t0")
    };
    let tried = std::thread::spawn(move || {
        let timeout = Duration::from_secs(60);
        Frozen::seize(Pid(pid), &FreezeOptions { timeout }).unwrap().threads().len()
    });
    while !traced(stuck) || traced(pid) {
        std::thread::yield_now();
    }
    p.tell("there");
    assert_eq!(p.line(), "there");
    p.tell("end");
    assert_eq!(p.line(), "end");
    assert!((1..=2).contains(&tried.join().unwrap()));
    p.tell("still there");
    assert_eq!(p.finish_ok().trim(), "still there");
}

/// What an engine that is killed leaves in the target, the next one takes out; nothing else that looks like it.
#[test]
fn an_agent_that_was_left_is_taken_out() {
    let p = Program::start(MANY);
    let maps = || std::fs::read_to_string(format!("/proc/{}/maps", p.pid())).unwrap();
    let before = maps();
    for (capacity, data) in [(8, 0), (2048, 256 << 10), (8, 100)] {
        let mut f = seize(p.pid()).unwrap();
        f.leader().map_agent(capacity, data).unwrap();
        f.thaw().unwrap();
    }
    // Code of its own, as a compiler at run time makes it.
    let mut f = seize(p.pid()).unwrap();
    let args = [0, 8192, (libc::PROT_READ | libc::PROT_EXEC) as u64, 0x22, u64::MAX, 0];
    let own = f.leader().syscall(libc::SYS_mmap, &args).unwrap();
    assert!(maps().lines().count() > before.lines().count() + 3);
    assert_eq!(mcr_criu_lite::tracee::commit::sweep(&mut f).unwrap(), 0x2000 + 0x61000 + 0x3000);
    f.leader().syscall(libc::SYS_munmap, &[own, 8192]).unwrap();
    f.thaw().unwrap();
    assert_eq!(maps(), before);
    assert_eq!(p.finish_ok().trim(), "bad 0 eintr 0");
}

/// Threads that make threads that end at once: something is always being born or dying.
const STORM: &str = r#"
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
static volatile int stop; static int bad;
static void *nothing(void *a) { return a; }
static void *maker(void *a) { while (!stop) { pthread_t t[4]; int n = 0;
    while (n < 4 && !pthread_create(&t[n], 0, nothing, 0)) n++;
    if (n < 4) bad = 1;
    while (n) pthread_join(t[--n], 0); } return 0; }
int main(void) { pthread_t t[4]; for (int i = 0; i < 4; i++) pthread_create(&t[i], 0, maker, 0);
    puts("ready"); fflush(stdout);
    char b; while (read(0, &b, 1) > 0) {}
    stop = 1; for (int i = 0; i < 4; i++) pthread_join(t[i], 0);
    return bad; }
"#;

#[test]
fn threads_that_come_and_go_are_all_stopped() {
    let p = Program::start(STORM);
    for round in 0..500 {
        let f = seize(p.pid()).unwrap_or_else(|e| panic!("round {round}: {e:?}"));
        let held: Vec<_> = f.threads().iter().map(|t| t.tid()).collect();
        for tid in mcr_criu_lite::tids(Pid(p.pid())).unwrap() {
            assert!(held.contains(&tid), "round {round}: {tid} runs on beside {held:?}");
        }
        f.thaw().unwrap();
    }
    p.finish_ok();
}

/// Injects single calls into one thread after the other, for ever.
fn inject_for_ever(mut f: Frozen) {
    loop {
        for i in 0..f.threads().len() {
            let tid = f.threads()[i].tid();
            drop(f.syscall(tid, libc::SYS_getpid, &[]));
            drop(f.threads_mut()[i].put_back());
        }
    }
}

/// Runs batches of calls in one thread after the other, for ever.
fn batches_for_ever(mut f: Frozen) {
    let area = f.leader().map_agent(64, 0).unwrap();
    let mut calls = vec![Call::new(libc::SYS_getpid, &[]); 200];
    loop {
        for t in f.threads_mut() {
            drop(t.run_agent(&area, &mut calls));
            drop(t.put_back());
        }
    }
}

#[test]
fn a_killed_engine_leaves_the_server_running() {
    kill_engines(inject_for_ever);
}

#[test]
fn an_engine_killed_in_a_batch_leaves_the_server_running() {
    kill_engines(batches_for_ever);
}

fn kill_engines(work: fn(Frozen)) {
    let p = Program::start(MANY);
    for round in 0..60u32 {
        // SAFETY: the child calls nothing but our own code and is killed; this test's process has other threads,
        // whose locks the child does not take (allocation is safe after fork in glibc).
        let engine = unsafe { libc::fork() };
        if engine == 0 {
            if let Ok(f) = seize(p.pid()) {
                work(f);
            }
            // SAFETY: ends the child.
            unsafe { libc::_exit(1) };
        }
        // A random-looking instant within the freeze.
        std::thread::sleep(Duration::from_micros(u64::from(2000 + round * 137 % 3000)));
        // SAFETY: our child.
        unsafe { libc::kill(engine, libc::SIGKILL) };
        let mut status = 0;
        // SAFETY: our child.
        unsafe { libc::waitpid(engine, &mut status, 0) };
    }
    let out = p.finish_ok();
    // An engine that dies between the interruption and its first look at the registers leaves the EINTR that
    // epoll_wait gives on any stop, as SIGSTOP and SIGCONT do (signal(7)).
    assert!(out.trim().starts_with("bad 0 "), "{out}");
}

/// The scheduling policy of the calling thread.
fn policy() -> i32 {
    // SAFETY: plain numbers; 0 is the calling thread.
    unsafe { libc::sched_getscheduler(0) }
}

#[test]
fn the_engine_is_above_all_others_just_as_long_as_threads_are_held() {
    let p = Program::start(QUIET);
    let before = policy();
    for drop_it in [true, false] {
        let f = seize(p.pid()).unwrap();
        let during = policy() & !libc::SCHED_RESET_ON_FORK;
        assert_eq!(f.is_real_time(), during == libc::SCHED_FIFO);
        if drop_it {
            drop(f);
        } else {
            f.thaw().unwrap();
        }
        assert_eq!(policy(), before);
    }
    let panicked = std::thread::spawn({
        let pid = p.pid();
        move || {
            let _f = seize(pid).unwrap();
            panic!("on purpose");
        }
    });
    assert!(panicked.join().is_err());
    // Let go all the same.
    drop(seize(p.pid()).unwrap());
    // Who is refused has not been raised.
    assert!(seize(i32::MAX).is_err());
    assert_eq!(policy(), before);
    p.finish_ok();
}

const QUIET: &str = r#"
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER; static pthread_cond_t c = PTHREAD_COND_INITIALIZER;
static int work, spin;
static void *worker(void *a) { pthread_mutex_lock(&m); for (;;) { while (!work) pthread_cond_wait(&c, &m); work--; } }
static void handle(void) { pthread_mutex_lock(&m); work++; pthread_cond_signal(&c); pthread_mutex_unlock(&m); }
int main(void) { pthread_t t; pthread_create(&t, 0, worker, 0);
    puts("ready"); fflush(stdout);
    char b; while (read(0, &b, 1) == 1) { if (b == 's') { volatile int *s = &spin; while (!*s) {} } handle(); }
    return 0; }
"#;

#[test]
fn a_server_comes_to_rest_under_load() {
    let mut p = Program::start(QUIET);
    for _ in 0..50 {
        p.tell(&"x".repeat(3000));
        let mut f = seize(p.pid()).unwrap();
        let states = f.quiesce(&QuiesceOptions::default()).unwrap();
        assert_eq!(states.len(), 2);
        for s in &states {
            assert!(s.quiescent(), "{s}");
        }
        let names: Vec<String> = states[0].stack.signature();
        assert!(names.iter().any(|n| n == "main"), "{names:?}");
        let names: Vec<String> = states[1].stack.signature();
        assert!(names.iter().any(|n| n == "worker"), "{names:?}");
        f.thaw().unwrap();
    }
    p.finish_ok();
}

#[test]
fn a_spinning_thread_is_named_and_let_go() {
    let mut p = Program::start(QUIET);
    p.tell("s");
    let start = Instant::now();
    let e = loop {
        let mut f = seize(p.pid()).unwrap();
        match f.quiesce(&QuiesceOptions { timeout: Duration::from_millis(200) }) {
            // It had not read the line yet.
            Ok(_) => drop(f),
            Err(e) => break e,
        }
        assert!(start.elapsed() < Duration::from_secs(10));
    };
    assert!(matches!(e, QuiesceError::Timeout { .. }));
    let text = e.to_string();
    assert!(text.contains("main") && text.contains("is running"), "{text}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", p.pid())).unwrap();
    assert!(status.contains("TracerPid:\t0\n"), "{status}");
}

#[test]
fn bad_targets_are_refused_by_name() {
    assert!(matches!(seize(0), Err(FreezeError::NoProcess { .. })));
    assert!(matches!(seize(i32::MAX), Err(FreezeError::NoProcess { .. })));
    assert!(matches!(seize(std::process::id() as i32), Err(FreezeError::Ourselves { .. })));
    if std::fs::read_to_string("/proc/2/comm").is_ok_and(|c| c.trim() == "kthreadd") {
        assert!(matches!(seize(2), Err(FreezeError::KernelThread { .. })));
    }
    let mut p = Program::start(QUIET);
    let tid = mcr_criu_lite::tids(Pid(p.pid())).unwrap().into_iter().find(|t| t.0 != p.pid()).unwrap();
    assert!(matches!(seize(tid.0), Err(FreezeError::NotAProcess { process, .. }) if process.0 == p.pid()));
    let held = seize(p.pid()).unwrap();
    let again = seize(p.pid());
    assert!(
        matches!(&again, Err(FreezeError::AlreadyTraced { tracer, .. }) if tracer.0 == nix::unistd::gettid().as_raw()),
        "{:?}",
        again.err()
    );
    drop(held);
    // SAFETY: our own child.
    unsafe { libc::kill(p.pid(), libc::SIGSTOP) };
    let start = Instant::now();
    while !matches!(seize(p.pid()), Err(FreezeError::Stopped { .. })) {
        assert!(start.elapsed() < Duration::from_secs(5));
    }
    // SAFETY: our own child.
    unsafe { libc::kill(p.pid(), libc::SIGCONT) };
    p.child.kill().unwrap();
    let start = Instant::now();
    while !matches!(
        seize(p.pid()),
        // Gone: it died in our hands, and we are its parent.
        Err(FreezeError::Zombie { .. } | FreezeError::LeaderExited { .. } | FreezeError::NoProcess { .. })
    ) {
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_server_that_is_killed_meanwhile_does_not_hang_the_engine() {
    let (_dir, exe) = common::build(MANY);
    for round in 0..60u64 {
        let p = Program::spawn(&exe);
        let pid = p.pid();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(round * 53));
            // SAFETY: our own child; it is reaped at the end of the round only.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        });
        let start = Instant::now();
        while let Ok(mut f) = seize(pid) {
            let tid = f.threads()[0].tid();
            drop(f.syscall(tid, libc::SYS_getpid, &[]));
        }
        assert!(start.elapsed() < Duration::from_secs(2));
        killer.join().unwrap();
    }
}
