//! System calls executed in the tracee.

use super::frame::SigFrame;
use super::restart::{self, blocked_call};
use super::{Kind, Resume, Site, Stop, TraceError, Tracee, ptrace};
use mcr_image::{Addr, Memory, Regs, Tid};
use nix::errno::Errno;

/// Every signal but SIGKILL and SIGSTOP, which cannot be blocked.
pub(super) const ALL_SIGNALS: u64 = !(1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1));
/// The agent ends in a trap: a blocked SIGTRAP would lose its handler (kernel/signal.c, force_sig_info).
const ALL_BUT_TRAP: u64 = ALL_SIGNALS & !(1 << (libc::SIGTRAP - 1));

/// What is put back after injections.
pub(super) struct Session {
    /// The registers to go on with.
    pub regs: Regs,
    /// `set_regs` was called: they are final, nothing is restarted.
    pub replaced: bool,
    pub sigmask: u64,
    /// Stack bytes under the signal frame.
    stack: Option<(Addr, Vec<u8>)>,
    /// The stop in which the session began.
    began: Stop,
    /// Registers at the start of each injected call.
    base: Regs,
}

/// Extra flags of [`Tracee::fork`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloneFlags {
    /// The child is the target's, with exit signal 0: the target sees it only through `wait4(__WALL)`.
    Hidden,
    /// The child's parent is the target's parent (CLONE_PARENT).
    Sibling,
}

impl Tracee {
    /// Executes a system call in the tracee, which must be in a stop. Returns its result or
    /// [`TraceError::Syscall`] with its errno. The registers are put back by [`Tracee::put_back`], which
    /// every resume and detach does, too.
    pub fn syscall(&mut self, nr: i64, args: &[u64]) -> Result<u64, TraceError> {
        let r = self.syscall_raw(nr, args)?;
        if (-4095..0).contains(&r) {
            return Err(TraceError::Syscall { tid: self.tid, nr, errno: Errno::from_raw(-r as i32) });
        }
        Ok(r as u64)
    }

    /// Like [`Tracee::syscall`], but gives the kernel's return value as it is (errors are −4095…−1).
    pub fn syscall_raw(&mut self, nr: i64, args: &[u64]) -> Result<i64, TraceError> {
        self.begin()?;
        let a = |i: usize| args.get(i).copied().unwrap_or(0);
        let mut regs = self.base();
        regs.rax = nr as u64;
        (regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9) = (a(0), a(1), a(2), a(3), a(4), a(5));
        self.step_syscall(&regs)?;
        Ok(ptrace::get_regs(self.tid)?.rax as i64)
    }

    pub(super) fn base(&self) -> Regs {
        self.session.as_ref().map(|s| s.base).unwrap_or_default()
    }

    /// Sets registers that are on a `syscall` instruction and runs over it.
    fn step_syscall(&mut self, regs: &Regs) -> Result<(), TraceError> {
        ptrace::set_regs(self.tid, regs)?;
        for want in [Stop::SyscallEntry, Stop::SyscallExit] {
            self.run_until(want)?;
        }
        Ok(())
    }

    fn run_until(&mut self, want: Stop) -> Result<(), TraceError> {
        self.resume_raw(Resume::Syscall, 0)?;
        loop {
            let stop = self.wait(None)?;
            match stop {
                s if s == want => return Ok(()),
                // A pending interrupt, or a job-control stop: goes on, the call is not disturbed.
                Stop::Event | Stop::Group(_) | Stop::Special(_) => self.resume_raw(Resume::Syscall, 0)?,
                Stop::Exited(_) | Stop::Killed(_) => {
                    return Err(TraceError::Died { tid: self.tid, how: format!("{stop:?}") });
                }
                s => {
                    return Err(TraceError::UnexpectedStop {
                        tid: self.tid,
                        stop: format!("{s:?}, not {want:?}"),
                    });
                }
            }
        }
    }

    /// Whether a thread that is let go in an injection returns to its interrupted context.
    pub(super) fn has_way_back(&self) -> bool {
        self.session.as_ref().is_some_and(|s| s.stack.is_some())
    }

