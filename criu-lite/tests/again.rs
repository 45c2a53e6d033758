//! A process is collected twice: what is taken from the first time, and what is not.

mod common;

use common::Program;
use mcr_criu_lite::{CollectOptions, Collected, FreezeOptions, Frozen, QuiesceOptions};
use mcr_image::proto::fd::Object;
use mcr_image::{Addr, Pid};

/// Three sockets and as many more as there are in `MORE`, with an epoll on one; at the first byte of input one of them
/// becomes another socket, one a pipe and one close-on-exec.
const SOCKETS: &str = r#"
#include <fcntl.h>
#include <sys/epoll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>
int main(void) {
    int s[3], p[2]; char b;
    struct epoll_event e = { EPOLLIN, { .u64 = 0x1234 } };
    dup2(epoll_create1(0), 40);
    for (int i = 0; i < MORE; i++) dup2(socket(AF_INET, SOCK_STREAM, 0), 200 + i);
    for (int i = 0; i < 3; i++) { s[i] = socket(AF_INET, SOCK_STREAM, 0); dup2(s[i], 50 + i); close(s[i]); }
    epoll_ctl(40, EPOLL_CTL_ADD, 52, &e);
    puts("ready"); fflush(stdout);
    if (read(0, &b, 1) != 1) return 1;
    s[0] = socket(AF_UNIX, SOCK_STREAM, 0); dup2(s[0], 50); close(s[0]);
    pipe(p); dup2(p[0], 51);
    fcntl(52, F_SETFD, FD_CLOEXEC);
    e.data.u64 = 0x5678; epoll_ctl(40, EPOLL_CTL_MOD, 52, &e);
    close(200);
    puts("changed"); fflush(stdout);
    return read(0, &b, 1) < 0;
}
"#;

fn collect(p: &Program, options: &CollectOptions<'_>) -> Collected {
    let mut f = Frozen::seize(Pid(p.pid()), &FreezeOptions::default()).unwrap();
    let states = f.quiesce(&QuiesceOptions::default()).unwrap();
    let collected = f.collect_with(&states, options).unwrap();
    f.thaw().unwrap();
    collected
}

#[test]
fn only_a_socket_that_is_still_the_same_is_not_asked_again() {
    again(0);
}

#[test]
fn of_many_sockets_only_one_that_is_still_the_same_is_not_asked_again() {
    again(300);
}

fn again(more: u32) {
    let mut p = Program::start(&format!("#define MORE {more}\n{SOCKETS}"));
    p.wait_blocked(p.pid(), libc::SYS_read);
    let mut first = collect(&p, &CollectOptions::live());
    // To be told from what is asked anew.
    for f in &mut first.process.fds {
        f.flags |= 0x4000_0000;
    }
    let again = CollectOptions { known: &first.process.fds, ..CollectOptions::live() };
    let same = collect(&p, &again);
    let of = |c: &Collected, n: u32| c.process.fds.iter().find(|f| f.number == n).cloned().unwrap();
    for n in (50..53).chain(200..200 + more) {
        assert_eq!(of(&same, n).flags & 0x4000_0000, 0x4000_0000, "{n}");
        assert!(!same.fds.contains_key(&n), "{n} was duplicated");
        assert_eq!(of(&same, n).object, of(&first, n).object);
    }
    assert_eq!(of(&same, 0).flags & 0x4000_0000, 0, "no socket");

    p.tell("");
    assert_eq!(p.line(), "changed");
    p.wait_blocked(p.pid(), libc::SYS_read);
    let then = collect(&p, &again);
    assert!(matches!(of(&then, 50).object, Some(Object::Unix(_))), "{:?}", of(&then, 50));
    assert!(matches!(of(&then, 51).object, Some(Object::Pipe(_))), "{:?}", of(&then, 51));
    assert!(then.fds.contains_key(&50) && then.fds.contains_key(&51));
    assert_eq!(of(&then, 52).flags & 0x4000_0000, 0x4000_0000);
    assert!(of(&then, 52).cloexec && !of(&first, 52).cloexec);
    let data = |c: &Collected| match of(c, 40).object {
        Some(Object::Epoll(e)) => e.watches.iter().map(|w| (w.fd, w.data)).collect::<Vec<_>>(),
        o => panic!("{o:?}"),
    };
    assert_eq!((data(&same), data(&then)), (vec![(52, 0x1234)], vec![(52, 0x5678)]));
    assert!(more == 0 || !then.process.fds.iter().any(|f| f.number == 200), "closed since");
    let numbers = |c: &Collected| c.process.fds.iter().map(|f| f.number).collect::<Vec<_>>();
    assert_eq!(numbers(&first), numbers(&same));
    assert!(numbers(&then).is_sorted());
}

/// Eight pages of memory at 0x600000000000 and a child; then one is written, one given back and one written by the child.
const PAGES: &str = r#"
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
int main(void) {
    int p[2]; char b;
    char *m = mmap((void *)0x600000000000, 8 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    madvise(m, 8 * 4096, MADV_NOHUGEPAGE);
    memset(m, 1, 7 * 4096);
    if (pipe(p)) return 1;
    pid_t child = fork();
    if (child == 0) { close(p[0]); m[4096] = 2; write(p[1], "x", 1); close(p[1]); pause(); }
    close(p[1]);
    if (read(p[0], &b, 1) != 1) return 1;
    m[3 * 4096] = 2;
    madvise(m + 5 * 4096, 4096, MADV_DONTNEED);
    printf("ready\n%d\n", child); fflush(stdout);
    return read(0, &b, 1) < 0;
}
"#;

#[test]
fn pages_that_nobody_wrote_to_since_the_copy_are_the_same() {
    let mut p = Program::start(PAGES);
    let child = Pid(p.line().parse().unwrap());
    let base = 0x6000_0000_0000;
    let page = |n: u64| Addr(base + n * 4096);
    let same = mcr_criu_lite::same_pages(Pid(p.pid()), child, page(0), page(8)).unwrap();
    let killed =
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.0), nix::sys::signal::Signal::SIGKILL);
    assert_eq!(same, [(page(0), page(1)), (page(2), page(3)), (page(4), page(5)), (page(6), page(7))]);
    killed.unwrap();
}
