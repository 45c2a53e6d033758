//! Many system calls at the cost of one: a small blob in the target that works through a table.
//!
//! How the blob says that it is done depends on who keeps the target from harm:
//! - in a disposable child by a breakpoint: a thread that is let go there is killed, as it should be;
//! - in an attached server by a signal to itself that the server does not notice: one that is ignored (by default
//!   or by its action) and that the thread does not block. The engine takes it at its delivery. Without the engine
//!   the kernel drops it, and the blob returns into the signal frame of the interrupted context.
//!
//! Where there is no such signal, or no way back (see `site`), the calls are injected one by one.

use super::inject::ALL_SIGNALS;
use super::{Kind, Resume, Stop, TraceError, Tracee, ptrace};
use crate::procfs::maps::MapsLine;
use mcr_image::{Addr, Memory};
use nix::errno::Errno;

std::arch::global_asm!(
    ".pushsection .rodata.mcr_agent, \"a\"",
    ".globl mcr_agent_start",
    ".globl mcr_agent_end",
    "mcr_agent_start:",
    // r12: table of {nr, six arguments, result}, r13: its length, r14: the signal at the end (0: breakpoint)
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
    "3: test r14, r14",
    "jz 4f",
    // tgkill(getpid(), gettid(), r14)
    "mov eax, 39",
    "syscall",
    "mov edi, eax",
    "mov eax, 186",
    "syscall",
    "mov esi, eax",
    "mov edx, r14d",
    "mov eax, 234",
    "syscall",
    ".globl mcr_agent_done",
    "mcr_agent_done:",
    // To __restore_rt.
    "ret",
    "4: int3",
    "mcr_agent_end:",
    ".popsection",
);

unsafe extern "C" {
    static mcr_agent_start: u8;
    static mcr_agent_done: u8;
    static mcr_agent_end: u8;
}

/// Where the blob is when its signal has been sent.
fn done_offset() -> u64 {
    // SAFETY: both labels are in one section, in this order.
    unsafe { (&raw const mcr_agent_done).offset_from_unsigned(&raw const mcr_agent_start) as u64 }
}

/// The position-independent code of the agent.
fn blob() -> &'static [u8] {
    // SAFETY: both labels are in one read-only section, start before end; the bytes are never written.
    unsafe {
        let (s, e) = (&raw const mcr_agent_start, &raw const mcr_agent_end);
        std::slice::from_raw_parts(s, e.offset_from_unsigned(s))
    }
}

/// Where the code page says how long its area is.
const LENGTH_AT: usize = 4096 - 8;

/// The code page of an area of so many bytes: whoever finds it knows what it is.
fn code_page(len: u64) -> Vec<u8> {
    let mut page = blob().to_vec();
    page.resize(LENGTH_AT, 0);
    page.extend_from_slice(&len.to_le_bytes());
    page
}

/// Areas in these mappings, of engines that were killed: start and end.
pub(super) fn abandoned(maps: &[MapsLine], mem: &dyn Memory) -> Vec<(Addr, Addr)> {
    // More code than this at once is somebody else's.
    const MOST: u64 = 4 << 20;
    let anonymous = |m: &MapsLine| !m.shared && m.ino == 0 && m.name.is_empty();
    let executable = (libc::PROT_READ | libc::PROT_EXEC) as u32;
    let covered = |start: Addr, end: Addr| {
        let mut at = start;
        for m in maps.iter().filter(|m| anonymous(m) && m.start <= end) {
            if m.start <= at && at < m.end {
                at = m.end;
            }
        }
        at >= end
    };
    let mut out: Vec<(Addr, Addr)> = Vec::new();
    for m in maps.iter().filter(|m| anonymous(m) && m.prot == executable && m.end.since(m.start) <= MOST) {
        let mut at = m.start;
        while at < m.end {
            let page = mem.bytes(at, 4096).unwrap_or_default();
            let len = page.get(LENGTH_AT..).and_then(|l| l.try_into().ok()).map_or(0, u64::from_le_bytes);
            let ours = len > 4096 && len <= MOST && len.is_multiple_of(4096) && page == code_page(len);
            if ours && covered(at, at.add(len)) {
                out.push((at, at.add(len)));
                at = at.add(len);
            } else {
                at = at.add(4096);
            }
        }
    }
    out
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

/// The agent's place in a target: the blob, its table, and memory that the calls may use.
#[derive(Clone, Copy, Debug)]
pub struct Area {
    code: Addr,
    len: u64,
    capacity: usize,
    data: Addr,
    /// Signals that may be sent to a thread which does not block them; 0 in a child.
    quiet: u64,
}

impl Area {
    /// The writable bytes that were asked for.
    #[must_use]
    pub fn data(&self) -> Addr {
        self.data
    }

    fn table(&self) -> Addr {
        self.code.add(4096)
    }
}

/// Bit of a signal in a set.
fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Signals whose arrival a process does not notice unless a thread blocks them: ignored ones, and those without a
/// handler that are ignored by default.
fn unnoticed(tid: mcr_image::Tid) -> u64 {
    let text = std::fs::read(format!("/proc/{tid}/status")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let set = |key: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(key))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    let (Some(ignored), Some(caught)) = (set("SigIgn:"), set("SigCgt:")) else { return 0 };
    let default = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD].into_iter().map(bit).fold(0, |a, b| a | b);
    // SIGCONT, and those that stop, act when they are sent. Real-time signals are queued.
    let never = [libc::SIGCONT, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].into_iter().map(bit);
    let standard = (1 << 31) - 1;
    ((default & !caught) | ignored) & standard & !never.fold(0, |a, b| a | b)
}

