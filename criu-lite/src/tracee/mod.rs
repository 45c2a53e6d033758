//! One thread under ptrace: stops, registers, and system calls executed in it.
//!
//! # Staying harmless
//! A seized server must survive the death of the engine at any instant:
//! - every stop is either an event stop or a syscall stop with PTRACE_O_TRACESYSGOOD. When a tracer dies in
//!   one of these the thread just continues; in a signal-delivery stop it would be killed;
//! - a call is injected through libc's `syscall; ret` with a signal frame of the interrupted context as its
//!   return address (see `frame`), so a thread that is let go in the middle returns to where it was;
//! - signals are blocked during the injection, so none is taken out of its queue.
//!
//! A child (`from_stopped_child`) is under PTRACE_O_EXITKILL instead: it dies with the engine.
//!
//! All operations on a tracee must come from the thread that attached it: [`Tracee`] is not `Send`.

mod agent;
pub mod commit;
mod error;
pub mod fault;
mod frame;
mod inject;
mod ptrace;
mod restart;
mod scratch;
mod site;

pub use agent::{Agent, Area, Call};
pub use error::TraceError;
pub use inject::CloneFlags;
pub(crate) use ptrace::reap;
pub use restart::{Blocked, blocked_call};
pub use scratch::Scratch;
pub use site::Site;

use crate::ProcessMemory;
use inject::Session;
use mcr_image::{Addr, MemoryError, Pid, Regs, Tid};
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How a tracee last stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// PTRACE_EVENT_STOP after an interrupt: the state that threads are parked in.
    Event,
    /// A PTRACE_EVENT_* other than stop (fork 1, vfork 2, clone 3, exec 4, vfork done 5, exit 6, seccomp 7).
    Special(i32),
    /// Job-control stop by this signal.
    Group(i32),
    /// About to enter a system call.
    SyscallEntry,
    /// Leaving a system call.
    SyscallExit,
    /// About to be given this signal.
    Signal(i32),
    /// The thread exited with this status.
    Exited(i32),
    /// The thread was killed by this signal.
    Killed(i32),
}

impl Stop {
    /// Exited or killed.
    #[must_use]
    pub fn is_end(self) -> bool {
        matches!(self, Self::Exited(_) | Self::Killed(_))
    }
}

/// How to let a tracee run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// Freely.
    Cont,
    /// Until the next system call entry or exit.
    Syscall,
    /// One instruction.
    Step,
    /// Stay in a group stop, but listen (PTRACE_LISTEN).
    Listen,
}

/// Who keeps the tracee from harm when the engine dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A thread of a server: it must go on.
    Attached,
    /// A child of ours to be: it dies with us.
    Disposable,
}

/// A thread under ptrace by the calling thread.
pub struct Tracee {
    tid: Tid,
    pid: Pid,
    kind: Kind,
    state: Option<Stop>,
    mem: Arc<ProcessMemory>,
    site: Option<Site>,
    session: Option<Session>,
    detached: bool,
    options: usize,
    _thread: PhantomData<*const ()>,
}

fn proc_error(path: String) -> impl FnOnce(std::io::Error) -> TraceError {
    move |source| TraceError::Proc { path, source }
}

impl Tracee {
    /// PTRACE_SEIZE of a running thread of process `pid`. It runs on until [`Tracee::stop`]. Dropping the
    /// tracee puts its registers back and detaches.
    pub fn seize(pid: Pid, tid: Tid) -> Result<Self, TraceError> {
        let mem = ProcessMemory::open(pid).map_err(proc_error(format!("/proc/{pid}/mem")))?;
        Self::seize_with(pid, tid, Arc::new(mem))
    }

    /// Like [`Tracee::seize`], sharing an open memory file between the threads of a process.
    pub fn seize_with(pid: Pid, tid: Tid, mem: Arc<ProcessMemory>) -> Result<Self, TraceError> {
        let options = libc::PTRACE_O_TRACESYSGOOD as usize;
        ptrace::request(tid, "PTRACE_SEIZE", libc::PTRACE_SEIZE, 0, options)?;
        Ok(Self::new(pid, tid, Kind::Attached, None, mem, options))
    }

