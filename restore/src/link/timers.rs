//! POSIX timers (timer_create(2)): all of old's go on with their ids, with what was left of them. Those that the
//! start-up made for the same purpose got the same ids (`boot/gate/timers.rs`) and are replaced.

use super::input::{Booted, Span};
use super::output::{KernelCall, Refusal};
use super::overlay::Overlay;
use mcr_image::{Addr, Memory, Tid, proto};
use std::collections::BTreeSet;

/// The signal that glibc's helper thread waits for (SIGTIMER).
const SIGTIMER: i32 = 32;
/// SIGEV_THREAD_ID.
const TO_THREAD: i32 = libc::SIGEV_THREAD_ID;
/// glibc's `struct timer`: sigev_notify, kernel id, function, value, pthread_attr_t (56 bytes), next.
const CALLBACK_ID: u64 = 4;
const CALLBACK_NEXT: u64 = 80;

fn refuse(message: String) -> Refusal {
    Refusal::new("timers", message, "update at a moment when the timer is not there, or restart the server")
}

/// Whether glibc turns its expiry into a thread (SIGEV_THREAD).
pub fn calls_back(kind: (i32, i32, i32)) -> bool {
    kind.1 & TO_THREAD != 0 && kind.2 == SIGTIMER
}

fn kind(t: &proto::PosixTimer) -> (i32, i32, i32) {
    (t.clockid, t.notify, t.signo)
}

/// The calls that make old's timers again. `resolve` computes a relocation's value.
pub(super) fn carry(
    process: &proto::Process,
    patch: &proto::Patch,
    booted: &Booted,
    resolve: impl Fn(&proto::Reloc) -> Result<u64, Refusal>,
    calls: &mut Vec<KernelCall>,
    findings: &mut Vec<proto::Finding>,
) -> Result<(), Refusal> {
    for t in &process.posix_timers {
        let mut timer = *t;
        timer.sigval = match patch.timers.iter().find(|d| d.id == t.id && d.old_sigval == t.sigval) {
            Some(proto::TimerData { reloc: Some(r), .. }) => resolve(r)?,
            Some(d) => d.new_sigval,
            None => t.sigval,
        };
        if t.notify & TO_THREAD != 0 {
            let new = booted.thread_for(Tid(t.notify_tid as i32)).ok_or_else(|| {
                refuse(format!(
                    "POSIX timer {} signals thread {}, which has no counterpart in the new version",
                    t.id, t.notify_tid
                ))
            })?;
            timer.notify_tid = new.tid.0 as u32;
        }
        // The clock of one process or thread carries its id: ~id << 3 | flags.
        if t.clockid < 0 {
            return Err(refuse(format!(
                "POSIX timer {} runs by the processor time of one thread or process (clock {})",
                t.id, t.clockid
            )));
        }
        if t.overrun != 0 {
            findings.push(super::finding(
                proto::Severity::Info,
                "timer-overrun",
                format!(
                    "POSIX timer {}: timer_getoverrun starts from 0, it said {} in the old version",
                    t.id, t.overrun
                ),
                "",
            ));
        }
        calls.push(KernelCall::PosixTimer { timer });
    }
    Ok(())
}

