//! An update as one transaction: until the commit the old process is whole, and whatever goes wrong it goes
//! on under its own pid; after the commit the new version owns its connections and its state.

mod error;
mod hand;

pub use error::UpdateError;

use crate::apply;
use crate::boot::{BootOutcome, BootSpec, Host, boot};
use crate::link::{LinkInput, LinkStats, Span, WriteList, link};
use crate::rebuild::{self, RebuildOptions, Threads};
use mcr_criu_lite::{FreezeOptions, Frozen, ProcessMemory, QuiesceOptions, modules, reap_hidden};
use mcr_image::{Addr, ElfFile, Image, Memory, ModuleMap, Pid, Tid, auxv_value, proto};
use mcr_transform::heap::GlibcHeap;
use mcr_transform::types::TypeModel;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How to update.
#[derive(Clone, Debug, Default)]
pub struct UpdateOptions {
    /// Do everything on a copy while the old version serves, and report.
    pub dry_run: bool,
    /// Debug directories and rules.
    pub transform: mcr_transform::Options,
    /// How long to wait for a quiescent point; zero: the default.
    pub quiesce_timeout: Duration,
    /// How long the new version's start-up may take; zero: what the rules say, else 10 s.
    pub boot_timeout: Duration,
    /// How to rebuild the process (offline restores).
    pub drop_connections: bool,
}

impl UpdateOptions {
    fn boot_limit(&self) -> Duration {
        match (self.boot_timeout, self.transform.rules.boot().timeout_s) {
            (Duration::ZERO, Some(s)) => Duration::from_secs(s),
            (Duration::ZERO, None) => Duration::from_secs(10),
            (d, _) => d,
        }
    }
}

/// What an update did, or, after a dry run, would do.
#[derive(Clone, Debug, Default)]
pub struct UpdateReport {
    /// The new version's process.
    pub pid: Pid,
    /// The old version's process.
    pub old_pid: Pid,
    /// Nothing was changed.
    pub dry_run: bool,
    /// Every phase.
    pub phases: Vec<proto::Phase>,
    /// How long nobody served, in microseconds.
    pub frozen_us: u64,
    /// What people should know.
    pub findings: Vec<proto::Finding>,
    /// What changed.
    pub patch: proto::Patch,
    /// Counts of the link.
    pub link: LinkStats,
    /// The end of what the new version wrote to its standard output and error while it started.
    pub output: String,
}

/// Phases with one origin.
struct Clock {
    origin: Instant,
    last: Instant,
    phases: Vec<proto::Phase>,
}

impl Clock {
    fn new() -> Self {
        let now = Instant::now();
        Self { origin: now, last: now, phases: Vec::new() }
    }
    fn lap(&mut self, name: &str, frozen: bool) {
        let now = Instant::now();
        self.phases.push(proto::Phase {
            name: name.to_owned(),
            start_us: (self.last - self.origin).as_micros() as u64,
            duration_us: (now - self.last).as_micros() as u64,
            frozen,
        });
        self.last = now;
    }
    /// The parts of a phase that has just been measured by its own clock.
    fn parts(&mut self, parts: &[(String, u64)], frozen: bool) {
        let mut at = (self.last - self.origin).as_micros() as u64;
        for (name, us) in parts {
            self.phases.push(proto::Phase { name: name.clone(), start_us: at, duration_us: *us, frozen });
            at += us;
        }
        self.last = Instant::now();
    }
    fn frozen_us(&self) -> u64 {
        self.phases.iter().filter(|p| p.frozen).map(|p| p.duration_us).sum()
    }
}

/// A booting or booted host, killed unless it was released.
struct Guard {
    host: Option<Host>,
    /// Child of the old process, to be collected there: (old, child).
    hidden: Option<(Pid, Pid)>,
}

impl Guard {
    fn host(&mut self) -> Result<&mut Host, UpdateError> {
        self.host.as_mut().ok_or(UpdateError::Internal("the host was released already"))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(host) = self.host.take() {
            host.kill();
        }
        if let Some((old, child)) = self.hidden {
            // A zombie that stays is no harm to the old process; it is gone with it.
            drop(reap_hidden(old, child));
        }
    }
}

