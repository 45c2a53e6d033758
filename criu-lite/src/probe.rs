//! What this kernel and these privileges allow, tried rather than guessed where a try is harmless.

use crate::sys;
use serde::Serialize;
use std::os::fd::AsFd;

/// One thing that mcr uses.
#[derive(Clone, Debug, Serialize)]
pub struct Probe {
    /// What.
    pub name: &'static str,
    /// It works here.
    pub ok: bool,
    /// What was found.
    pub detail: String,
    /// What does not work without it.
    pub needed_for: &'static str,
    /// Nothing works without it.
    pub required: bool,
}

/// Capabilities by number (linux/capability.h).
const CAPS: [(&str, u32, &str, bool); 4] = [
    ("CAP_SYS_PTRACE", 19, "freezing processes of other users, reading their memory and descriptors", true),
    ("CAP_SYS_ADMIN", 21, "restoring pids (or CAP_CHECKPOINT_RESTORE)", false),
    ("CAP_NET_ADMIN", 12, "socket options that only root may set", false),
    ("CAP_SYS_RESOURCE", 24, "raising hard limits at a restore", false),
];

/// Tries everything.
#[must_use]
pub fn probes() -> Vec<Probe> {
    let mut out = Vec::new();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
        .unwrap_or(0);
    for (name, bit, needed_for, required) in CAPS {
        let ok = effective >> bit & 1 == 1;
        out.push(Probe {
            name,
            ok,
            detail: if ok { "held" } else { "not held" }.into(),
            needed_for,
            required,
        });
    }
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok();
    let scope = scope.as_deref().map(str::trim);
    out.push(Probe {
        name: "ptrace",
        ok: scope != Some("3"),
        detail: scope
            .map_or_else(|| "not restricted (no Yama)".into(), |s| format!("kernel.yama.ptrace_scope={s}")),
        needed_for: "everything that touches a process",
        required: true,
    });
    let release =
        nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    let version = version(&release);
    for (name, since, needed_for, required) in [
        ("PTRACE_GET_RSEQ_CONFIGURATION", (5, 13), "programs on glibc 2.35 and later", true),
        ("clone3 set_tid", (5, 5), "restoring the same pid and thread ids", true),
        ("PAGEMAP_SCAN", (6, 7), "finding the pages to dump without reading all of them", false),
    ] {
        let ok = version >= since;
        let detail = format!("since Linux {}.{}; this is {release}", since.0, since.1);
        out.push(Probe { name, ok, detail, needed_for, required });
    }
    out.push(pidfd_getfd());
    out.push(kcmp());
    let soft_dirty = std::fs::read_to_string("/proc/self/smaps").is_ok_and(|s| s.contains(" sd"));
    out.push(Probe {
        name: "soft-dirty",
        ok: true,
        detail: if soft_dirty { "there, not used" } else { "not in this kernel; not needed" }.into(),
        needed_for: "nothing: mcr does not use it",
        required: false,
    });
    out
}

fn version(release: &str) -> (u32, u32) {
    let mut it = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (it.next().unwrap_or(0), it.next().unwrap_or(0))
}

fn pidfd_getfd() -> Probe {
    let me = std::process::id() as i32;
    let tried = std::io::pipe().map_err(|e| e.to_string()).and_then(|(r, _w)| {
        use std::os::fd::AsRawFd;
        let pidfd = sys::pidfd_open(me).map_err(|e| format!("pidfd_open: {e}"))?;
        sys::pidfd_getfd(pidfd.as_fd(), r.as_raw_fd()).map_err(|e| format!("pidfd_getfd: {e}"))
    });
    Probe {
        name: "pidfd_getfd",
        ok: tried.is_ok(),
        detail: tried.map_or_else(|e| e, |_| "works".into()),
        needed_for: "keeping connections open",
        required: true,
    }
}

fn kcmp() -> Probe {
    let me = std::process::id() as i32;
    let tried = sys::kcmp_file(me, 0, me, 0).map_err(|e| e.to_string());
    Probe {
        name: "kcmp",
        ok: tried == Ok(std::cmp::Ordering::Equal),
        detail: match tried {
            Ok(_) => "works".into(),
            Err(e) => e,
        },
        needed_for: "seeing which descriptors share one open file",
        required: false,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn versions() {
        assert_eq!(super::version("6.18.44-fc"), (6, 18));
        assert_eq!(super::version("5.4"), (5, 4));
        assert!(super::version("6.7.0") < (6, 18));
    }

    #[test]
    fn this_machine_has_what_the_tests_need() {
        let p = super::probes();
        assert!(p.iter().any(|p| p.name == "pidfd_getfd"));
        assert!(p.iter().all(|p| !p.detail.is_empty()));
    }
}
