//! Every blocking call that servers rest in, frozen again and again: no early return, no EINTR, timeouts that run on
//! where the kernel keeps them.

mod common;

use common::Program;
use mcr_criu_lite::{Call, FreezeOptions, Frozen, QuiesceOptions};
use mcr_image::Pid;
use std::time::Duration;

/// One thread a call. Those with a timeout wait for TIMEOUT and check that it was not shorter; the others wait for
/// what main() does when it is told to. A line on stdin is answered by the names of the calls that are over.
const CALLS: &str = r#"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#define TIMEOUT_MS 400
static const struct timespec T = { 0, TIMEOUT_MS * 1000000L };
static struct pollfd nobody(void);
static int go[2], silent[2], ep_go, ep_silent, pair[2], quiet_pair[2], listener, sem, quiet_sem, queue, lock_fd[2];
static unsigned word, quiet_word;
static volatile int handled;
static pid_t child;
static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER; static pthread_cond_t c = PTHREAD_COND_INITIALIZER;
static sigset_t usr1, usr2, quiet_set, none;

static void on(int s) { (void)s; handled++; }
static long ms(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000L + t.tv_nsec / 1000000; }
static struct pollfd nobody(void) { return (struct pollfd){ silent[0], POLLIN, 0 }; }
static long failed(long r) { return r < 0 ? -errno : r; }
static long fut(unsigned *w, const struct timespec *t) { return failed(syscall(SYS_futex, w, FUTEX_WAIT_PRIVATE, 0, t, 0, 0)); }
static long sops(int id, const struct timespec *t) { struct sembuf b = { 0, -1, 0 }; return failed(t ? semtimedop(id, &b, 1, t) : semop(id, &b, 1)); }

/* Until main() says so. */
static long u_epoll_wait(void) { struct epoll_event e = {0}; long r = failed(epoll_wait(ep_go, &e, 1, -1)); return r == 1 && e.data.u64 == 0xabcdef01 ? 0 : r ? r : -1000; }
static long u_epoll_pwait(void) { struct epoll_event e = {0}; return failed(epoll_pwait(ep_go, &e, 1, -1, &none)) - 1; }
static long u_poll(void) { struct pollfd f = { go[0], POLLIN, 0 }; return failed(poll(&f, 1, -1)) - 1; }
static long u_ppoll(void) { struct pollfd f = { go[0], POLLIN, 0 }; return failed(ppoll(&f, 1, 0, &none)) - 1; }
static long u_select(void) { fd_set s; FD_ZERO(&s); FD_SET(go[0], &s); return failed(select(go[0] + 1, &s, 0, 0, 0)) - 1; }
static long u_read(void) { char b[4]; return failed(read(pair[0], b, 4)) - 4; }
static long u_readv(void) { char b[4]; struct iovec v = { b, 4 }; return failed(readv(pair[0], &v, 1)) - 4; }
static long u_recvmsg(void) { char b[4]; struct iovec v = { b, 4 }; struct msghdr h = { .msg_iov = &v, .msg_iovlen = 1 }; return failed(recvmsg(pair[0], &h, 0)) - 4; }
static long u_recvfrom(void) { char b[4]; return failed(recv(pair[0], b, 4, 0)) - 4; }
static long u_accept(void) { long r = failed(accept(listener, 0, 0)); return r > 0 ? 0 : r; }
static long u_accept4(void) { long r = failed(accept4(listener, 0, 0, SOCK_CLOEXEC)); return r > 0 ? 0 : r; }
static long u_futex(void) { return fut(&word, 0); }
static long u_cond(void) { pthread_mutex_lock(&m); long r = 0; if (!word) r = pthread_cond_wait(&c, &m); pthread_mutex_unlock(&m); return -r; }
static long u_sigsuspend(void) { sigset_t s; sigfillset(&s); sigdelset(&s, SIGUSR1); int h = handled; long r = failed(sigsuspend(&s)); return r == -EINTR && handled > h ? 0 : -1000; }
static long u_pause(void) { pthread_sigmask(SIG_UNBLOCK, &usr1, 0); int h = handled; long r = failed(pause()); return r == -EINTR && handled > h ? 0 : -1000; }
static long u_sigwaitinfo(void) { siginfo_t i; return failed(sigwaitinfo(&usr2, &i)) - SIGUSR2; }
static long u_wait4(void) { int s = 0; long r = failed(wait4(child, &s, 0, 0)); return r == child && WIFEXITED(s) && WEXITSTATUS(s) == 7 ? 0 : r; }
static long u_semop(void) { return sops(sem, 0); }
static long u_msgrcv(void) { struct { long t; char b[8]; } x; return failed(msgrcv(queue, &x, 8, 0, 0)) - 8; }
static long u_flock(void) { return failed(flock(lock_fd[1], LOCK_EX)); }