    /// Saves the thread's state and makes it ready for injections.
    pub(super) fn begin(&mut self) -> Result<(), TraceError> {
        if self.session.is_some() {
            return Ok(());
        }
        let began = match self.state {
            Some(s @ (Stop::Event | Stop::SyscallEntry | Stop::SyscallExit | Stop::Special(_))) => s,
            // A child that was handed over in a signal stop: the signal is dropped by the caller's choice.
            Some(s @ Stop::Signal(_)) if self.kind == Kind::Disposable => s,
            s => {
                return Err(TraceError::UnexpectedStop {
                    tid: self.tid,
                    stop: format!("{s:?}: cannot inject here"),
                });
            }
        };
        let site = self.find_site()?;
        if began == Stop::SyscallEntry {
            // Make this call a no-op and leave it; it is entered again when things are put back.
            let mut r = ptrace::get_regs(self.tid)?;
            let saved = r;
            r.orig_rax = u64::MAX;
            ptrace::set_regs(self.tid, &r)?;
            self.run_until(Stop::SyscallExit)?;
            ptrace::set_regs(self.tid, &saved)?;
        }
        let regs = ptrace::get_regs(self.tid)?;
        let sigmask = ptrace::get_sigmask(self.tid)?;
        let mut base = Regs { orig_rax: u64::MAX, rip: site.syscall.0, ..regs };
        // No single-stepping or direction flag in our calls.
        base.eflags &= !0x500;
        let mut stack = None;
        if self.kind == Kind::Attached
            && let Some((insn, restorer)) = site.guarded
        {
            let on = match blocked_call(&regs, &self.mem) {
                Some(b) => b.rewound(&regs),
                None => regs,
            };
            let frame = SigFrame::new(&on, &ptrace::get_xstate(self.tid)?, sigmask, restorer);
            let under = self.mem.bytes(frame.at, frame.bytes.len()).map_err(self.mem_error())?;
            self.mem.write(frame.at, &frame.bytes).map_err(self.mem_error())?;
            stack = Some((frame.at, under));
            base.rip = insn.0;
            base.rsp = frame.at.0;
        }
        self.session = Some(Session { regs, replaced: false, sigmask, stack, began, base });
        // Registers first: from here on a dead engine means: one harmless call, then rt_sigreturn.
        let mut first = base;
        first.rax = libc::SYS_getpid as u64;
        ptrace::set_regs(self.tid, &first)?;
        let mask = if self.kind == Kind::Attached { ALL_SIGNALS } else { ALL_BUT_TRAP };
        ptrace::set_sigmask(self.tid, mask)
    }

    /// Ends an injection: mask, stack bytes and registers are as they were (or as `set_regs` and
    /// `set_sigmask` want them), and the thread is in the same kind of stop as before.
    pub fn put_back(&mut self) -> Result<(), TraceError> {
        let Some(s) = self.session.take() else {
            return Ok(());
        };
        ptrace::set_sigmask(self.tid, s.sigmask)?;
        let mut regs = s.regs;
        match s.began {
            Stop::SyscallEntry if !s.replaced => {
                regs.rax = regs.orig_rax;
                regs.rip = regs.rip.wrapping_sub(restart::INSN);
                regs.orig_rax = u64::MAX;
                ptrace::set_regs(self.tid, &regs)?;
                self.restore_stack(&s)?;
                self.run_until(Stop::SyscallEntry)
            }
            Stop::Event if !s.replaced => {
                // The kernel restarts an interrupted call only on its way out of get_signal(): go there.
                ptrace::set_regs(self.tid, &regs)?;
                self.restore_stack(&s)?;
                self.interrupt()?;
                self.resume_raw(Resume::Cont, 0)?;
                loop {
                    match self.wait(None)? {
                        Stop::Event => return Ok(()),
                        Stop::Group(_) => return Ok(()),
                        Stop::Signal(sig) => self.resume_raw(Resume::Cont, sig)?,
                        s if s.is_end() => {
                            return Err(TraceError::Died { tid: self.tid, how: format!("{s:?}") });
                        }
                        _ => self.resume_raw(Resume::Cont, 0)?,
                    }
                }
            }
            _ => {
                if s.replaced {
                    regs.orig_rax = u64::MAX;
                }
                ptrace::set_regs(self.tid, &regs)?;
                self.restore_stack(&s)
            }
        }
    }

    fn restore_stack(&self, s: &Session) -> Result<(), TraceError> {
        match &s.stack {
            Some((at, bytes)) => self.mem.write(*at, bytes).map_err(self.mem_error()),
            None => Ok(()),
        }
    }

