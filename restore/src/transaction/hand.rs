//! What the booted host gets besides the write list: the old process's open files at their numbers, and its
//! signal handlers. Nothing of the old process is touched: the host shares open files with it, but neither
//! the descriptor table nor its epoll objects.

use super::UpdateError;
use super::make::Files;
use crate::boot::Host;
use crate::fds::{Install, install_fds, move_fds};
use crate::link::{BootEpoll, Booted, KernelCall, WriteList};
use crate::rebuild::Inject;
use crate::signals;
use mcr_image::proto::fd::Object;
use mcr_image::{Addr, Fd, ModuleMap, Pid, Tid, proto};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> UpdateError {
    let what = what.into();
    move |source| UpdateError::Inside { what, source }
}

/// Gives the host the old process's open files at their numbers. Epoll objects stay those that the boot
/// made (a shared one would still be the old process's), missing ones are made and returned.
pub(super) fn install_descriptors(
    host: &mut Host,
    old: &proto::Process,
    booted: &Booted,
    files: &Files<'_>,
) -> Result<Vec<BootEpoll>, UpdateError> {
    let mut installs = Vec::new();
    let mut moves = Vec::new();
    let mut fresh = Vec::new();
    for fd in &old.fds {
        let number = fd.number as i32;
        if matches!(fd.object, Some(Object::Epoll(_))) {
            match booted.epolls.iter().find(|e| e.old_fd == Some(Fd(number))) {
                Some(e) if e.fd.0 == number => {}
                Some(e) => moves.push((e.fd.0, number, fd.cloexec)),
                None => {
                    let flags = if fd.cloexec { libc::EPOLL_CLOEXEC } else { 0 };
                    let what = format!("epoll_create1 for descriptor {number}");
                    let made = host.leader_calls().call(libc::SYS_epoll_create1, &[flags as u64]);
                    let made = made.map_err(failed(what))? as i32;
                    if made != number {
                        moves.push((made, number, fd.cloexec));
                    }
                    fresh.push(BootEpoll { fd: Fd(number), old_fd: Some(Fd(number)), watches: Vec::new() });
                }
            }
            continue;
        }
        let Some(&file) = files.get(&fd.number) else {
            return Err(UpdateError::MissingFile { fd: Fd(number), what: fd.link.clone() });
        };
        installs.push(Install { number: Fd(number), file, cloexec: fd.cloexec });
        // A listener that the new version knows by another number gets both.
        for m in booted.fds.iter().filter(|m| m.old_fd.0 == number && m.new_fd.0 != number && m.old_object) {
            installs.push(Install { number: m.new_fd, file, cloexec: fd.cloexec });
        }
    }
    let pid = host.pid().0;
    let numbers = old.fds.iter().map(|f| f.number as i32);
    let spare = numbers.chain(moves.iter().flat_map(|m| [m.0, m.1])).max().map_or(3, |n| n + 1);
    let spare = spare.max(host.highest_fd()? + 1);
    let mut leader = host.leader_calls();
    if !moves.is_empty() {
        move_fds(&mut leader, &moves, spare)?;
    }
    install_fds(&mut leader, pid, &installs)?;
    Ok(fresh)
}

/// A live host is a fork of the old process: memory that a fork leaves out or clears would be lost.
pub(super) fn refuse_unforkable(old: &proto::Process) -> Result<(), UpdateError> {
    let lost = old.vmas.iter().find(|v| v.vm_flags.iter().any(|f| f == "dc" || f == "wf"));
    match lost {
        Some(v) => {
            Err(UpdateError::Unforkable { start: Addr(v.start), end: Addr(v.end), name: v.name.clone() })
        }
        None => Ok(()),
    }
}

/// Whether the old process holds POSIX record locks, which no other process can be handed.
pub(super) fn has_record_locks(old: &proto::Process) -> bool {
    old.fds.iter().any(|fd| match &fd.object {
        Some(Object::File(f)) => f.locks.iter().any(|l| l.kind.eq_ignore_ascii_case("posix")),
        _ => false,
    })
}

/// Takes old's record locks in the new version, once the old one is gone.
pub(super) fn take_record_locks(host: &mut Host, old: &proto::Process) -> Option<proto::Finding> {
    let taken = crate::rebuild::process::posix_locks(&mut host.leader_calls(), old)
        .map_err(|e| e.to_string())
        .and_then(|()| host.drop_scratch().map_err(|e| e.to_string()));
    let message = taken.err()?;
    Some(proto::Finding {
        severity: proto::Severity::Warning.into(),
        code: "record-lock".into(),
        message,
        next_step: "look whether another process holds the lock now".into(),
        ..Default::default()
    })
}

