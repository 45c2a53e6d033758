//! From image to process. The engine opens every file first, then makes the process with its old pid as a
//! traced, stopped child and lets it set up its own memory, descriptors, threads and kernel state by injected
//! calls. Until [`Host::release`] it has not executed one instruction of the server; any error before that
//! kills it and leaves nothing behind.

mod batch;
mod epoll;
mod error;
mod eventfd;
mod file;
mod fill;
mod foreign;
mod mapped;
mod objects;
mod pipe;
pub(crate) mod process;
pub(crate) mod remote;
mod signalfd;
mod spawn;
mod tcp;
mod timerfd;
mod timers;
mod unix;
mod vma;

pub use error::RebuildError;
pub use objects::{Content, OpenFiles, open_all};
pub use remote::{Call, Inject, Remote};

use crate::keeper::{Fetched, Keeper, KeeperError};
use mcr_image::{Image, Pid, Regs, Tid, proto};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

/// Which threads to make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Threads {
    /// All of them, with descriptors installed: a plain restore.
    #[default]
    All,
    /// Only the leader, with memory; descriptors are open in the engine ([`Host::files`]) and the process has
    /// none but the engine's 0, 1 and 2. Signal actions are old's; no timers or credentials are set, and every
    /// signal but SIGTRAP is blocked: a new version is going to be booted.
    LeaderOnly,
}

/// How to rebuild.
#[derive(Clone, Debug)]
pub struct RebuildOptions {
    /// Which threads.
    pub threads: Threads,
    /// Connections whose keeper is gone become unconnected sockets instead of a refusal.
    pub drop_connections: bool,
    /// How long to wait for the old process to be collected by its parent.
    pub reap_wait: Duration,
}

impl Default for RebuildOptions {
    fn default() -> Self {
        Self { threads: Threads::All, drop_connections: false, reap_wait: Duration::from_secs(10) }
    }
}

/// A rebuilt, stopped process. Dropping it kills it.
#[derive(Debug)]
pub struct Host {
    /// The image it was made from.
    pub image: Image,
    /// Open files by ofd, in the engine.
    pub files: OpenFiles,
    /// What was done when.
    pub phases: Vec<proto::Phase>,
    /// What the user should know.
    pub findings: Vec<proto::Finding>,
    leader: Option<Remote>,
    threads: Vec<Remote>,
    keeper: Option<Fetched>,
    pid: Pid,
    clock: Clock,
}

/// Phases with one origin.
#[derive(Clone, Copy, Debug)]
struct Clock {
    origin: Instant,
    last: Instant,
}

impl Clock {
    fn lap(&mut self, name: &str, phases: &mut Vec<proto::Phase>) {
        let now = Instant::now();
        phases.push(proto::Phase {
            name: name.to_owned(),
            start_us: (self.last - self.origin).as_micros() as u64,
            duration_us: (now - self.last).as_micros() as u64,
            frozen: true,
        });
        self.last = now;
    }
}

/// Result of a plain restore.
#[derive(Debug)]
pub struct Restored {
    /// Its pid, the same as in the image.
    pub pid: Pid,
    /// What was done when.
    pub phases: Vec<proto::Phase>,
    /// What the user should know.
    pub findings: Vec<proto::Finding>,
}

/// Restores an untransformed image: the same process again, running when this returns. It is our child until
/// this program ends.
pub fn restore_image(image: &Image, options: &RebuildOptions) -> Result<Restored, RebuildError> {
    let options = RebuildOptions { threads: Threads::All, ..options.clone() };
    rebuild(image, &options)?.release()
}

