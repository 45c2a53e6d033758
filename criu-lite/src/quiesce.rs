//! Quiescence: every thread blocked in a call that it comes back to, under a stack that is fully understood.

use crate::tracee::{Blocked, Resume, Stop, blocked_call};
use crate::{FreezeError, Frozen, ProcessMemory, TraceError, Tracee, interrupted};
use mcr_image::{Addr, Memory, ModuleMap, Pid, Tid, Unwound, syscalls, unwind};
use std::fmt;
use std::time::{Duration, Instant};

/// How long to try.
#[derive(Clone, Copy, Debug)]
pub struct QuiesceOptions {
    /// One deadline for the whole process.
    pub timeout: Duration,
}

impl Default for QuiesceOptions {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(5) }
    }
}

/// What one thread is doing.
pub struct ThreadState {
    /// The thread.
    pub tid: Tid,
    /// Its name.
    pub comm: String,
    /// The call it is blocked in.
    pub call: Option<Blocked>,
    /// Its stack.
    pub stack: Unwound,
    /// Why it is not quiescent.
    pub obstacle: Option<Obstacle>,
}

/// What keeps a thread from being quiescent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// It is executing code.
    Running,
    /// In a call that is not waiting for events.
    Busy {
        /// The call's name.
        call: String,
    },
    /// It waits for a lock that another thread holds.
    Lock {
        /// The function that waits.
        function: String,
    },
    /// It was woken and has not run yet.
    Woken,
    /// Its stack cannot be unwound to the end.
    Stack {
        /// Where the unwinder stopped.
        why: String,
    },
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running => write!(f, "is running"),
            Self::Busy { call } => write!(f, "is inside {call}"),
            Self::Lock { function } => write!(f, "waits for a lock in {function}"),
            Self::Woken => write!(f, "was just woken"),
            Self::Stack { why } => write!(f, "has a stack that cannot be followed: {why}"),
        }
    }
}

impl ThreadState {
    /// At a quiescent point.
    #[must_use]
    pub fn quiescent(&self) -> bool {
        self.obstacle.is_none()
    }

    /// The name of the call it is blocked in.
    #[must_use]
    pub fn call_name(&self) -> Option<&'static str> {
        syscalls::name(self.call?.nr)
    }
}

impl fmt::Display for ThreadState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "thread {} ({})", self.tid, self.comm)?;
        if let Some(n) = self.call_name() {
            write!(f, " in {n}")?;
        }
        if let Some(o) = &self.obstacle {
            write!(f, " {o}")?;
        }
        let names: Vec<String> = self.stack.frames.iter().map(ToString::to_string).collect();
        write!(f, ": {}", names.join(" < "))
    }
}

