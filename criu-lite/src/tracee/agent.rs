//! Many system calls at the cost of one: a small blob in the target that works through a table.
//!
//! The blob ends in a breakpoint, and a thread that is let go in that stop is killed by SIGTRAP. So it is used
//! in disposable children only; in an attached server the calls are injected one by one.

use super::{Kind, Resume, Stop, TraceError, Tracee, ptrace};
use mcr_image::{Addr, Memory};
use nix::errno::Errno;

std::arch::global_asm!(
    ".pushsection .rodata.mcr_agent, \"a\"",
    ".globl mcr_agent_start",
    ".globl mcr_agent_end",
    "mcr_agent_start:",
    // r12: table of {nr, six arguments, result}, r13: its length
    "2: test r13, r13",
    "jz 3f",
    "mov rax, [r12]",
    "mov rdi, [r12 + 8]",
    "mov rsi, [r12 + 16]",
    "mov rdx, [r12 + 24]",
    "mov r10, [r12 + 32]",
    "mov r8, [r12 + 40]",
    "mov r9, [r12 + 48]",
    "syscall",
    "mov [r12 + 56], rax",
    "add r12, 64",
    "dec r13",
    "jmp 2b",
    "3: int3",
    "mcr_agent_end:",
    ".popsection",
);

unsafe extern "C" {
    static mcr_agent_start: u8;
    static mcr_agent_end: u8;
}

/// The position-independent code of the agent.
fn blob() -> &'static [u8] {
    // SAFETY: both labels are in one read-only section, start before end; the bytes are never written.
    unsafe {
        let (s, e) = (&raw const mcr_agent_start, &raw const mcr_agent_end);
        std::slice::from_raw_parts(s, e.offset_from_unsigned(s))
    }
}

/// One system call of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub nr: i64,
    /// Its arguments.
    pub args: [u64; 6],
    /// What it returned (errors are −4095…−1).
    pub result: i64,
}

impl Call {
    /// A call with up to six arguments.
    #[must_use]
    pub fn new(nr: i64, args: &[u64]) -> Self {
        let mut a = [0; 6];
        for (to, from) in a.iter_mut().zip(args) {
            *to = *from;
        }
        Self { nr, args: a, result: 0 }
    }

    /// The result, or the errno.
    pub fn value(&self) -> Result<u64, Errno> {
        if (-4095..0).contains(&self.result) {
            return Err(Errno::from_raw(-self.result as i32));
        }
        Ok(self.result as u64)
    }
}

/// The blob and a table in the target's memory; unmapped when dropped.
pub struct Agent<'t> {
    tracee: &'t mut Tracee,
    code: Addr,
    len: u64,
    capacity: usize,
}

impl<'t> Agent<'t> {
    /// Maps the agent for batches of up to `capacity` calls.
    pub fn install(tracee: &'t mut Tracee, capacity: usize) -> Result<Self, TraceError> {
        if tracee.kind != Kind::Disposable {
            return Err(TraceError::UnexpectedStop {
                tid: tracee.tid,
                stop: "the agent runs in children of the engine only; inject the calls one by one".into(),
            });
        }
        let len = 4096 + (capacity.max(1) as u64 * 64).next_multiple_of(4096);
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let code = tracee.syscall(libc::SYS_mmap, &[0, len, prot, flags, u64::MAX, 0])?;
        let this = Self { tracee, code: Addr(code), len, capacity: capacity.max(1) };
        this.tracee.mem.write(this.code, blob()).map_err(this.tracee.mem_error())?;
        let rx = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        this.tracee.syscall(libc::SYS_mprotect, &[code, 4096, rx])?;
        Ok(this)
    }

    /// The range it occupies.
    #[must_use]
    pub fn range(&self) -> (Addr, Addr) {
        (self.code, self.code.add(self.len))
    }

    /// The tracee.
    pub fn tracee(&mut self) -> &mut Tracee {
        self.tracee
    }

    /// Executes the calls in order and fills in their results. A failed call does not end the batch.
    pub fn run(&mut self, calls: &mut [Call]) -> Result<(), TraceError> {
        let table = self.code.add(4096);
        for part in calls.chunks_mut(self.capacity) {
            let bytes: Vec<u8> = part
                .iter()
                .flat_map(|c| [c.nr as u64].into_iter().chain(c.args).chain([0]))
                .flat_map(u64::to_le_bytes)
                .collect();
            let t = &mut *self.tracee;
            t.mem.write(table, &bytes).map_err(t.mem_error())?;
            // Opens the session.
            t.syscall(libc::SYS_getpid, &[])?;
            let mut regs = ptrace::get_regs(t.tid)?;
            (regs.rip, regs.r12, regs.r13, regs.orig_rax) =
                (self.code.0, table.0, part.len() as u64, u64::MAX);
            ptrace::set_regs(t.tid, &regs)?;
            t.resume_raw(Resume::Cont, 0)?;
            loop {
                match t.wait(None)? {
                    Stop::Signal(libc::SIGTRAP) => break,
                    Stop::Event | Stop::Group(_) | Stop::Special(_) => t.resume_raw(Resume::Cont, 0)?,
                    s if s.is_end() => {
                        return Err(TraceError::Died { tid: t.tid, how: format!("{s:?} in the agent") });
                    }
                    s => {
                        return Err(TraceError::UnexpectedStop {
                            tid: t.tid,
                            stop: format!("{s:?} in the agent"),
                        });
                    }
                }
            }
            let back = t.mem.bytes(table, part.len() * 64).map_err(t.mem_error())?;
            for (c, b) in part.iter_mut().zip(back.chunks_exact(64)) {
                c.result = i64::from_le_bytes([b[56], b[57], b[58], b[59], b[60], b[61], b[62], b[63]]);
            }
        }
        Ok(())
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        // Fails only when the target is gone, and its memory with it.
        drop(self.tracee.syscall(libc::SYS_munmap, &[self.code.0, self.len]));
    }
}

impl Tracee {
    /// Executes the calls in order: through the agent in a child, one by one in an attached server.
    pub fn syscalls_batch(&mut self, calls: &mut [Call]) -> Result<(), TraceError> {
        if self.kind == Kind::Disposable && calls.len() > 4 {
            return Agent::install(self, calls.len().min(1024))?.run(calls);
        }
        for c in calls {
            c.result = self.syscall_raw(c.nr, &c.args)?;
        }
        Ok(())
    }
}
