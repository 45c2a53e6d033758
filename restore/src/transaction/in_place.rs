//! The update in place: rehearsed on a copy while the old version serves, then, in one pause, laid into the
//! old process itself.

use super::clock::Clock;
use super::make::{Files, Old, at_rest, check, join};
use super::programs::{Programs, old_program, plan};
use super::rehearse::{Rehearsal, rehearse};
use super::{UpdateError, UpdateOptions, UpdateReport, entry, hand, not_recorded, report};
use crate::boot::fates;
use crate::fds::{InTracee, Install, install_fds, open_flags, take_copies};
use crate::inplace::{self, InPlace, Input, Laid, PlanError, Stale, refreshed};
use crate::link::Span;
use crate::link::relations::Depth;
use mcr_criu_lite::tracee::commit;
use mcr_criu_lite::{FreezeOptions, Frozen};
use mcr_image::{Addr, Blocks, ElfFile, Fd, Memory, Pid, proto};
use mcr_transform::Prepared;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

/// How often a rehearsal is repeated when the old process has changed too much since.
const REHEARSALS: usize = 3;

/// Updates a living process.
pub(super) fn update(pid: Pid, new: &Path, options: &UpdateOptions) -> Result<UpdateReport, UpdateError> {
    let mut clock = Clock::new();
    crate::sys::keep_memory();
    mcr_criu_lite::freeze::examine(pid)?;
    options.tell("reading both programs");
    let program = old_program(pid)?;
    let programs = Programs::read(new, &program, options)?;
    let prepared = programs.prepare(options);
    clock.lap("read programs", false);
    let mut last = None;
    for _ in 0..REHEARSALS {
        clock.rehearsal_begins();
        let mut rehearsal = rehearse(pid, &program, (&programs, &prepared), options, &mut clock)?;
        clock.pause_begins();
        if options.dry_run {
            let Rehearsal { outcome, list, patch, .. } = rehearsal;
            return Ok(report(pid, pid, true, clock, &outcome, list, patch, Vec::new()));
        }
        match change(pid, &program, (&programs, &prepared), options, &mut rehearsal, &mut clock) {
            Err(UpdateError::Stale(s)) => last = Some(s),
            Err(e) => return Err(e),
            Ok(Changed { list, patch, mut findings, constants, dropped }) => {
                let Rehearsal { guard, outcome, history, .. } = rehearsal;
                drop(guard);
                clock.lap("clean up", false);
                let native = inplace::leftovers::native(&outcome);
                let entry = entry(&patch, &clock, true).leaving(&native, &constants);
                findings.extend(history.record(pid, entry, &dropped).err().map(not_recorded));
                return Ok(report(pid, pid, false, clock, &outcome, list, patch, findings));
            }
        }
    }
    Err(last.map_or(UpdateError::Internal("no rehearsal was made"), UpdateError::Stale))
}

struct Changed {
    list: crate::link::WriteList,
    patch: proto::Patch,
    findings: Vec<proto::Finding>,
    constants: Vec<Span>,
    dropped: Vec<Span>,
}