/// A copy of the old process that only lends its memory.
struct Snapshot {
    tracee: Option<mcr_criu_lite::Tracee>,
    memory: ProcessMemory,
    old: Pid,
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        if let Some(t) = self.tracee.take() {
            let child = t.pid();
            drop(t.kill());
            drop(reap_hidden(self.old, child));
        }
    }
}

/// Both sides of an update, read and checked.
struct Programs {
    new_path: PathBuf,
    new: Arc<ElfFile>,
    types: TypeModel,
    /// Types of the old program.
    old_types: TypeModel,
}

impl Programs {
    fn read(new: &Path, old: &ElfFile, options: &UpdateOptions) -> Result<Self, UpdateError> {
        let new_path = std::fs::canonicalize(new)
            .map_err(|source| UpdateError::NewProgram { path: new.to_owned(), source })?;
        let dirs = options.transform.debug_search();
        let elf = ElfFile::open_with_debug(&new_path, &dirs)?;
        elf.check_updatable()?;
        old.check_updatable()?;
        let types = TypeModel::load(&elf, &dirs)?;
        let old_types = TypeModel::load(old, &dirs)?;
        Ok(Self { new_path, new: Arc::new(elf), types, old_types })
    }

    /// The plan, refused if anything stands in its way.
    fn plan(
        &self,
        process: &proto::Process,
        memory: &dyn Memory,
        modules: &ModuleMap,
        options: &UpdateOptions,
    ) -> Result<proto::Patch, UpdateError> {
        let loaded = mcr_transform::Loaded {
            path: self.new_path.display().to_string(),
            elf: &self.new,
            types: &self.types,
            old_types: &self.old_types,
        };
        let patch = mcr_transform::plan_loaded(process, memory, modules, &loaded, &options.transform)?;
        Ok(mcr_transform::refuse(patch)?)
    }
}

/// The old process as the transaction sees it.
struct Old<'a> {
    process: &'a proto::Process,
    modules: &'a ModuleMap,
    memory: &'a dyn Memory,
    patch: &'a proto::Patch,
    /// Its open files; none in a dry run.
    files: Option<&'a Files<'a>>,
}

/// Boots and links. The host is booted when this returns, and nothing else has been done to it.
fn make(
    host: &mut Host,
    old: &Old<'_>,
    programs: &Programs,
    options: &UpdateOptions,
    clock: &mut Clock,
    frozen: bool,
) -> Result<(BootOutcome, WriteList), UpdateError> {
    let rules = options.transform.rules.boot();
    let random = old
        .process
        .mm
        .as_ref()
        .and_then(|m| auxv_value(&m.auxv, 25))
        .and_then(|a| old.memory.bytes(Addr(a), 16).ok()?.try_into().ok());
    let spec = BootSpec {
        new: Arc::clone(&programs.new),
        new_path: programs.new_path.clone(),
        old: old.process,
        old_modules: old.modules,
        argv: rules.argv(&old.process.argv),
        envp: rules.envp(&old.process.envp),
        random,
        reserve: old
            .patch
            .regions
            .iter()
            .map(|r| {
                let end = (r.start + r.content.len() as u64).next_multiple_of(mcr_image::PAGE as u64);
                Span::new(Addr(r.start), Addr(end))
            })
            .collect(),
        pid: None,
        timeout: options.boot_limit(),
    };
    // Old's heap is read while the new version starts.
    let (booted, old_heap) = std::thread::scope(|s| {
        let heap = s.spawn(|| GlibcHeap::read(old.memory, &old.process.threads, &old.process.vmas));
        (boot(host, &spec), heap.join())
    });
    let mut outcome = booted?;
    // A heap that cannot be read is refused by `link`, which says why.
    let old_heap = old_heap.ok().and_then(Result::ok);
    clock.parts(&outcome.phases, frozen);
    // With its socket replaced by old's, a watch that the start-up registered is gone: link has to see that.
    if let Some(files) = old.files {
        let made = hand::install_descriptors(host, old.process, &outcome.booted, files)?;
        outcome.booted.epolls.extend(made);
        for e in &mut outcome.booted.epolls {
            e.watches = host.watches(e.fd)?;
        }
        clock.lap("descriptors", frozen);
    }
    let list = link(&LinkInput {
        patch: old.patch,
        process: old.process,
        old: old.memory,
        old_modules: old.modules,
        old_types: Some(&programs.old_types),
        booted: &outcome.booted,
        host: host.memory(),
        modules: &outcome.modules,
        types: &programs.types,
        new_elf: &programs.new,
        old_heap: old_heap.as_ref(),
    })?;
    clock.lap("link", frozen);
    Ok((outcome, list))
}