/// Gives a rebuilt host the old process's standard streams before anything runs in it: what the new version says
/// while it starts up belongs there, not into ours.
pub(super) fn standard_streams(
    host: &mut crate::rebuild::Host,
    old: &proto::Process,
) -> Result<(), UpdateError> {
    let null =
        std::fs::File::options().read(true).write(true).open("/dev/null").map_err(failed("/dev/null"))?;
    let mut streams = Vec::new();
    for number in 0..3u32 {
        let fd = old.fds.iter().find(|f| f.number == number);
        let file = match fd.and_then(|f| host.files.by_ofd.get(&f.ofd)) {
            Some(f) => f.try_clone(),
            None => null.try_clone().map(Into::into),
        };
        streams.push((number, file.map_err(failed(format!("dup of descriptor {number}")))?));
    }
    let installs: Vec<_> = streams
        .iter()
        .map(|(n, f)| Install { number: Fd(*n as i32), file: f.as_fd(), cloexec: false })
        .collect();
    let pid = host.pid().0;
    let leader = host.leader().ok_or(UpdateError::Internal("a rebuilt process without a thread"))?;
    Ok(install_fds(leader, pid, &installs)?)
}

/// The signal actions of the new version: its own, and old's handlers that its start-up did not set itself, as
/// the functions of the same name. Also what could not be carried over.
pub(super) fn handlers(
    old: &proto::Process,
    old_modules: &ModuleMap,
    new_modules: &ModuleMap,
    booted: &Booted,
) -> (Vec<proto::SigAction>, Vec<proto::Finding>) {
    let mut actions = booted.sigactions.clone();
    let mut findings = Vec::new();
    let set: BTreeSet<u32> = booted.sigactions.iter().map(|a| a.signo).collect();
    for a in old.sigactions.iter().filter(|a| a.handler > 1 && !set.contains(&a.signo)) {
        match same_function(old_modules, new_modules, Addr(a.handler)) {
            Some(handler) => actions.push(proto::SigAction { handler: handler.0, ..*a }),
            None => findings.push(proto::Finding {
                severity: proto::Severity::Warning.into(),
                code: "signal-handler-dropped".into(),
                message: format!(
                    "the old version's handler of {} at {:#x} has no counterpart in the new one",
                    signal(a.signo),
                    a.handler
                ),
                next_step: "let the new version install a handler at its start-up".into(),
                ..Default::default()
            }),
        }
    }
    (actions, findings)
}

/// Installs those of [`handlers`] that the start-up did not. Returns what could not be carried over.
pub(super) fn carry_handlers(
    host: &mut Host,
    old: &proto::Process,
    old_modules: &ModuleMap,
    new_modules: &ModuleMap,
    booted: &Booted,
) -> Result<Vec<proto::Finding>, UpdateError> {
    let (actions, findings) = handlers(old, old_modules, new_modules, booted);
    for a in &actions[booted.sigactions.len()..] {
        let bytes: Vec<u8> =
            [a.handler, a.flags, a.restorer, a.mask].iter().flat_map(|w| w.to_le_bytes()).collect();
        host.leader_calls()
            .call_with(libc::SYS_rt_sigaction, &[Some(a.signo.into()), None, Some(0), Some(8)], &bytes)
            .map_err(failed(format!("rt_sigaction of {}", signal(a.signo))))?;
    }
    Ok(findings)
}

/// Working directory, umask and limits are state like any other: old's stay.
pub(super) fn carry_surroundings(host: &mut Host, old: &proto::Process) -> Result<(), UpdateError> {
    let cwd = std::fs::read_link(format!("/proc/{}/cwd", host.pid()));
    let mut leader = host.leader_calls();
    if !cwd.is_ok_and(|c| c.as_os_str().as_encoded_bytes() == old.cwd.as_bytes()) {
        let path = [old.cwd.as_bytes(), &[0]].concat();
        leader
            .call_with(libc::SYS_chdir, &[None], &path)
            .map_err(failed(format!("chdir to the old working directory {}", old.cwd)))?;
    }
    leader.call(libc::SYS_umask, &[u64::from(old.umask)]).map_err(failed("umask"))?;
    if old.child_subreaper {
        leader
            .call(libc::SYS_prctl, &[libc::PR_SET_CHILD_SUBREAPER as u64, 1, 0, 0, 0])
            .map_err(failed("prctl PR_SET_CHILD_SUBREAPER"))?;
    }
    Ok(crate::rebuild::process::limits(&mut leader, old)?)
}

