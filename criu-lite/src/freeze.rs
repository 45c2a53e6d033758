//! Freezing: every thread of a process in a ptrace event stop, and all of them let go again, whatever happens.

use crate::collect::Known;
use crate::sys::{self, RealTime};
use crate::tracee::{self, CloneFlags, Site, Stop};
use crate::{ProcessMemory, TraceError, Tracee, modules};
use mcr_image::{ModuleMap, Pid, Tid, proto};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How to freeze.
#[derive(Clone, Copy, Debug)]
pub struct FreezeOptions {
    /// For all threads to stop.
    pub timeout: Duration,
}

impl Default for FreezeOptions {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(20) }
    }
}

/// Why a process cannot be frozen. It runs on as before.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// Nobody has this pid.
    #[error("no process has pid {pid}; look it up with `pgrep` or `ps`")]
    NoProcess {
        /// The pid.
        pid: Pid,
    },
    /// The pid is a thread's.
    #[error("{pid} is a thread of process {process}; give {process}")]
    NotAProcess {
        /// The thread.
        pid: Pid,
        /// Its process.
        process: Pid,
    },
    /// It lives in the kernel.
    #[error("process {pid} ({comm}) is a kernel thread; only user programs can be frozen")]
    KernelThread {
        /// The pid.
        pid: Pid,
        /// Its name.
        comm: String,
    },
    /// It is this program.
    #[error("process {pid} is mcr itself; give the pid of the server")]
    Ourselves {
        /// The pid.
        pid: Pid,
    },
    /// It has ended and waits for its parent.
    #[error(
        "process {pid} ({comm}) is a zombie: it has ended and waits for its parent {parent} to collect it"
    )]
    Zombie {
        /// The pid.
        pid: Pid,
        /// Its name.
        comm: String,
        /// Its parent.
        parent: Pid,
    },
    /// Its main thread has exited.
    #[error("the main thread of process {pid} ({comm}) has exited; such a process cannot be carried")]
    LeaderExited {
        /// The pid.
        pid: Pid,
        /// Its name.
        comm: String,
    },
    /// Job control has stopped it.
    #[error("process {pid} ({comm}) is stopped by job control; continue it first: kill -CONT {pid}")]
    Stopped {
        /// The pid.
        pid: Pid,
        /// Its name.
        comm: String,
    },
    /// A debugger holds it.
    #[error("process {pid} is already traced by process {tracer} ({tracer_comm}); end that first")]
    AlreadyTraced {
        /// The pid.
        pid: Pid,
        /// The tracer.
        tracer: Pid,
        /// Its name.
        tracer_comm: String,
    },
    /// Rights are missing.
    #[error(
        "process {pid}: {call}: not permitted; run as root or as its user (uid {uid}), with ptrace allowed"
    )]
    Denied {
        /// The pid.
        pid: Pid,
        /// Its user.
        uid: u32,
        /// What was refused.
        call: &'static str,
    },
    /// 32-bit code.
    #[error("process {pid} ({comm}) is a 32-bit program; only x86-64 programs are supported")]
    ThirtyTwoBit {
        /// The pid.
        pid: Pid,
        /// Its name.
        comm: String,
    },
    /// One of its threads does not stop.
    #[error(
        "process {pid}: thread {tid} did not stop in time ({doing}); nothing was changed. A thread in uninterruptible \
         sleep (state D) stops once its call is over: try again then"
    )]
    NotStopping {
        /// The pid.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// Its state, system call and signals.
        doing: String,
    },
    /// A ptrace operation failed.
    #[error("process {pid}: {source}")]
    Trace {
        /// The pid.
        pid: Pid,
        /// Why.
        #[source]
        source: TraceError,
    },
}

/// For so long a process stands still for a thread that does not stop; then the others go on meanwhile.
const PATIENCE: Duration = Duration::from_millis(100);

/// After a deadline.
const GRACE: Duration = Duration::from_millis(50);

/// What there is to say of a thread that does not stop (proc(5)).
fn not_stopping(pid: Pid, tid: Tid) -> FreezeError {
    let read = |name| std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/{name}")).unwrap_or_default();
    let status = Status(read("status"));
    let [state, tracer, own, shared, blocked] =
        ["State", "TracerPid", "SigPnd", "ShdPnd", "SigBlk"].map(|key| status.get(key));
    let (wchan, call) = (read("wchan"), read("syscall"));
    let doing = format!(
        "state {state}, in {wchan}, call {}, traced by {tracer}, signals pending {own} and {shared}, blocked {blocked}",
        call.split_whitespace().next().unwrap_or("?"),
    );
    FreezeError::NotStopping { pid, tid, doing }
}

