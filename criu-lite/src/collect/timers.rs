//! setitimer(2) and timer_create(2); what only the process can tell is asked inside it.

use super::{CollectError, Inside, View};
use mcr_image::{Tid, proto};

/// POSIX timers whose answers fit into the page behind those of the interval timers.
const AT_ONCE: usize = 100;
const INTERVAL_LEN: u64 = 3 * 32;

pub(super) fn collect(
    view: &View<'_>,
    inside: &mut Inside<'_>,
) -> Result<(Vec<proto::Itimer>, Vec<proto::PosixTimer>), CollectError> {
    let page = inside.page();
    let word = |at: u64, n: u64| view.memory.u64(page.add(at + n * 8)).unwrap_or(0);
    let mut posix = parse(&std::fs::read_to_string(view.proc("timers")).unwrap_or_default());
    let mut calls: Vec<_> =
        (0..3u64).map(|which| (libc::SYS_getitimer, [which, page.0 + which * 32, 0, 0, 0, 0])).collect();
    let mut itimers = Vec::new();
    let first = AT_ONCE.min(posix.len());
    let (first, rest) = posix.split_at_mut(first);
    for part in std::iter::once(first).chain(rest.chunks_mut(AT_ONCE)) {
        let at = |i: usize| INTERVAL_LEN + i as u64 * 32;
        let skip = calls.len();
        for (i, t) in part.iter().enumerate() {
            calls.push((libc::SYS_timer_gettime, [u64::from(t.id), page.0 + at(i), 0, 0, 0, 0]));
            calls.push((libc::SYS_timer_getoverrun, [u64::from(t.id), 0, 0, 0, 0, 0]));
        }
        let results = run(view, inside, &calls)?;
        for which in 0..skip as u64 {
            let at = which * 32;
            // struct itimerval: interval, then value; each seconds and microseconds.
            let interval_us = word(at, 0) * 1_000_000 + word(at, 1);
            let value_us = word(at, 2) * 1_000_000 + word(at, 3);
            // An interval without a time: it has expired and its SIGALRM is still pending.
            if value_us != 0 || interval_us != 0 {
                itimers.push(proto::Itimer { which: which as u32, value_us, interval_us });
            }
        }
        for (i, t) in part.iter_mut().enumerate() {
            t.interval_ns = word(at(i), 0) * 1_000_000_000 + word(at(i), 1);
            t.value_ns = word(at(i), 2) * 1_000_000_000 + word(at(i), 3);
            t.overrun = results.get(skip + i * 2 + 1).copied().unwrap_or(0).max(0) as u32;
        }
        calls.clear();
    }
    Ok((itimers, posix))
}

fn run(
    view: &View<'_>,
    inside: &mut Inside<'_>,
    calls: &[(i64, [u64; 6])],
) -> Result<Vec<i64>, CollectError> {
    let failed = |e: crate::TraceError| std::io::Error::other(e.to_string());
    inside.calls(Tid(view.pid.0), calls).map_err(|e| view.io("the process", "timer_gettime")(failed(e)))
}

/// `ID: 0 / signal: 10/0000000000000000 / notify: signal/pid.1234 / ClockID: 1`, a group a timer
/// (/proc/PID/timers, Linux 3.10).
fn parse(text: &str) -> Vec<proto::PosixTimer> {
    let mut out: Vec<proto::PosixTimer> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(": ") else {
            continue;
        };
        if key == "ID" {
            out.push(proto::PosixTimer { id: value.trim().parse().unwrap_or(0), ..Default::default() });
            continue;
        }
        let Some(t) = out.last_mut() else { continue };
        match key {
            "signal" => {
                let (signo, sigval) = value.split_once('/').unwrap_or((value, "0"));
                t.signo = signo.trim().parse().unwrap_or(0);
                t.sigval = u64::from_str_radix(sigval.trim(), 16).unwrap_or(0);
            }
            "notify" => {
                let (how, who) = value.split_once('/').unwrap_or((value, ""));
                t.notify = match how {
                    "none" => libc::SIGEV_NONE,
                    "thread" => libc::SIGEV_THREAD,
                    _ => libc::SIGEV_SIGNAL,
                };
                if let Some(tid) = who.strip_prefix("tid.") {
                    t.notify |= libc::SIGEV_THREAD_ID;
                    t.notify_tid = tid.trim().parse().unwrap_or(0);
                }
            }
            "ClockID" => t.clockid = value.trim().parse().unwrap_or(0),
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn timers_file() {
        let t = super::parse(
            "ID: 3\nsignal: 34/00007f0000000010\nnotify: signal/tid.77\nClockID: 1\nID: 4\nsignal: 14/0\nnotify: none/pid.7\nClockID: 0\n",
        );
        assert_eq!(t.len(), 2);
        assert_eq!((t[0].id, t[0].signo, t[0].sigval, t[0].notify_tid), (3, 34, 0x7f00_0000_0010, 77));
        assert_eq!((t[0].notify, t[1].notify, t[0].clockid), (libc::SIGEV_THREAD_ID, libc::SIGEV_NONE, 1));
    }
}