    /// Takes over a child that is already traced by this thread and in a ptrace stop (PTRACE_TRACEME and a
    /// raised SIGSTOP, or an attached clone whose stop was waited for). It gets PTRACE_O_EXITKILL: it dies
    /// with the engine. Dropping the tracee kills it, unless it was detached.
    pub fn from_stopped_child(tid: Tid) -> Result<Self, TraceError> {
        let pid = Pid(tid.0);
        let options = (libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD) as usize;
        ptrace::request(tid, "PTRACE_SETOPTIONS", libc::PTRACE_SETOPTIONS, 0, options)?;
        let mem = ProcessMemory::open(pid).map_err(proc_error(format!("/proc/{pid}/mem")))?;
        Ok(Self::new(pid, tid, Kind::Disposable, Some(Stop::Event), Arc::new(mem), options))
    }

    /// A further thread of a disposable process (it came by PTRACE_O_TRACECLONE or CLONE_PTRACE). Its first
    /// stop is waited for.
    pub fn from_new_thread(&self, tid: Tid) -> Result<Self, TraceError> {
        let mut t = Self::new(self.pid, tid, self.kind, None, self.mem.clone(), self.options);
        t.site = self.site;
        let stop = t.wait(None)?;
        if stop.is_end() {
            t.detached = true;
            return Err(TraceError::Died { tid, how: format!("{stop:?}") });
        }
        Ok(t)
    }

    fn new(
        pid: Pid,
        tid: Tid,
        kind: Kind,
        state: Option<Stop>,
        mem: Arc<ProcessMemory>,
        options: usize,
    ) -> Self {
        Self {
            tid,
            pid,
            kind,
            state,
            mem,
            site: None,
            session: None,
            detached: false,
            options,
            _thread: PhantomData,
        }
    }

    /// The thread.
    #[must_use]
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The stop it sits in; `None` while it runs.
    #[must_use]
    pub fn state(&self) -> Option<Stop> {
        self.state
    }