    /// Before a thread leaves an event stop: a call that gave EINTR because of us is executed again, unless a
    /// signal handler runs first (ERESTARTNOHAND says just that to the kernel).
    pub(super) fn settle(&mut self) -> Result<(), TraceError> {
        let mut regs = ptrace::get_regs(self.tid)?;
        let nr = regs.orig_rax as i64;
        if nr >= 0 && regs.rax as i64 == restart::EINTR && restart::interrupted(nr, restart::EINTR) {
            regs.rax = restart::ERESTARTNOHAND as u64;
            ptrace::set_regs(self.tid, &regs)?;
        }
        Ok(())
    }

    /// Answers the system call at whose entry the tracee sits: it is not executed, and returns `result`
    /// (−4095…−1 for errors). The tracee is at the exit of the call afterwards.
    pub fn answer(&mut self, result: i64) -> Result<(), TraceError> {
        if self.state != Some(Stop::SyscallEntry) {
            return Err(TraceError::UnexpectedStop {
                tid: self.tid,
                stop: format!("{:?}, not at entry", self.state),
            });
        }
        self.put_back()?;
        let mut r = ptrace::get_regs(self.tid)?;
        r.orig_rax = u64::MAX;
        ptrace::set_regs(self.tid, &r)?;
        self.run_until(Stop::SyscallExit)?;
        r.rax = result as u64;
        ptrace::set_regs(self.tid, &r)
    }

    /// The address of a `syscall` instruction in the tracee.
    pub fn find_site(&mut self) -> Result<Site, TraceError> {
        if let Some(s) = self.site {
            return Ok(s);
        }
        let pid = self.pid;
        let site = Site::find(&self.mem, self.kind == Kind::Attached)
            .map_err(super::proc_error(format!("/proc/{pid}/maps")))?
            .ok_or(TraceError::NoSyscall { pid })?;
        self.site = Some(site);
        Ok(site)
    }

    /// Uses an instruction that was found before (by another thread of the process).
    pub fn set_site(&mut self, site: Site) {
        self.site = Some(site);
    }

    /// Forks the tracee's process: a copy-on-write child with one thread, stopped, traced by us and under
    /// PTRACE_O_EXITKILL. Its registers are the tracee's, rewound where it was blocked in a call.
    ///
    /// The child starts on a stack of its own whose return address is an exit stub: if the engine dies before
    /// the child is under EXITKILL, it ends at once and never runs the server's code.
    pub fn fork(&mut self, flags: CloneFlags) -> Result<Tracee, TraceError> {
        // mov $60,%eax; xor %edi,%edi; syscall
        const STUB: &[u8] = &[0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05];
        let mut page = super::Scratch::map(self, 4096, libc::PROT_READ | libc::PROT_EXEC)?;
        let at = page.addr();
        let mut bytes = vec![0u8; 128];
        bytes[..STUB.len()].copy_from_slice(STUB);
        bytes[64..72].copy_from_slice(&at.0.to_le_bytes());
        page.write(0, &bytes)?;
        let mut f = libc::CLONE_PTRACE as u64;
        if flags == CloneFlags::Sibling {
            f |= libc::CLONE_PARENT as u64;
        }
        let child = page.tracee().syscall(libc::SYS_clone, &[f, at.0 + 64, 0, 0, 0])?;
        let tid = Tid(child as i32);
        // The first stop of an automatically attached child is an event stop.
        ptrace::wait(tid, None)?;
        let mut t = Tracee::from_stopped_child(tid)?;
        let parent = page.tracee();
        let (regs, mask) = (parent.regs()?, parent.sigmask()?);
        let regs = blocked_call(&regs, &parent.mem)
            .map_or(Regs { orig_rax: u64::MAX, ..regs }, |b| b.rewound(&regs));
        ptrace::set_sigmask(tid, mask)?;
        ptrace::set_regs(tid, &regs)?;
        t.syscall(libc::SYS_munmap, &[at.0, 4096])?;
        // The child's registers are whole: no restart of the parent's call in it.
        t.set_regs(&regs)?;
        t.put_back()?;
        if let Some((a, under)) = page.tracee().session.as_ref().and_then(|s| s.stack.clone()) {
            t.mem.write(a, &under).map_err(t.mem_error())?;
        }
        Ok(t)
    }
}
