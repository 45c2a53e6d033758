//! A process becomes another one, or stays what it was, whoever dies meanwhile.

mod common;

use common::Program;
use mcr_criu_lite::tracee::commit::{self, Call, CommitPlan, Context, List, NewThread, ThreadPlan};
use mcr_criu_lite::tracee::fault;
use mcr_criu_lite::{FreezeOptions, Frozen};
use mcr_image::{Addr, Memory, Pid, Regs, Tid};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const WORDS: u64 = 100_000;
/// Where many processes are needed.
const FEW: u64 = 3000;
const STACK: u64 = 16384;

fn exe() -> PathBuf {
    static EXE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    EXE.get_or_init(|| common::build(include_str!("commit.c"))).1.clone()
}

/// The program with its addresses.
struct Target {
    p: Program,
    words: u64,
    start: u64,
    stacks: u64,
    blocks: u64,
    expected: u64,
    handler: u64,
    restorer: u64,
    slots: u64,
    workers: Vec<i32>,
    count: u64,
}

impl Target {
    fn start(threads: usize) -> Self {
        Self::start_with(threads, 1, WORDS)
    }

    /// `scale` makes all timeouts longer; so many words are written.
    fn start_with(threads: usize, scale: u32, count: u64) -> Self {
        Self::start_args(threads, &[&threads.to_string(), &scale.to_string(), &count.to_string()], count)
    }

    fn start_args(threads: usize, args: &[&str], count: u64) -> Self {
        let mut p = Program::spawn_with(&exe(), args);
        let a: Vec<u64> = p.line().split(' ').map(|w| u64::from_str_radix(w, 16).unwrap()).collect();
        let workers: Vec<i32> = p.line().split_whitespace().map(|w| w.parse().unwrap()).collect();
        assert_eq!(workers.len(), threads);
        let t = Self {
            words: a[0],
            start: a[1],
            stacks: a[2],
            blocks: a[3],
            expected: a[4],
            handler: a[5],
            restorer: a[6],
            slots: a[7],
            workers,
            count,
            p,
        };
        t.settle();
        t
    }

    /// Waits until every thread sleeps in a call.
    fn settle(&self) {
        let nrs = [232, 202, 230, 0, 271, 7, 202, 34];
        self.p.wait_blocked(self.p.pid(), libc::SYS_read);
        for (i, &tid) in self.workers.iter().enumerate() {
            let path = format!("/proc/{}/task/{tid}/syscall", self.p.pid());
            let ok = |s: &str| [nrs[i % 8], 35, 219].iter().any(|n| s.starts_with(&format!("{n} ")));
            while !ok(&std::fs::read_to_string(&path).unwrap()) {
                std::thread::yield_now();
            }
        }
    }

    fn freeze(&self) -> Frozen {
        Frozen::seize(Pid(self.p.pid()), &FreezeOptions::default()).unwrap()
    }

    /// The index of a thread in the new version.
    fn index(&self, tid: Tid) -> u64 {
        self.workers.iter().position(|&w| w == tid.0).map_or(0, |n| n as u64 + 1)
    }

    fn context(&self, i: u64, xstate: &[u8], like: &Regs) -> Context {
        let k = i + 1;
        let mut x = xstate.to_vec();
        let mut put = |at: usize, v: u64| x[at..at + 8].copy_from_slice(&v.to_le_bytes());
        put(160 + 16, k * 19);
        put(160 + 24, k * 23);
        put(160 + 240, k * 29);
        put(160 + 248, k * 31);
        x[24..28].copy_from_slice(&0x9f80u32.to_le_bytes());
        x[512] |= 3;
        Context {
            regs: Regs {
                rip: self.start,
                rsp: self.stacks + (i + 1) * STACK - 64,
                rdi: i,
                rbx: k * 3,
                rbp: k * 5,
                r12: k * 7,
                r13: k * 11,
                r14: k * 13,
                r15: k * 17,
                fs_base: self.blocks + i * 64,
                gs_base: 0,
                eflags: 0x202 | 0x45,
                orig_rax: u64::MAX,
                cs: like.cs,
                ss: like.ss,
                ..Regs::default()
            },
            xstate: x,
            at_call: false,
        }
    }

