//! Which pages a snapshot holds, and where they can be read.
//!
//! A copy-on-write child freezes private memory only. Shared memory goes on changing under it, and mappings
//! that a fork leaves out (MADV_DONTFORK) or wipes (MADV_WIPEONFORK) are not in it: those are read in the pause.

use crate::{modules, sys};
use mcr_image::proto::{Vma, VmaKind};
use mcr_image::{Addr, Pid};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Ranges of whole pages, in the order of the map.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// To be read from the child, or from the process while it stands.
    pub in_child: Vec<(u64, u64)>,
    /// To be read from the process while it stands.
    pub not_in_child: Vec<(u64, u64)>,
}

/// The page is the file's own (PAGEMAP_SCAN, include/uapi/linux/fs.h).
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE: u64 = 4096;

/// What was tried, and why it failed.
type Failure = (String, std::io::Error);

impl Plan {
    /// Looks at every mapping of a frozen process.
    pub(crate) fn new(pid: Pid, vmas: &[Vma]) -> Result<Self, Failure> {
        let path = format!("/proc/{pid}/pagemap");
        let pagemap = File::open(&path).map_err(|e| (format!("open {path}"), e))?;
        let mut plan = Self::default();
        for v in vmas {
            let flag = |f: &str| v.vm_flags.iter().any(|x| x == f);
            let out = if flag("dc") || flag("wf") { &mut plan.not_in_child } else { &mut plan.in_child };
            let scanned = match v.kind() {
                VmaKind::VmaAnonPrivate | VmaKind::VmaVdso => present(&pagemap, v, 0, out),
                // A deleted data file cannot be opened again: all of it.
                VmaKind::VmaFilePrivate if v.deleted && v.module_key.is_empty() => {
                    let file = v.file_size.saturating_sub(v.file_offset).next_multiple_of(PAGE);
                    push(&mut plan.not_in_child, v.start, v.start + file.min(v.end - v.start));
                    Ok(())
                }
                // Pages that were written to. The others come from the file.
                VmaKind::VmaFilePrivate => present(&pagemap, v, PAGE_IS_FILE, out),
                VmaKind::VmaAnonShared => shared(pid, &pagemap, v, &mut plan.not_in_child),
                VmaKind::VmaFileShared if v.memfd || v.deleted => {
                    shared(pid, &pagemap, v, &mut plan.not_in_child)
                }
                VmaKind::VmaFileShared | VmaKind::VmaVvar | VmaKind::VmaVsyscall => Ok(()),
            };
            scanned.map_err(|e| (format!("pages of {:#x}-{:#x}", v.start, v.end), e))?;
        }
        Ok(plan)
    }
}

/// Pages of private memory in `start..end` that the process has written to, or that are not a file's.
pub fn own_pages(pid: Pid, start: Addr, end: Addr) -> std::io::Result<Vec<(Addr, Addr)>> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let range = Vma { start: start.0, end: end.0, ..Vma::default() };
    let mut out = Vec::new();
    present(&pagemap, &range, PAGE_IS_FILE, &mut out)?;
    Ok(out.into_iter().map(|(a, b)| (Addr(a), Addr(b))).collect())
}

/// Pages that two stopped processes share since one was copied from the other: neither has written to them. Nothing
/// where the kernel does not tell (it takes CAP_SYS_ADMIN).
pub fn same_pages(one: Pid, other: Pid, start: Addr, end: Addr) -> std::io::Result<Vec<(Addr, Addr)>> {
    // /proc/PID/pagemap: bit 63 present, 62 swapped, 0 to 54 the page frame.
    const FRAME: u64 = (1 << 55) - 1;
    let open = |pid: Pid| File::open(format!("/proc/{pid}/pagemap"));
    let (one, other) = (open(one)?, open(other)?);
    let mut bufs = [vec![0u8; 8 * 8192], vec![0u8; 8 * 8192]];
    let (mut at, mut out) = (start.0, Vec::new());
    while at < end.0 {
        let n = (((end.0 - at) / PAGE) as usize * 8).min(bufs[0].len());
        one.read_exact_at(&mut bufs[0][..n], at / PAGE * 8)?;
        other.read_exact_at(&mut bufs[1][..n], at / PAGE * 8)?;
        for (a, b) in bufs[0][..n].chunks_exact(8).zip(bufs[1][..n].chunks_exact(8)) {
            let entry = |e: &[u8]| u64::from_le_bytes(e.try_into().expect("eight bytes"));
            let (a, b) = (entry(a), entry(b));
            if a >> 62 == 2 && b >> 62 == 2 && a & FRAME != 0 && a & FRAME == b & FRAME {
                push(&mut out, at, at + PAGE);
            }
            at += PAGE;
        }
    }
    Ok(out.into_iter().map(|(a, b)| (Addr(a), Addr(b))).collect())
}

fn push(out: &mut Vec<(u64, u64)>, start: u64, end: u64) {
    match out.last_mut() {
        _ if start >= end => {}
        Some(last) if last.1 == start => last.1 = end,
        _ => out.push((start, end)),
    }
}

/// Pages of a mapping that are in memory or swapped out.
fn present(pagemap: &File, v: &Vma, not: u64, out: &mut Vec<(u64, u64)>) -> std::io::Result<()> {
    match sys::pagemap_scan(pagemap, v.start, v.end, not, out) {
        // Before Linux 6.7.
        Err(Errno::ENOTTY | Errno::EINVAL) => entries(pagemap, v, not, out),
        r => r.map_err(Into::into),
    }
}

/// The same from the entries of /proc/PID/pagemap: bit 63 present, 62 swapped, 61 a page of a file.
fn entries(pagemap: &File, v: &Vma, not: u64, out: &mut Vec<(u64, u64)>) -> std::io::Result<()> {
    let mut buf = vec![0u8; 8 * 8192];
    let mut at = v.start;
    while at < v.end {
        let n = (((v.end - at) / PAGE) as usize * 8).min(buf.len());
        pagemap.read_exact_at(&mut buf[..n], at / PAGE * 8)?;
        for e in buf[..n].chunks_exact(8) {
            // The top byte of a little-endian word.
            let top = e[7];
            if top & 0xc0 != 0 && !(not == PAGE_IS_FILE && top & 0x20 != 0) {
                push(out, at, at + PAGE);
            }
            at += PAGE;
        }
    }
    Ok(())
}

/// Pages of shared memory that hold data, whoever wrote them: not those that this process happens to have
/// mapped, and without touching the holes (reading one would allocate it).
fn shared(pid: Pid, pagemap: &File, v: &Vma, out: &mut Vec<(u64, u64)>) -> std::io::Result<()> {
    let link = modules::path_of(pid, v);
    let Ok(file) = File::open(&link) else {
        // Without the right to open map_files: at least what is mapped.
        return present(pagemap, v, 0, out);
    };
    let (first, last) = (v.file_offset, v.file_offset + (v.end - v.start));
    let mut at = first;
    while at < last {
        let data = match lseek(&file, at as i64, Whence::SeekData) {
            Ok(n) => (n as u64 & !(PAGE - 1)).max(at),
            // Nothing behind.
            Err(Errno::ENXIO) => return Ok(()),
            Err(_) => return present(pagemap, v, 0, out),
        };
        if data >= last {
            return Ok(());
        }
        let hole = lseek(&file, data as i64, Whence::SeekHole).map_err(std::io::Error::from)? as u64;
        let hole = hole.next_multiple_of(PAGE).clamp(data + PAGE, last);
        push(out, v.start + (data - first), v.start + (hole - first));
        at = hole;
    }
    Ok(())
}