/// What /proc/PID/status says.
struct Status(String);

impl Status {
    fn read(pid: i32) -> Option<Self> {
        let b = std::fs::read(format!("/proc/{pid}/status")).ok()?;
        Some(Self(String::from_utf8_lossy(&b).into_owned()))
    }
    fn get(&self, key: &str) -> &str {
        self.0.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':')).map_or("", str::trim)
    }
    fn num(&self, key: &str) -> i32 {
        self.get(key).split_whitespace().next().and_then(|w| w.parse().ok()).unwrap_or(0)
    }
}

/// Looks at a pid before anything is done to it.
pub fn examine(pid: Pid) -> Result<(), FreezeError> {
    if pid.0 <= 0 {
        return Err(FreezeError::NoProcess { pid });
    }
    if pid.0 == std::process::id() as i32 {
        return Err(FreezeError::Ourselves { pid });
    }
    let st = Status::read(pid.0).ok_or(FreezeError::NoProcess { pid })?;
    let comm = st.get("Name").to_owned();
    let process = Pid(st.num("Tgid"));
    if process != pid {
        return Err(FreezeError::NotAProcess { pid, process });
    }
    /// PF_KTHREAD, include/linux/sched.h.
    const PF_KTHREAD: u64 = 0x0020_0000;
    let stat = std::fs::read(format!("/proc/{pid}/stat")).map_err(|_| FreezeError::NoProcess { pid })?;
    let stat = String::from_utf8_lossy(&stat).into_owned();
    let flags =
        stat.rsplit_once(") ").and_then(|(_, r)| r.split(' ').nth(6)?.parse::<u64>().ok()).unwrap_or(0);
    if flags & PF_KTHREAD != 0 {
        return Err(FreezeError::KernelThread { pid, comm });
    }
    match st.get("State").chars().next() {
        Some('Z' | 'X') if st.num("Threads") > 1 => {
            return Err(FreezeError::LeaderExited { pid, comm });
        }
        Some('Z' | 'X') => {
            return Err(FreezeError::Zombie { pid, comm, parent: Pid(st.num("PPid")) });
        }
        Some('T') => return Err(FreezeError::Stopped { pid, comm }),
        _ => {}
    }
    traced(pid, &st)?;
    // EI_CLASS of the program.
    let mut head = [0u8; 5];
    let uid = st.num("Uid") as u32;
    match std::fs::File::open(format!("/proc/{pid}/exe")) {
        Ok(mut f) => {
            use std::io::Read;
            if f.read_exact(&mut head).is_ok() && head[4] == 1 {
                return Err(FreezeError::ThirtyTwoBit { pid, comm });
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            return Err(FreezeError::Denied { pid, uid, call: "opening /proc/PID/exe" });
        }
        Err(_) => {}
    }
    Ok(())
}

fn traced(pid: Pid, st: &Status) -> Result<(), FreezeError> {
    let tracer = st.num("TracerPid");
    if tracer == 0 {
        return Ok(());
    }
    let tracer_comm = Status::read(tracer).map_or_else(String::new, |s| s.get("Name").to_owned());
    Err(FreezeError::AlreadyTraced { pid, tracer: Pid(tracer), tracer_comm })
}

/// A process whose threads all sit in event stops. Dropping it lets them go as they were, also on a panic;
/// when the engine is killed the kernel lets them go.
pub struct Frozen {
    pid: Pid,
    pidfd: OwnedFd,
    threads: Vec<Tracee>,
    mem: Arc<ProcessMemory>,
    /// With the mappings that they were read from.
    modules: Option<(Arc<Vec<proto::Vma>>, Arc<ModuleMap>)>,
    vmas: Option<Arc<Vec<proto::Vma>>>,
    /// Its mappings as they were before it was stopped.
    known: Known,
    since: Instant,
    // Last: the threads are detached before the engine gives its priority back.
    real_time: Option<RealTime>,
}

impl Frozen {
    /// Freezes a process: PTRACE_SEIZE and PTRACE_INTERRUPT of every thread until /proc shows no new one. The
    /// calling thread is at SCHED_FIFO from here on, where that is allowed: only this thread can use the result.
    pub fn seize(pid: Pid, options: &FreezeOptions) -> Result<Self, FreezeError> {
        examine(pid)?;
        let pidfd = sys::pidfd_open(pid.0).map_err(|_| FreezeError::NoProcess { pid })?;
        let mem = ProcessMemory::open(pid).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => FreezeError::NoProcess { pid },
            _ => {
                let uid = Status::read(pid.0).map_or(0, |s| s.num("Uid") as u32);
                FreezeError::Denied { pid, uid, call: "opening /proc/PID/mem" }
            }
        })?;
        let mut this = Self {
            pid,
            pidfd,
            threads: Vec::new(),
            mem: Arc::new(mem),
            modules: None,
            vmas: None,
            // A process whose map cannot be read now is refused when it is read again.
            known: Known::read(pid).unwrap_or_default(),
            since: Instant::now(),
            real_time: Some(RealTime::enter()),
        };
        this.stop_all(Instant::now() + options.timeout)?;
        Ok(this)
    }

    /// Stops whatever threads are not held yet.
    pub(crate) fn stop_all(&mut self, deadline: Instant) -> Result<(), FreezeError> {
        let pid = self.pid;
        // Whoever holds threads already may not let them go.
        let alone = self.threads.is_empty();
        self.since = Instant::now();
        loop {
            let (mut fresh, mut late, mut dying) = (Vec::new(), Vec::new(), false);
            // The leader last: see `release`.
            let mut listed = tids(pid).map_err(|_| FreezeError::NoProcess { pid })?;
            listed.sort_by_key(|t| t.0 == pid.0);
            for tid in listed {
                if self.threads.iter().any(|t| t.tid() == tid) {
                    continue;
                }
                match Tracee::seize_with(pid, tid, self.mem.clone()).and_then(|t| t.interrupt().map(|()| t)) {
                    Ok(t) => fresh.push(t),
                    // It exited between the listing and now. A thread that is past its exit but still listed
                    // gives EPERM, as one of somebody else's would.
                    Err(e) if matches!(e, TraceError::Gone { .. }) || is_dying(pid, tid, &e) => dying = true,
                    Err(e) => return Err(self.seize_error(tid, e)),
                }
            }
            let found = !fresh.is_empty();
            let soon = if alone { deadline.min(Instant::now() + PATIENCE) } else { deadline };
            for mut t in fresh {
                match self.hold(&mut t, soon) {
                    Err(FreezeError::NotStopping { .. }) if Instant::now() < deadline => late.push(t),
                    Ok(true) => self.threads.push(t),
                    Ok(false) => dying = true,
                    Err(e) => return Err(e),
                }
            }
            if !late.is_empty() {
                // Nobody else waits for them: the others run until these have stopped, and are then stopped again.
                self.leader_first();
                self.release().map_err(|source| FreezeError::Trace { pid, source })?;
                for mut t in late {
                    if self.hold(&mut t, deadline)? {
                        self.threads.push(t);
                    }
                }
                self.since = Instant::now();
                continue;
            }
            if found {
                continue;
            }
            // The kernel cuts the listing short at a thread that ends meanwhile (next_tid, fs/proc/base.c), so
            // what comes after it may be missing: the number of threads has to agree.
            let counted = Status::read(pid.0).ok_or(FreezeError::NoProcess { pid })?.num("Threads");
            if !dying && usize::try_from(counted).is_ok_and(|n| n <= self.threads.len()) {
                break;
            }
            if Instant::now() >= deadline {
                let mut all = tids(pid).unwrap_or_default().into_iter();
                let dying = all.find(|t| !self.threads.iter().any(|held| held.tid() == *t));
                return Err(not_stopping(pid, dying.unwrap_or(Tid(pid.0))));
            }
            // The dying thread needs a processor, and we are above all others; it is not ours to wait for.
            std::thread::sleep(Duration::from_micros(20));
        }
        self.leader_first();
        if self.threads.first().is_none_or(|t| t.tid().0 != pid.0) {
            return Err(FreezeError::NoProcess { pid });
        }
        self.mem.refresh();
        self.vmas = None;
        Ok(())
    }

    /// Waits until a thread that was interrupted has stopped. `false`: it has ended.
    fn hold(&self, t: &mut Tracee, deadline: Instant) -> Result<bool, FreezeError> {
        let pid = self.pid;
        let mut stop = t.wait_event_stop(Some(deadline));
        if matches!(stop, Err(TraceError::Timeout { .. })) {
            // Where the machine itself stood still (a guest that got no processor), nobody else had that time, either.
            stop = t.wait_event_stop(Some(Instant::now() + GRACE));
        }
        match stop {
            Ok(Stop::Group(_)) => {
                let comm = Status::read(pid.0).map_or_else(String::new, |s| s.get("Name").to_owned());
                Err(FreezeError::Stopped { pid, comm })
            }
            Ok(_) => Ok(true),
            Err(TraceError::Gone { .. } | TraceError::Died { .. }) => Ok(false),
            Err(TraceError::Timeout { tid }) => Err(not_stopping(pid, tid)),
            Err(source) => Err(FreezeError::Trace { pid, source }),
        }
    }

    /// The leader, then the others by age.
    fn leader_first(&mut self) {
        let leader = self.pid.0;
        self.threads.sort_by_key(|t| (t.tid().0 != leader, t.tid()));
    }

    fn seize_error(&self, tid: Tid, e: TraceError) -> FreezeError {
        let pid = self.pid;
        if e.errno() == Some(Errno::EPERM) {
            if let Some(st) = Status::read(tid.0) {
                if let Err(e) = traced(pid, &st) {
                    return e;
                }
                if matches!(st.get("State").chars().next(), Some('Z' | 'X')) {
                    return FreezeError::LeaderExited { pid, comm: st.get("Name").to_owned() };
                }
                return FreezeError::Denied { pid, uid: st.num("Uid") as u32, call: "PTRACE_SEIZE" };
            }
            return FreezeError::NoProcess { pid };
        }
        FreezeError::Trace { pid, source: e }
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its pidfd.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Since when it stands.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<ProcessMemory> {
        &self.mem
    }

    /// Its threads, the leader first.
    #[must_use]
    pub fn threads(&self) -> &[Tracee] {
        &self.threads
    }

    /// Its threads.
    pub fn threads_mut(&mut self) -> &mut [Tracee] {
        &mut self.threads
    }

    /// One thread.
    pub fn thread(&mut self, tid: Tid) -> Option<&mut Tracee> {
        self.threads.iter_mut().find(|t| t.tid() == tid)
    }

    /// The main thread. A frozen process has one.
    pub fn leader(&mut self) -> &mut Tracee {
        &mut self.threads[0]
    }

    /// Executes a system call in a thread. The thread's registers are back when it is let go.
    pub fn syscall(&mut self, tid: Tid, nr: i64, args: &[u64]) -> Result<u64, TraceError> {
        self.share_site()?;
        self.thread(tid).ok_or(TraceError::Gone { tid })?.syscall(nr, args)
    }

    /// Finds the instructions for injections once for all threads.
    pub(crate) fn share_site(&mut self) -> Result<Site, TraceError> {
        let site = self.leader().find_site()?;
        for t in &mut self.threads {
            t.set_site(site);
        }
        Ok(site)
    }

    /// Forgets threads that have exited.
    pub(crate) fn drop_dead(&mut self) {
        self.threads.retain(|t| !t.state().is_some_and(Stop::is_end));
    }

    /// Its mappings.
    pub fn vmas(&mut self) -> std::io::Result<Arc<Vec<proto::Vma>>> {
        if let Some(v) = &self.vmas {
            return Ok(v.clone());
        }
        let v = Arc::new(self.known.map(self.pid)?);
        self.vmas = Some(v.clone());
        Ok(v)
    }

    /// Its ELF modules. Files that [`modules::preload`] has read before the freeze are not read again.
    pub fn modules(&mut self) -> std::io::Result<Arc<ModuleMap>> {
        let vmas = self.vmas()?;
        if let Some((from, m)) = &self.modules
            && (Arc::ptr_eq(from, &vmas) || *from == vmas)
        {
            return Ok(m.clone());
        }
        let m = Arc::new(modules::load(self.pid, &vmas, self.mem.as_ref())?);
        self.modules = Some((vmas, m.clone()));
        Ok(m)
    }

    /// A copy-on-write child whose parent is the target's parent: the host of a live update. It is stopped,
    /// single-threaded, has the leader's registers (rewound where it was blocked in a call), all descriptors,
    /// and dies with the engine.
    pub fn fork_host(&mut self) -> Result<Tracee, TraceError> {
        self.share_site()?;
        let t = self.leader().fork(CloneFlags::Sibling)?;
        self.leader().put_back()?;
        Ok(t)
    }

    /// A copy-on-write child that the target never sees: the snapshot of a dump. After it was killed it has to
    /// be reaped in the target: [`reap_hidden`].
    pub fn fork_hidden(&mut self) -> Result<Tracee, TraceError> {
        self.share_site()?;
        let t = self.leader().fork(CloneFlags::Hidden)?;
        self.leader().put_back()?;
        Ok(t)
    }

    /// Whether the engine is at SCHED_FIFO while the process stands. Not permitted everywhere (CAP_SYS_NICE, or
    /// RLIMIT_RTPRIO); without it letting go of many busy threads takes a hundred milliseconds and more.
    #[must_use]
    pub fn is_real_time(&self) -> bool {
        self.real_time.as_ref().is_some_and(RealTime::is_on)
    }

    /// Gives up the real-time priority: when the process will not be let go soon.
    pub fn relax(&mut self) {
        self.real_time = None;
    }

    /// Lets all threads go. Returns for how long the process stood.
    pub fn thaw(mut self) -> Result<Duration, TraceError> {
        self.release()?;
        Ok(self.since.elapsed())
    }

    /// Detaches all threads; the process runs on.
    pub(crate) fn release(&mut self) -> Result<(), TraceError> {
        let mut first = Ok(());
        // Whatever needs several steps comes first, so that the threads are let go at nearly the same time.
        for t in &mut self.threads {
            first = first.and(match t.put_back() {
                Err(TraceError::Gone { .. } | TraceError::Died { .. }) => Ok(()),
                r => r,
            });
        }
        // The leader first: while it is traced, the kernel queues also what the process ignores, like the SIGCHLD of
        // a child that it forked (sig_ignored, kernel/signal.c), and wakes whichever thread would take it: a call of
        // a thread that was let go before would end with EINTR. Should the process be dying, the leader's exit is reported after all
        // others', so it is waited for last.
        let leader = self.threads.first_mut().map(Tracee::detach_living).transpose();
        let leader_lives = !matches!(leader, Ok(Some(false)));
        first = first.and(leader.map(drop));
        for mut t in self.threads.drain(..).skip(usize::from(leader_lives)).rev() {
            first = first.and(t.detach_now());
        }
        first
    }

    /// Ends the process: SIGKILL, and every thread reaped. The zombie of the leader is left to its parent,
    /// unless that is this program.
    pub fn kill(mut self) -> Result<(), TraceError> {
        let mut first = Ok(());
        // The leader is reported last, when all others are reaped.
        while let Some(t) = self.threads.pop() {
            first = first.and(t.kill());
        }
        first
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.release());
    }
}