    /// A plan that makes every thread new, with `extra` further threads.
    fn plan(&self, f: &mut Frozen, extra: u64) -> CommitPlan {
        let mut plan = CommitPlan::default();
        for i in 0..self.count {
            let old = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1111;
            plan.writes.push((Addr(self.words + i * 64), (!old).to_le_bytes().to_vec()));
        }
        let mut xstate = Vec::new();
        let mut like = Regs::default();
        let all = self.workers.len() as u64 + 1;
        for n in 0..f.threads().len() {
            let t = &f.threads()[n];
            let i = self.index(t.tid());
            (xstate, like) = (t.xstate().unwrap(), t.regs().unwrap());
            let mut tp = ThreadPlan {
                tid: t.tid(),
                becomes: self.context(i, &xstate, &like),
                sigmask: i << 40,
                ..ThreadPlan::default()
            };
            let (rseq, len, sig, _) = t.rseq().unwrap();
            let args = |flags: u64| [rseq.0, u64::from(len), flags, u64::from(sig)];
            tp.before.push(Call::new(libc::SYS_rseq, &args(1)).undo(libc::SYS_rseq, &args(0)));
            tp.calls.push(self.altstack(&mut plan, i));
            plan.writes.push((Addr(self.blocks + i * 64), (self.blocks + i * 64).to_le_bytes().to_vec()));
            plan.threads.push(tp);
        }
        for i in all..all + extra {
            let calls = vec![self.altstack(&mut plan, i)];
            plan.writes.push((Addr(self.blocks + i * 64), (self.blocks + i * 64).to_le_bytes().to_vec()));
            plan.new_threads.push(NewThread {
                becomes: self.context(i, &xstate, &like),
                sigmask: i << 40,
                calls,
                tid_word: Some(Addr(self.blocks + i * 64 + 8)),
            });
        }
        plan.writes.push((Addr(self.expected), ((all + extra) as u32).to_le_bytes().to_vec()));
        // A descriptor, a handler, and memory.
        plan.calls.push(Call::new(libc::SYS_dup3, &[1, 200, 0]).undo(libc::SYS_close, &[200]));
        const SA_RESTORER: u64 = 0x0400_0000;
        let act: Vec<u8> =
            [self.handler, SA_RESTORER, self.restorer, 0].into_iter().flat_map(u64::to_le_bytes).collect();
        let (new, old) = (plan.put(&act), plan.put(&[0; 32]));
        let usr1 = libc::SIGUSR1 as u64;
        plan.calls.push(
            Call::new(libc::SYS_rt_sigaction, &[usr1, new, old, 8])
                .undo(libc::SYS_rt_sigaction, &[usr1, old, 0, 8]),
        );
        plan.calls.push(
            Call::new(libc::SYS_mmap, &[0, 8192, 3, 0x22, u64::MAX, 0])
                .undo(libc::SYS_munmap, &[commit::result_of(0), 8192]),
        );
        plan.calls.push(Call::new(libc::SYS_mprotect, &[commit::result_of(1), 4096, 1]));
        plan.calls.push(Call::new(libc::SYS_close, &[9999]).ignore());
        // A file is mapped; when this is undone, the descriptor has been closed already.
        let path = plan.put(b"/proc/self/exe\0");
        plan.calls.push(
            Call::new(libc::SYS_openat, &[libc::AT_FDCWD as u64, path, 0])
                .undo(libc::SYS_close, &[commit::result_of(0)]),
        );
        plan.calls.push(
            Call::new(libc::SYS_mmap, &[0, 4096, 1, 2, commit::result_of(1), 0])
                .undo(libc::SYS_munmap, &[commit::result_of(0), 4096]),
        );
        plan.calls.push(Call::new(libc::SYS_close, &[commit::result_of(2)]));
        plan.after.push(Call::new(libc::SYS_getpid, &[]));
        plan.after.push(Call::new(libc::SYS_close, &[9999]));
        plan
    }

    /// sigaltstack to the thread's stack; taken back with what was set before.
    fn altstack(&self, plan: &mut CommitPlan, i: u64) -> Call {
        let ss: Vec<u8> =
            [self.stacks + i * STACK, 0, STACK].into_iter().flat_map(u64::to_le_bytes).collect();
        let (new, old) = (plan.put(&ss), plan.put(&[0; 24]));
        Call::new(libc::SYS_sigaltstack, &[new, old]).undo(libc::SYS_sigaltstack, &[old, 0])
    }

    /// What the program says about itself.
    fn ask(&mut self) -> String {
        self.p.tell("?");
        self.p.line()
    }
}