/// The blob and a table in the target's memory; unmapped when dropped.
pub struct Agent<'t> {
    tracee: &'t mut Tracee,
    area: Area,
}

impl<'t> Agent<'t> {
    /// Maps the agent for batches of up to `capacity` calls.
    pub fn install(tracee: &'t mut Tracee, capacity: usize) -> Result<Self, TraceError> {
        let area = tracee.map_agent(capacity, 0)?;
        Ok(Self { tracee, area })
    }

    /// The range it occupies.
    #[must_use]
    pub fn range(&self) -> (Addr, Addr) {
        (self.area.code, self.area.code.add(self.area.len))
    }

    /// The tracee.
    pub fn tracee(&mut self) -> &mut Tracee {
        self.tracee
    }

    /// Executes the calls in order and fills in their results. A failed call does not end the batch.
    pub fn run(&mut self, calls: &mut [Call]) -> Result<(), TraceError> {
        self.tracee.run_agent(&self.area, calls)
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        // Fails only when the target is gone, and its memory with it.
        drop(self.tracee.unmap_agent(self.area));
    }
}

impl Tracee {
    /// Maps an agent for batches of up to `capacity` calls that any thread of the process may run, and
    /// `data` bytes for their arguments.
    pub fn map_agent(&mut self, capacity: usize, data: u64) -> Result<Area, TraceError> {
        let capacity = capacity.max(1);
        let table = (capacity as u64 * 64).next_multiple_of(4096);
        let len = 4096 + table + data.next_multiple_of(4096);
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let (rx, rw) = (libc::PROT_READ | libc::PROT_EXEC, libc::PROT_READ | libc::PROT_WRITE);
        // Never writable and executable: the blob is written from outside.
        let code = self.syscall(libc::SYS_mmap, &[0, len, rx as u64, flags, u64::MAX, 0])?;
        let quiet = if self.kind == Kind::Attached { unnoticed(self.tid) } else { 0 };
        let area = Area { code: Addr(code), len, capacity, data: Addr(code + 4096 + table), quiet };
        let made = self
            .mem
            .write(area.code, &code_page(len))
            .map_err(self.mem_error())
            .and_then(|()| self.syscall(libc::SYS_mprotect, &[code + 4096, len - 4096, rw as u64]));
        match made {
            Ok(_) => Ok(area),
            Err(e) => {
                drop(self.unmap_agent(area));
                Err(e)
            }
        }
    }

    /// Unmaps an agent.
    pub fn unmap_agent(&mut self, area: Area) -> Result<(), TraceError> {
        self.syscall(libc::SYS_munmap, &[area.code.0, area.len]).map(drop)
    }

    /// Whether [`Self::run_agent`] executes many calls at the cost of one.
    pub fn runs_agent(&mut self, area: &Area) -> Result<bool, TraceError> {
        self.begin()?;
        Ok(self.end_signal(area)?.is_some())
    }

