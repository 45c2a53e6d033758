//! Dumps: what is in the image, and that the server does not notice.

mod common;

use common::Program;
use mcr_criu_lite::dump::{DumpError, DumpOptions, Kept, dump};
use mcr_image::proto::fd::Object;
use mcr_image::{Addr, Image, Memory, Pid};
use std::collections::HashMap;
use std::path::Path;

/// Prints where its memory is, then checks and changes it for ever: two counters that are always equal when
/// it blocks, memory that a fork does not copy, shared memory that it has never touched, a deleted file.
const STATE: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
static unsigned long *big; static volatile int stop, bad; static size_t words = 1 << 17;
static void *worker(void *a) {
    for (unsigned long i = 1; !stop; i++) {
        big[0] = i; for (size_t n = 1; n < words; n += 512) { if (big[n] != i - 1) bad = 1; big[n] = i; } big[1] = i;
        struct pollfd none; poll(&none, 0, 1);
    }
    return 0;
}
static char *map(int flags, int fd, size_t n) { char *p = mmap(0, n, PROT_READ | PROT_WRITE, flags, fd, 0); if (p == MAP_FAILED) abort(); return p; }
int main(void) {
    big = calloc(words, 8);
    char *nofork = map(MAP_PRIVATE | MAP_ANONYMOUS, -1, 8192); madvise(nofork, 8192, MADV_DONTFORK); strcpy(nofork + 4096, "not in a child");
    int m = memfd_create("shm", 0); ftruncate(m, 1 << 20); pwrite(m, "never touched", 13, 65536); char *shm = map(MAP_SHARED, m, 1 << 20); close(m);
    char *anon = map(MAP_SHARED | MAP_ANONYMOUS, -1, 1 << 30); strcpy(anon + (1 << 29), "far away");
    int f = open("data", O_CREAT | O_RDWR, 0600); write(f, "deleted and mapped", 18); char *del = map(MAP_PRIVATE, f, 4096); close(f); unlink("data");
    int g = open("gone", O_CREAT | O_RDWR, 0600); write(g, "deleted and open", 16); unlink("gone");
    int p[2]; pipe(p); write(p[1], "in the pipe", 11);
    char *huge = mmap(0, 1ul << 40, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); strcpy(huge + (1ul << 39), "in the middle");
    pthread_t t; pthread_create(&t, 0, worker, 0);
    puts("ready");
    printf("big %p\nnofork %p\nshm %p\nanon %p\ndel %p\nhuge %p\ngone %d\npipe %d\n.\n", (void*)big, nofork + 4096, shm + 65536, anon + (1 << 29), del, huge + (1ul << 39), g, p[0]);
    fflush(stdout);
    char b; while (read(0, &b, 1) == 1) {}
    stop = 1; pthread_join(t, 0);
    if (waitpid(-1, 0, WNOHANG | __WALL) != -1 || errno != ECHILD) bad = 2;
    if (strcmp(nofork + 4096, "not in a child")) bad = 3;
    char c[16]; if (read(p[0], c, 16) != 11) bad = 4;
    printf("bad %d\n", bad); return bad;
}
"#;

fn places(p: &mut Program) -> HashMap<String, u64> {
    let mut out = HashMap::new();
    loop {
        let l = p.line();
        let Some((name, value)) = l.split_once(' ') else { return out };
        let n = match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
            None => value.parse().unwrap(),
        };
        out.insert(name.to_owned(), n);
    }
}

/// What does not compress much, as it is: the same state in a larger file.
#[test]
fn stored_as_it_is_or_compressed() {
    let mut p = Program::start(STATE);
    let at = places(&mut p);
    let dir = tempfile::tempdir().unwrap();
    let sizes = [0, 1].map(|level| {
        let path = dir.path().join(format!("{level}.mcr"));
        let options = DumpOptions { leave_running: true, level, ..DumpOptions::default() };
        let report = dump(Pid(p.pid()), &path, &options, &mut |_, _| Ok(Kept::default())).unwrap();
        check(&path, &at);
        (report.pages, std::fs::metadata(&path).unwrap().len())
    });
    assert!(sizes[0].1 > sizes[0].0 * 4096 && sizes[1].1 < sizes[0].1, "{sizes:?}");
}

fn run(pid: i32, output: &Path, leave_running: bool) -> Result<mcr_criu_lite::dump::DumpReport, DumpError> {
    let options = DumpOptions { leave_running, ..DumpOptions::default() };
    dump(Pid(pid), output, &options, &mut |_, _| Ok(Kept::default()))
}

