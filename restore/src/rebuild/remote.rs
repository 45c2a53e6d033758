//! A thread of the process under construction: ptrace(2) requests, injected system calls, its memory.
//!
//! Nothing has to be put back in it: until the release it has no life of its own, and it dies with the engine
//! (PTRACE_O_EXITKILL). System calls run by PTRACE_SYSCALL, whose stops are no signals, so neither mask nor
//! handlers of the process change under them.
#![allow(unsafe_code)]

use mcr_image::{Addr, Regs, Tid};
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

/// Machine code that executes `r13` calls from the table at `r12` (eight words each: number, six arguments,
/// result) and then traps.
pub(crate) const AGENT: &[u8] = &[
    0x4d, 0x85, 0xed, // test r13, r13
    0x74, 0x32, // jz done
    0x49, 0x8b, 0x04, 0x24, // mov rax, [r12]
    0x49, 0x8b, 0x7c, 0x24, 0x08, // mov rdi, [r12+8]
    0x49, 0x8b, 0x74, 0x24, 0x10, // mov rsi, [r12+16]
    0x49, 0x8b, 0x54, 0x24, 0x18, // mov rdx, [r12+24]
    0x4d, 0x8b, 0x54, 0x24, 0x20, // mov r10, [r12+32]
    0x4d, 0x8b, 0x44, 0x24, 0x28, // mov r8, [r12+40]
    0x4d, 0x8b, 0x4c, 0x24, 0x30, // mov r9, [r12+48]
    0x0f, 0x05, // syscall
    0x49, 0x89, 0x44, 0x24, 0x38, // mov [r12+56], rax
    0x49, 0x83, 0xc4, 0x40, // add r12, 64
    0x49, 0xff, 0xcd, // dec r13
    0xeb, 0xc9, // jmp to the test
    0xcc, // done: int3
];
/// Where in [`AGENT`] the `syscall` instruction is.
pub(super) const AGENT_SYSCALL: u64 = 39;
/// Mask while under construction: everything but SIGTRAP, with which a batch ends (blocked, the kernel would
/// reset its handler, force_sig_info in kernel/signal.c).
pub(super) const BUILD_MASK: u64 = !(1 << (libc::SIGTRAP - 1));

/// A system call to execute.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Number.
    pub nr: i64,
    /// Arguments.
    pub args: [u64; 6],
}

impl Call {
    /// A call with up to six arguments; the rest is 0.
    #[must_use]
    pub fn new(nr: i64, args: &[u64]) -> Self {
        let mut a = [0; 6];
        a[..args.len()].copy_from_slice(args);
        Self { nr, args: a }
    }
}

/// Something that executes system calls in a stopped process. Results are the kernel's (negative errno).
pub trait Inject {
    /// One call.
    fn inject(&mut self, call: Call) -> io::Result<i64>;
    /// Many calls in order; all are executed whatever they return.
    fn inject_all(&mut self, calls: &[Call]) -> io::Result<Vec<i64>> {
        calls.iter().map(|c| self.inject(*c)).collect()
    }
    /// Writes memory of the process.
    fn poke(&mut self, at: Addr, bytes: &[u8]) -> io::Result<()>;
    /// Reads memory of the process.
    fn peek(&mut self, at: Addr, bytes: &mut [u8]) -> io::Result<()>;
    /// Memory of the process that calls may use for their arguments until the next call of `scratch`.
    fn scratch(&mut self) -> io::Result<(Addr, usize)>;

    /// One call, its error as an error.
    fn call(&mut self, nr: i64, args: &[u64]) -> io::Result<u64> {
        result(self.inject(Call::new(nr, args))?)
    }
    /// One call whose first argument that is `None` points at `bytes`.
    fn call_with(&mut self, nr: i64, args: &[Option<u64>], bytes: &[u8]) -> io::Result<u64> {
        let (at, room) = self.scratch()?;
        if bytes.len() > room {
            return Err(io::Error::other("argument larger than the scratch memory"));
        }
        self.poke(at, bytes)?;
        let args: Vec<u64> = args.iter().map(|a| a.unwrap_or(at.0)).collect();
        self.call(nr, &args)
    }
}

/// A kernel result to a result.
pub fn result(r: i64) -> io::Result<u64> {
    if (-4095..0).contains(&r) { Err(io::Error::from_raw_os_error(-r as i32)) } else { Ok(r as u64) }
}

/// Where injected calls execute and put their data: memory outside of everything the image maps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Island {
    pub(super) start: u64,
    pub(super) len: u64,
    /// Address of a `syscall` instruction.
    pub(super) syscall: u64,
    /// Whether [`AGENT`] is at `start`.
    pub(super) agent: bool,
}

