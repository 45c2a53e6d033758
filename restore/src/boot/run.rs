//! The start-up itself: every thread runs from system call to system call until all of them rest where old's
//! threads rest.

use super::error::{BootError, Result};
use super::exec::Loaded;
use super::gate::{After, Call, Decision, Gate};
use super::hold::{self, Stacks};
use super::host::{Host, signal_name};
use super::ptrace::{self, AtSyscall, Stop};
use super::{BootSpec, OldThread, Where};
use mcr_image::{Regs, Tid, syscalls};
use nix::errno::Errno;
use std::time::{Duration, Instant};

/// How long nothing may happen before threads that are not held are looked at.
const QUIET: Duration = Duration::from_millis(3);
/// How long nothing may happen, with no thread able to go on, before the boot is given up.
const STUCK: Duration = Duration::from_millis(400);

/// What a thread is doing.
// There is one of these a thread: boxing the registers would gain nothing.
#[allow(clippy::large_enum_variant)]
enum State {
    /// Computing, or between stops.
    Running,
    /// Executing a call; what to do when it returns, and the registers that it is to see then.
    InCall { call: Call, after: Option<After>, restore: Option<Regs>, answer: Option<i64> },
    /// Stopped at the entry of its blocking call.
    Held { call: Call },
}

struct Thread {
    tid: Tid,
    state: State,
    /// Signature where it is held.
    signature: Vec<String>,
}

/// A thread at rest when the boot is complete.
pub(super) struct Rest {
    pub tid: Tid,
    pub call: Call,
    /// Index of its old thread.
    pub old: Option<usize>,
    /// Stopped at the entry of the call (true), or inside it.
    pub at_entry: bool,
}

/// What the start-up came to.
pub(super) struct Run<'a> {
    pub loaded: Loaded,
    pub gate: Gate<'a>,
    pub stacks: Stacks,
    pub threads: Vec<Rest>,
}

/// Runs one start-up.
pub(super) struct Runner<'a> {
    host: &'a Host,
    spec: &'a BootSpec<'a>,
    old: &'a [OldThread],
    loaded: Loaded,
    gate: Gate<'a>,
    stacks: Stacks,
    /// In order of creation.
    threads: Vec<Thread>,
    /// The last fatal signal that was delivered to a handler.
    last_fatal: Option<(i32, Where)>,
}

impl<'a> Runner<'a> {
    pub(super) fn new(host: &'a Host, spec: &'a BootSpec<'a>, old: &'a [OldThread], loaded: Loaded) -> Self {
        let gate = Gate::new(spec, &loaded);
        Self {
            host,
            spec,
            old,
            loaded,
            gate,
            stacks: Stacks::new(spec),
            threads: vec![Thread { tid: Tid(host.pid.0), state: State::Running, signature: Vec::new() }],
            last_fatal: None,
        }
    }