fn check(path: &Path, at: &HashMap<String, u64>) {
    let image = Image::open(path).unwrap();
    let mem = image.memory();
    let text = |name: &str| mem.cstr(Addr(at[name]), 64).unwrap();
    assert_eq!(text("nofork"), b"not in a child");
    assert_eq!(text("shm"), b"never touched");
    assert_eq!(text("anon"), b"far away");
    assert_eq!(text("del"), b"deleted and mapped");
    assert_eq!(text("huge"), b"in the middle");
    // At a quiescent point the worker has finished its round.
    let big = Addr(at["big"]);
    let first = mem.u64(big).unwrap();
    for n in (1..1 << 17).step_by(512) {
        assert_eq!(mem.u64(big.add(n * 8)).unwrap(), first, "word {n}");
    }
    let p = image.process();
    assert_eq!(p.threads.len(), 2);
    for t in &p.threads {
        let names = mcr_image::proto_signature(&t.frames);
        assert!(names.iter().any(|n| n == "main" || n == "worker"), "{names:?}");
    }
    let fd = |n: u64| p.fds.iter().find(|f| u64::from(f.number) == n).unwrap().object.clone().unwrap();
    let Object::File(f) = fd(at["gone"]) else { panic!() };
    assert!(f.deleted);
    assert_eq!(image.file(&f.content_key).unwrap().unwrap(), b"deleted and open");
    let Object::Pipe(pipe) = fd(at["pipe"]) else { panic!() };
    assert_eq!(pipe.contents, b"in the pipe");
}

#[test]
fn twenty_dumps_of_a_running_server() {
    let mut p = Program::start(STATE);
    let at = places(&mut p);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.mcr");
    for _ in 0..20 {
        let r = run(p.pid(), &path, true).unwrap();
        assert!(r.left_running && r.frozen_us > 0);
        check(&path, &at);
    }
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", p.pid())).unwrap();
    let tasks = mcr_criu_lite::tids(Pid(p.pid())).unwrap().len();
    assert_eq!(tasks, 2, "{maps}");
    assert_eq!(p.finish_ok().trim(), "bad 0");
}

#[test]
fn a_dump_ends_the_server() {
    let mut p = Program::start(STATE);
    let at = places(&mut p);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.mcr");
    run(p.pid(), &path, false).unwrap();
    check(&path, &at);
    assert!(
        !Path::new(&format!("/proc/{}/maps", p.pid())).exists() || {
            std::fs::read(format!("/proc/{}/maps", p.pid())).is_ok_and(|m| m.is_empty())
        }
    );
}

#[test]
fn a_dump_that_fails_leaves_the_server_alone() {
    let mut p = Program::start(STATE);
    places(&mut p);
    let dir = tempfile::tempdir().unwrap();
    let e = run(p.pid(), &dir.path().join("none/a.mcr"), false).unwrap_err();
    assert!(matches!(e, DumpError::Image(_)), "{e}");
    let options = DumpOptions::default();
    let e = dump(Pid(p.pid()), &dir.path().join("a.mcr"), &options, &mut |_, _| Err("no keeper".into()))
        .unwrap_err();
    assert!(e.to_string().contains("no keeper"), "{e}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_eq!(p.finish_ok().trim(), "bad 0");
}

/// Opens something that images do not hold.
fn refused(open: &str, words: &[&str]) {
    let source = format!(
        "#define _GNU_SOURCE\n#include <stdio.h>\n#include <unistd.h>\n#include <sys/inotify.h>\n#include <sys/socket.h>\n\
         #include <sys/syscall.h>\n#include <sys/wait.h>\n#include <signal.h>\n#include <stdlib.h>\n\
         int main(void) {{ char b; {open}; puts(\"ready\"); fflush(stdout); while (read(0, &b, 1) == 1) {{}} return 0; }}"
    );
    let p = Program::start(&source);
    let dir = tempfile::tempdir().unwrap();
    let e = run(p.pid(), &dir.path().join("a.mcr"), false).unwrap_err();
    let text = e.to_string();
    assert!(matches!(e, DumpError::Collect(mcr_criu_lite::CollectError::Unsupported { .. })), "{text}");
    for w in words {
        assert!(text.contains(w), "{w}: {text}");
    }
    p.finish_ok();
}

#[test]
fn what_cannot_be_carried_is_refused_by_name() {
    refused("inotify_init()", &["descriptor 3", "inotify"]);
    refused("socket(AF_NETLINK, SOCK_RAW, 0)", &["descriptor 3", "socket, family 16"]);
    refused("if (!fork()) { read(0, &b, 1); _exit(0); }", &["child process"]);
    refused(
        "char p[128] = {8}; if (syscall(SYS_io_uring_setup, 4, p) < 0) dup(inotify_init())",
        &["descriptor 3"],
    );
}
