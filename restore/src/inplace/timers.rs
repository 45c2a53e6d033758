//! POSIX timers run on in the old process, with their ids and their time. Only one whose value is a pointer that
//! changes is made again, with the time that it had when the process was stopped.

use super::{Input, PlanError, unsupported};
use crate::apply::PR_TIMER_CREATE_RESTORE_IDS;
use crate::link::{KernelCall, calls_back};
use mcr_criu_lite::tracee::commit::{Call, CommitPlan};
use mcr_image::proto;

const NS: u64 = 1_000_000_000;

/// struct sigevent: value, signal, kind, thread.
fn event(t: &proto::PosixTimer, sigval: u64) -> [u8; 64] {
    let mut b = [0; 64];
    b[..8].copy_from_slice(&sigval.to_le_bytes());
    b[8..12].copy_from_slice(&t.signo.to_le_bytes());
    b[12..16].copy_from_slice(&t.notify.to_le_bytes());
    b[16..20].copy_from_slice(&t.notify_tid.to_le_bytes());
    b
}

pub(super) fn timers(input: &Input<'_>, plan: &mut CommitPlan) -> Result<(), PlanError> {
    let booted = &input.outcome.booted;
    if let Some(t) = booted.timers.iter().find(|t| !t.in_old) {
        return Err(unsupported(format!(
            "the new version's start-up makes a POSIX timer that the old one does not have (id {})",
            t.id
        )));
    }
    if let Some(which) = booted.new_itimers.first() {
        return Err(unsupported(format!(
            "the new version's start-up sets interval timer {which}, which the old one does not use"
        )));
    }
    if let Some(t) = input.old.posix_timers.iter().find(|t| calls_back((t.clockid, t.notify, t.signo))) {
        return Err(unsupported(format!("POSIX timer {} calls a function on a thread (SIGEV_THREAD)", t.id)));
    }
    let changed: Vec<(&proto::PosixTimer, u64)> = input
        .list
        .calls
        .iter()
        .filter_map(|c| {
            let KernelCall::PosixTimer { timer } = c else { return None };
            let old = input.old.posix_timers.iter().find(|o| o.id == timer.id)?;
            (old.sigval != timer.sigval).then_some((old, timer.sigval))
        })
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    let choose = |on: u64| [PR_TIMER_CREATE_RESTORE_IDS, on, 0, 0, 0];
    let prctl = libc::SYS_prctl;
    plan.calls.push(Call::new(prctl, &choose(1)).undo(prctl, &choose(0)));
    for (t, sigval) in &changed {
        make_again(t, *sigval, plan);
    }
    plan.calls.push(Call::new(prctl, &choose(0)).undo(prctl, &choose(1)));
    // What a timer has sent goes away with it.
    let shared = input.old.shared_pending.iter().map(|s| (None, s));
    let own = input.old.threads.iter().flat_map(|t| t.pending.iter().map(move |s| (Some(t.tid), s)));
    for (tid, s) in shared.chain(own) {
        let mut info = s.siginfo.clone();
        let Some((_, sigval)) =
            crate::signals::timer_of(&info).and_then(|id| changed.iter().find(|(t, _)| t.id == id))
        else {
            continue;
        };
        crate::signals::set_value(&mut info, *sigval);
        let at = plan.put(&info);
        let (pid, signo) = (u64::from(input.old.pid), crate::signals::number(&info));
        plan.after.push(match tid {
            None => Call::new(libc::SYS_rt_sigqueueinfo, &[pid, signo, at]),
            Some(tid) => Call::new(libc::SYS_rt_tgsigqueueinfo, &[pid, tid.into(), signo, at]),
        });
    }
    Ok(())
}

fn make_again(t: &proto::PosixTimer, sigval: u64, plan: &mut CommitPlan) {
    let id = u64::from(t.id);
    let clock = i64::from(t.clockid) as u64;
    let times = [t.interval_ns / NS, t.interval_ns % NS, t.value_ns / NS, t.value_ns % NS];
    let times = plan.put(&times.map(u64::to_le_bytes).concat());
    let room = plan.put(&[0; 32]);
    // timer_create takes the id from its result word, and writes it there.
    let word = plan.put(&u64::from(t.id).to_le_bytes());
    let new = plan.put(&event(t, sigval));
    let old = plan.put(&event(t, t.sigval));
    // Taken back in the opposite order: the old timer is made, then set.
    plan.calls.push(
        Call::new(libc::SYS_timer_gettime, &[id, room]).undo(libc::SYS_timer_settime, &[id, 0, times, 0]),
    );
    plan.calls
        .push(Call::new(libc::SYS_timer_delete, &[id]).undo(libc::SYS_timer_create, &[clock, old, word]));
    plan.calls
        .push(Call::new(libc::SYS_timer_create, &[clock, new, word]).undo(libc::SYS_timer_delete, &[id]));
    if t.value_ns != 0 {
        plan.calls.push(Call::new(libc::SYS_timer_settime, &[id, 0, times, 0]));
    }
}
