//! What commits leave behind.

use super::area::NAME;
use crate::procfs::maps::MapsLine;
use crate::tracee::{Resume, Stop, agent};
use crate::{Frozen, TraceError};
use mcr_image::{Addr, Memory, Tid};
use std::time::{Duration, Instant};

/// For threads to leave a stub. They need microseconds.
const PATIENCE: Duration = Duration::from_secs(2);
/// Before another thread is looked at.
const TURN: Duration = Duration::from_millis(2);
/// How much of a stack is searched for a return into a stub.
const STACK: usize = 32 * 1024;

/// A mapping of a staging area, or (inode 0) an agent's.
#[derive(Clone, Copy)]
struct Area {
    ino: u64,
    start: Addr,
    end: Addr,
}

impl Area {
    fn holds(self, at: u64) -> bool {
        (self.start.0..self.end.0).contains(&at)
    }
}

fn areas(maps: &[MapsLine]) -> Vec<Area> {
    let ours = |m: &&MapsLine| m.name.strip_prefix(b"/memfd:").is_some_and(|n| n.starts_with(NAME));
    maps.iter().filter(ours).map(|m| Area { ino: m.ino, start: m.start, end: m.end }).collect()
}

/// Drops staging areas that nobody needs any more from a frozen process: that of a finished commit (a thread
/// cannot unmap what it stands on), and that of an engine which was killed while it staged, with its
/// descriptor; and the agents of engines that were killed. An area that a thread may still return to, from a signal handler, is left for the next time.
/// Returns the number of bytes dropped.
pub fn sweep(frozen: &mut Frozen) -> Result<u64, TraceError> {
    let pid = frozen.pid();
    let maps = frozen.memory().maps();
    let maps = maps.map_err(|source| TraceError::Proc { path: format!("/proc/{pid}/maps"), source })?;
    let (mut areas, fds) = (areas(&maps), descriptors(frozen));
    let agents = agent::abandoned(&maps, frozen.memory().as_ref());
    areas.extend(agents.into_iter().map(|(start, end)| Area { ino: 0, start, end }));
    if areas.is_empty() && fds.is_empty() {
        return Ok(0);
    }
    let_out(frozen, &areas)?;
    // The mappings of one staging area go together.
    let same = |a: &Area, b: &Area| if a.ino == 0 { a.start == b.start } else { a.ino == b.ino };
    let needed: Vec<Area> =
        areas.iter().filter(|a| frozen.threads().iter().any(|t| returns_to(t, **a))).copied().collect();
    frozen.share_site()?;
    let mut dropped = 0;
    for a in areas.iter().filter(|a| !needed.iter().any(|n| same(n, a))) {
        let len = a.end.since(a.start);
        frozen.leader().syscall(libc::SYS_munmap, &[a.start.0, len])?;
        dropped += len;
    }
    for fd in fds {
        frozen.leader().syscall(libc::SYS_close, &[fd])?;
    }
    frozen.leader().put_back()?;
    Ok(dropped)
}

/// May the thread get into the area by a return?
fn returns_to(t: &crate::Tracee, area: Area) -> bool {
    let Ok(r) = t.regs() else { return false };
    // Page by page: the stack ends somewhere.
    let mut at = r.rsp & !7;
    let mut stack = Vec::new();
    while stack.len() < STACK {
        let n = 4096 - (at & 4095) as usize;
        match t.memory().bytes(Addr(at), n) {
            Ok(b) => stack.extend_from_slice(&b),
            Err(_) => break,
        }
        at += n as u64;
    }
    let words = stack.chunks_exact(8).filter_map(|w| Some(u64::from_le_bytes(w.try_into().ok()?)));
    [r.rip, r.rsp].into_iter().chain(words).any(|w| area.holds(w))
}

/// Lets threads run on that are still on their way out of an earlier commit's stub, and stops them outside:
/// what they are there is no context to go back to.
pub(super) fn leave(frozen: &mut Frozen, maps: &[MapsLine]) -> Result<(), TraceError> {
    let areas = areas(maps);
    if areas.is_empty() { Ok(()) } else { let_out(frozen, &areas) }
}

fn let_out(frozen: &mut Frozen, areas: &[Area]) -> Result<(), TraceError> {
    let deadline = Instant::now() + PATIENCE;
    let inside = |rip: u64| areas.iter().any(|a| a.holds(rip));
    let mut left: Vec<Tid> = Vec::new();
    for t in frozen.threads_mut() {
        if inside(t.regs()?.rip) {
            left.push(t.tid());
            t.resume(Resume::Syscall, 0)?;
        }
    }
    // They may wait for each other: each gets its turn.
    while let Some(&tid) = left.first() {
        left.rotate_left(1);
        let Some(t) = frozen.thread(tid) else { return Err(TraceError::Gone { tid }) };
        match t.wait(Some(Instant::now() + TURN)) {
            Err(TraceError::Timeout { .. }) if Instant::now() < deadline => {}
            Err(e) => return Err(e),
            Ok(Stop::Signal(sig)) => t.resume(Resume::Syscall, sig)?,
            Ok(stop) if stop.is_end() => return Err(TraceError::Died { tid, how: format!("{stop:?}") }),
            Ok(_) if inside(t.regs()?.rip) => t.resume(Resume::Syscall, 0)?,
            Ok(_) => {
                left.retain(|&other| other != tid);
                t.wait_event_stop(Some(deadline))?;
            }
        }
    }
    Ok(())
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