/// Why no quiescent point was reached. The process runs on.
#[derive(Debug, thiserror::Error)]
pub enum QuiesceError {
    /// The deadline passed.
    #[error(
        "process {pid} did not come to rest within {timeout_ms} ms; in the way: {}; raise --timeout, or name \
         its resting point in a rules file",
        .obstacles.join("; ")
    )]
    Timeout {
        /// The process.
        pid: Pid,
        /// The deadline.
        timeout_ms: u64,
        /// The threads that were not quiescent when it was looked at last.
        obstacles: Vec<String>,
    },
    /// It could not be frozen again.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// A ptrace operation failed.
    #[error("process {pid}: {source}")]
    Trace {
        /// The process.
        pid: Pid,
        /// Why.
        #[source]
        source: TraceError,
    },
    /// Its maps or files could not be read.
    #[error("process {pid}: reading its mappings: {source}")]
    Io {
        /// The process.
        pid: Pid,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Functions of libc in which a thread waits for another one to release something.
const LOCK_FUNCTIONS: &[&str] = &[
    "pthread_mutex_lock",
    "__pthread_mutex_lock",
    "pthread_mutex_timedlock",
    "pthread_mutex_clocklock",
    "pthread_rwlock_rdlock",
    "pthread_rwlock_wrlock",
    "__pthread_rwlock_rdlock",
    "__pthread_rwlock_wrlock",
    "__lll_lock_wait",
    "__lll_lock_wait_private",
    "malloc",
    "free",
    "calloc",
    "realloc",
];

/// Looks at one stopped thread.
pub fn state(t: &Tracee, modules: &ModuleMap, mem: &ProcessMemory) -> Result<ThreadState, TraceError> {
    let regs = t.regs()?;
    let call = blocked_call(&regs, mem);
    let regs = call.map_or(regs, |c| c.rewound(&regs));
    let stack = unwind(modules, mem, &regs);
    let comm = std::fs::read(format!("/proc/{}/task/{}/comm", t.pid(), t.tid())).unwrap_or_default();
    let comm = String::from_utf8_lossy(comm.trim_ascii_end()).into_owned();
    let obstacle = obstacle(call.as_ref(), &stack, mem);
    Ok(ThreadState { tid: t.tid(), comm, call, stack, obstacle })
}

fn obstacle(call: Option<&Blocked>, stack: &Unwound, mem: &ProcessMemory) -> Option<Obstacle> {
    let Some(c) = call else {
        return Some(Obstacle::Running);
    };
    if !syscalls::is_resting(c.nr, &c.args) {
        let call = syscalls::name(c.nr).map_or_else(|| format!("system call {}", c.nr), str::to_owned);
        return Some(Obstacle::Busy { call });
    }
    if c.nr == libc::SYS_futex {
        // FUTEX_WAIT and FUTEX_WAIT_BITSET: the word still has the value that the thread sleeps on?
        let word = mem.u32(Addr(c.args[0])).ok();
        if matches!(c.args[1] & 0x7f, 0 | 9) && word != Some(c.args[2] as u32) {
            return Some(Obstacle::Woken);
        }
        let lock = stack
            .frames
            .iter()
            .take(4)
            .take_while(|f| !f.in_program())
            .find_map(|f| f.base_name().filter(|n| LOCK_FUNCTIONS.contains(n)).map(str::to_owned));
        if let Some(function) = lock {
            return Some(Obstacle::Lock { function });
        }
    }
    if !stack.end.is_complete() {
        return Some(Obstacle::Stack { why: stack.end.to_string() });
    }
    None
}

/// How long a call that should block is watched before it is believed.
const SETTLE: Duration = Duration::from_micros(300);
/// How often the threads that are not at rest are driven before the whole process is let go for a moment.
const ROUNDS: usize = 16;
/// For how long one thread is driven while the others stand.
const SLICE: Duration = Duration::from_millis(10);

impl Frozen {
    /// What every thread is doing now.
    pub fn states(&mut self) -> Result<Vec<ThreadState>, QuiesceError> {
        let pid = self.pid();
        let modules = self.modules().map_err(|source| QuiesceError::Io { pid, source })?;
        let mem = self.memory().clone();
        let all: Result<Vec<_>, _> = self.threads().iter().map(|t| state(t, &modules, &mem)).collect();
        all.map_err(|source| QuiesceError::Trace { pid, source })
    }

    /// Brings every thread to a quiescent point: those that are not there are let run to their next blocking
    /// call, first alone, then with all the others. Returns the threads' states.
    ///
    /// On an error the process has been let go.
    pub fn quiesce(&mut self, options: &QuiesceOptions) -> Result<Vec<ThreadState>, QuiesceError> {
        let r = self.try_quiesce(options);
        if r.is_err() {
            drop(self.release());
        }
        r
    }

    fn try_quiesce(&mut self, options: &QuiesceOptions) -> Result<Vec<ThreadState>, QuiesceError> {
        let pid = self.pid();
        let trace = |source| QuiesceError::Trace { pid, source };
        let deadline = Instant::now() + options.timeout;
        let mut pause = Duration::from_millis(1);
        loop {
            let mut states = self.states()?;
            let busy = |s: &[ThreadState]| -> Vec<Tid> {
                s.iter().filter(|s| !s.quiescent()).map(|s| s.tid).collect()
            };
            let mut left = busy(&states);
            // One that runs wakes others, which run in the next round: the wakes die down while nobody else adds
            // to them. A thread that waits for a lock cannot go on before its holder does.
            for _ in 0..ROUNDS {
                let stuck = |s: &ThreadState| matches!(s.obstacle, None | Some(Obstacle::Lock { .. }));
                if states.iter().all(stuck) || Instant::now() >= deadline {
                    break;
                }
                for tid in left {
                    let until = deadline.min(Instant::now() + SLICE);
                    if let Some(t) = self.thread(tid) {
                        drive(t, until).map_err(trace)?;
                    }
                }
                // Threads may have come (pthread_create) or gone meanwhile.
                self.drop_dead();
                self.stop_all(deadline)?;
                states = self.states()?;
                left = busy(&states);
            }
            if left.is_empty() {
                return Ok(states);
            }
            if interrupted() {
                return Err(trace(TraceError::Interrupted));
            }
            if Instant::now() + pause >= deadline {
                let obstacles = states.iter().filter(|s| !s.quiescent()).map(ToString::to_string).collect();
                return Err(QuiesceError::Timeout {
                    pid,
                    timeout_ms: options.timeout.as_millis() as u64,
                    obstacles,
                });
            }
            // Some wait for others (locks, pipes): let the whole process go on by itself for a moment. Nothing
            // tells when it has come to rest, so this is a pause and not a wait.
            self.release().map_err(trace)?;
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
            self.stop_all(deadline)?;
        }
    }
}

/// Lets one thread run until it blocks in a resting call, or `until`. It is in an event stop afterwards, or
/// has exited.
fn drive(t: &mut Tracee, until: Instant) -> Result<(), TraceError> {
    let mut sig = 0;
    loop {
        t.resume(Resume::Syscall, sig)?;
        sig = 0;
        let stop = match t.wait(Some(until)) {
            Err(TraceError::Timeout { .. }) => {
                t.stop(None)?;
                return Ok(());
            }
            r => r?,
        };
        match stop {
            Stop::Signal(s) => sig = s,
            Stop::Exited(_) | Stop::Killed(_) => return Ok(()),
            Stop::SyscallEntry => {
                let r = t.regs()?;
                let args = [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9];
                if !syscalls::is_resting(r.orig_rax as i64, &args) {
                    continue;
                }
                if holds(t, r.orig_rax as i64, &args) {
                    // A server under load finds something ready each time: it would never be seen blocked. In
                    // one step, so that the thread executes its call whatever becomes of the engine: the call
                    // is skipped and the thread is back in front of its instruction.
                    let mut back = r;
                    back.rip = r.rip.wrapping_sub(2);
                    back.rax = r.orig_rax;
                    back.orig_rax = u64::MAX;
                    t.set_regs(&back)?;
                    t.wait_event_stop(None)?;
                    return Ok(());
                }
                t.resume(Resume::Syscall, 0)?;
                match t.wait(Some(until.min(Instant::now() + SETTLE))) {
                    Err(TraceError::Timeout { .. }) => {
                        // It did not come back: blocked.
                        t.stop(None)?;
                        return Ok(());
                    }
                    Ok(Stop::Signal(s)) => sig = s,
                    Ok(s) if s.is_end() => return Ok(()),
                    Ok(_) => {}
                    Err(e) => return Err(e),
                }
            }
            _ => {}
        }
        if Instant::now() >= until {
            if sig != 0 {
                t.resume(Resume::Cont, sig)?;
            }
            t.stop(None)?;
            return Ok(());
        }
    }
}

/// Whether a thread at the entry of this call may be held there, as if it had found nothing ready.
fn holds(t: &Tracee, nr: i64, args: &[u64; 6]) -> bool {
    if !syscalls::only_waits(nr, args) {
        return false;
    }
    // A futex that has changed does not wait, it goes on.
    let plain = nr == libc::SYS_futex && matches!(args[1] & 0x7f, 0 | 9);
    !plain || t.memory().u32(Addr(args[0])).ok() == Some(args[2] as u32)
}