fn number(line: &str, name: &str) -> i64 {
    let mut w = line.split(' ');
    w.by_ref().find(|&x| x == name).unwrap_or_else(|| panic!("no {name} in {line:?}"));
    w.next().unwrap().parse().unwrap()
}

fn commits(threads: usize, extra: u64) {
    let mut t = Target::start(threads);
    let mut f = t.freeze();
    let plan = t.plan(&mut f, extra);
    let out = commit::stage(&mut f, &plan).unwrap().arm().unwrap().commit().unwrap();
    drop(f);
    assert!(out.committed, "{out:?}");
    assert_eq!(out.after, [i64::from(t.p.pid()), -i64::from(libc::EBADF)]);
    assert_eq!(out.calls.len(), plan.calls.len());
    let line = t.ask();
    assert_eq!(line, format!("new bad 0 threads {} signals 0", threads as u64 + 1 + extra));
    // From outside: the tids are the same, the new ones are where they belong.
    let mut f = t.freeze();
    let mem = f.memory().clone();
    let mut want: Vec<i32> = t.workers.clone();
    want.push(t.p.pid());
    for (n, tid) in out.new_threads.iter().enumerate() {
        let i = threads as u64 + 1 + n as u64;
        assert_eq!(mem.u64(Addr(t.blocks + i * 64 + 8)).unwrap(), tid.0 as u64);
        want.push(tid.0);
    }
    let mut have: Vec<i32> = f.threads().iter().map(|t| t.tid().0).collect();
    have.sort_unstable();
    want.sort_unstable();
    assert_eq!(have, want);
    for (i, tid) in t.workers.iter().enumerate() {
        assert_eq!(mem.u64(Addr(t.slots + (i as u64 + 1) * 120 + 104)).unwrap(), *tid as u64);
    }
    // Nothing of the area stays.
    let left: Vec<_> =
        f.memory().maps().unwrap().into_iter().filter(|m| m.name.starts_with(b"/memfd:")).collect();
    assert_eq!(left.len(), 1);
    assert_eq!((left[0].start, left[0].end.since(left[0].start)), out.area);
    assert_eq!((out.area.1, left[0].prot), (4096, 5));
    assert_eq!(commit::sweep(&mut f).unwrap(), out.area.1);
    assert!(!f.memory().maps().unwrap().iter().any(|m| m.name.starts_with(b"/memfd:")));
    f.thaw().unwrap();
    assert_eq!(t.ask(), line);
    t.p.finish_ok();
}

#[test]
fn a_process_becomes_wholly_new() {
    for threads in [0, 7, 63] {
        commits(threads, 0);
    }
}

#[test]
fn threads_that_only_the_new_version_has_are_made() {
    commits(0, 3);
    commits(5, 8);
}

#[test]
fn a_stack_without_room_for_a_frame_will_do() {
    let mut t = Target::start_with(3, 1, FEW);
    let mut f = t.freeze();
    let mut plan = t.plan(&mut f, 0);
    // The page below the new stack pointer of one thread cannot be written.
    let page = (t.stacks + 2 * STACK + 8192) & !4095;
    plan.threads.iter_mut().find(|p| p.becomes.regs.rdi == 2).unwrap().becomes.regs.rsp = page + 1024;
    plan.calls.push(
        Call::new(libc::SYS_mprotect, &[page - 4096, 4096, 0])
            .undo(libc::SYS_mprotect, &[page - 4096, 4096, 3]),
    );
    let out = commit::stage(&mut f, &plan).unwrap().arm().unwrap().commit().unwrap();
    drop(f);
    assert!(out.committed);
    assert_eq!(t.ask(), "new bad 0 threads 4 signals 0");
    // Then the blocks stay until they are swept.
    let mut f = t.freeze();
    assert!(commit::sweep(&mut f).unwrap() > out.area.1);
    assert_eq!(commit::sweep(&mut f).unwrap(), 0);
    drop(f);
    assert_eq!(t.ask(), "new bad 0 threads 4 signals 0");
    t.p.finish_ok();
}

/// Everything of a frozen process that an abort must leave: memory, maps, registers, masks, descriptors.
#[derive(PartialEq)]
struct Picture {
    maps: Vec<String>,
    memory: Vec<(u64, Vec<u8>)>,
    threads: Vec<(Regs, Vec<u8>, u64, u64)>,
    fds: Vec<(String, PathBuf)>,
}