/// Old's open files by number, in our hands.
type Files<'a> = HashMap<u32, BorrowedFd<'a>>;

/// Lays the old state over the booted host. Returns findings.
fn lay(
    host: &mut Host,
    old: &Old<'_>,
    outcome: &BootOutcome,
    list: &WriteList,
) -> Result<Vec<proto::Finding>, UpdateError> {
    apply::apply(host, list, cfg!(debug_assertions))?;
    hand::carry_handlers(host, old.process, old.modules, &outcome.modules, &outcome.booted)
}

fn tids(outcome: &BootOutcome) -> Vec<Tid> {
    outcome.booted.threads.iter().map(|t| t.tid).collect()
}

/// Pid files that name the old process name the new one now.
fn rewrite_pid_files(outcome: &BootOutcome, old: Pid, new: Pid) -> Vec<proto::Finding> {
    let mut findings = Vec::new();
    for path in outcome.pid_files.iter().filter(|_| old != new) {
        let written = std::fs::read_to_string(path)
            .and_then(|t| std::fs::write(path, t.replace(&old.to_string(), &new.to_string())));
        if let Err(e) = written {
            findings.push(proto::Finding {
                severity: proto::Severity::Warning.into(),
                code: "pid-file".into(),
                message: format!("{}: {e}; it still names {old}", path.display()),
                next_step: format!("write {new} into it"),
                ..Default::default()
            });
        }
    }
    findings
}

/// The program of a running process, read (with all its libraries) before the process is stopped.
fn old_program(pid: Pid) -> Result<Arc<ElfFile>, UpdateError> {
    let read = || {
        let vmas = mcr_criu_lite::collect::vmas(pid)?;
        let memory = ProcessMemory::open(pid)?;
        modules::load(pid, &vmas, &memory)
    };
    let map = read().map_err(|source| UpdateError::Memory { pid, source })?;
    let exe = map.exe().ok_or_else(|| UpdateError::OldProgram { pid })?;
    Ok(Arc::clone(&exe.elf))
}

