//! What commits leave behind.

use super::area::NAME;
use crate::{Frozen, TraceError};
use mcr_image::Addr;

/// Drops staging areas that nobody needs any more from a frozen process: that of a finished commit (a thread
/// cannot unmap what it stands on), and that of an engine which was killed while it staged, with its
/// descriptor. An area in which a thread still runs is left. Returns the number of bytes dropped.
pub fn sweep(frozen: &mut Frozen) -> Result<u64, TraceError> {
    let pid = frozen.pid();
    let proc_error = |path: &str| {
        let path = format!("/proc/{pid}/{path}");
        move |source| TraceError::Proc { path, source }
    };
    let mut areas: Vec<(u64, Addr, Addr)> = Vec::new();
    for m in frozen.memory().maps().map_err(proc_error("maps"))? {
        if m.name.strip_prefix(b"/memfd:").is_some_and(|n| n.starts_with(NAME)) {
            areas.push((m.ino, m.start, m.end));
        }
    }
    if areas.is_empty() && !may_hold_descriptor(frozen) {
        return Ok(0);
    }
    let mut busy = Vec::new();
    for t in frozen.threads() {
        let r = t.regs()?;
        let inside =
            |&&(_, a, b): &&(u64, Addr, Addr)| (a.0..b.0).contains(&r.rip) || (a.0..b.0).contains(&r.rsp);
        busy.extend(areas.iter().find(inside).map(|a| a.0));
    }
    frozen.share_site()?;
    let mut dropped = 0;
    for (ino, start, end) in areas {
        if !busy.contains(&ino) {
            frozen.leader().syscall(libc::SYS_munmap, &[start.0, end.since(start)])?;
            dropped += end.since(start);
        }
    }
    for fd in descriptors(frozen) {
        frozen.leader().syscall(libc::SYS_close, &[fd])?;
    }
    frozen.leader().put_back()?;
    Ok(dropped)
}

fn may_hold_descriptor(frozen: &Frozen) -> bool {
    !descriptors(frozen).is_empty()
}

/// Descriptors of areas. An engine closes its own before it lets the process go.
fn descriptors(frozen: &Frozen) -> Vec<u64> {
    let Ok(dir) = std::fs::read_dir(format!("/proc/{}/fd", frozen.pid())) else { return Vec::new() };
    let ours = |path: &std::path::Path| {
        use std::os::unix::ffi::OsStrExt;
        let name = std::fs::read_link(path).unwrap_or_default();
        name.as_os_str().as_bytes().strip_prefix(b"/memfd:").is_some_and(|n| n.starts_with(NAME))
    };
    dir.flatten().filter(|e| ours(&e.path())).filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}