/// Old's signal stacks, which its state may point at, wherever their memory stays; elsewhere (in variables of the
/// program, on stacks) the new version's own are right.
pub(super) fn carry_signal_stacks(
    host: &mut Host,
    old: &proto::Process,
    booted: &Booted,
) -> Result<(), UpdateError> {
    for t in &old.threads {
        let Some(new) = booted.thread_for(Tid(t.tid as i32)) else {
            continue;
        };
        let Some(a) = t.altstack.filter(|a| a.size != 0 && *a != new.altstack) else {
            continue;
        };
        if !booted.is_retained(Addr(a.sp)) || !booted.is_retained(Addr(a.sp + a.size - 1)) {
            continue;
        }
        // stack_t: address, flags (without SS_ONSTACK), size.
        let bytes: Vec<u8> =
            [a.sp, u64::from(a.flags & !1), a.size].iter().flat_map(|w| w.to_le_bytes()).collect();
        host.thread_calls(new.tid)
            .call_with(libc::SYS_sigaltstack, &[None, Some(0)], &bytes)
            .map_err(failed(format!("sigaltstack of thread {}", new.tid)))?;
    }
    Ok(())
}

/// Whether a thread has old's credentials already: a start-up that gives up privileges does so for itself.
pub(super) fn has_credentials(pid: Pid, tid: Tid, old: &proto::Process) -> bool {
    let Some(c) = &old.creds else { return true };
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
    let field = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_default();
    let ids = |key: &str| field(key).split_whitespace().filter_map(|w| w.parse().ok()).collect::<Vec<u32>>();
    let set = |key: &str| u64::from_str_radix(field(key).trim(), 16).ok();
    let sorted = |mut v: Vec<u32>| {
        v.sort_unstable();
        v
    };
    ids("Uid:") == [c.ruid, c.euid, c.suid, c.fsuid]
        && ids("Gid:") == [c.rgid, c.egid, c.sgid, c.fsgid]
        && sorted(ids("Groups:")) == sorted(c.groups.clone())
        && set("CapInh:") == Some(c.cap_inh)
        && set("CapPrm:") == Some(c.cap_prm)
        && set("CapEff:") == Some(c.cap_eff)
        && set("CapBnd:") == Some(c.cap_bnd)
        && set("CapAmb:") == Some(c.cap_amb)
        && ids("NoNewPrivs:") == [u32::from(old.no_new_privs)]
}

/// Signals that were pending in the old process are pending in the new one. The values of timers' signals are
/// the new version's.
pub(super) fn carry_signals(
    host: &mut Host,
    old: &proto::Process,
    booted: &Booted,
    list: &WriteList,
) -> Result<Vec<proto::Finding>, UpdateError> {
    let mut findings = Vec::new();
    let pid = host.pid().0 as u64;
    let mut send = |to: Option<Tid>, info: &[u8]| {
        let mut info = info.to_vec();
        translate_value(&mut info, list);
        let signo = signals::number(&info);
        let (call, nr, args) = match to {
            None => {
                let args = vec![Some(pid), Some(signo), None];
                ("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, args)
            }
            Some(tid) => {
                let args = vec![Some(pid), Some(tid.0 as u64), Some(signo), None];
                ("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, args)
            }
        };
        let what = format!("{call} of the pending {}", signal(signo as u32));
        host.leader_calls().call_with(nr, &args, &info).map(drop).map_err(failed(what))
    };
    for s in &old.shared_pending {
        send(None, &s.siginfo)?;
    }
    for t in &old.threads {
        match booted.thread_for(Tid(t.tid as i32)) {
            Some(new) => {
                for s in &t.pending {
                    send(Some(new.tid), &s.siginfo)?;
                }
            }
            None if t.pending.is_empty() => {}
            None => findings.push(proto::Finding {
                severity: proto::Severity::Warning.into(),
                code: "signal-pending".into(),
                message: format!("thread {}: {} pending signals are dropped with it", t.tid, t.pending.len()),
                ..Default::default()
            }),
        }
    }
    Ok(findings)
}

fn translate_value(info: &mut [u8], list: &WriteList) {
    let Some(id) = signals::timer_of(info) else {
        return;
    };
    let timer = list.calls.iter().find_map(|c| match c {
        KernelCall::PosixTimer { timer } if timer.id == id => Some(timer),
        _ => None,
    });
    if let Some(t) = timer {
        signals::set_value(info, t.sigval);
    }
}

fn signal(n: u32) -> String {
    nix::sys::signal::Signal::try_from(n as i32)
        .map_or_else(|_| format!("signal {n}"), |s| s.as_str().to_owned())
}

/// The function of the new program with the name of the old one at an address; library code stays where it is.
fn same_function(old: &ModuleMap, new: &ModuleMap, at: Addr) -> Option<Addr> {
    let module = old.find(at)?;
    if !module.is_exe() {
        return new
            .find(at)
            .filter(|n| n.build_id() == module.build_id() && n.bias == module.bias)
            .map(|_| at);
    }
    let symbol = module.elf.function_at(module.link(at))?;
    if symbol.addr != module.link(at) {
        return None;
    }
    new.exe()?.symbol(symbol.name)
}