/// Updates a living process to a new build.
pub fn update(pid: Pid, new: &Path, options: &UpdateOptions) -> Result<UpdateReport, UpdateError> {
    let mut clock = Clock::new();
    mcr_criu_lite::freeze::examine(pid)?;
    let program = old_program(pid)?;
    let programs = Programs::read(new, &program, options)?;
    clock.lap("read programs", false);

    let mut frozen = Frozen::seize(pid, &FreezeOptions::default())?;
    let mut wait = QuiesceOptions::default();
    if !options.quiesce_timeout.is_zero() {
        wait.timeout = options.quiesce_timeout;
    }
    let states = frozen.quiesce(&wait)?;
    clock.lap("freeze", true);
    let mut collected = frozen.collect(&states)?;
    if collected.modules.exe().map(|m| m.build_id()) != Some(program.build_id()) {
        return Err(UpdateError::Internal("the process executed another program while it was looked at"));
    }
    hand::refuse_unforkable(&collected.process)?;
    clock.lap("collect", true);

    let old_modules = Arc::clone(&collected.modules);
    if options.dry_run {
        // Whoever holds on to an open file of a running server keeps its epoll registration alive beyond the
        // server's close: neither the copies nor we may.
        collected.let_go();
        let process = &collected.process;
        let close = [3, u64::from(u32::MAX), 0];
        let mut tracee = frozen.fork_hidden()?;
        tracee.syscall(libc::SYS_close_range, &close)?;
        let child = tracee.pid();
        let mut copy = frozen.fork_hidden()?;
        copy.syscall(libc::SYS_close_range, &close)?;
        let memory = ProcessMemory::open(copy.pid())
            .map_err(|source| UpdateError::Memory { pid: copy.pid(), source })?;
        let snapshot = Snapshot { tracee: Some(copy), memory, old: pid };
        tracee.leak();
        let mut guard = Guard { host: None, hidden: Some((pid, child)) };
        guard.host = Some(Host::attach(child)?);
        frozen.thaw()?;
        clock.lap("fork", true);
        let patch = programs.plan(process, &snapshot.memory, &old_modules, options)?;
        clock.lap("plan", false);
        let old =
            Old { process, modules: &old_modules, memory: &snapshot.memory, patch: &patch, files: None };
        let (outcome, list) = make(guard.host()?, &old, &programs, options, &mut clock, false)?;
        drop(guard);
        return Ok(report(pid, pid, true, clock, &outcome, list, patch, Vec::new()));
    }

    let process = &collected.process;
    let files: Files<'_> = collected.fds.iter().map(|(n, f)| (*n, f.as_fd())).collect();
    let memory = Arc::clone(frozen.memory());
    let patch = programs.plan(process, &*memory, &old_modules, options)?;
    clock.lap("plan", true);
    let tracee = frozen.fork_host()?;
    let child = tracee.pid();
    tracee.leak();
    let mut guard = Guard { host: Some(Host::attach(child)?), hidden: None };
    clock.lap("fork", true);
    let old = Old { process, modules: &old_modules, memory: &*memory, patch: &patch, files: Some(&files) };
    let (outcome, list) = make(guard.host()?, &old, &programs, options, &mut clock, true)?;
    let mut findings = lay(guard.host()?, &old, &outcome, &list)?;
    clock.lap("apply", true);

    let tids = tids(&outcome);
    let locks = hand::has_record_locks(process);
    guard.host()?.park(&tids, locks)?;
    if mcr_criu_lite::interrupted() {
        return Err(UpdateError::Interrupted);
    }
    // The commit: from here to the end of `kill` both are whole, and the old one does not run.
    guard.host()?.disarm(&tids)?;
    let ended = frozen.kill();
    collected.fds.clear();
    let mut host = guard.host.take().ok_or(UpdateError::Internal("no host at the commit"))?;
    if locks {
        // They belonged to the old process; nobody can have taken them but in the last microseconds.
        findings.extend(hand::take_record_locks(&mut host, process));
    }
    host.let_go(&tids).map_err(|e| UpdateError::Lost { pid: child, why: e.to_string() })?;
    clock.lap("commit", true);
    if let Err(e) = ended {
        findings.push(proto::Finding {
            severity: proto::Severity::Warning.into(),
            code: "old-process".into(),
            message: format!("the new version runs as {child}, but ending the old one reported: {e}"),
            next_step: format!("look whether process {pid} is gone"),
            ..Default::default()
        });
    }
    findings.extend(rewrite_pid_files(&outcome, pid, child));
    clock.lap("clean up", false);
    Ok(report(child, pid, false, clock, &outcome, list, patch, findings))
}

