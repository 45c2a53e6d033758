//! The update through an image.

use super::clock::Clock;
use super::make::{Files, Guard, Old, lay, make, rewrite_pid_files, tids};
use super::programs::{Programs, hex};
use super::{UpdateError, UpdateOptions, UpdateReport, hand, report};
use crate::boot::Host;
use crate::rebuild::{self, RebuildOptions, Threads};
use mcr_image::{Image, Pid};
use std::os::fd::AsFd;
use std::path::Path;

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
    let prepared = programs.prepare(options);
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
    let old =
        Old { process, modules: &old_modules, memory: &memory, patch: &patch, files: &files, dropped: &[] };
    let (outcome, list) = make(guard.host()?, &old, (&programs, &prepared), options, &mut clock)?;
    let mut findings = lay(guard.host()?, &old, &outcome, &list)?;
    let host = guard.host()?;
    for t in outcome.booted.threads.iter().rev() {
        if hand::has_credentials(child, t.tid, process) {
            continue;
        }
        rebuild::process::credentials(&mut host.thread_calls(t.tid), process, t.tid.0 == child.0)?;
    }
    findings.extend(handed.findings.clone());
    clock.lap("apply", true);
    let tids = tids(&outcome);
    findings.extend(hand::take_record_locks(guard.host()?, process));
    guard.host()?.park(&tids, false)?;
    guard.host()?.disarm(&tids)?;
    // Ours and the keeper's copies are closed before it runs: what it closes then is closed.
    handed.let_flow(process)?;
    handed.confirm();
    let host = guard.host.take().ok_or(UpdateError::Internal("no host at the commit"))?;
    host.let_go(&tids).map_err(|e| UpdateError::Lost { pid: child, why: e.to_string() })?;
    clock.lap("commit", true);
    let old_pid = Pid(process.pid as i32);
    findings.extend(rewrite_pid_files(&outcome, old_pid, child));
    Ok(report(child, old_pid, false, clock, &outcome, list, patch, findings))
}
