//! setitimer(2) and timer_create(2); what only the process can tell is asked inside it.

use super::{CollectError, Inside, View};
use mcr_image::{Tid, proto};

pub(super) fn interval(view: &View<'_>, inside: &mut Inside<'_>) -> Result<Vec<proto::Itimer>, CollectError> {
    let page = inside.page();
    let tid = Tid(view.pid.0);
    let calls: Vec<_> =
        (0..3u64).map(|which| (libc::SYS_getitimer, [which, page.0 + which * 32, 0, 0, 0, 0])).collect();
    run(view, inside, tid, &calls, "getitimer")?;
    let mut out = Vec::new();
    for which in 0..3u64 {
        let word = |n: u64| view.memory.u64(page.add(which * 32 + n * 8)).unwrap_or(0);
        // struct itimerval: interval, then value; each seconds and microseconds.
        let (interval_us, value_us) = (word(0) * 1_000_000 + word(1), word(2) * 1_000_000 + word(3));
        // An interval without a time: it has expired and its SIGALRM is still pending.
        if value_us != 0 || interval_us != 0 {
            out.push(proto::Itimer { which: which as u32, value_us, interval_us });
        }
    }
    Ok(out)
}

pub(super) fn posix(
    view: &View<'_>,
    inside: &mut Inside<'_>,
) -> Result<Vec<proto::PosixTimer>, CollectError> {
    let text = std::fs::read_to_string(view.proc("timers")).unwrap_or_default();
    let mut out = parse(&text);
    let page = inside.page();
    for t in &mut out {
        let calls = [
            (libc::SYS_timer_gettime, [u64::from(t.id), page.0, 0, 0, 0, 0]),
            (libc::SYS_timer_getoverrun, [u64::from(t.id), 0, 0, 0, 0, 0]),
        ];
        let r = run(view, inside, Tid(view.pid.0), &calls, "timer_gettime")?;
        let word = |n: u64| view.memory.u64(page.add(n * 8)).unwrap_or(0);
        t.interval_ns = word(0) * 1_000_000_000 + word(1);
        t.value_ns = word(2) * 1_000_000_000 + word(3);
        t.overrun = r.get(1).copied().unwrap_or(0).max(0) as u32;
    }
    Ok(out)
}

fn run(
    view: &View<'_>,
    inside: &mut Inside<'_>,
    tid: Tid,
    calls: &[(i64, [u64; 6])],
    call: &'static str,
) -> Result<Vec<i64>, CollectError> {
    inside.calls(tid, calls).map_err(|e| view.io("the process", call)(std::io::Error::other(e.to_string())))
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
