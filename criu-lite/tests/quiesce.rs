//! Quiescence of servers that never find nothing to do.

mod common;

use common::Program;
use mcr_criu_lite::{FreezeOptions, Frozen, QuiesceOptions};
use mcr_image::Pid;
use std::time::{Duration, Instant};

/// An event loop whose descriptor is always readable, with descriptors that do not block, as Redis under load;
/// a worker that each
/// event wakes, and one that the first wakes.
const LOADED: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>
static volatile int stop, bad; static int p[2], ep; static unsigned long handled, seen, jobs[2], done[2];
static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER; static pthread_cond_t c[2] = { PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER };
static void __attribute__((noinline)) handle(int fd) {
    char b[1]; ssize_t n = read(fd, b, 1); if (n != 1) bad = 1;
    if (read(fd, b, 1) != -1 || errno != EAGAIN) bad = 2;
    if (write(p[1], "x", 1) != 1) bad = 3;
    handled++;
    pthread_mutex_lock(&m); jobs[0]++; pthread_cond_signal(&c[0]); pthread_mutex_unlock(&m);
}
static void __attribute__((noinline)) loop(void) {
    struct epoll_event e;
    while (!stop) { int n = epoll_wait(ep, &e, 1, -1); if (n != 1 || e.data.u64 != 77) { bad = 4; printf("epoll %d %d\n", n, errno); }
        seen++; handle(p[0]); }
}
static void *serve(void *a) { loop(); return a; }
static void *worker(void *a) { int me = (int)(long)a;
    while (!stop) { pthread_mutex_lock(&m); while (!jobs[me] && !stop) pthread_cond_wait(&c[me], &m);
        if (jobs[me]) { jobs[me]--; done[me]++; if (!me) { jobs[1]++; pthread_cond_signal(&c[1]); } }
        pthread_mutex_unlock(&m); } return 0; }
int main(void) {
    pipe2(p, O_NONBLOCK); ep = epoll_create1(0);
    struct epoll_event e = { EPOLLIN, { .u64 = 77 } }; epoll_ctl(ep, EPOLL_CTL_ADD, p[0], &e); write(p[1], "x", 1);
    pthread_t t[3]; pthread_create(&t[0], 0, serve, 0);
    pthread_create(&t[1], 0, worker, (void *)0); pthread_create(&t[2], 0, worker, (void *)1);
    puts("ready"); fflush(stdout);
    char b[64]; while (read(0, b, 64) > 0) {}
    pthread_mutex_lock(&m); stop = 1; pthread_cond_broadcast(&c[0]); pthread_cond_broadcast(&c[1]); pthread_mutex_unlock(&m);
    for (int i = 0; i < 3; i++) pthread_join(t[i], 0);
    if (handled != seen) bad = 5;
    if (handled != jobs[0] + done[0] || done[0] != jobs[1] + done[1]) bad = 6;
    printf("bad %d\n", bad); return bad;
}
"#;

#[test]
fn an_event_loop_that_is_never_idle_is_held_at_its_wait() {
    let p = Program::start(LOADED);
    let mut worst = Duration::ZERO;
    for _ in 0..50 {
        let mut f = Frozen::seize(Pid(p.pid()), &FreezeOptions::default()).unwrap();
        let start = Instant::now();
        let states = f.quiesce(&QuiesceOptions::default()).unwrap();
        worst = worst.max(start.elapsed());
        assert_eq!(states.len(), 4);
        for s in &states {
            let program: Vec<String> =
                s.stack.frames.iter().filter(|f| f.in_program()).map(|f| f.signature()).collect();
            match program.last().map(String::as_str) {
                Some("_start") => assert_eq!(s.call_name(), Some("read")),
                Some("serve") => {
                    assert_eq!(s.call_name(), Some("epoll_wait"), "{s}");
                    assert_eq!(program, ["loop", "serve"]);
                }
                Some("worker") => assert_eq!((s.call_name(), program.len()), (Some("futex"), 1), "{s}"),
                other => panic!("{other:?}: {s}"),
            }
        }
        f.thaw().unwrap();
    }
    println!("slowest of 50: {worst:?}");
    assert_eq!(p.finish_ok().trim(), "bad 0");
}