/// glibc keeps a list of the timers that call a function on a thread of its own (SIGEV_THREAD); old's list
/// becomes new's. The list's head has no symbol: it is the word of libc's data from which exactly the timers
/// that the kernel knows are reached. `moved` gives the new address of an old object.
pub(super) fn adopt_callbacks(
    process: &proto::Process,
    old: &dyn Memory,
    booted: &Booted,
    libc_data: &[Span],
    moved: impl Fn(u64) -> u64,
    out: &mut Overlay<'_>,
) -> Result<(), Refusal> {
    if let Some(extra) = booted.timers.iter().find(|t| !t.in_old && calls_back(t.kind)) {
        return Err(refuse(format!(
            "the new version's start-up makes a timer with SIGEV_THREAD (id {}) that the old one does not have",
            extra.id
        )));
    }
    let timers: Vec<&proto::PosixTimer> =
        process.posix_timers.iter().filter(|t| calls_back(kind(t))).collect();
    if timers.is_empty() {
        return Ok(());
    }
    let wanted: BTreeSet<u64> = timers.iter().map(|t| t.sigval).collect();
    let whole = timers.iter().all(|t| old.u32(Addr(t.sigval + CALLBACK_ID)).is_ok_and(|id| id == t.id));
    let list_from = |head: u64| {
        let (mut seen, mut at) = (BTreeSet::new(), head);
        while at != 0 && wanted.contains(&at) && seen.insert(at) {
            at = old.u64(Addr(at + CALLBACK_NEXT)).unwrap_or(1);
        }
        at == 0 && seen == wanted
    };
    let mut heads = Vec::new();
    for span in libc_data.iter().filter(|_| whole) {
        let bytes = old.bytes(span.start, span.len() as usize).unwrap_or_default();
        for (i, w) in bytes.chunks_exact(8).enumerate() {
            let word = w.try_into().map_or(0, u64::from_le_bytes);
            if wanted.contains(&word) && list_from(word) {
                heads.push((span.start.add(i as u64 * 8), word));
            }
        }
    }
    let [(at, head)] = heads[..] else {
        return Err(refuse(format!(
            "{} timers with SIGEV_THREAD: libc's list of them was not recognised ({} candidates)",
            timers.len(),
            heads.len()
        )));
    };
    if wanted.iter().any(|&t| moved(t) != t) {
        return Err(refuse("a timer with SIGEV_THREAD lies in memory that moves".to_owned()));
    }
    out.write_u64(at, head);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::input::NewThread;
    use super::*;

    fn timer(id: u32) -> proto::PosixTimer {
        proto::PosixTimer { id, clockid: 1, signo: 34, sigval: 0x1000, value_ns: 5, ..Default::default() }
    }

    fn carried(
        timers: Vec<proto::PosixTimer>,
        patch: &proto::Patch,
        booted: &Booted,
    ) -> Result<Vec<KernelCall>, Refusal> {
        let process = proto::Process { posix_timers: timers, ..Default::default() };
        let mut calls = Vec::new();
        carry(&process, patch, booted, |_| Ok(0xdead), &mut calls, &mut Vec::new())?;
        Ok(calls)
    }

    #[test]
    fn values_are_translated() {
        let data = |id, new_sigval, reloc| proto::TimerData { id, old_sigval: 0x1000, new_sigval, reloc };
        let patch = proto::Patch {
            timers: vec![data(1, 0x2000, None), data(2, 0, Some(proto::Reloc::default()))],
            ..Default::default()
        };
        let calls = carried(vec![timer(0), timer(1), timer(2)], &patch, &Booted::default()).unwrap();
        let values: Vec<u64> = calls
            .iter()
            .map(|c| if let KernelCall::PosixTimer { timer } = c { timer.sigval } else { 0 })
            .collect();
        assert_eq!(values, [0x1000, 0x2000, 0xdead]);
    }

    #[test]
    fn a_thread_must_have_a_counterpart() {
        let to = proto::PosixTimer { notify: TO_THREAD, notify_tid: 7, ..timer(3) };
        let patch = proto::Patch::default();
        let e = carried(vec![to], &patch, &Booted::default()).unwrap_err();
        assert!(e.message.contains("POSIX timer 3 signals thread 7"), "{}", e.message);
        let booted = Booted {
            threads: vec![NewThread { tid: Tid(90), old_tid: Some(Tid(7)), ..NewThread::default() }],
            ..Booted::default()
        };
        let calls = carried(vec![to], &patch, &booted).unwrap();
        assert!(matches!(&calls[..], [KernelCall::PosixTimer { timer }] if timer.notify_tid == 90));
    }
}