/* Timeouts that the kernel keeps, or writes back into memory. */
static long t_nanosleep(void) { struct timespec left; return failed(syscall(SYS_nanosleep, &T, &left)); }
static long t_clock_nanosleep(void) { return -clock_nanosleep(CLOCK_MONOTONIC, 0, &T, 0); }
static long t_absolute_sleep(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); t.tv_nsec += T.tv_nsec + 1000000;
    if (t.tv_nsec >= 1000000000) { t.tv_sec++; t.tv_nsec -= 1000000000; } return -clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, 0); }
static long t_poll(void) { struct pollfd f = nobody(); return failed(poll(&f, 1, TIMEOUT_MS)); }
static long t_ppoll(void) { struct pollfd f = nobody(); return failed(ppoll(&f, 1, &T, &none)); }
static long t_select(void) { struct timeval t = { 0, TIMEOUT_MS * 1000 }; fd_set s; FD_ZERO(&s); FD_SET(silent[0], &s); return failed(select(silent[0] + 1, &s, 0, 0, &t)); }
static long t_futex(void) { return fut(&quiet_word, &T) + ETIMEDOUT; }
static long t_cond(void) { static pthread_mutex_t m2 = PTHREAD_MUTEX_INITIALIZER; static pthread_cond_t c2 = PTHREAD_COND_INITIALIZER;
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t); t.tv_nsec += T.tv_nsec + 1000000; if (t.tv_nsec >= 1000000000) { t.tv_sec++; t.tv_nsec -= 1000000000; }
    pthread_mutex_lock(&m2); long r = pthread_cond_timedwait(&c2, &m2, &t); pthread_mutex_unlock(&m2); return r - ETIMEDOUT; }

/* Timeouts that nobody keeps: the call begins anew. */
static long a_epoll_wait(void) { struct epoll_event e; return failed(epoll_wait(ep_silent, &e, 1, TIMEOUT_MS)); }
static long a_semtimedop(void) { return sops(quiet_sem, &T) + EAGAIN; }
static long a_sigtimedwait(void) { return failed(sigtimedwait(&quiet_set, 0, &T)) + EAGAIN; }
static long a_recv_timeout(void) { char b[4]; return failed(recv(quiet_pair[0], b, 4, 0)) + EAGAIN; }

#define CASE(f) { #f, f, 0, 0, 0, 0 }
static struct test { const char *name; long (*f)(void); volatile int over; long result, took; pthread_t thread; } tests[] = {
    CASE(u_epoll_wait), CASE(u_epoll_pwait), CASE(u_poll), CASE(u_ppoll), CASE(u_select), CASE(u_read), CASE(u_readv),
    CASE(u_recvmsg), CASE(u_recvfrom), CASE(u_accept), CASE(u_accept4), CASE(u_futex), CASE(u_cond), CASE(u_sigsuspend),
    CASE(u_pause), CASE(u_sigwaitinfo), CASE(u_wait4), CASE(u_semop), CASE(u_msgrcv), CASE(u_flock),
    CASE(t_nanosleep), CASE(t_clock_nanosleep), CASE(t_absolute_sleep), CASE(t_poll), CASE(t_ppoll), CASE(t_select),
    CASE(t_futex), CASE(t_cond),
    CASE(a_epoll_wait), CASE(a_semtimedop), CASE(a_sigtimedwait), CASE(a_recv_timeout),
};
#define N (sizeof tests / sizeof *tests)
static void *run(void *a) { struct test *t = a; long from = ms(); t->result = t->f(); t->took = ms() - from; t->over = 1; return 0; }
static pthread_t thread_of(const char *name) { for (size_t i = 0; i < N; i++) if (!strcmp(tests[i].name, name)) return tests[i].thread; abort(); }