impl Island {
    fn table(self) -> (Addr, usize) {
        let half = (self.len - 4096) / 2;
        (Addr(self.start + 4096), half as usize)
    }
    fn data(self) -> (Addr, usize) {
        let half = (self.len - 4096) / 2;
        (Addr(self.start + 4096 + half), half as usize)
    }
}

/// One traced, stopped thread. Usable only from the thread of the engine that seized it.
#[derive(Debug)]
pub struct Remote {
    tid: Tid,
    mem: Arc<File>,
    pub(super) island: Island,
    _here: PhantomData<*const ()>,
}

fn ptrace(req: u32, tid: Tid, addr: usize, data: usize) -> io::Result<i64> {
    // SAFETY: the callers below pass numbers, or pointers to live buffers of the size that the request uses.
    let r = unsafe { libc::ptrace(req, tid.0, addr, data) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r) }
}

fn waitpid(tid: Tid) -> io::Result<i32> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a live int.
        let r = unsafe { libc::waitpid(tid.0, &raw mut status, libc::__WALL) };
        if r == tid.0 {
            return Ok(status);
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// Options while under construction.
const OPTIONS: i32 = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE;

impl Remote {
    /// Takes hold of a child of ours and stops it.
    pub(super) fn seize(tid: Tid, syscall: u64) -> io::Result<Self> {
        ptrace(libc::PTRACE_SEIZE, tid, 0, OPTIONS as usize)?;
        ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0)?;
        let mem = File::options().read(true).write(true).open(format!("/proc/{tid}/mem"))?;
        let island = Island { start: 0, len: 0, syscall, agent: false };
        let me = Self { tid, mem: Arc::new(mem), island, _here: PhantomData };
        me.wait_stop()?;
        Ok(me)
    }

    /// A thread that PTRACE_O_TRACECLONE has attached.
    fn attached(&self, tid: Tid) -> io::Result<Self> {
        let new = Self { tid, mem: Arc::clone(&self.mem), island: self.island, _here: PhantomData };
        new.wait_stop()?;
        Ok(new)
    }

    /// Its thread id.
    #[must_use]
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// `/proc/TID/mem`, for bulk writes.
    #[must_use]
    pub fn memory(&self) -> &Arc<File> {
        &self.mem
    }

    /// Waits for a stop and returns its status; its end is an error.
    fn wait_stop(&self) -> io::Result<i32> {
        let status = waitpid(self.tid)?;
        if libc::WIFSTOPPED(status) {
            return Ok(status);
        }
        let how = if libc::WIFSIGNALED(status) {
            format!("was killed by signal {}", libc::WTERMSIG(status))
        } else {
            format!("exited with status {}", libc::WEXITSTATUS(status))
        };
        Err(io::Error::other(format!("thread {} {how} while it was being built", self.tid)))
    }

    /// General registers.
    pub fn regs(&self) -> io::Result<Regs> {
        let mut w = [0u64; 27];
        ptrace(libc::PTRACE_GETREGS, self.tid, 0, w.as_mut_ptr() as usize)?;
        Ok(Regs::from_words(&w).unwrap_or_default())
    }

    /// Sets the general registers.
    pub fn set_regs(&self, regs: &Regs) -> io::Result<()> {
        let w = regs.to_words();
        ptrace(libc::PTRACE_SETREGS, self.tid, 0, w.as_ptr() as usize).map(drop)
    }

    /// Sets the extended state (NT_X86_XSTATE).
    pub fn set_xstate(&self, state: &[u8]) -> io::Result<()> {
        let iov = libc::iovec { iov_base: state.as_ptr().cast_mut().cast(), iov_len: state.len() };
        ptrace(libc::PTRACE_SETREGSET, self.tid, 0x202, (&raw const iov) as usize).map(drop)
    }

    /// Sets the signal mask.
    pub fn set_sigmask(&self, mask: u64) -> io::Result<()> {
        ptrace(libc::PTRACE_SETSIGMASK, self.tid, 8, (&raw const mask) as usize).map(drop)
    }

    /// The rseq registration: address, size, signature.
    pub(super) fn rseq(&self) -> io::Result<(u64, u32, u32)> {
        let mut b = [0u64; 3];
        ptrace(libc::PTRACE_GET_RSEQ_CONFIGURATION, self.tid, 24, b.as_mut_ptr() as usize)?;
        Ok((b[0], b[1] as u32, (b[1] >> 32) as u32))
    }

    /// Lets it go at its present registers.
    pub(super) fn detach(self) -> io::Result<()> {
        ptrace(libc::PTRACE_DETACH, self.tid, 0, 0).map(drop)
    }

    /// Runs to the next stop of the kind that `how` makes.
    fn resume(&self, how: u32) -> io::Result<i32> {
        ptrace(how, self.tid, 0, 0)?;
        self.wait_stop()
    }

    fn place(&self, call: Call) -> io::Result<()> {
        let mut r = self.regs()?;
        r.rip = self.island.syscall;
        r.rsp = self.island.start + self.island.len;
        r.orig_rax = u64::MAX;
        r.rax = call.nr as u64;
        [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9] = call.args;
        // A stack that exists is not needed: nothing but the one instruction runs.
        self.set_regs(&r)
    }

    /// Executes clone3 with `args` in this thread and returns the new, stopped thread.
    pub(super) fn clone_thread(&mut self, args: &[u8]) -> io::Result<Self> {
        let (at, _) = self.scratch()?;
        self.poke(at, args)?;
        self.place(Call::new(libc::SYS_clone3, &[at.0, args.len() as u64]))?;
        let mut child = None;
        let mut entered = false;
        loop {
            let status = self.resume(libc::PTRACE_SYSCALL)?;
            match status >> 8 {
                s if s == libc::SIGTRAP | 0x80 => {
                    // Entry and exit look the same.
                    if std::mem::replace(&mut entered, true) {
                        let tid = result(self.regs()?.rax as i64)?;
                        return self.attached(child.unwrap_or(Tid(tid as i32)));
                    }
                }
                s if s == libc::SIGTRAP | libc::PTRACE_EVENT_CLONE << 8 => {
                    let mut id = 0u64;
                    ptrace(libc::PTRACE_GETEVENTMSG, self.tid, 0, (&raw mut id) as usize)?;
                    child = Some(Tid(id as i32));
                }
                s => return Err(unexpected(self.tid, s)),
            }
        }
    }
}