/// Whether seizing failed because the thread has exited and is about to vanish. Not for a main thread: that one
/// stays as a zombie.
fn is_dying(pid: Pid, tid: Tid, e: &TraceError) -> bool {
    tid.0 != pid.0
        && e.errno() == Some(Errno::EPERM)
        && Status::read(tid.0).is_none_or(|s| matches!(s.get("State").chars().next(), Some('Z' | 'X')))
}

/// The threads of a process as /proc shows them.
pub fn tids(pid: Pid) -> std::io::Result<Vec<Tid>> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/task"))?
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok().map(Tid))
        .collect())
}

/// Waits until a process that is being killed is a zombie or gone. `false`: not in time.
#[must_use]
pub fn await_end(pid: Pid, limit: Duration) -> bool {
    let Ok(end) = sys::pidfd_open(pid.0) else { return true };
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(end.as_fd(), PollFlags::POLLIN)], left) {
            Err(Errno::EINTR) => {}
            r => return r.is_ok_and(|n| n > 0),
        }
    }
}

/// Reaps a hidden child that is dead or dying in its parent, by a wait4(2) injected in the main thread for some
/// microseconds. That call never waits: whatever holds the child up must not hold up the server.
pub fn reap_hidden(pid: Pid, child: Pid) -> Result<(), TraceError> {
    let patience = Duration::from_secs(2);
    // A dead tracee is not its parent's before its tracer has reaped it (wait_consider_task, kernel/exit.c).
    drop(tracee::reap(Tid(child.0), Some(Instant::now() + patience)));
    if !await_end(child, patience) {
        return Err(TraceError::Timeout { tid: Tid(child.0) });
    }
    let mut t = Tracee::seize(pid, Tid(pid.0))?;
    t.stop(Some(Instant::now() + patience))?;
    let flags = (libc::__WALL | libc::WNOHANG) as u64;
    let reaped = t.syscall(libc::SYS_wait4, &[child.0 as u64, 0, flags, 0]);
    t.detach()?;
    match reaped {
        // Somebody else traces it.
        Ok(0) => Err(TraceError::Timeout { tid: Tid(child.0) }),
        r => r.map(drop),
    }
}