fn picture(f: &Frozen) -> Picture {
    let mem = f.memory();
    let maps: Vec<_> = mem.maps().unwrap();
    let rseq: Vec<u64> = f.threads().iter().map(|t| t.rseq().unwrap().0.0).collect();
    let writable = |m: &&mcr_criu_lite::procfs::maps::MapsLine| m.prot & 2 != 0 && !m.name.starts_with(b"[v");
    let memory = maps.iter().filter(writable).map(|m| {
        let mut b = mem.bytes(m.start, m.end.since(m.start) as usize).unwrap();
        // The kernel writes to the registered structure as it likes.
        for r in rseq.iter().filter(|&&r| (m.start.0..m.end.0).contains(&r)) {
            b[(r - m.start.0) as usize..][..32].fill(0);
        }
        (m.start.0, b)
    });
    let threads = f.threads().iter().map(|t| {
        let r = t.regs().unwrap();
        // How often a call was restarted is not a state.
        let (rax, orig_rax) = (0, u64::from(r.orig_rax as i64 >= 0));
        (Regs { rax, orig_rax, ..r }, t.xstate().unwrap(), t.sigmask().unwrap(), t.rseq().unwrap().0.0)
    });
    let mut fds: Vec<(String, PathBuf)> = std::fs::read_dir(format!("/proc/{}/fd", f.pid()))
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| (e.file_name().to_string_lossy().into_owned(), std::fs::read_link(e.path()).unwrap()))
        .collect();
    fds.sort();
    Picture {
        maps: maps.iter().map(|m| format!("{m:?}")).collect(),
        memory: memory.collect(),
        threads: threads.collect(),
        fds,
    }
}

fn same(before: &Picture, after: &Picture, what: &str) {
    assert_eq!(before.maps, after.maps, "{what}");
    assert_eq!(before.fds, after.fds, "{what}");
    for ((at, b), (_, a)) in before.memory.iter().zip(&after.memory) {
        if let Some(n) = b.iter().zip(a).position(|(x, y)| x != y) {
            panic!("{what}: byte at {:#x} was {:#x}, is {:#x}", at + n as u64, b[n], a[n]);
        }
    }
    for (b, a) in before.threads.iter().zip(&after.threads) {
        assert_eq!((b.0, b.2, b.3), (a.0, a.2, a.3), "{what}");
        assert_eq!(b.1, a.1, "{what}: vector registers");
    }
    assert_eq!(before.threads.len(), after.threads.len(), "{what}");
}

fn bad_call() -> Call {
    Call::new(libc::SYS_close, &[9999])
}