    pub(super) fn run(mut self) -> Result<Run<'a>> {
        let begun = Instant::now();
        let deadline = begun + self.spec.timeout;
        ptrace::resume(Tid(self.host.pid.0), 0)?;
        let mut quiet_since = Instant::now();
        loop {
            self.release_moved_on()?;
            let (paired, all_held) = self.progress();
            if paired && all_held {
                break;
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(self.hangs(self.spec.timeout.as_secs()));
            }
            let quiet = now.duration_since(quiet_since);
            if quiet >= QUIET && self.nobody_runs() {
                if paired {
                    break;
                }
                if quiet >= STUCK && self.nobody_will_run() {
                    return Err(self.hangs(begun.elapsed().as_secs()));
                }
            }
            let until = (now + QUIET).min(deadline);
            match self.host.waiter.any(until) {
                Ok(Some((tid, stop))) => {
                    if self.handle(tid, stop)? {
                        quiet_since = Instant::now();
                    }
                }
                Ok(None) if mcr_criu_lite::interrupted() => return Err(BootError::Interrupted),
                Ok(None) => {}
                Err(Errno::ECHILD) => {
                    return Err(BootError::HostKilled { signal: "an unknown cause".into() });
                }
                Err(e) => return Err(BootError::step("waiting for the new version", e)),
            }
        }
        self.stacks.stale();
        let held: Vec<(Tid, &[String])> =
            self.threads.iter().map(|t| (t.tid, t.signature.as_slice())).collect();
        let (pairs, _) = hold::pair(&held, self.old);
        let threads = self
            .threads
            .iter()
            .zip(pairs)
            .filter_map(|(t, old)| match &t.state {
                State::Held { call } => Some(Rest { tid: t.tid, call: *call, old, at_entry: true }),
                State::InCall { call, .. } => {
                    Some(Rest { tid: t.tid, call: *call, old: None, at_entry: false })
                }
                State::Running => None,
            })
            .collect();
        Ok(Run { loaded: self.loaded, gate: self.gate, stacks: self.stacks, threads })
    }

    /// (every old thread has its counterpart, every thread is held).
    fn progress(&self) -> (bool, bool) {
        let held: Vec<(Tid, &[String])> = self
            .threads
            .iter()
            .filter(|t| matches!(t.state, State::Held { .. }))
            .map(|t| (t.tid, t.signature.as_slice()))
            .collect();
        if held.len() < self.old.len() {
            return (false, held.len() == self.threads.len());
        }
        let (_, missing) = hold::pair(&held, self.old);
        (missing.is_empty(), held.len() == self.threads.len())
    }

    /// Every thread is held or sleeps in a blocking call.
    fn nobody_runs(&self) -> bool {
        self.threads.iter().all(|t| match &t.state {
            State::Held { .. } => true,
            State::InCall { call, .. } => {
                syscalls::is_resting(call.nr, &call.args) && self.host.thread_state(t.tid) == Some('S')
            }
            State::Running => false,
        })
    }

    /// As [`Self::nobody_runs`], and no timeout will wake anyone.
    fn nobody_will_run(&self) -> bool {
        use syscalls::Timeout;
        self.threads.iter().all(|t| match &t.state {
            State::InCall { call, .. } => syscalls::blocking(call.nr).is_some_and(|b| match b.timeout {
                Timeout::Never => true,
                Timeout::Millis(i) => (call.args[i] as i32) < 0,
                Timeout::Timespec(i)
                | Timeout::Timeval(i)
                | Timeout::Futex(i)
                | Timeout::AbsoluteTimespec(i) => call.args[i] == 0,
                Timeout::ClockSleep(_) => false,
            }),
            State::Held { .. } => true,
            State::Running => false,
        })
    }

    fn hangs(&mut self, seconds: u64) -> BootError {
        let mut places = Vec::new();
        let tids: Vec<(Tid, Option<i64>, bool)> = self
            .threads
            .iter()
            .map(|t| match &t.state {
                State::Running => (t.tid, None, false),
                State::InCall { call, .. } => (t.tid, Some(call.nr), false),
                State::Held { call } => (t.tid, Some(call.nr), true),
            })
            .collect();
        for (tid, call, stopped) in tids {
            if !stopped {
                let _ = ptrace::interrupt(tid);
                let _ = self.host.waiter.one(tid, Instant::now() + Duration::from_millis(200));
            }
            places.push(self.stacks.place(self.host, self.spec, tid, call));
        }
        let held: Vec<(Tid, &[String])> = self
            .threads
            .iter()
            .filter(|t| matches!(t.state, State::Held { .. }))
            .map(|t| (t.tid, t.signature.as_slice()))
            .collect();
        let (_, missing) = hold::pair(&held, self.old);
        let missing = missing
            .into_iter()
            .map(|i| {
                let o = &self.old[i];
                Where { tid: o.tid, call: o.call.clone(), stack: o.signature.clone() }
            })
            .collect();
        BootError::Hangs { seconds, places, missing, output: self.gate.output_text() }
    }

    fn index(&mut self, tid: Tid) -> Option<usize> {
        if let Some(i) = self.threads.iter().position(|t| t.tid == tid) {
            return Some(i);
        }
        // A new thread may stop before its creator tells of it; other tracees of ours are none of the host's.
        if !std::path::Path::new(&format!("/proc/{}/task/{tid}", self.host.pid)).exists() {
            return None;
        }
        self.threads.push(Thread { tid, state: State::Running, signature: Vec::new() });
        Some(self.threads.len() - 1)
    }

    /// Deals with one stop. Whether it was the host's.
    fn handle(&mut self, tid: Tid, stop: Stop) -> Result<bool> {
        let Some(i) = self.index(tid) else {
            return Ok(false);
        };
        match stop {
            Stop::Syscall => match ptrace::syscall_info(tid)? {
                AtSyscall::Entry { nr, args } => self.entry(i, Call { tid, nr, args })?,
                AtSyscall::Exit { result } => self.exit(i, result)?,
                AtSyscall::No => ptrace::resume(tid, 0)?,
            },
            Stop::Parked => ptrace::resume(tid, 0)?,
            Stop::Event(libc::PTRACE_EVENT_CLONE) => {
                let child = Tid(ptrace::event_message(tid)? as i32);
                self.index(child);
                ptrace::resume(tid, 0)?;
            }
            Stop::Event(e) => {
                let call = match e {
                    libc::PTRACE_EVENT_EXEC => "execve",
                    _ => "fork",
                };
                return Err(BootError::Forks {
                    call: call.into(),
                    place: self.stacks.place(self.host, self.spec, tid, None),
                });
            }
            Stop::Signal(s) => self.signal(tid, s)?,
            Stop::Exited(status) => {
                self.threads.remove(i);
                if self.threads.is_empty() || tid.0 == self.host.pid.0 {
                    return Err(self.exited(status, Where { tid, ..Where::default() }));
                }
            }
            Stop::Killed(s) => {
                return Err(match self.last_fatal.take() {
                    Some((signal, place)) => self.crashed(signal, place),
                    None => BootError::HostKilled { signal: signal_name(s) },
                });
            }
        }
        Ok(true)
    }

    fn exited(&mut self, status: i32, place: Where) -> BootError {
        match self.last_fatal.take() {
            // A crash handler of the program's own ended it, with whatever status.
            Some((signal, place)) => self.crashed(signal, place),
            None => BootError::Exited { status, place, output: self.gate.output_text() },
        }
    }

    fn crashed(&self, signal: i32, place: Where) -> BootError {
        BootError::Crashed { signal: signal_name(signal), place, output: self.gate.output_text() }
    }

    fn signal(&mut self, tid: Tid, s: i32) -> Result<()> {
        let fatal = matches!(
            s,
            libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE | libc::SIGABRT | libc::SIGSYS
        );
        if fatal {
            let place = self.stacks.place(self.host, self.spec, tid, None);
            let handled = self.gate.sigactions.get(&(s as u32)).is_some_and(|a| a.handler > 1);
            if !handled {
                return Err(self.crashed(s, place));
            }
            self.last_fatal.get_or_insert((s, place));
        }
        ptrace::resume(tid, s)?;
        Ok(())
    }

    fn entry(&mut self, i: usize, call: Call) -> Result<()> {
        let tid = call.tid;
        if hold::may_rest(self.host, call.nr, &call.args) && self.rests(i, &call)? {
            self.threads[i].state = State::Held { call };
            return Ok(());
        }
        let decision = match self.gate.entry(self.host, &call) {
            Ok(d) => d,
            // A path that the program itself cannot read will get its EFAULT from the kernel.
            Err(BootError::Memory(_)) => Decision::Run,
            Err(e) => return Err(e),
        };
        let mut state = (None, None, None);
        match decision {
            Decision::Run => {}
            Decision::Then(after) => state.0 = Some(after),
            Decision::Instead { nr, args, then } => {
                let saved = ptrace::regs(tid)?;
                let mut r = saved;
                r.orig_rax = nr as u64;
                (r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9) =
                    (args[0], args[1], args[2], args[3], args[4], args[5]);
                ptrace::set_regs(tid, &r)?;
                state = (then, Some(saved), None);
            }
            Decision::Answer(result) => {
                let saved = ptrace::regs(tid)?;
                ptrace::set_regs(tid, &Regs { orig_rax: u64::MAX, ..saved })?;
                state = (None, Some(saved), Some(result));
            }
            Decision::Ends(status) => {
                let place = self.stacks.place(self.host, self.spec, tid, Some(call.nr));
                return Err(self.exited(status, place));
            }
            Decision::Forks(name) => {
                let place = self.stacks.place(self.host, self.spec, tid, Some(call.nr));
                return Err(BootError::Forks { call: name, place });
            }
            Decision::Refuse(e) => return Err(*e),
        }
        if call.nr == libc::SYS_exit && self.threads.len() == 1 {
            let place = self.stacks.place(self.host, self.spec, tid, Some(call.nr));
            return Err(self.exited(call.args[0] as i32, place));
        }
        let (after, restore, answer) = state;
        self.threads[i].state = State::InCall { call, after, restore, answer };
        ptrace::resume(tid, 0)?;
        Ok(())
    }

    /// Whether the thread stands where an old thread rests.
    fn rests(&mut self, i: usize, call: &Call) -> Result<bool> {
        if self.gate.maps_changed {
            self.stacks.stale();
            self.gate.maps_changed = false;
        }
        let mut regs = ptrace::regs(call.tid)?;
        regs.rip -= 2;
        let signature = self.stacks.unwind(self.host, self.spec, &regs)?.signature();
        let known = self.old.iter().any(|o| o.signature == signature);
        self.threads[i].signature = if known { signature } else { Vec::new() };
        Ok(known)
    }

    fn exit(&mut self, i: usize, result: i64) -> Result<()> {
        let tid = self.threads[i].tid;
        let state = std::mem::replace(&mut self.threads[i].state, State::Running);
        if let State::InCall { call, after, restore, answer } = state {
            let mut regs = None;
            if let Some(saved) = restore {
                // Back to the arguments that the program passed; a rewritten call keeps its result.
                regs = Some(Regs { rax: answer.unwrap_or(result) as u64, ..saved });
            }
            if let Some(r) = regs {
                ptrace::set_regs(tid, &r)?;
            }
            if let Some(after) = after
                && let Some(seen) = self.gate.exit(self.host, &call, &after, result)?
                && seen != result
            {
                let r = ptrace::regs(tid)?;
                ptrace::set_regs(tid, &Regs { rax: seen as u64, ..r })?;
            }
        }
        ptrace::resume(tid, 0)?;
        Ok(())
    }

    /// Lets held futex waiters go whose word has changed: they have been woken.
    fn release_moved_on(&mut self) -> Result<()> {
        for t in &mut self.threads {
            if let State::Held { call } = t.state
                && hold::futex_moved_on(&self.host.mem, call.nr, &call.args)
            {
                t.signature.clear();
                t.state = State::InCall { call, after: None, restore: None, answer: None };
                ptrace::resume(t.tid, 0)?;
            }
        }
        Ok(())
    }
}