/// Restores an update image: rebuilds the old process's memory, boots the new version in it, links, releases.
pub fn restore_update(image: &Image, options: &UpdateOptions) -> Result<UpdateReport, UpdateError> {
    let mut clock = Clock::new();
    let patch = image.patch()?.cloned().ok_or(UpdateError::NoPatch)?;
    let process = image.process();
    let memory = image.memory();
    let old_modules = mcr_transform::image_modules(image, process, &memory, &options.transform);
    let Some(exe) = old_modules.exe() else {
        return Err(UpdateError::OldProgram { pid: Pid(process.pid as i32) });
    };
    let programs = Programs::read(Path::new(&patch.new_path), &exe.elf, options)?;
    if programs.new.build_id().unwrap_or_default() != patch.new_build_id.as_slice() {
        return Err(UpdateError::OtherBuild { path: programs.new_path, planned: hex(&patch.new_build_id) });
    }
    clock.lap("read programs", false);
    let mut rebuilt = rebuild::rebuild(
        image,
        &RebuildOptions {
            threads: Threads::LeaderOnly,
            drop_connections: options.drop_connections,
            ..RebuildOptions::default()
        },
    )?;
    hand::standard_streams(&mut rebuilt, process)?;
    let handed = rebuilt.hand_over()?;
    let child = handed.pid;
    let mut guard = Guard { host: Some(Host::attach(child)?), hidden: None };
    clock.lap("rebuild", true);
    let files: Files<'_> = process
        .fds
        .iter()
        .filter_map(|fd| Some((fd.number, handed.files.by_ofd.get(&fd.ofd)?.as_fd())))
        .collect();
    let old = Old { process, modules: &old_modules, memory: &memory, patch: &patch, files: Some(&files) };
    let (outcome, list) = make(guard.host()?, &old, &programs, options, &mut clock, true)?;
    let mut findings = lay(guard.host()?, &old, &outcome, &list)?;
    let host = guard.host()?;
    for t in outcome.booted.threads.iter().rev() {
        rebuild::process::credentials(&mut host.thread_calls(t.tid), process, t.tid.0 == child.0)?;
    }
    findings.extend(handed.findings.clone());
    clock.lap("apply", true);
    let tids = tids(&outcome);
    findings.extend(hand::take_record_locks(guard.host()?, process));
    guard.host()?.park(&tids, false)?;
    guard.host()?.disarm(&tids)?;
    // Ours and the keeper's copies are closed before it runs: what it closes then is closed.
    handed.confirm();
    let host = guard.host.take().ok_or(UpdateError::Internal("no host at the commit"))?;
    host.let_go(&tids).map_err(|e| UpdateError::Lost { pid: child, why: e.to_string() })?;
    clock.lap("commit", true);
    let old_pid = Pid(process.pid as i32);
    findings.extend(rewrite_pid_files(&outcome, old_pid, child));
    Ok(report(child, old_pid, false, clock, &outcome, list, patch, findings))
}

/// What an update of a running process would do; refusals stay among the patch's findings. The process stands
/// still while it is looked at, and runs on.
pub fn plan(pid: Pid, new: &Path, options: &mcr_transform::Options) -> Result<proto::Patch, UpdateError> {
    mcr_criu_lite::freeze::examine(pid)?;
    modules::preload(pid);
    let mut frozen = Frozen::seize(pid, &FreezeOptions::default())?;
    let states = frozen.quiesce(&QuiesceOptions::default())?;
    let mut collected = frozen.collect(&states)?;
    let memory = Arc::clone(frozen.memory());
    collected.let_go();
    let patch = mcr_transform::plan_process(&collected.process, &*memory, &collected.modules, new, options)?;
    frozen.thaw()?;
    Ok(patch)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[allow(clippy::too_many_arguments)]
fn report(
    pid: Pid,
    old_pid: Pid,
    dry_run: bool,
    clock: Clock,
    outcome: &BootOutcome,
    list: WriteList,
    patch: proto::Patch,
    mut findings: Vec<proto::Finding>,
) -> UpdateReport {
    let mut all = patch.findings.clone();
    all.extend(outcome.booted.findings.iter().cloned());
    all.extend(list.findings);
    all.append(&mut findings);
    UpdateReport {
        pid,
        old_pid,
        dry_run,
        frozen_us: clock.frozen_us(),
        phases: clock.phases,
        findings: all,
        patch,
        link: list.stats,
        output: outcome.output.clone(),
    }
}
