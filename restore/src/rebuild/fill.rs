//! Page contents: what the image stores is written through /proc/PID/mem in the image's large runs, on as many
//! threads as there are processors.

use super::RebuildError;
use super::mapped::MappedFiles;
use super::remote::Remote;
use mcr_image::Stored;
use mcr_image::{Addr, Image, MemoryError, proto};
use proto::VmaKind;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Work is dealt in pieces of this size.
const PIECE: u64 = 16 << 20;
const ZEROS: &[u8] = &[0; 1 << 18];

/// What was written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Filled {
    /// Bytes of page content.
    pub bytes: u64,
}

struct Piece {
    start: u64,
    end: u64,
    /// Zero pages have to be written: a file shows through otherwise.
    zeros: bool,
}

pub(super) fn fill(
    leader: &Remote,
    image: &Image,
    process: &proto::Process,
    files: &MappedFiles,
) -> Result<Filled, RebuildError> {
    let mut pieces = Vec::new();
    for v in &process.vmas {
        let zeros = match v.kind() {
            VmaKind::VmaAnonPrivate => false,
            VmaKind::VmaFilePrivate => true,
            VmaKind::VmaAnonShared | VmaKind::VmaFileShared if files.recreated(v) => false,
            _ => continue,
        };
        let mut at = v.start;
        while at < v.end {
            let end = (at + PIECE).min(v.end);
            pieces.push(Piece { start: at, end, zeros });
            at = end;
        }
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let total: u64 = process.vmas.iter().map(|v| v.end - v.start).sum();
    let threads = if total < PIECE { 1 } else { cpus.min(8) };
    let (next, bytes, failed) = (AtomicUsize::new(0), AtomicU64::new(0), Mutex::new(None));
    let memory = image.memory_of(mcr_image::Pid(process.pid as i32)).unwrap_or_else(|| image.memory());
    let leader_mem: &File = leader.memory();
    let work = || {
        while let Some(p) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            match fill_piece(leader_mem, &memory, p) {
                Ok(n) => {
                    bytes.fetch_add(n, Ordering::Relaxed);
                }
                Err(e) => {
                    next.store(pieces.len(), Ordering::Relaxed);
                    if let Ok(mut f) = failed.lock() {
                        f.get_or_insert(e);
                    }
                }
            }
        }
    };
    std::thread::scope(|s| {
        for _ in 1..threads {
            s.spawn(work);
        }
        work();
    });
    match failed.into_inner() {
        Ok(Some(e)) => Err(e),
        _ => Ok(Filled { bytes: bytes.into_inner() }),
    }
}

fn fill_piece(mem: &File, image: &mcr_image::ImageMemory, p: &Piece) -> Result<u64, RebuildError> {
    let mut written = 0;
    let mut failed: Option<(Addr, std::io::Error)> = None;
    let r: Result<(), MemoryError> = image.for_each_stored(Addr(p.start), Addr(p.end), &mut |at, stored| {
        if failed.is_some() {
            return;
        }
        let r = match stored {
            Stored::Data(b) => {
                written += b.len() as u64;
                mem.write_all_at(b, at.0)
            }
            Stored::Zero(len) if p.zeros => zero(mem, at.0, len),
            Stored::Zero(_) => Ok(()),
        };
        failed = r.err().map(|e| (at, e));
    });
    r?;
    match failed {
        None => Ok(written),
        Some((at, source)) => Err(RebuildError::Call {
            object: format!("memory at {at}"),
            call: "writing pages through /proc/PID/mem",
            source,
            next: "",
        }),
    }
}

fn zero(mem: &File, start: u64, len: u64) -> std::io::Result<()> {
    let mut at = start;
    while at < start + len {
        let n = (start + len - at).min(ZEROS.len() as u64);
        mem.write_all_at(&ZEROS[..n as usize], at)?;
        at += n;
    }
    Ok(())
}
