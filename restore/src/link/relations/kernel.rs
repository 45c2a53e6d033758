//! What the kernel keeps for the program: descriptors, epoll data, timers' values, arguments of blocked calls.

use super::super::kernel::old_watches;
use super::super::output::{KernelCall, Refusal};
use super::super::scan;
use super::super::state::register;
use super::{Final, relation};
use mcr_image::proto;
use mcr_transform::verify::Verdict;
use std::collections::{BTreeMap, BTreeSet};

const EPOLL_CTL_DEL: i32 = 2;
/// Registers of the six arguments, by DWARF number: rdi, rsi, rdx, r10, r8, r9.
const ARGS: [u16; 6] = [5, 4, 1, 10, 8, 9];

pub(super) fn check(now: &Final<'_>) -> Result<usize, Refusal> {
    descriptors(now)?;
    Ok(epolls(now)? + timers(now)? + arguments(now)?)
}

/// A number that old's memory may hold means the same open file.
fn descriptors(now: &Final<'_>) -> Result<(), Refusal> {
    let booted = now.input.booted;
    let old: BTreeSet<u32> = now.input.process.fds.iter().map(|f| f.number).collect();
    if let Some((fd, what)) = booted.new_only_fds.iter().find(|f| old.contains(&(f.0.0 as u32))) {
        return Err(relation(
            format!("descriptor {fd} is old's, and the new version has {what} there"),
            format!("descriptor {fd}"),
        ));
    }
    let mut taken = BTreeMap::new();
    for m in &booted.fds {
        if let Some(other) = taken.insert(m.new_fd, m.old_fd).filter(|o| *o != m.old_fd) {
            return Err(relation(
                format!(
                    "descriptor {} of the new version is {} and {other} of the old one",
                    m.new_fd, m.old_fd
                ),
                format!("descriptor {}", m.new_fd),
            ));
        }
        let number = m.new_fd.0 as u32;
        if m.new_fd != m.old_fd && old.contains(&number) && !booted.fds.iter().any(|o| o.old_fd == m.new_fd) {
            return Err(relation(
                format!(
                    "descriptor {} is {} in the new version; the old one has another file at that number",
                    m.new_fd, m.what
                ),
                format!("descriptor {}", m.new_fd),
            ));
        }
    }
    Ok(())
}

/// The watches that there will be.
fn epolls(now: &Final<'_>) -> Result<usize, Refusal> {
    let (input, booted) = (now.input, now.input.booted);
    let mut words = 0;
    for e in &booted.epolls {
        let Some(old_fd) = e.old_fd else { continue };
        let from_old = old_watches(input.process, old_fd);
        let start = if booted.in_place { from_old } else { &e.watches[..] };
        let mut then: BTreeMap<u32, (u32, u64)> = start.iter().map(|w| (w.fd, (w.events, w.data))).collect();
        for c in &now.list.calls {
            if let KernelCall::EpollCtl { epoll, op, fd, events, data } = c
                && *epoll == e.fd
            {
                if *op == EPOLL_CTL_DEL {
                    then.remove(&(fd.0 as u32));
                } else {
                    then.insert(fd.0 as u32, (*events, *data));
                }
            }
        }
        for w in from_old {
            words += 1;
            let number =
                booted.fds.iter().find(|m| m.old_fd.0 as u32 == w.fd).map_or(w.fd, |m| m.new_fd.0 as u32);
            let path = format!("epoll {}: data of fd {number}", e.fd);
            let Some((events, data)) = then.get(&number) else {
                return Err(relation(
                    format!(
                        "epoll {} watches fd {} in the old version, and no longer in the new one",
                        e.fd, w.fd
                    ),
                    path,
                ));
            };
            if *events != w.events {
                return Err(relation(
                    format!(
                        "{path}: waits for events {:#x} in the old version and for {events:#x} in the new one",
                        w.events
                    ),
                    path,
                ));
            }
            judge(now, w.data, *data, &path)?;
        }
    }
    Ok(words)
}

fn timers(now: &Final<'_>) -> Result<usize, Refusal> {
    let mut words = 0;
    for c in &now.list.calls {
        let KernelCall::PosixTimer { timer } = c else { continue };
        let old = now.input.process.posix_timers.iter().find(|t| t.id == timer.id);
        if let Some(old) = old {
            words += 1;
            judge(now, old.sigval, timer.sigval, &format!("value of POSIX timer {}", timer.id))?;
        }
    }
    Ok(words)
}

fn arguments(now: &Final<'_>) -> Result<usize, Refusal> {
    let mut words = 0;
    for (old, new) in now.threads() {
        let Some(call) = &old.syscall else { continue };
        let mut regs = now.regs(new);
        for (i, p) in call.args.iter().enumerate().take(scan::arguments(new.syscall).min(ARGS.len())) {
            // Numbers and places on the stack are the new version's own.
            if !now.verifier.is_object(*p) {
                continue;
            }
            let Some(q) = register(&mut regs, ARGS[i]).map(|w| *w) else { continue };
            words += 1;
            let name = mcr_image::syscalls::name(new.syscall).unwrap_or("call");
            judge(now, *p, q, &format!("thread {}: argument {i} of {name}", new.tid))?;
        }
    }
    Ok(words)
}

fn judge(now: &Final<'_>, old: u64, new: u64, path: &str) -> Result<(), Refusal> {
    match now.verifier.judge(old, new, None, &now.at) {
        Verdict::Right | Verdict::Unknown => Ok(()),
        Verdict::Wrong(what) => Err(relation(
            format!(
                "{path} meant {what} ({old:#x}) in the old version, and would be {new:#x} in the new one"
            ),
            path,
        )),
    }
}

/// The finding about a thread's own value that the new version does not have.
pub(super) fn lost(path: String, old: u64) -> proto::Finding {
    super::super::finding(
        proto::Severity::Warning,
        "thread-data-lost",
        format!(
            "{path} pointed at {old:#x} in the old version; the new version's start-up has nothing there, and so it stays"
        ),
        &path,
    )
}