/// Makes the process of the image, stopped.
pub fn rebuild(image: &Image, options: &RebuildOptions) -> Result<Host, RebuildError> {
    let now = Instant::now();
    let mut clock = Clock { origin: now, last: now };
    let mut phases = Vec::new();
    let p = image.process();
    let pid = Pid(i32::try_from(p.pid).ok().filter(|p| *p > 0).ok_or_else(|| bad("pid"))?);
    if p.threads.first().is_none_or(|t| t.tid != p.pid) {
        return Err(bad("the leader is not the first thread"));
    }
    let all = options.threads == Threads::All;
    // The process inherits this limit until it gets its own.
    crate::sys::raise_open_files();
    spawn::ids_free(p, all, options.reap_wait)?;
    clock.lap("wait for the pid", &mut phases);

    // Everything that can fail without a process, first.
    let FromKeeper { kept, connection: keeper, gone } = fetch(image)?;
    let content = |key: &str| image.file(key).ok().flatten();
    let mut files = open_all(&p.fds, &content, kept, gone, options.drop_connections)?;
    let mapped = mapped::open_mapped(p, &content, &mut files.shared)?;
    clock.lap("open files", &mut phases);

    let leader = spawn::spawn(pid)?;
    let mut findings = std::mem::take(&mut files.findings);
    let mut host = Host {
        image: image.clone(),
        files,
        phases,
        findings: Vec::new(),
        leader: Some(leader),
        threads: Vec::new(),
        keeper,
        pid,
        clock,
    };
    // From here on an error drops `host`, which kills the process.
    let leader = host.leader.as_mut().ok_or_else(|| bad("leader"))?;
    findings.extend(process::session(leader, p)?);
    vma::clear(leader, p)?;
    host.clock.lap("new process", &mut host.phases);
    let filled = vma::map_all(leader, image, p, &mapped)?;
    host.clock.lap(&format!("memory ({} MiB)", filled.bytes >> 20), &mut host.phases);
    process::memory_layout(leader, p, &mapped)?;
    process::surroundings(leader, p)?;
    if all {
        install(leader, p, &host.files)?;
        epoll::watch(leader, &p.fds)?;
        process::posix_locks(leader, p)?;
        host.clock.lap("descriptors", &mut host.phases);
        process::handlers(leader, p)?;
        timers::create(leader, p)?;
        host.threads = process::threads(leader, p)?;
        findings.extend(process::thread_state(leader, p, &p.threads[0], true)?);
        for (remote, t) in host.threads.iter_mut().zip(&p.threads[1..]) {
            findings.extend(process::thread_state(remote, p, t, false)?);
        }
        process::limits(leader, p)?;
        for remote in &mut host.threads {
            process::credentials(remote, p, false)?;
        }
        process::credentials(leader, p, true)?;
        host.clock.lap("threads and process state", &mut host.phases);
    } else {
        close_range(leader, 3, u32::MAX)?;
        process::handlers(leader, p)?;
        process::limits(leader, p)?;
        host.clock.lap("process state", &mut host.phases);
    }
    host.findings = findings;
    Ok(host)
}

fn bad(what: &str) -> RebuildError {
    RebuildError::Image(what.to_owned())
}

/// What the keeper has.
#[derive(Default)]
struct FromKeeper {
    kept: HashMap<u32, crate::keeper::Kept>,
    connection: Option<Fetched>,
    /// Why there is nothing although the image expects something.
    gone: Option<String>,
}

fn fetch(image: &Image) -> Result<FromKeeper, RebuildError> {
    let name = &image.meta().keeper_socket;
    if name.is_empty() {
        return Ok(FromKeeper::default());
    }
    match Keeper::fetch(name) {
        Ok(mut f) => Ok(FromKeeper { kept: std::mem::take(&mut f.fds), connection: Some(f), gone: None }),
        Err(e @ KeeperError::Gone { .. }) => {
            let deadline = image.meta().keeper_deadline_unix_s;
            let now =
                std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let text = match now.checked_sub(deadline) {
                Some(s) if deadline != 0 => {
                    format!("the connections' keeper is gone since {s} s: its deadline passed")
                }
                _ => e.to_string(),
            };
            Ok(FromKeeper { gone: Some(text), ..FromKeeper::default() })
        }
        Err(e) => Err(e.into()),
    }
}

fn close_range(leader: &mut Remote, first: u32, last: u32) -> Result<(), RebuildError> {
    if first > last {
        return Ok(());
    }
    leader.call(libc::SYS_close_range, &[u64::from(first), u64::from(last), 0]).map(drop).map_err(|source| {
        RebuildError::Inside { object: "descriptors".into(), call: "close_range", source, next: "" }
    })
}

/// The process has the engine's descriptors under the engine's numbers: moves those that are wanted, closes the
/// rest.
fn install(leader: &mut Remote, p: &proto::Process, files: &OpenFiles) -> Result<(), RebuildError> {
    let mut moves: Vec<(RawFd, RawFd, bool)> = Vec::with_capacity(p.fds.len());
    for fd in &p.fds {
        let file = files.by_ofd.get(&fd.ofd).ok_or_else(|| bad("a descriptor without its open file"))?;
        moves.push((file.as_raw_fd(), fd.number as RawFd, fd.cloexec));
    }
    // Numbers of the engine that no move reads are of no use any more.
    let spare = moves.iter().map(|m| m.0.max(m.1)).max().unwrap_or(0) + 1;
    crate::fds::move_fds(leader, &moves, spare)
        .map_err(|e| RebuildError::refused("descriptors", e.to_string(), ""))?;
    let mut first = 0;
    let mut numbers: Vec<u32> = p.fds.iter().map(|f| f.number).collect();
    numbers.sort_unstable();
    for n in numbers {
        if n > first {
            close_range(leader, first, n - 1)?;
        }
        first = n + 1;
    }
    close_range(leader, first, u32::MAX)?;
    for fd in p.fds.iter().filter(|f| f.owner_pid == p.pid) {
        if let Some(file) = files.by_ofd.get(&fd.ofd) {
            use std::os::fd::AsFd;
            crate::sys::set_owner(file.as_fd(), fd.owner_pid as i32)
                .map_err(RebuildError::call(objects::name_of(fd), "fcntl F_SETOWN"))?;
        }
    }
    Ok(())
}

