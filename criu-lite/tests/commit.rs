//! A process becomes another one, or stays what it was, whoever dies meanwhile.

mod common;

use common::Program;
use mcr_criu_lite::tracee::commit::{self, Call, CommitPlan, Context, NewThread, ThreadPlan};
use mcr_criu_lite::{FreezeOptions, Frozen};
use mcr_image::{Addr, Memory, Pid, Regs, Tid};
use std::path::PathBuf;
use std::sync::OnceLock;

const WORDS: u64 = 100_000;
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
}

impl Target {
    fn start(threads: usize) -> Self {
        let mut p = Program::spawn_with(&exe(), &[&threads.to_string()]);
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
        for i in 0..WORDS {
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
        let pair = plan.put(&[0; 8]);
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
        plan.after.push(Call::new(libc::SYS_getpid, &[]));
        plan.after.push(Call::new(libc::SYS_close, &[9999]));
        let _ = pair;
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
    assert!(f.memory().maps().unwrap().iter().any(|m| m.start == out.area.0));
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