int main(void) {
    int alive[2]; char b[64];
    if (pipe(go) || pipe(silent) || pipe(alive) || socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) || socketpair(AF_UNIX, SOCK_DGRAM, 0, quiet_pair)) return 1;
    if (!(child = fork())) { close(alive[1]); close(go[1]); close(0); close(1); read(alive[0], b, 1); _exit(7); }
    close(alive[0]);
    sigemptyset(&none); sigemptyset(&usr1); sigemptyset(&usr2); sigemptyset(&quiet_set);
    sigaddset(&usr1, SIGUSR1); sigaddset(&usr2, SIGUSR2); sigaddset(&quiet_set, SIGRTMIN + 3);
    pthread_sigmask(SIG_BLOCK, &usr1, 0); pthread_sigmask(SIG_BLOCK, &usr2, 0); pthread_sigmask(SIG_BLOCK, &quiet_set, 0);
    none = usr1; sigaddset(&none, SIGUSR2); sigaddset(&none, SIGCHLD);
    /* pthread_kill(3) blocks everything for a moment: a SIGCHLD of that moment is not ignored but wakes another thread. */
    sigset_t chld; sigemptyset(&chld); sigaddset(&chld, SIGCHLD); pthread_sigmask(SIG_BLOCK, &chld, 0);
    struct sigaction sa = { .sa_handler = on }; sigaction(SIGUSR1, &sa, 0);
    ep_go = epoll_create1(0); ep_silent = epoll_create1(0);
    struct epoll_event e = { EPOLLIN, { .u64 = 0xabcdef01 } };
    epoll_ctl(ep_go, EPOLL_CTL_ADD, go[0], &e); epoll_ctl(ep_silent, EPOLL_CTL_ADD, silent[0], &e);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) }; socklen_t len = sizeof at;
    if (bind(listener, (void *)&at, len) || listen(listener, 5) || getsockname(listener, (void *)&at, &len)) return 1;
    sem = semget(IPC_PRIVATE, 1, 0600); quiet_sem = semget(IPC_PRIVATE, 1, 0600); queue = msgget(IPC_PRIVATE, 0600);
    struct timeval tv = { 0, TIMEOUT_MS * 1000 }; setsockopt(quiet_pair[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    for (int i = 0; i < 2; i++) lock_fd[i] = open("lock", O_RDWR | O_CREAT, 0600);
    flock(lock_fd[0], LOCK_EX);
    for (size_t i = 0; i < N; i++) pthread_create(&tests[i].thread, 0, run, &tests[i]);
    puts("ready"); fflush(stdout);
    ssize_t r;
    while ((r = read(0, b, sizeof b)) > 0) {
        if (b[0] == 'g') {
            pthread_mutex_lock(&m); word = 1; pthread_cond_broadcast(&c); pthread_mutex_unlock(&m);
            syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
            write(go[1], "x", 1); close(alive[1]); flock(lock_fd[0], LOCK_UN);
            for (int i = 0; i < 4; i++) write(pair[1], "abcd", 4);
            for (int i = 0; i < 2; i++) { int s = socket(AF_INET, SOCK_STREAM, 0); connect(s, (void *)&at, len); }
            pthread_kill(thread_of("u_sigsuspend"), SIGUSR1); pthread_kill(thread_of("u_pause"), SIGUSR1); pthread_kill(thread_of("u_sigwaitinfo"), SIGUSR2);
            struct sembuf up = { 0, 1, 0 }; semop(sem, &up, 1);
            struct { long t; char x[8]; } msg = { 1, "1234567" }; msgsnd(queue, &msg, 8, 0);
            for (size_t i = 0; i < N; i++) pthread_join(tests[i].thread, 0);
        }
        for (size_t i = 0; i < N; i++) if (tests[i].over) printf("%s ", tests[i].name);
        printf("\n"); fflush(stdout);
    }
    semctl(sem, 0, IPC_RMID); semctl(quiet_sem, 0, IPC_RMID); msgctl(queue, IPC_RMID, 0);
    int bad = r < 0;
    for (size_t i = 0; i < N; i++) {
        struct test *t = &tests[i];
        int early = t->name[0] != 'u' && t->took < TIMEOUT_MS - 1;
        if (!t->over || t->result || early) { bad = 1; printf("%s: over %d result %ld after %ld ms\n", t->name, t->over, t->result, t->took); }
    }
    return bad;
}
"#;

/// The calls that are over, of one kind: `u` without a timeout, `t` with one that is kept, `a` with one that is not.
fn over(p: &mut Program, kind: char) -> Vec<String> {
    p.tell("?");
    p.line().split_whitespace().filter(|n| n.starts_with(kind)).map(str::to_owned).collect()
}

/// Freezes until the timeouts are over that the kernel keeps, at least twenty times. The pauses between two freezes
/// are a small part of a timeout: one that began anew each time would never be over.
fn freeze_again_and_again(with: fn(&mut Frozen)) {
    let mut p = Program::start(CALLS);
    let mut rounds = 0;
    while rounds < 20 || over(&mut p, 't').len() < 8 {
        let mut f = Frozen::seize(Pid(p.pid()), &FreezeOptions::default()).unwrap();
        with(&mut f);
        f.thaw().unwrap();
        std::thread::sleep(Duration::from_millis(10));
        rounds += 1;
        assert!(rounds < 3000, "only {:?} are over", over(&mut p, 't'));
    }
    assert_eq!(over(&mut p, 'u'), [""; 0], "calls that returned early");
    // What nobody keeps: signal(7). These begin anew at each freeze, so they are over only now; had they given EINTR,
    // the program would say so.
    p.tell("go");
    assert_eq!(p.line().split_whitespace().count(), 32);
    p.finish_ok();
}

#[test]
fn calls_do_not_notice_a_freeze() {
    freeze_again_and_again(|_| {});
}

#[test]
fn calls_do_not_notice_calls_injected_into_their_threads() {
    freeze_again_and_again(|f| {
        let tids: Vec<_> = f.threads().iter().map(|t| t.tid()).collect();
        for tid in tids {
            f.syscall(tid, libc::SYS_getpid, &[]).unwrap();
        }
    });
}

#[test]
fn calls_do_not_notice_batches_of_calls() {
    freeze_again_and_again(|f| {
        let area = f.leader().map_agent(16, 0).unwrap();
        for t in f.threads_mut() {
            let mut calls = [Call::new(libc::SYS_getppid, &[]); 20];
            t.run_agent(&area, &mut calls).unwrap();
            assert!(calls.iter().all(|c| c.result > 0));
        }
        f.leader().unmap_agent(area).unwrap();
    });
}

#[test]
fn calls_do_not_notice_a_copy_of_their_process() {
    freeze_again_and_again(|f| {
        let child = f.fork_host().unwrap();
        child.kill().unwrap();
    });
}

const SLEEPERS: &str = r#"
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static const struct timespec T = { 1000, 0 };
static void *sleeper(void *a) { struct timespec left; syscall(SYS_nanosleep, &T, &left); return a; }
static void *blind(void *a) { syscall(SYS_nanosleep, &T, 0); return a; }
static void *poller(void *a) { ppoll(0, 0, &T, 0); return a; }
static void *(*const f[])(void *) = { sleeper, blind, poller };
int main(void) { pthread_t t; for (int i = 0; i < 3; i++) pthread_create(&t, 0, f[i], 0);
    puts("ready"); fflush(stdout); char b; return read(0, &b, 1) < 0; }
"#;

#[test]
fn what_is_left_of_a_timeout_is_in_the_image_where_it_can_be_known() {
    let p = Program::start(SLEEPERS);
    let mut tids = mcr_criu_lite::tids(Pid(p.pid())).unwrap();
    tids.sort_unstable();
    let calls = [libc::SYS_read, libc::SYS_nanosleep, libc::SYS_nanosleep, libc::SYS_ppoll];
    for (tid, nr) in tids.iter().zip(calls) {
        p.wait_blocked(tid.0, nr);
    }
    let mut last = u64::MAX;
    for _ in 0..3 {
        // The kernel writes down what is left when it interrupts the call: the thread has to be in it again.
        p.wait_blocked_in(tids[1].0, &[libc::SYS_nanosleep, libc::SYS_restart_syscall]);
        let mut f = Frozen::seize(Pid(p.pid()), &FreezeOptions::default()).unwrap();
        let states = f.quiesce(&QuiesceOptions::default()).unwrap();
        let process = f.collect(&states).unwrap().process;
        f.thaw().unwrap();
        let left: Vec<_> =
            process.threads.iter().map(|t| t.syscall.as_ref().and_then(|s| s.remaining_ns)).collect();
        let [None, Some(sleep), None, Some(poll)] = left[..] else { panic!("{left:?}") };
        assert!((1..=1_000_000_000_000).contains(&poll), "{poll}");
        assert!(sleep > 0 && sleep < last.min(1_000_000_000_000), "{sleep} after {last}");
        last = sleep;
    }
    p.finish_ok();
}

const PARENT: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
static int ep, ended;
static void *waiter(void *a) { struct epoll_event e; for (;;) if (epoll_wait(ep, &e, 1, -1) < 0) __atomic_add_fetch(&ended, 1, __ATOMIC_SEQ_CST); return a; }
int main(void) {
    ep = epoll_create1(0);
    pthread_t t; for (int i = 0; i < 12; i++) pthread_create(&t, 0, waiter, 0);
    puts("ready"); fflush(stdout);
    struct pollfd in = { 0, POLLIN, 0 };
    long children = 0;
    for (; poll(&in, 1, 0) == 0; children++) {
        long child = syscall(SYS_fork);
        if (child == 0) _exit(0);
        while (wait4(child, 0, 0, 0) < 0) if (errno != EINTR) return 3;
    }
    printf("%d calls ended early, %ld children\n", ended, children); fflush(stdout);
    return ended != 0; }
"#;

/// What the default action ignores would not be ignored in a traced thread, and end other threads' calls.
#[test]
fn children_that_end_meanwhile_disturb_nobody() {
    let mut p = Program::start(PARENT);
    let tids = mcr_criu_lite::tids(Pid(p.pid())).unwrap();
    for t in tids.iter().filter(|t| t.0 != p.pid()) {
        p.wait_blocked(t.0, libc::SYS_epoll_wait);
    }
    for _ in 0..400 {
        Frozen::seize(Pid(p.pid()), &FreezeOptions::default()).unwrap().thaw().unwrap();
    }
    p.tell("");
    p.finish_ok();
}