    /// The signal that says that the blob is done; 0: a breakpoint does.
    fn end_signal(&mut self, area: &Area) -> Result<Option<i32>, TraceError> {
        if self.kind == Kind::Disposable {
            return Ok(Some(0));
        }
        let free = area.quiet & !self.sigmask()?;
        Ok((free != 0 && self.has_way_back()).then(|| free.trailing_zeros() as i32 + 1))
    }

    /// Executes the calls in order and fills in their results. A failed call does not end the batch.
    pub fn run_agent(&mut self, area: &Area, calls: &mut [Call]) -> Result<(), TraceError> {
        self.begin()?;
        let signal = match self.end_signal(area)? {
            Some(signal) if signal == 0 || calls.len() > 1 => signal,
            _ => return self.one_by_one(calls),
        };
        for part in calls.chunks_mut(area.capacity) {
            let mut bytes = Vec::with_capacity(part.len() * 64);
            for c in &*part {
                bytes.extend_from_slice(&c.nr.to_le_bytes());
                for a in c.args {
                    bytes.extend_from_slice(&a.to_le_bytes());
                }
                bytes.extend_from_slice(&[0; 8]);
            }
            self.mem.write(area.table(), &bytes).map_err(self.mem_error())?;
            let mut regs = self.base();
            (regs.rip, regs.r12, regs.r13, regs.r14) =
                (area.code.0, area.table().0, part.len() as u64, signal as u64);
            ptrace::set_regs(self.tid, &regs)?;
            if signal == 0 {
                self.run_to_breakpoint()?;
            } else {
                ptrace::set_sigmask(self.tid, ALL_SIGNALS & !bit(signal))?;
                self.run_to_signal(signal, area.code.add(done_offset()))?;
                ptrace::set_sigmask(self.tid, ALL_SIGNALS)?;
            }
            let back = self.mem.bytes(area.table(), part.len() * 64).map_err(self.mem_error())?;
            for (c, b) in part.iter_mut().zip(back.chunks_exact(64)) {
                c.result = i64::from_le_bytes([b[56], b[57], b[58], b[59], b[60], b[61], b[62], b[63]]);
            }
        }
        Ok(())
    }

    fn one_by_one(&mut self, calls: &mut [Call]) -> Result<(), TraceError> {
        for c in calls {
            c.result = self.syscall_raw(c.nr, &c.args)?;
        }
        Ok(())
    }

    fn run_to_breakpoint(&mut self) -> Result<(), TraceError> {
        self.resume_raw(Resume::Cont, 0)?;
        loop {
            match self.wait(None)? {
                Stop::Signal(libc::SIGTRAP) => return Ok(()),
                Stop::Event | Stop::Group(_) | Stop::Special(_) => self.resume_raw(Resume::Cont, 0)?,
                s => return Err(self.agent_failed(s)),
            }
        }
    }

    /// Runs until the signal has come that the blob sends when it is done, and takes it.
    fn run_to_signal(&mut self, signal: i32, done: Addr) -> Result<(), TraceError> {
        let mut pass = 0;
        loop {
            self.resume_raw(Resume::Cont, pass)?;
            pass = 0;
            match self.wait(None)? {
                Stop::Signal(s) if s == signal => {
                    if ptrace::get_regs(self.tid)?.rip == done.0 {
                        // Nothing is left to be delivered: the thread may be treated as in an event stop, and should
                        // we die the kernel drops the signal.
                        self.state = Some(Stop::Event);
                        return Ok(());
                    }
                    // Somebody else's; the process would not have noticed it either.
                }
                // The one signal that cannot be blocked: the thread goes on until it is let go.
                Stop::Signal(libc::SIGSTOP) => pass = libc::SIGSTOP,
                Stop::Event | Stop::Group(_) | Stop::Special(_) => {}
                s => return Err(self.agent_failed(s)),
            }
        }
    }

    fn agent_failed(&self, stop: Stop) -> TraceError {
        let tid = self.tid;
        if stop.is_end() {
            TraceError::Died { tid, how: format!("{stop:?} in the agent") }
        } else {
            TraceError::UnexpectedStop { tid, stop: format!("{stop:?} in the agent") }
        }
    }

    /// Executes the calls in order, as one batch where that is worth it.
    pub fn syscalls_batch(&mut self, calls: &mut [Call]) -> Result<(), TraceError> {
        if calls.len() > 4 {
            return Agent::install(self, calls.len().min(1024))?.run(calls);
        }
        self.one_by_one(calls)
    }
}
