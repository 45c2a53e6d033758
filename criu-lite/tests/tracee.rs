//! Injection leaves no trace in the target, whatever it was doing.

mod common;

use common::Program;
use mcr_criu_lite::tracee::{Agent, CloneFlags};
use mcr_criu_lite::{Call, Scratch, Tracee, blocked_call};
use mcr_image::{Addr, Memory, Pid, Tid};

/// Blocks in poll on stdin with checks of everything that an injection could disturb.
const BLOCKED: &str = r#"
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <errno.h>
#include <sys/epoll.h>
#include <time.h>
int main(void) {
    int ep = epoll_create1(0);
    struct epoll_event ev = { .events = EPOLLIN, .data.u64 = 0x1122334455667788 };
    epoll_ctl(ep, EPOLL_CTL_ADD, 0, &ev);
    puts("ready"); fflush(stdout);
    for (;;) {
        struct epoll_event got; memset(&got, 0, sizeof got);
        int n = epoll_wait(ep, &got, 1, -1);
        if (n != 1) { printf("epoll_wait %d errno %d\n", n, errno); return 3; }
        char b[64]; ssize_t r = read(0, b, sizeof b);
        if (r == 0) return 0;
        if (r < 0) return 4;
        printf("got %zd\n", r); fflush(stdout);
    }
}
"#;

#[test]
fn injected_calls_leave_a_blocked_server_as_it_was() {
    let mut p = Program::start(BLOCKED);
    let pid = p.pid();
    p.wait_blocked(pid, libc::SYS_epoll_wait);
    for round in 0..50 {
        let mut t = Tracee::seize(Pid(pid), Tid(pid)).unwrap();
        t.stop(None).unwrap();
        let before = t.regs().unwrap();
        let sp = t.memory().bytes(Addr(before.rsp - 8192), 8192).unwrap();
        let blocked = blocked_call(&before, t.memory()).unwrap();
        assert_eq!(blocked.nr, libc::SYS_epoll_wait);
        assert_eq!(t.syscall(libc::SYS_getpid, &[]).unwrap(), pid as u64);
        let e = t.syscall(libc::SYS_close, &[9999]).unwrap_err();
        assert_eq!(e.errno(), Some(nix::errno::Errno::EBADF));
        let mut s = Scratch::data(&mut t, 100).unwrap();
        s.write(0, b"/proc/self/status\0").unwrap();
        let at = s.addr();
        let fd = s.tracee().syscall(libc::SYS_open, &[at.0, 0]).unwrap();
        s.tracee().syscall(libc::SYS_close, &[fd]).unwrap();
        drop(s);
        // A batch, at its end taken out by a signal that must not be seen; and one that arrives by chance.
        let mut calls = vec![Call::new(libc::SYS_getpid, &[]); 100];
        calls.push(Call::new(libc::SYS_close, &[9999]));
        let area = t.map_agent(64, 0).unwrap();
        // SAFETY: our own child, which has no handler for it.
        unsafe { libc::kill(pid, libc::SIGWINCH) };
        t.run_agent(&area, &mut calls).unwrap();
        t.unmap_agent(area).unwrap();
        assert!(calls[..100].iter().all(|c| c.result == i64::from(pid)));
        assert_eq!(calls[100].value(), Err(nix::errno::Errno::EBADF));
        t.put_back().unwrap();
        assert_eq!(t.regs().unwrap(), before);
        assert_eq!(t.memory().bytes(Addr(before.rsp - 8192), 8192).unwrap(), sp);
        t.detach().unwrap();
        if round % 10 == 0 {
            p.tell("x");
            assert_eq!(p.line(), "got 2");
            p.wait_blocked(pid, libc::SYS_epoll_wait);
        }
    }
    p.finish_ok();
}

