//! A host becomes the new version: boot, link, and the old state laid over it.

use super::clock::Clock;
use super::programs::Programs;
use super::{UpdateError, UpdateOptions, hand};
use crate::apply;
use crate::boot::{BootOutcome, BootSpec, Host, boot};
use crate::link::relations::Depth;
use crate::link::{Booted, LinkInput, Span, WriteList, link, relations};
use mcr_criu_lite::{CollectOptions, Collected, Frozen, reap_hidden};
use mcr_image::{Addr, Blocks, ElfFile, Memory, ModuleMap, Pid, Tid, auxv_value, proto};
use mcr_transform::Prepared;
use mcr_transform::heap::GlibcHeap;
use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// A booting or booted host, killed unless it was released.
pub(super) struct Guard {
    pub(super) host: Option<Host>,
    /// Child of the old process, to be collected there: (old, child).
    pub(super) hidden: Option<(Pid, Pid)>,
}

impl Guard {
    pub(super) fn host(&mut self) -> Result<&mut Host, UpdateError> {
        self.host.as_mut().ok_or(UpdateError::Internal("the host was released already"))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(host) = self.host.take() {
            host.kill();
        }
        if let Some((old, child)) = self.hidden {
            // Not waited for while it lives.
            let pid = nix::unistd::Pid::from_raw(child.0);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            // A zombie that stays is no harm to the old process; it is gone with it.
            drop(reap_hidden(old, child));
        }
    }
}

/// Brings a frozen process to rest and collects what the kernel keeps for it. It must still be `program`. `known`:
/// descriptors that were collected before, for a change that leaves them where they are.
pub(super) fn at_rest(
    frozen: &mut Frozen,
    program: &ElfFile,
    options: &UpdateOptions,
    known: &[proto::Fd],
    clock: &mut Clock,
) -> Result<Collected, UpdateError> {
    let states = frozen.quiesce(&options.quiesce())?;
    clock.lap("freeze", true);
    let collected = frozen.collect_with(&states, &CollectOptions { known, ..CollectOptions::live() })?;
    if collected.modules.exe().map(|m| m.build_id()) != Some(program.build_id()) {
        return Err(UpdateError::Internal("the process executed another program while it was looked at"));
    }
    Ok(collected)
}

/// The old process as the transaction sees it.
pub(super) struct Old<'a> {
    pub(super) process: &'a proto::Process,
    pub(super) modules: &'a ModuleMap,
    pub(super) memory: &'a dyn Memory,
    pub(super) patch: &'a proto::Patch,
    /// Its open files; none where the host does not get them.
    pub(super) files: &'a Files<'a>,
    /// Memory that goes with the update.
    pub(super) dropped: &'a [Span],
}

/// Boots the new version in the host. `pid`: which one it is told to have. Also old's heap, read meanwhile.
pub(super) fn start(
    host: &mut Host,
    old: &Old<'_>,
    programs: &Programs,
    options: &UpdateOptions,
    pid: Option<Pid>,
) -> Result<(BootOutcome, Option<GlibcHeap>), UpdateError> {
    let rules = options.transform.rules.boot();
    let random = old
        .process
        .mm
        .as_ref()
        .and_then(|m| auxv_value(&m.auxv, 25))
        .and_then(|a| old.memory.bytes(Addr(a), 16).ok()?.try_into().ok());
    let region = |r: &proto::NewRegion| {
        let end = (r.start + r.content.len() as u64).next_multiple_of(mcr_image::PAGE as u64);
        Span::new(Addr(r.start), Addr(end))
    };
    let spec = BootSpec {
        new: Arc::clone(&programs.new),
        new_path: programs.new_path.clone(),
        old: old.process,
        old_modules: old.modules,
        argv: rules.argv(&old.process.argv),
        envp: rules.envp(&old.process.envp),
        random,
        reserve: old.patch.regions.iter().map(region).collect(),
        pid,
        timeout: options.boot_limit(),
    };
    let (booted, old_heap) = std::thread::scope(|s| {
        let heap = s.spawn(|| GlibcHeap::read(old.memory, &old.process.threads, &old.process.vmas));
        (boot(host, &spec), heap.join())
    });
    // A heap that cannot be read is refused by `link`, which says why.
    Ok((booted?, old_heap.ok().and_then(Result::ok)))
}

/// What joins the booted host and the old state. Nothing is touched.
pub(super) fn join(
    view: &dyn Memory,
    booted: &Booted,
    modules: &ModuleMap,
    old: &Old<'_>,
    old_heap: Option<&GlibcHeap>,
    programs: &Programs,
) -> Result<WriteList, UpdateError> {
    Ok(link(&input(view, booted, modules, old, old_heap, programs))?)
}

