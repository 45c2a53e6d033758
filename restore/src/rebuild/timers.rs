//! setitimer(2) and timer_create(2). Timers are made with their ids early and set running at the very end.

use super::RebuildError;
use super::batch::Batch;
use super::remote::Remote;
use mcr_image::proto;

/// PR_TIMER_CREATE_RESTORE_IDS (include/uapi/linux/prctl.h, Linux 6.15): timer_create takes the id from its
/// result word.
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;

/// Makes the POSIX timers, disarmed.
pub(super) fn create(leader: &mut Remote, process: &proto::Process) -> Result<(), RebuildError> {
    if process.posix_timers.is_empty() {
        return Ok(());
    }
    let next = "restoring POSIX timers needs Linux 6.15 or later";
    let mut batch = Batch::new(leader)?;
    let prctl = libc::SYS_prctl;
    batch.add(
        "POSIX timers",
        "prctl RESTORE_IDS",
        prctl,
        &[PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0],
        next,
    )?;
    for t in &process.posix_timers {
        // struct sigevent: value, signo, notify, tid.
        let mut ev = [0u8; 64];
        ev[..8].copy_from_slice(&t.sigval.to_le_bytes());
        ev[8..12].copy_from_slice(&t.signo.to_le_bytes());
        ev[12..16].copy_from_slice(&t.notify.to_le_bytes());
        ev[16..20].copy_from_slice(&t.notify_tid.to_le_bytes());
        let ev = batch.data(&ev);
        let id = batch.data(&t.id.to_le_bytes());
        let object = format!("POSIX timer {}", t.id);
        batch.add(
            object,
            "timer_create",
            libc::SYS_timer_create,
            &[i64::from(t.clockid) as u64, ev, id],
            "",
        )?;
    }
    batch.add(
        "POSIX timers",
        "prctl RESTORE_IDS off",
        prctl,
        &[PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0],
        next,
    )?;
    batch.run()
}

/// Sets everything running.
pub(super) fn arm(leader: &mut Remote, process: &proto::Process) -> Result<(), RebuildError> {
    let mut batch = Batch::new(leader)?;
    for t in process.posix_timers.iter().filter(|t| t.value_ns != 0 || t.interval_ns != 0) {
        let spec =
            [split(t.interval_ns, 1_000_000_000), split(first(t.value_ns, t.interval_ns), 1_000_000_000)]
                .concat();
        let at = batch.data(&spec);
        let object = format!("POSIX timer {}", t.id);
        batch.add(object, "timer_settime", libc::SYS_timer_settime, &[u64::from(t.id), 0, at, 0], "")?;
    }
    for t in process.itimers.iter().filter(|t| t.value_us != 0 || t.interval_us != 0) {
        let spec =
            [split(t.interval_us, 1_000_000), split(first(t.value_us, t.interval_us), 1_000_000)].concat();
        let at = batch.data(&spec);
        let object = format!("interval timer {}", t.which);
        batch.add(object, "setitimer", libc::SYS_setitimer, &[u64::from(t.which), at, 0], "")?;
    }
    batch.run()
}

/// An interval timer whose signal was still pending at the dump has no time left until that signal is taken.
fn first(value: u64, interval: u64) -> u64 {
    if value == 0 { interval } else { value }
}

/// Seconds and the rest, as struct timespec and struct timeval have them.
fn split(n: u64, per_second: u64) -> Vec<u8> {
    [(n / per_second).to_le_bytes(), (n % per_second).to_le_bytes()].concat()
}
