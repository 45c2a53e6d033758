//! The descriptor table as the process itself sees it: a few batches of calls, where /proc takes a file for each
//! of ten thousand connections.

use super::{CollectError, DATA, Inside, View};
use mcr_image::Tid;
use std::os::unix::net::UnixDatagram;

/// An open descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub number: u32,
    /// It is closed by an execve(2).
    pub cloexec: bool,
    /// The inode number of a socket, where that was asked for: no two have the same one at once.
    pub socket: Option<u64>,
}

/// A larger table is not asked entry by entry.
const MOST: u64 = 1 << 17;
/// struct stat (arch/x86/include/uapi/asm/stat.h): st_dev at 0, st_ino at 8, st_mode at 24.
const STAT_LEN: usize = 144;

/// All open descriptors, ascending; of those that `ask` is true for also which socket it is. `None`: it would take
/// longer than to read /proc.
pub(super) fn read(
    view: &View<'_>,
    inside: &mut Inside<'_>,
    ask: &dyn Fn(u32) -> bool,
) -> Result<Option<Vec<Entry>>, CollectError> {
    let path = view.proc("status");
    let name = path.display().to_string();
    let status = std::fs::read(&path).map_err(view.io(&name, "read"))?;
    let status = String::from_utf8_lossy(&status);
    // The size of the table: no number is above it.
    let size = status.lines().find_map(|l| l.strip_prefix("FDSize:")?.trim().parse::<u64>().ok());
    let Some(size) = size.filter(|s| *s <= MOST) else { return Ok(None) };
    let Some(device) = sockets() else { return Ok(None) };
    let trace = |source| CollectError::Trace { pid: view.pid, source };
    let tid = Tid(view.pid.0);
    if !inside.in_batches(tid).map_err(trace)? {
        return Ok(None);
    }
    let flags: Vec<_> = (0..size).map(|n| (libc::SYS_fcntl, [n, libc::F_GETFD as u64, 0, 0, 0, 0])).collect();
    let flags = inside.calls(tid, &flags).map_err(trace)?;
    let mut out: Vec<Entry> = flags
        .into_iter()
        .zip(0..)
        .filter(|(r, _)| *r >= 0)
        .map(|(r, number)| Entry { number, cloexec: r & i64::from(libc::FD_CLOEXEC) != 0, socket: None })
        .collect();
    let asked: Vec<usize> = (0..out.len()).filter(|i| ask(out[*i].number)).collect();
    let page = inside.page();
    for part in asked.chunks(DATA / STAT_LEN) {
        let place = |i: usize| page.0 + (i * STAT_LEN) as u64;
        let calls: Vec<_> = part
            .iter()
            .enumerate()
            .map(|(i, e)| (libc::SYS_fstat, [u64::from(out[*e].number), place(i), 0, 0, 0, 0]))
            .collect();
        let results = inside.calls(tid, &calls).map_err(trace)?;
        let stats = view
            .memory
            .bytes(page, part.len() * STAT_LEN)
            .map_err(|e| view.io("memory", "read")(std::io::Error::other(e)))?;
        for ((e, r), stat) in part.iter().zip(results).zip(stats.chunks_exact(STAT_LEN)) {
            let word = |at: usize| u64::from_le_bytes(stat[at..at + 8].try_into().expect("eight bytes"));
            let socket = word(24) as u32 & libc::S_IFMT == libc::S_IFSOCK && word(0) == device;
            out[*e].socket = (r == 0 && socket).then(|| word(8));
        }
    }
    Ok(Some(out))
}

/// The device number of the file system of all sockets (a path that leads to a socket's file is on another one).
fn sockets() -> Option<u64> {
    let one = UnixDatagram::unbound().ok()?;
    Some(nix::sys::stat::fstat(one).ok()?.st_dev)
}