impl Host {
    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The stopped leader, for injected calls.
    pub fn leader(&mut self) -> Option<&mut Remote> {
        self.leader.as_mut()
    }

    /// Hands the stopped process to another tracer layer on this OS thread: it is seized with
    /// PTRACE_O_EXITKILL | TRACESYSGOOD | TRACECLONE, its mask is all but SIGTRAP, the builder's own memory is unmapped, and
    /// whoever takes it has to kill it on error. The open files and the keeper stay with this value's
    /// [`HandedOver`].
    pub fn hand_over(mut self) -> Result<HandedOver, RebuildError> {
        if let Some(leader) = self.leader.as_mut() {
            let island = leader.island;
            leader
                .call(libc::SYS_munmap, &[island.start, island.len])
                .map_err(RebuildError::call("the new process", "munmap of the builder's memory"))?;
        }
        self.leader = None;
        Ok(HandedOver {
            pid: self.pid,
            files: std::mem::take(&mut self.files),
            phases: std::mem::take(&mut self.phases),
            findings: std::mem::take(&mut self.findings),
            keeper: self.keeper.take(),
        })
    }

    /// Lets the process run as it was dumped.
    pub fn release(mut self) -> Result<Restored, RebuildError> {
        let image = self.image.clone();
        let p = image.process();
        let fail = |call| RebuildError::call(format!("process {}", p.pid), call);
        let leader = self.leader.as_mut().ok_or_else(|| bad("leader"))?;
        timers::arm(leader, p)?;
        let island = leader.island;
        leader
            .call(libc::SYS_munmap, &[island.start, island.len])
            .map_err(fail("munmap of the builder's memory"))?;
        for (remote, t) in
            self.threads.iter().chain([&*leader]).zip(p.threads[1..].iter().chain([&p.threads[0]]))
        {
            let mut regs = Regs::from_words(&t.regs).ok_or_else(|| bad("registers"))?;
            // Not in a system call: nothing to restart.
            regs.orig_rax = u64::MAX;
            if !t.xstate.is_empty() {
                remote.set_xstate(&t.xstate).map_err(fail("PTRACE_SETREGSET"))?;
            }
            remote.set_regs(&regs).map_err(fail("PTRACE_SETREGS"))?;
            remote.set_sigmask(t.sigmask).map_err(fail("PTRACE_SETSIGMASK"))?;
        }
        self.files.let_flow(&p.fds)?;
        // Nothing can fail any more but by the death of a thread. Nobody else may hold the open files when it
        // runs: what it closes then would stay registered in its epoll objects.
        drop(std::mem::take(&mut self.files));
        if let Some(k) = self.keeper.take() {
            k.confirm();
        }
        while let Some(t) = self.threads.pop() {
            let tid = t.tid();
            t.detach().map_err(fail("PTRACE_DETACH")).inspect_err(|_| remote::kill_all(tid, &[]))?;
        }
        if let Some(l) = self.leader.take() {
            l.detach().map_err(fail("PTRACE_DETACH"))?;
        }
        self.clock.lap("release", &mut self.phases);
        Ok(Restored {
            pid: self.pid,
            phases: std::mem::take(&mut self.phases),
            findings: std::mem::take(&mut self.findings),
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.leader.take().is_some() {
            let tids: Vec<Tid> = self.threads.iter().map(Remote::tid).collect();
            remote::kill_all(Tid(self.pid.0), &tids);
        }
    }
}

/// What remains with the engine when a [`Host`] was handed over.
#[derive(Debug)]
pub struct HandedOver {
    /// The stopped, traced process.
    pub pid: Pid,
    /// The dumped process's open files.
    pub files: OpenFiles,
    /// What was done when.
    pub phases: Vec<proto::Phase>,
    /// What the user should know.
    pub findings: Vec<proto::Finding>,
    keeper: Option<Fetched>,
}

impl HandedOver {
    /// The last step before the new version runs: connections that are held still go on.
    pub fn let_flow(&self, process: &proto::Process) -> Result<(), RebuildError> {
        self.files.let_flow(&process.fds)
    }

    /// The new version runs: the keeper may let go.
    pub fn confirm(mut self) {
        if let Some(k) = self.keeper.take() {
            k.confirm();
        }
    }
}