    /// Its process's memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<ProcessMemory> {
        &self.mem
    }

    /// Opens /proc/PID/mem again and forgets cached instruction addresses: after an `execve` in the tracee.
    pub fn reopen_memory(&mut self) -> Result<(), TraceError> {
        let pid = self.pid;
        self.mem = Arc::new(ProcessMemory::open(pid).map_err(proc_error(format!("/proc/{pid}/mem")))?);
        self.site = None;
        Ok(())
    }

    /// Sets further PTRACE_O_* options (those that this layer needs stay set).
    pub fn add_options(&mut self, options: i32) -> Result<(), TraceError> {
        let all = self.options | options as usize;
        ptrace::request(self.tid, "PTRACE_SETOPTIONS", libc::PTRACE_SETOPTIONS, 0, all)?;
        self.options = all;
        Ok(())
    }

    /// PTRACE_GETEVENTMSG: the new tid of a clone event, the status of an exit event.
    pub fn event_message(&self) -> Result<u64, TraceError> {
        let mut v = 0u64;
        ptrace::request(self.tid, "PTRACE_GETEVENTMSG", libc::PTRACE_GETEVENTMSG, 0, (&raw mut v) as usize)?;
        Ok(v)
    }

    /// PTRACE_INTERRUPT; returns at once.
    pub fn interrupt(&self) -> Result<(), TraceError> {
        ptrace::request(self.tid, "PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, 0, 0)?;
        Ok(())
    }

    /// Interrupts and waits for the event stop.
    pub fn stop(&mut self, deadline: Option<Instant>) -> Result<Stop, TraceError> {
        self.interrupt()?;
        self.wait_event_stop(deadline)
    }

    /// Waits until a thread that was interrupted is in its event stop. A signal that was being delivered
    /// first is delivered, never swallowed.
    pub fn wait_event_stop(&mut self, deadline: Option<Instant>) -> Result<Stop, TraceError> {
        loop {
            let stop = match self.state {
                Some(s @ (Stop::Event | Stop::Group(_))) => return Ok(s),
                Some(s) => s,
                None => self.wait(deadline)?,
            };
            match stop {
                Stop::Event => {
                    self.settle()?;
                    return Ok(stop);
                }
                Stop::Group(_) => return Ok(stop),
                Stop::Signal(sig) => self.resume(Resume::Cont, sig)?,
                Stop::SyscallEntry | Stop::SyscallExit | Stop::Special(_) => {
                    // The interrupt is still pending: it stops at the way out of the kernel.
                    self.interrupt()?;
                    self.resume(Resume::Cont, 0)?;
                }
                Stop::Exited(_) | Stop::Killed(_) => {
                    return Err(TraceError::Died { tid: self.tid, how: format!("{stop:?}") });
                }
            }
        }
    }

    /// Waits for the next stop.
    pub fn wait(&mut self, deadline: Option<Instant>) -> Result<Stop, TraceError> {
        let status = ptrace::wait(self.tid, deadline)?;
        self.note(status)
    }

    /// The next stop if there is one already.
    pub fn try_wait(&mut self) -> Result<Option<Stop>, TraceError> {
        let mut status = 0;
        match ptrace::wait_once(self.tid, libc::WNOHANG, &mut status)? {
            Some(s) => self.note(s).map(Some),
            None => Ok(None),
        }
    }

    /// Takes a status that somebody else's waitpid (for any child) returned for this thread.
    pub fn note(&mut self, status: i32) -> Result<Stop, TraceError> {
        let stop = if libc::WIFEXITED(status) {
            Stop::Exited(libc::WEXITSTATUS(status))
        } else if libc::WIFSIGNALED(status) {
            Stop::Killed(libc::WTERMSIG(status))
        } else {
            let (sig, event) = (libc::WSTOPSIG(status), status >> 16);
            match (event, sig) {
                (128, libc::SIGTRAP) => Stop::Event,
                (128, s) => Stop::Group(s),
                (0, s) if s == libc::SIGTRAP | 0x80 => match ptrace::syscall_op(self.tid)? {
                    1 => Stop::SyscallEntry,
                    _ => Stop::SyscallExit,
                },
                (0, s) => Stop::Signal(s),
                (e, _) => Stop::Special(e),
            }
        };
        if stop.is_end() {
            self.detached = true;
            self.session = None;
        }
        self.state = Some(stop);
        Ok(stop)
    }

    /// Lets it run; `sig` is delivered where it sits in a signal stop. Puts the registers back first.
    pub fn resume(&mut self, how: Resume, sig: i32) -> Result<(), TraceError> {
        self.put_back()?;
        self.resume_raw(how, sig)
    }

    fn resume_raw(&mut self, how: Resume, sig: i32) -> Result<(), TraceError> {
        let (name, req) = match how {
            Resume::Cont => ("PTRACE_CONT", libc::PTRACE_CONT),
            Resume::Syscall => ("PTRACE_SYSCALL", libc::PTRACE_SYSCALL),
            Resume::Step => ("PTRACE_SINGLESTEP", libc::PTRACE_SINGLESTEP),
            Resume::Listen => ("PTRACE_LISTEN", libc::PTRACE_LISTEN),
        };
        ptrace::request(self.tid, name, req, 0, sig as usize)?;
        self.state = None;
        Ok(())
    }

    /// The registers as the thread will have them when it goes on. During an injection: those that are put
    /// back after it.
    pub fn regs(&self) -> Result<Regs, TraceError> {
        match &self.session {
            Some(s) => Ok(s.regs),
            None => ptrace::get_regs(self.tid),
        }
    }

    /// Sets the registers with which the thread will go on.
    pub fn set_regs(&mut self, regs: &Regs) -> Result<(), TraceError> {
        if let Some(s) = &mut self.session {
            s.regs = *regs;
            s.replaced = true;
            return Ok(());
        }
        ptrace::set_regs(self.tid, regs)
    }

    /// Extended registers: the XSAVE image as ptrace shows it (NT_X86_XSTATE).
    pub fn xstate(&self) -> Result<Vec<u8>, TraceError> {
        ptrace::get_xstate(self.tid)
    }

    /// Sets the extended registers.
    pub fn set_xstate(&mut self, state: &[u8]) -> Result<(), TraceError> {
        ptrace::set_xstate(self.tid, state)
    }

    /// What a signal stop is about: the 128 bytes of siginfo_t.
    pub fn siginfo(&self) -> Result<[u8; 128], TraceError> {
        ptrace::get_siginfo(self.tid)
    }

    /// Pending signals of the thread, or of the process (`shared`), left where they are.
    pub fn pending(&self, shared: bool) -> Result<Vec<[u8; 128]>, TraceError> {
        ptrace::peek_siginfo(self.tid, shared)
    }

    /// The signal mask that the thread has outside a call which replaces it for a while.
    pub fn sigmask(&self) -> Result<u64, TraceError> {
        match &self.session {
            Some(s) => Ok(s.sigmask),
            None => ptrace::get_sigmask(self.tid),
        }
    }

    /// Sets the signal mask.
    pub fn set_sigmask(&mut self, mask: u64) -> Result<(), TraceError> {
        if let Some(s) = &mut self.session {
            s.sigmask = mask;
            return Ok(());
        }
        ptrace::set_sigmask(self.tid, mask)
    }

    /// rseq(2) registration: address (0 = none), size, signature, flags.
    pub fn rseq(&self) -> Result<(Addr, u32, u32, u32), TraceError> {
        let (a, n, s, f) = ptrace::get_rseq(self.tid)?;
        Ok((Addr(a), n, s, f))
    }

    /// Puts registers, mask and stack bytes back and lets the thread run untraced.
    pub fn detach(mut self) -> Result<(), TraceError> {
        self.detach_now()
    }

    /// Detaches. `false`: it is ending, and [`Tracee::detach_now`] has to reap it.
    pub(crate) fn detach_living(&mut self) -> Result<bool, TraceError> {
        if self.detached {
            return Ok(true);
        }
        match self.try_detach() {
            Ok(()) => {
                self.detached = true;
                Ok(true)
            }
            Err(TraceError::Gone { .. } | TraceError::Died { .. }) => Ok(self.detached),
            Err(e) => Err(e),
        }
    }

    pub(crate) fn detach_now(&mut self) -> Result<(), TraceError> {
        if self.detached {
            return Ok(());
        }
        let r = self.try_detach();
        let reaped = self.detached;
        self.detached = true;
        match r {
            // It ended meanwhile: nobody to detach from, but a dead tracee has to be reaped, or its process
            // never ends.
            Err(TraceError::Gone { .. } | TraceError::Died { .. }) => {
                if !reaped {
                    drop(ptrace::reap(self.tid, Some(Instant::now() + Duration::from_secs(2))));
                }
                Ok(())
            }
            r => r,
        }
    }

    fn try_detach(&mut self) -> Result<(), TraceError> {
        if self.state.is_none() {
            // One that sleeps uninterruptibly cannot be detached: it is let go with the end of this thread.
            self.stop(Some(Instant::now() + LAST_WAIT))?;
        }
        self.put_back()?;
        let sig = match self.state {
            Some(Stop::Signal(s)) => s,
            _ => 0,
        };
        ptrace::request(self.tid, "PTRACE_DETACH", libc::PTRACE_DETACH, 0, sig as usize)?;
        Ok(())
    }

    /// SIGKILL, and waits until the thread is reaped. For a multi-threaded process every traced thread has to
    /// be reaped: kill the process, then call this for each, the leader last.
    pub fn kill(mut self) -> Result<(), TraceError> {
        self.kill_now()
    }

    pub(crate) fn kill_now(&mut self) -> Result<(), TraceError> {
        if self.detached {
            return Ok(());
        }
        self.detached = true;
        self.session = None;
        // SAFETY: plain numbers; the pid is our tracee, so it cannot have been reused.
        unsafe { libc::kill(self.pid.0, libc::SIGKILL) };
        ptrace::reap(self.tid, None)
    }

    /// Gives the tracee up without detaching it or killing it: it stays in its stop until the engine ends or
    /// somebody takes it over by tid.
    pub fn leak(mut self) {
        self.detached = true;
    }

    fn mem_error(&self) -> impl FnOnce(MemoryError) -> TraceError + use<> {
        let tid = self.tid;
        move |source| TraceError::Memory { tid, source }
    }
}

/// For so long a thread that runs is waited for to be detached.
const LAST_WAIT: Duration = Duration::from_secs(2);

impl Drop for Tracee {
    fn drop(&mut self) {
        if self.detached {
            return;
        }
        match self.kind {
            Kind::Attached => drop(self.detach_now()),
            Kind::Disposable => drop(self.kill_now()),
        }
    }
}