/// The threads rest where they did.
fn same_threads(then: &proto::Process, now: &proto::Process) -> Result<(), Stale> {
    let rests = |p: &proto::Process| -> Vec<_> {
        p.threads.iter().map(|t| (t.tid, mcr_image::unwind::proto_signature(&t.frames))).collect()
    };
    let (then, now) = (rests(then), rests(now));
    if let Some((tid, _)) = now.iter().find(|n| !then.iter().any(|t| t.0 == n.0)) {
        return Err(Stale::Threads(format!("thread {tid} is new")));
    }
    for (tid, signature) in &then {
        match now.iter().find(|n| n.0 == *tid) {
            None => return Err(Stale::Threads(format!("thread {tid} is gone"))),
            Some((_, s)) if s != signature => {
                return Err(Stale::Threads(format!("thread {tid} rests in {}", s.join(" < "))));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// The pause.
fn change(
    pid: Pid,
    program: &ElfFile,
    (programs, prepared): (&Programs, &Prepared<'_>),
    options: &UpdateOptions,
    rehearsal: &mut Rehearsal,
    clock: &mut Clock,
) -> Result<Changed, UpdateError> {
    let read = std::mem::take(&mut rehearsal.read);
    let outcome = &rehearsal.outcome;
    // The copy stands still: what it made is read before the pause.
    let host = rehearsal.guard.host()?;
    host.memory().refresh();
    let host_memory = Blocks::new(host.memory());
    for s in &outcome.booted.native {
        for (start, end) in mcr_criu_lite::own_pages(host.pid(), s.start, s.end).unwrap_or_default() {
            // What cannot be read now is asked for again, and told of then.
            drop(host_memory.bytes(start, end.since(start) as usize));
        }
    }
    clock.lap("copy's memory", false);
    let mut frozen = Frozen::seize(pid, &FreezeOptions::default())?;
    clock.lap_until("look", false, frozen.since());
    let mut collected = at_rest(&mut frozen, program, options, &rehearsal.process.fds, clock)?;
    collected.fds.clear();
    let process = &collected.process;
    same_threads(&rehearsal.process, process)?;
    clock.lap("collect", true);

    let living = Arc::clone(frozen.memory());
    living.refresh();
    let large: Vec<_> = process.vmas.iter().filter(|v| is_large(v)).collect();
    let mut same = Vec::new();
    for v in &large {
        // What the kernel does not tell is read again.
        let (start, end) = (Addr(v.start), Addr(v.end));
        same.extend(mcr_criu_lite::same_pages(pid, host.pid(), start, end).unwrap_or_default());
    }
    let memory = Blocks::again(&*living, read, &same);
    let modules = Arc::clone(&collected.modules);
    let (patch, heap) = std::thread::scope(|s| {
        if !large.is_empty() {
            let memory = &memory;
            s.spawn(move || read_ahead(pid, &large, memory));
        }
        plan(prepared, process, &memory, &modules)
    })?;
    clock.lap("plan", true);

    let fates = fates(&process.vmas, process, &modules, &memory);
    let booted = refreshed(outcome, process, &fates);
    let none = Files::new();
    let dropped = rehearsal.unreferenced.now(&memory);
    let old =
        Old { process, modules: &modules, memory: &memory, patch: &patch, files: &none, dropped: &dropped };
    let view = Laid { native: &booted.native, host: &host_memory, old: &memory };
    let list = join(&view, &booted, &outcome.modules, &old, Some(&heap), programs)?;
    clock.lap("link", true);

    let (actions, mut findings) = hand::handlers(process, &modules, &outcome.modules, &outcome.booted);
    let input = Input {
        old: process,
        fates: &fates,
        old_memory: &memory,
        outcome,
        host: host.pid(),
        host_memory: &host_memory,
        list: &list,
        unreferenced: &dropped,
        actions: &actions,
    };
    // The check looks at the same list, and needs nothing of the plan.
    let (checked, planned) = std::thread::scope(|s| {
        let (view, booted, old, heap, list, outcome) = (&view, &booted, &old, &heap, &list, outcome);
        let both = (programs, prepared);
        let checked =
            s.spawn(move || check(view, booted, &outcome.modules, old, Some(heap), both, list, Depth::Words));
        let planned = inplace::plan(&input);
        (checked.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), planned)
    });
    findings.extend(checked?);
    let InPlace { commit: plan, findings: more, exe_call, .. } = planned.map_err(|e| match e {
        PlanError::Stale(s) | PlanError::Memory(inplace::MemoryPlanError::Stale(s)) => UpdateError::Stale(s),
        e => UpdateError::InPlace(e),
    })?;
    findings.extend(more);
    let given = Given::hand_over(&mut frozen, process, outcome, host.pid())?;
    if mcr_criu_lite::interrupted() {
        given.take_back(&mut frozen);
        return Err(UpdateError::Interrupted);
    }
    clock.lap("prepare", true);
    let done = commit::stage(&mut frozen, &plan).and_then(|staged| {
        clock.lap("stage", true);
        staged.arm()?.commit()
    });
    let done = match done {
        Ok(d) => d,
        Err(e) => {
            if !frozen.threads().is_empty() {
                given.take_back(&mut frozen);
            }
            return Err(e.into());
        }
    };
    clock.lap("commit", true);
    if let Some(f) = done.failure.as_ref().filter(|_| !done.committed) {
        drop(frozen);
        given.take_back(&mut Frozen::seize(pid, &FreezeOptions::default())?);
        return Err(UpdateError::TakenBack { pid, why: f.to_string() });
    }
    findings.extend(afterwards(pid, &outcome.booted.new_path, &plan, &done, exe_call));
    let constants = inplace::leftovers::constants(process, &fates);
    Ok(Changed { list, patch, findings, constants, dropped })
}

/// Memory that takes a while to read, and that the plan will look at as a whole.
fn is_large(v: &proto::Vma) -> bool {
    const LARGE: u64 = 4 << 20;
    v.kind() == proto::VmaKind::VmaAnonPrivate && v.prot & 3 == 3 && v.end - v.start >= LARGE
}

/// Reads memory from its end while the plan reads it from its start.
fn read_ahead(pid: Pid, large: &[&proto::Vma], memory: &Blocks<'_>) {
    const STEP: u64 = 64 << 10;
    for v in large.iter().rev() {
        // What cannot be read now is asked for again, and told of then.
        let pages = mcr_criu_lite::own_pages(pid, Addr(v.start), Addr(v.end)).unwrap_or_default();
        for (start, end) in pages.into_iter().rev() {
            let mut at = end;
            while at > start {
                at = Addr((at.0 - 1) / STEP * STEP).max(start);
                let _ = memory.slice(at, 1);
            }
        }
    }
}

/// Descriptors that only the new version has, handed to the old process.
struct Given(Vec<Fd>);

impl Given {
    fn hand_over(
        frozen: &mut Frozen,
        process: &proto::Process,
        outcome: &crate::boot::BootOutcome,
        host: Pid,
    ) -> Result<Self, UpdateError> {
        let epolls = |n: &Fd| outcome.booted.epolls.iter().any(|e| e.fd == *n);
        let numbers: Vec<Fd> =
            outcome.booted.new_only_fds.iter().map(|f| f.0).filter(|n| !epolls(n)).collect();
        if numbers.is_empty() {
            return Ok(Self(numbers));
        }
        if let Some(n) = numbers.iter().find(|n| process.fds.iter().any(|f| f.number == n.0 as u32)) {
            return Err(Stale::Descriptor(n.0).into());
        }
        let failed =
            |source| UpdateError::Inside { what: "the new version's own descriptors".into(), source };
        let files = take_copies(host.0, &numbers).map_err(failed)?;
        let installs: Vec<Install<'_>> = numbers
            .iter()
            .zip(&files)
            .map(|(n, f)| {
                let cloexec = open_flags(host.0, n.0) & libc::O_CLOEXEC != 0;
                Install { number: *n, file: f.as_fd(), cloexec }
            })
            .collect();
        let pid = frozen.pid().0;
        let leader = frozen.leader();
        let mut inside = InTracee::new(leader).map_err(failed)?;
        install_fds(&mut inside, pid, &installs)?;
        Ok(Self(numbers))
    }

    fn take_back(self, frozen: &mut Frozen) {
        let leader = frozen.leader();
        for n in self.0 {
            // The process goes on with a descriptor too many at worst.
            drop(leader.syscall(libc::SYS_close, &[n.0 as u64]));
        }
    }
}

/// What did not succeed after the point of no return.
fn afterwards(
    pid: Pid,
    program: &Path,
    plan: &commit::CommitPlan,
    done: &commit::Outcome,
    exe_call: usize,
) -> Vec<proto::Finding> {
    let mut findings = Vec::new();
    for (i, r) in done.after.iter().enumerate().filter(|(_, r)| (-4095..0).contains(*r)) {
        let errno = nix::errno::Errno::from_raw(-*r as i32);
        if i == exe_call {
            findings.extend(crate::boot::exe_link(pid, program, errno));
            continue;
        }
        let name = plan.after.get(i).and_then(|c| mcr_image::syscalls::name(c.nr)).unwrap_or("a call");
        findings.push(proto::Finding {
            severity: proto::Severity::Warning.into(),
            code: "clean-up".into(),
            message: format!("{name} after the change: {errno}"),
            next_step: "some memory of the old version stays".into(),
            ..Default::default()
        });
    }
    findings
}