#[test]
fn a_failed_call_leaves_the_process_byte_for_byte() {
    for threads in [0, 8, 63] {
        let mut t = Target::start_with(threads, 1000, WORDS);
        let mut f = t.freeze();
        let whole = t.plan(&mut f, 4);
        let before = picture(&f);
        f.thaw().unwrap();
        let last = threads;
        type Break = (&'static str, fn(&mut CommitPlan, usize), fn(&CommitPlan, usize) -> List);
        let cases: [Break; 7] = [
            ("process", |p, _| p.calls.push(bad_call()), |_, _| List::Calls),
            ("page", |p, _| p.writes.push((Addr(4096), vec![1])), |_, _| List::Page(Addr(4096))),
            (
                "code page",
                |p, _| p.writes.push((Addr(p.threads[0].becomes.regs.rip), vec![1])),
                |p, _| List::Page(Addr(p.threads[0].becomes.regs.rip & !4095)),
            ),
            ("before", |p, n| p.threads[n].before.push(bad_call()), |p, n| List::Before(p.threads[n].tid)),
            ("thread", |p, n| p.threads[n].calls.push(bad_call()), |p, n| List::Thread(p.threads[n].tid)),
            ("leader", |p, _| p.threads[0].calls.push(bad_call()), |p, _| List::Thread(p.threads[0].tid)),
            ("new thread", |p, _| p.new_threads[3].calls.push(bad_call()), |_, _| List::NewThread(3)),
        ];
        for (what, spoil, want) in cases {
            let mut plan = whole.clone();
            // Any thread can lead.
            plan.threads.rotate_left(last / 2);
            spoil(&mut plan, last);
            let mut f = t.freeze();
            let out = commit::stage(&mut f, &plan).unwrap().arm().unwrap().commit().unwrap();
            drop(f);
            assert!(!out.committed, "{what}");
            assert_eq!(out.failure.unwrap().list, want(&plan, last), "{what}: {}", out.failure.unwrap());
            t.settle();
            let mut f = t.freeze();
            assert_eq!(commit::sweep(&mut f).unwrap(), out.area.1, "{what}");
            same(&before, &picture(&f), what);
            f.thaw().unwrap();
            t.settle();
        }
        // Taken back before anything ran.
        for armed in [false, true] {
            let mut f = t.freeze();
            let staged = commit::stage(&mut f, &whole).unwrap();
            if armed {
                drop(staged.arm().unwrap());
            } else {
                drop(staged);
            }
            same(&before, &picture(&f), if armed { "armed" } else { "staged" });
            f.thaw().unwrap();
            t.settle();
        }
        let line = t.ask();
        assert!(line.starts_with("old bad 0 eintr 0 "), "{line}");
        t.p.finish_ok();
    }
}

#[test]
fn a_thread_that_cannot_be_made_leaves_the_process_as_it_was() {
    let mut t = Target::start_args(8, &["8", "1000", "3000", "no-clone"], FEW);
    let mut f = t.freeze();
    let mut plan = t.plan(&mut f, 2);
    let before = picture(&f);
    let e = commit::stage(&mut f, &plan).err().unwrap().to_string();
    assert!(e.contains("has a seccomp filter"), "{e}");
    plan.filters_allow = true;
    let out = commit::stage(&mut f, &plan).unwrap().arm().unwrap().commit().unwrap();
    drop(f);
    assert!(!out.committed);
    assert_eq!(out.failure.unwrap().to_string(), "making new thread 0: EAGAIN: Try again");
    t.settle();
    let mut f = t.freeze();
    commit::sweep(&mut f).unwrap();
    same(&before, &picture(&f), "clone");
    drop(f);
    assert!(t.ask().starts_with("old bad 0 eintr 0 "));
    t.p.finish_ok();
}

#[test]
fn plans_that_do_not_fit_are_refused_before_anything_is_touched() {
    let mut t = Target::start_with(2, 1000, FEW);
    let mut f = t.freeze();
    let whole = t.plan(&mut f, 1);
    let before = picture(&f);
    type Break = (&'static str, fn(&mut CommitPlan));
    let cases: [Break; 6] = [
        ("it names the threads", |p| drop(p.threads.pop())),
        ("has rip 0x0", |p| p.threads[1].becomes.regs.rip = 0),
        ("has fs_base 0x8000000000000000", |p| p.new_threads[0].becomes.regs.fs_base = 1 << 63),
        ("100 bytes of extended state", |p| p.threads[0].becomes.xstate.truncate(100)),
        ("points to byte 1000000", |p| p.after[0].args[0] = commit::data(1_000_000)),
        ("the result of the call 1 before it", |p| p.calls[0].args[0] = commit::result_of(1)),
    ];
    for (text, spoil) in cases {
        let mut plan = whole.clone();
        spoil(&mut plan);
        let e = commit::stage(&mut f, &plan).err().expect(text).to_string();
        assert!(e.contains(text), "{e}");
        same(&before, &picture(&f), text);
    }
    drop(f);
    t.settle();
    assert!(t.ask().starts_with("old bad 0 eintr 0 "));
    t.p.finish_ok();
}

#[test]
fn the_end_of_the_process_is_no_verdict() {
    let mut t = Target::start_with(8, 1, FEW);
    let mut f = t.freeze();
    let plan = t.plan(&mut f, 1);
    let armed = commit::stage(&mut f, &plan).unwrap().arm().unwrap();
    t.p.child.kill().unwrap();
    let e = armed.commit().unwrap_err();
    assert!(matches!(e, commit::CommitError::Ended { .. }), "{e}");
}

/// One commit that fails in the last thread's last call.
fn abort(t: &Target) {
    let mut f = t.freeze();
    commit::sweep(&mut f).unwrap();
    let mut plan = t.plan(&mut f, 1);
    plan.threads.last_mut().unwrap().calls.push(bad_call());
    let out = commit::stage(&mut f, &plan).unwrap().arm().unwrap().commit().unwrap();
    assert!(!out.committed);
}

#[test]
fn timeouts_run_on_over_many_aborted_commits() {
    let mut t = Target::start(8);
    // Each sleep is longer than the time between two commits: one that began anew would never end.
    let begin = number(&t.ask(), "sleeps");
    let mut rounds = 0;
    while number(&t.ask(), "sleeps") < begin + 6 {
        abort(&t);
        rounds += 1;
        assert!(rounds < 10_000, "no sleep ends");
    }
    let line = t.ask();
    assert!(line.starts_with("old bad 0 eintr 0 "), "{line}");
    t.p.finish_ok();
}

#[test]
fn signals_that_come_while_parked_are_not_lost() {
    for (signal, hits) in [
        (libc::SIGUSR1, "1 0 1 1 1 1 1 1"),
        (libc::SIGUSR2, "1 0 1 0 1 1 1 1"),
        (libc::SIGCHLD, "0 0 0 0 0 0 0 0"),
    ] {
        let mut t = Target::start_with(8, 1000, FEW);
        let mut f = t.freeze();
        let mut plan = t.plan(&mut f, 1);
        plan.calls.push(bad_call());
        let armed = commit::stage(&mut f, &plan).unwrap().arm().unwrap();
        for &tid in &t.workers {
            // SAFETY: our own child's threads.
            assert_eq!(unsafe { libc::syscall(libc::SYS_tgkill, t.p.pid(), tid, signal) }, 0);
        }
        assert!(!armed.commit().unwrap().committed);
        drop(f);
        t.settle();
        let line = t.ask();
        let signals = if signal == libc::SIGCHLD { 0 } else { 8 };
        assert!(line.starts_with("old bad 0 "), "{line}");
        assert!(line.ends_with(&format!(" signals {signals} hits {hits}")), "signal {signal}: {line}");
        t.p.finish_ok();
    }
    // The new version's handler gets it.
    let mut t = Target::start(8);
    let mut f = t.freeze();
    let plan = t.plan(&mut f, 1);
    let armed = commit::stage(&mut f, &plan).unwrap().arm().unwrap();
    // SAFETY: our own child.
    unsafe { libc::kill(t.p.pid(), libc::SIGUSR1) };
    assert!(armed.commit().unwrap().committed);
    drop(f);
    assert_eq!(t.ask(), "new bad 0 threads 10 signals 1");
    t.p.finish_ok();
}

/// Threads that compute with integers, vectors and the red zone under a storm of signals, and a main thread that
/// polls with a timeout.
const BUSY: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>
static volatile int stop, bad; static volatile long taken, polls; long scratch[4096];
static void on(int s) { (void)s; __atomic_add_fetch(&taken, 1, 5); }
static double work(double x) { for (int i = 0; i < 2000; i++) x = x * 1.0000001 + i / (x + 1); return x; }
static long leaf(long a) { volatile long z[12]; for (int i = 0; i < 12; i++) z[i] = a + i; long r = 0;
    for (int n = 0; n < 50; n++) for (int i = 0; i < 12; i++) r += z[i]; return r; }
static void *busy(void *a) { double want = work(1.5); unsigned long h = 1;
    while (!stop) { if (work(1.5) != want) bad = 1; h = h * 31 + 7; if (leaf(h) != (long)(50 * (12 * h + 66))) bad = 2; } return 0; }
static long ns(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000L + t.tv_nsec; }
int main(void) {
    struct sigaction sa = { .sa_handler = on, .sa_flags = SA_RESTART }; sigaction(SIGUSR1, &sa, 0);
    pthread_t t[4]; for (int i = 0; i < 4; i++) pthread_create(&t[i], 0, busy, 0);
    printf("ready\n%lx\n", (long)scratch); fflush(stdout);
    for (;;) { struct pollfd f = { 0, POLLIN, 0 }; long b = ns(); int r = poll(&f, 1, 100);
        if (r > 0) break;
        if (r < 0 && errno != EINTR) bad = 3;
        if (r == 0) { polls++; if (ns() - b < 99000000) bad = 4; } }
    stop = 1; for (int i = 0; i < 4; i++) pthread_join(t[i], 0);
    for (int i = 0; i < 4096; i++) if (scratch[i]) bad = 5;
    printf("bad %d taken %ld polls %ld\n", bad, taken, polls); return bad;
}
"#;

#[test]
fn computing_threads_under_signals_do_not_notice_an_aborted_commit() {
    let mut p = Program::start(BUSY);
    let scratch = u64::from_str_radix(&p.line(), 16).unwrap();
    let mut sent = 0;
    for round in 0..150 {
        let mut f = Frozen::seize(Pid(p.pid()), &FreezeOptions::default()).unwrap();
        commit::sweep(&mut f).unwrap();
        let mut plan = CommitPlan::default();
        for t in f.threads() {
            let becomes = Context::read(t).unwrap();
            plan.threads.push(ThreadPlan { tid: t.tid(), becomes, ..ThreadPlan::default() });
        }
        let n = plan.threads.len();
        plan.threads.rotate_left(round % n);
        plan.threads[n - 1].calls.push(bad_call());
        plan.writes = (0..4096).map(|i| (Addr(scratch + i * 8), vec![0xff; 8])).collect();
        let armed = commit::stage(&mut f, &plan).unwrap().arm().unwrap();
        if round % 3 != 0 {
            // SAFETY: our own child.
            unsafe { libc::kill(p.pid(), libc::SIGUSR1) };
            sent += 1;
        }
        let out = armed.commit().unwrap();
        assert_eq!(out.failure.unwrap().list, List::Thread(plan.threads[n - 1].tid));
        drop(f);
        if round % 5 == 0 {
            // SAFETY: our own child.
            unsafe { libc::kill(p.pid(), libc::SIGUSR1) };
            sent += 1;
        }
    }
    p.tell("x");
    let out = p.finish_ok();
    assert!(out.starts_with("bad 0 "), "{out}");
    let taken = number(out.trim(), "taken");
    assert!(taken > sent / 2 && taken <= sent, "{taken} of {sent} signals");
}

/// What an engine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A commit.
    Commit,
    /// One that fails in the end.
    Fail,
    /// It arms and thinks better of it.
    Drop,
}

/// An engine of its own process that commits and sweeps. It dies before its `n`-th call on the target; 0: it
/// does not.
fn engine(t: &Target, n: u64, way: Way) -> libc::pid_t {
    // SAFETY: the child calls nothing but our own code and ends by _exit; it takes no lock that another thread of
    // this test holds (allocation is safe after fork in glibc).
    let child = unsafe { libc::fork() };
    if child == 0 {
        let whole = std::panic::catch_unwind(|| {
            if n > 0 {
                fault::kill_before(fault::passed() + n);
            }
            let mut f = t.freeze();
            commit::sweep(&mut f).unwrap();
            let mut plan = t.plan(&mut f, 2);
            if way == Way::Fail {
                plan.new_threads[1].calls.push(bad_call());
            }
            let armed = commit::stage(&mut f, &plan).unwrap().arm().unwrap();
            if way == Way::Drop {
                drop(armed);
            } else {
                assert_eq!(armed.commit().unwrap().committed, way == Way::Commit);
            }
            drop(f);
            let mut f = t.freeze();
            commit::sweep(&mut f).unwrap();
            f.thaw().unwrap();
        });
        // SAFETY: ends the child.
        unsafe { libc::_exit(if whole.is_ok() { 0 } else { 2 }) };
    }
    child
}

/// Its wait status.
fn reap(engine: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: our child.
    assert_eq!(unsafe { libc::waitpid(engine, &mut status, 0) }, engine);
    status
}

/// Asks the process; it must be wholly old or wholly new. A new one is replaced.
fn judge(t: &mut Target, threads: usize, what: &str) -> bool {
    let line = t.ask();
    if line.starts_with("new") {
        assert_eq!(line, format!("new bad 0 threads {} signals 0", threads + 3), "{what}");
        std::mem::replace(t, Target::start_with(threads, 1, FEW)).p.finish_ok();
        return true;
    }
    assert!(line.starts_with("old bad 0 "), "{what}: {line}");
    t.settle();
    let tids = mcr_criu_lite::tids(Pid(t.p.pid())).unwrap();
    assert_eq!(tids.len(), threads + 1, "{what}");
    false
}

#[test]
fn an_engine_killed_before_each_of_its_calls_leaves_old_or_new() {
    // The first call after which the process is new: before that a plan that fails makes no difference.
    let mut turn = 0u64;
    for way in [Way::Commit, Way::Fail, Way::Drop] {
        let threads = 3;
        let mut t = Target::start_with(threads, 1, FEW);
        let (mut old, mut new, mut whole) = (0, 0, 0);
        let mut n = if way == Way::Commit { 0 } else { turn - 20 };
        // How often a wait looks differs from run to run: the last calls come at several numbers.
        while whole < 12 {
            n += 1;
            let status = reap(engine(&t, n, way));
            let done = libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0;
            assert!(done || libc::WIFSIGNALED(status), "engine {n}: status {status:#x}");
            let is_new = judge(&mut t, threads, &format!("killed before call {n}"));
            *(if is_new { &mut new } else { &mut old }) += 1;
            if is_new && turn == 0 {
                turn = n;
            }
            assert!(!done || is_new == (way == Way::Commit));
            whole += u32::from(done);
        }
        println!("killed before each call, {way:?}: {old} old, {new} new");
        assert!(old > 20 && (new > 5) == (way == Way::Commit));
        let mut f = t.freeze();
        commit::sweep(&mut f).unwrap();
        assert!(!f.memory().maps().unwrap().iter().any(|m| m.name.starts_with(b"/memfd:")));
        assert!(!picture(&f).fds.iter().any(|(_, to)| to.to_string_lossy().contains("memfd")));
        f.thaw().unwrap();
        t.p.finish_ok();
    }
}

#[test]
fn an_engine_killed_at_any_instant_leaves_old_or_new() {
    let rounds = std::env::var("MCR_COMMIT_ROUNDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60u64);
    let threads = std::env::var("MCR_COMMIT_THREADS").ok().and_then(|s| s.parse().ok()).unwrap_or(8);
    let mut t = Target::start_with(threads, 1, FEW);
    // How long an engine takes, to spread the instants.
    let begin = Instant::now();
    assert_eq!(reap(engine(&t, 0, Way::Fail)), 0);
    let whole = begin.elapsed().as_nanos() as u64 * 3 / 2;
    assert!(!judge(&mut t, threads, "undisturbed"));
    let (mut old, mut new) = (0, 0);
    for n in 0..rounds {
        let way = [Way::Commit, Way::Fail, Way::Commit, Way::Drop][n as usize % 4];
        let at = Duration::from_nanos(n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % whole);
        let begin = Instant::now();
        let e = engine(&t, 0, way);
        while begin.elapsed() < at {
            std::hint::spin_loop();
        }
        // SAFETY: our child; not reaped yet.
        unsafe { libc::kill(e, libc::SIGKILL) };
        reap(e);
        let is_new = judge(&mut t, threads, &format!("round {n}, killed after {at:?}"));
        assert!(!is_new || way == Way::Commit);
        *(if is_new { &mut new } else { &mut old }) += 1;
    }
    println!("killed at {rounds} instants: {old} old, {new} new");
    t.p.finish_ok();
}

#[test]
#[ignore = "measures: run with --nocapture on a quiet machine"]
fn times() {
    println!("threads   words  stage µs  arm µs  commit µs  (best of 10)");
    for (threads, words) in [(0, FEW), (7, FEW), (63, FEW), (0, WORDS), (7, WORDS), (63, WORDS)] {
        let mut best = [u128::MAX; 3];
        for _ in 0..10 {
            let t = Target::start_with(threads, 1, words);
            let mut f = t.freeze();
            let plan = t.plan(&mut f, 0);
            // The instructions for injections are known by then.
            f.syscall(Tid(t.p.pid()), libc::SYS_getpid, &[]).unwrap();
            let b = Instant::now();
            let staged = commit::stage(&mut f, &plan).unwrap();
            let c = Instant::now();
            let armed = staged.arm().unwrap();
            let d = Instant::now();
            let out = armed.commit().unwrap();
            assert!(out.committed);
            for (to, v) in best.iter_mut().zip([c - b, d - c, out.took]) {
                *to = (*to).min(v.as_micros());
            }
        }
        println!("{:7}  {words:6}  {:8}  {:6}  {:9}", threads + 1, best[0], best[1], best[2]);
    }
    println!("    MiB  stage µs  commit µs  (fresh memory, one thread, one run)");
    for mb in [1, 8, 32u64] {
        let t = Target::start_with(0, 1, FEW);
        let mut f = t.freeze();
        let mut plan = t.plan(&mut f, 0);
        let (at, len) = (0x1000_0000_0000, mb << 20);
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        plan.calls.push(
            Call::new(libc::SYS_mmap, &[at, len, 3, flags, u64::MAX, 0]).undo(libc::SYS_munmap, &[at, len]),
        );
        plan.writes.push((Addr(at), vec![7; len as usize]));
        f.syscall(Tid(t.p.pid()), libc::SYS_getpid, &[]).unwrap();
        let b = Instant::now();
        let staged = commit::stage(&mut f, &plan).unwrap();
        let c = Instant::now();
        let out = staged.arm().unwrap().commit().unwrap();
        assert!(out.committed);
        println!("{mb:7}  {:8}  {:9}", (c - b).as_micros(), out.took.as_micros());
    }
}