fn input<'a>(
    view: &'a dyn Memory,
    booted: &'a Booted,
    modules: &'a ModuleMap,
    old: &Old<'a>,
    old_heap: Option<&'a GlibcHeap>,
    programs: &'a Programs,
) -> LinkInput<'a> {
    LinkInput {
        patch: old.patch,
        process: old.process,
        old: old.memory,
        old_modules: old.modules,
        old_types: Some(&programs.old_types),
        booted,
        host: view,
        modules,
        types: &programs.types,
        new_elf: &programs.new,
        old_heap,
        dropped: old.dropped,
    }
}

/// I10 and I11 over what [`join`] made of it; returns findings.
#[allow(clippy::too_many_arguments)]
pub(super) fn check(
    view: &dyn Memory,
    booted: &Booted,
    modules: &ModuleMap,
    old: &Old<'_>,
    old_heap: Option<&GlibcHeap>,
    (programs, prepared): (&Programs, &Prepared<'_>),
    list: &WriteList,
    depth: Depth,
) -> Result<Vec<proto::Finding>, UpdateError> {
    let input = input(view, booted, modules, old, old_heap, programs);
    Ok(relations::check(&input, list, prepared, depth)?.findings)
}

/// As [`check`], in full; findings go into the list.
pub(super) fn check_all(
    view: &dyn Memory,
    (booted, modules): (&Booted, &ModuleMap),
    old: &Old<'_>,
    old_heap: Option<&GlibcHeap>,
    (programs, prepared): (&Programs, &Prepared<'_>),
    list: &mut WriteList,
    options: &UpdateOptions,
) -> Result<(), UpdateError> {
    if let Some(examine) = options.examine {
        examine(&input(view, booted, modules, old, old_heap, programs), list, prepared);
    }
    let found = check(view, booted, modules, old, old_heap, (programs, prepared), list, Depth::All)?;
    list.findings.extend(found);
    Ok(())
}

/// Boots and links beside the old process, with its open files. The host is booted when this returns, and
/// nothing else has been done to it.
pub(super) fn make(
    host: &mut Host,
    old: &Old<'_>,
    (programs, prepared): (&Programs, &Prepared<'_>),
    options: &UpdateOptions,
    clock: &mut Clock,
) -> Result<(BootOutcome, WriteList), UpdateError> {
    let (mut outcome, old_heap) = start(host, old, programs, options, None)?;
    clock.parts(&outcome.phases, true);
    // With its socket replaced by old's, a watch that the start-up registered is gone: link has to see that.
    let made = hand::install_descriptors(host, old.process, &outcome.booted, old.files)?;
    outcome.booted.epolls.extend(made);
    for e in &mut outcome.booted.epolls {
        e.watches = host.watches(e.fd)?;
    }
    clock.lap("descriptors", true);
    host.memory().refresh();
    let view = Blocks::new(host.memory());
    let mut list = join(&view, &outcome.booted, &outcome.modules, old, old_heap.as_ref(), programs)?;
    clock.lap("link", true);
    let both = (programs, prepared);
    let host = (&outcome.booted, &outcome.modules);
    check_all(&view, host, old, old_heap.as_ref(), both, &mut list, options)?;
    clock.lap("relations", true);
    Ok((outcome, list))
}

/// Old's open files by number, in our hands.
pub(super) type Files<'a> = HashMap<u32, BorrowedFd<'a>>;

/// Lays the old state over the booted host. Returns findings.
pub(super) fn lay(
    host: &mut Host,
    old: &Old<'_>,
    outcome: &BootOutcome,
    list: &WriteList,
) -> Result<Vec<proto::Finding>, UpdateError> {
    apply::apply(host, list, cfg!(debug_assertions))?;
    let mut findings =
        hand::carry_handlers(host, old.process, old.modules, &outcome.modules, &outcome.booted)?;
    hand::carry_surroundings(host, old.process)?;
    hand::carry_signal_stacks(host, old.process, &outcome.booted)?;
    findings.extend(hand::carry_signals(host, old.process, &outcome.booted, list)?);
    Ok(findings)
}

pub(super) fn tids(outcome: &BootOutcome) -> Vec<Tid> {
    outcome.booted.threads.iter().map(|t| t.tid).collect()
}

/// Pid files that name the old process name the new one now.
pub(super) fn rewrite_pid_files(outcome: &BootOutcome, old: Pid, new: Pid) -> Vec<proto::Finding> {
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
