//! State of a whole process that images do not hold yet: refused by name, before anything is written.

use super::CollectError;
use mcr_image::Pid;

/// Refuses what would be lost.
pub(super) fn check(pid: Pid) -> Result<(), CollectError> {
    let no = |object: String, why: &str, next: &str| {
        Err(CollectError::Unsupported { pid, object, why: why.into(), next: next.into() })
    };
    let status = std::fs::read(format!("/proc/{pid}/status")).unwrap_or_default();
    let status = String::from_utf8_lossy(&status).into_owned();
    let get =
        |key: &str| status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':')).map_or("", str::trim);
    if !matches!(get("Seccomp"), "" | "0") {
        return no(
            "its seccomp filter".into(),
            "filters are not carried yet",
            "start the server without seccomp",
        );
    }
    if get("NSpid").split_whitespace().count() > 1 {
        return no(
            "its pid namespace".into(),
            "it lives in another pid namespace than mcr",
            "run mcr inside its container",
        );
    }
    for child in children(pid) {
        let (state, exit_signal) = state_of(child);
        // What a killed dump left behind: a dead child with exit signal 0 that nobody waits for.
        if state == 'Z' && exit_signal == 0 {
            continue;
        }
        // Our own copy of the process, that an update was rehearsed on.
        if exit_signal == 0 && is_ours(child) {
            continue;
        }
        let what = format!("its child process {child}");
        return if state == 'Z' {
            no(what, "it has ended and was not waited for", "try again when the server has collected it")
        } else {
            no(
                what,
                "process trees are not carried yet",
                "wait until it has ended, or dump it without children",
            )
        };
    }
    Ok(())
}

fn children(pid: Pid) -> Vec<Pid> {
    let tids = crate::tids(pid).unwrap_or_default();
    tids.iter()
        .filter_map(|t| std::fs::read_to_string(format!("/proc/{pid}/task/{t}/children")).ok())
        .flat_map(|s| s.split_whitespace().filter_map(|w| w.parse().ok().map(Pid)).collect::<Vec<_>>())
        .collect()
}

/// Whether a thread of this program traces it.
fn is_ours(pid: Pid) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let tracer = status.lines().find_map(|l| l.strip_prefix("TracerPid:")).map_or("0", str::trim);
    tracer != "0" && std::path::Path::new("/proc/self/task").join(tracer).exists()
}

/// State and exit signal (field 38) of /proc/PID/stat.
fn state_of(pid: Pid) -> (char, i64) {
    let b = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    let s = String::from_utf8_lossy(&b);
    let f: Vec<&str> = s.rsplit_once(") ").map_or("", |(_, r)| r).split_whitespace().collect();
    let state = f.first().and_then(|w| w.chars().next()).unwrap_or('Z');
    (state, f.get(38 - 3).and_then(|w| w.parse().ok()).unwrap_or(0))
}