fn unexpected(tid: Tid, stop: i32) -> io::Error {
    io::Error::other(format!("thread {tid} stopped for {stop:#x} in an injected call"))
}

impl Inject for Remote {
    fn inject(&mut self, call: Call) -> io::Result<i64> {
        self.place(call)?;
        for _ in 0..2 {
            let stop = self.resume(libc::PTRACE_SYSCALL)? >> 8;
            if stop != libc::SIGTRAP | 0x80 {
                return Err(unexpected(self.tid, stop));
            }
        }
        Ok(self.regs()?.rax as i64)
    }

    fn inject_all(&mut self, calls: &[Call]) -> io::Result<Vec<i64>> {
        if !self.island.agent {
            return calls.iter().map(|c| self.inject(*c)).collect();
        }
        let (table, room) = self.island.table();
        let mut results = Vec::with_capacity(calls.len());
        for part in calls.chunks(room / 64) {
            let mut bytes = Vec::with_capacity(part.len() * 64);
            for c in part {
                bytes.extend_from_slice(&c.nr.to_le_bytes());
                c.args.iter().for_each(|a| bytes.extend_from_slice(&a.to_le_bytes()));
                bytes.extend_from_slice(&(-i64::from(libc::ENOSYS)).to_le_bytes());
            }
            self.poke(table, &bytes)?;
            let mut r = self.regs()?;
            r.rip = self.island.start;
            r.orig_rax = u64::MAX;
            (r.r12, r.r13) = (table.0, part.len() as u64);
            self.set_regs(&r)?;
            let stop = self.resume(libc::PTRACE_CONT)? >> 8;
            if stop != libc::SIGTRAP {
                return Err(unexpected(self.tid, stop));
            }
            self.peek(table, &mut bytes)?;
            for e in bytes.chunks_exact(64) {
                let mut w = [0u8; 8];
                w.copy_from_slice(&e[56..]);
                results.push(i64::from_le_bytes(w));
            }
        }
        Ok(results)
    }

    fn poke(&mut self, at: Addr, bytes: &[u8]) -> io::Result<()> {
        self.mem.write_all_at(bytes, at.0)
    }

    fn peek(&mut self, at: Addr, bytes: &mut [u8]) -> io::Result<()> {
        self.mem.read_exact_at(bytes, at.0)
    }

    fn scratch(&mut self) -> io::Result<(Addr, usize)> {
        if self.island.len == 0 {
            return Err(io::Error::other("no scratch memory yet"));
        }
        Ok(self.island.data())
    }
}

/// Kills the process that `leader` belongs to and collects every thread in `tids` (waiting for the leader alone
/// hangs while other traced threads are not waited for).
pub(super) fn kill_all(leader: Tid, tids: &[Tid]) {
    // SAFETY: a plain kill(2) of a process that this engine created and still traces.
    unsafe { libc::kill(leader.0, libc::SIGKILL) };
    for &tid in tids.iter().filter(|t| **t != leader).chain([&leader]) {
        while let Ok(status) = waitpid(tid) {
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                break;
            }
            // A stop that was on its way; the kill comes next.
            let _ = ptrace(libc::PTRACE_CONT, tid, 0, 0);
        }
    }
}
