//! The update beside the old process: the new version gets a process of its own.

use super::clock::Clock;
use super::make::{Files, Guard, Old, at_rest, lay, make, rewrite_pid_files, tids};
use super::programs::{Programs, old_program, plan};
use super::{History, UpdateError, UpdateOptions, UpdateReport, entry, hand, not_recorded, notify, report};
use crate::boot::Host;
use mcr_criu_lite::{FreezeOptions, Frozen};
use mcr_image::{Pid, proto};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

/// Updates a living process to a new build that gets a process of its own.
pub(super) fn update(pid: Pid, new: &Path, options: &UpdateOptions) -> Result<UpdateReport, UpdateError> {
    let mut clock = Clock::new();
    mcr_criu_lite::freeze::examine(pid)?;
    let program = old_program(pid)?;
    let programs = Programs::read(new, &program, options)?;
    let prepared = programs.prepare(options);
    clock.lap("read programs", false);

    let history = History::load(pid);
    let mut frozen = Frozen::seize(pid, &FreezeOptions::default())?;
    clock.lap_until("look", false, frozen.since());
    let mut collected = at_rest(&mut frozen, &program, options, &[], &mut clock)?;
    hand::refuse_unforkable(&collected.process)?;
    clock.lap("collect", true);

    let old_modules = Arc::clone(&collected.modules);
    let process = &collected.process;
    let files: Files<'_> = collected.fds.iter().map(|(n, f)| (*n, f.as_fd())).collect();
    let memory = Arc::clone(frozen.memory());
    let (patch, _) = plan(&prepared, process, &*memory, &old_modules)?;
    clock.lap("plan", true);
    let tracee = frozen.fork_host()?;
    let child = tracee.pid();
    tracee.leak();
    let mut guard = Guard { host: Some(Host::attach(child)?), hidden: None };
    clock.lap("fork", true);
    let old =
        Old { process, modules: &old_modules, memory: &*memory, patch: &patch, files: &files, dropped: &[] };
    let (outcome, list) = make(guard.host()?, &old, (&programs, &prepared), options, &mut clock)?;
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
    findings.extend(notify::main_pid(&mut frozen, process, child));
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
    let entry = entry(&patch, &clock, false);
    findings.extend(history.record(child, entry, &[]).err().map(not_recorded));
    Ok(report(child, pid, false, clock, &outcome, list, patch, findings))
}