#[test]
fn a_forked_child_is_a_whole_copy_and_the_agent_runs_in_it() {
    let mut p = Program::start(BLOCKED);
    let pid = p.pid();
    p.wait_blocked(pid, libc::SYS_epoll_wait);
    let mut t = Tracee::seize(Pid(pid), Tid(pid)).unwrap();
    t.stop(None).unwrap();
    let regs = t.regs().unwrap();
    let maps = t.memory().maps().unwrap();
    for flags in [CloneFlags::Hidden, CloneFlags::Sibling] {
        let mut c = t.fork(flags).unwrap();
        let child = c.tid();
        assert_eq!(c.memory().maps().unwrap(), maps);
        let cr = c.regs().unwrap();
        assert_eq!((cr.rip + 2, cr.rax, cr.rsp), (regs.rip, libc::SYS_epoll_wait as u64, regs.rsp));
        let mut calls = vec![Call::new(libc::SYS_getpid, &[]); 500];
        calls.push(Call::new(libc::SYS_close, &[9999]));
        let mut a = Agent::install(&mut c, 64).unwrap();
        a.run(&mut calls).unwrap();
        drop(a);
        assert!(calls[..500].iter().all(|x| x.result == i64::from(child.0)));
        assert_eq!(calls[500].value(), Err(nix::errno::Errno::EBADF));
        c.put_back().unwrap();
        assert_eq!(c.memory().maps().unwrap(), maps);
        c.kill().unwrap();
        if flags == CloneFlags::Hidden {
            let r = t.syscall(libc::SYS_wait4, &[child.0 as u64, 0, libc::__WALL as u64, 0]).unwrap();
            assert_eq!(r, child.0 as u64);
        }
    }
    t.detach().unwrap();
    p.tell("x");
    assert_eq!(p.line(), "got 2");
    p.finish_ok();
}

/// Computes with integers and vectors and compares, takes SIGUSR1s, sleeps and polls with timeouts.
const BUSY: &str = r#"
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <errno.h>
#include <time.h>
#include <poll.h>
static volatile int stop, bad; static volatile long signals, rounds;
static void on(int s) { (void)s; __atomic_add_fetch(&signals, 1, 5); }
static double work(double x) { for (int i = 0; i < 2000; i++) x = x * 1.0000001 + i / (x + 1); return x; }
static void *busy(void *a) { double want = work(1.5); unsigned long h = 1;
    while (!stop) { if (work(1.5) != want) bad = 1; h = h * 31 + 7; rounds++; } return (void*)h; }
static void *sleeper(void *a) { while (!stop) { struct timespec t0, t1, d = {0, 3000000};
    clock_gettime(CLOCK_MONOTONIC, &t0);
    int r; struct timespec left = d; while ((r = nanosleep(&left, &left)) != 0 && errno == EINTR) if (!signals) bad = 2;
    clock_gettime(CLOCK_MONOTONIC, &t1);
    if ((t1.tv_sec - t0.tv_sec) * 1000000000L + t1.tv_nsec - t0.tv_nsec < 3000000) bad = 3; } return 0; }
int main(void) {
    struct sigaction sa = { .sa_handler = on, .sa_flags = SA_RESTART }; sigaction(SIGUSR1, &sa, 0);
    pthread_t t[4]; for (int i = 0; i < 2; i++) pthread_create(&t[i], 0, busy, 0);
    sigset_t s; sigemptyset(&s); sigaddset(&s, SIGUSR1); pthread_sigmask(SIG_BLOCK, &s, 0);
    for (int i = 2; i < 4; i++) pthread_create(&t[i], 0, sleeper, 0);
    pthread_sigmask(SIG_UNBLOCK, &s, 0);
    puts("ready"); fflush(stdout);
    char c; ssize_t r; while ((r = read(0, &c, 1)) > 0) {}
    if (r < 0) bad = 4;
    stop = 1; for (int i = 0; i < 4; i++) pthread_join(t[i], 0);
    printf("bad %d signals %ld\n", bad, signals); return bad;
}
"#;

#[test]
fn busy_threads_under_signals_compute_on() {
    let p = Program::start(BUSY);
    let pid = p.pid();
    let tids: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|d| d.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    let mut sent = 0;
    for round in 0..200 {
        let mut all: Vec<Tracee> = tids.iter().map(|&t| Tracee::seize(Pid(pid), Tid(t)).unwrap()).collect();
        // SAFETY: our own child.
        unsafe { libc::kill(pid, libc::SIGUSR1) };
        sent += 1;
        for t in &mut all {
            t.stop(None).unwrap();
        }
        let t = &mut all[round % tids.len()];
        t.syscall(libc::SYS_getppid, &[]).unwrap();
        // SAFETY: our own child.
        unsafe { libc::kill(pid, libc::SIGUSR1) };
        t.syscall(libc::SYS_gettid, &[]).unwrap();
        for t in all {
            t.detach().unwrap();
        }
    }
    let out = p.finish_ok();
    let n: i32 = out.trim().rsplit(' ').next().unwrap().parse().unwrap();
    assert!(n >= sent / 2, "{n} of {sent} signals arrived");
}
