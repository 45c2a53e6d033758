//! The walk over one run of chunks, from its first header to the top chunk or the closing fenceposts.

use super::{Chunk, ChunkState, HeapError};
use mcr_image::{Addr, Memory, MemoryError};

const PREV_INUSE: u64 = 1;
const IS_MMAPPED: u64 = 2;
const NON_MAIN: u64 = 4;
const MIN_CHUNK: u64 = 0x20;
/// Size of a fencepost (`CHUNK_HDR_SZ`).
pub(super) const FENCE: u64 = 0x10;

/// Where a run of chunks came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// The break.
    Brk,
    /// An anonymous mapping that the main arena took when the break could not grow (or that an earlier
    /// update left).
    Mapped,
    /// A 64 MiB aligned heap of a thread's arena.
    ThreadHeap,
    /// One chunk with a mapping of its own.
    MmappedChunk,
}

/// A run of chunks.
#[derive(Clone, Debug)]
pub struct Segment {
    /// First byte (of the mapping, the heap_info or the break).
    pub start: Addr,
    /// One past the last byte that belongs to it.
    pub end: Addr,
    /// Where it came from.
    pub kind: SegmentKind,
    /// Index of the arena; `Chunk::MMAPPED` for a mapped chunk.
    pub arena: u16,
}

/// A free chunk with its links, as found in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct FreeChunk {
    /// Header address.
    pub header: u64,
    pub size: u64,
    pub fd: u64,
    pub bk: u64,
}

/// What one walk found.
#[derive(Default)]
pub(super) struct Walked {
    pub chunks: Vec<Chunk>,
    pub free: Vec<FreeChunk>,
    /// One past the last byte of the run.
    pub end: u64,
    /// It ended at the arena's top chunk.
    pub top: bool,
}

/// Sequential reader of headers over a bounded range.
struct Headers<'a> {
    mem: &'a dyn Memory,
    limit: u64,
    at: u64,
    buf: Vec<u8>,
}

const WINDOW: u64 = 256 << 10;

impl Headers<'_> {
    /// `prev_size`, `size`, `fd`, `bk` of the chunk at `p`; what lies behind `limit` reads as 0.
    fn at(&mut self, p: u64) -> Result<[u64; 4], MemoryError> {
        let need = 32.min(self.limit - p);
        if p < self.at || p + need > self.at + self.buf.len() as u64 {
            // A small window first after a jump over a big chunk, so that big chunks are not read.
            let jumped = p > self.at + self.buf.len() as u64 + 4096;
            let want = if jumped { 4096 - (p & 4095) + 32 } else { WINDOW };
            let len = want.min(self.limit - p);
            self.buf.resize(len as usize, 0);
            self.at = p;
            self.mem.read(Addr(p), &mut self.buf)?;
        }
        let mut out = [0; 4];
        let from = (p - self.at) as usize;
        if let Some(raw) = self.buf.get(from..from + 32) {
            for (slot, w) in out.iter_mut().zip(raw.chunks_exact(8)) {
                *slot = u64::from_le_bytes(w.try_into().expect("eight bytes"));
            }
            return Ok(out);
        }
        for (i, slot) in out.iter_mut().enumerate() {
            let o = (p - self.at) as usize + 8 * i;
            if (8 * i as u64) + 8 <= need {
                *slot = super::arena::word(&self.buf, o);
            }
        }
        Ok(out)
    }
}

/// One run to walk.
pub(super) struct Run<'a> {
    pub start: u64,
    /// No byte at or behind this belongs to the run.
    pub limit: u64,
    /// The arena's top chunk (0: none).
    pub top: u64,
    pub arena: u16,
    /// For messages.
    pub what: &'a str,
}

/// Walks `run`. Every chunk must agree with its neighbours.
pub(super) fn walk(mem: &dyn Memory, run: &Run<'_>) -> Result<Walked, HeapError> {
    let thread_arena = run.arena != 0;
    let bad =
        |chunk: u64, why: String| HeapError::Chunk { chunk: Addr(chunk), segment: run.what.into(), why };
    let mut headers = Headers { mem, limit: run.limit, at: 0, buf: Vec::new() };
    let mut out = Walked::default();
    let mut prev: Option<(u64, u64, u64, [u64; 2])> = None; // header, size, flags, links
    let mut p = run.start;
    loop {
        if p + 16 > run.limit {
            return Err(bad(p, format!("the chunks run to the end of the segment ({:#x})", run.limit)));
        }
        let [prev_size, size_word, fd, bk] = headers.at(p)?;
        let (size, flags) = (size_word & !7, size_word & 7);
        if let Some((header, psize, pflags, links)) = prev {
            let in_use = flags & PREV_INUSE != 0;
            if !in_use && prev_size != psize {
                return Err(bad(p, format!("previous size {prev_size:#x}, but that chunk has {psize:#x}")));
            }
            if in_use && (pflags & NON_MAIN != 0) != thread_arena {
                return Err(bad(header, format!("arena flag {pflags:#x} does not fit its arena")));
            }
            if !in_use {
                out.free.push(FreeChunk { header, size: psize, fd: links[0], bk: links[1] });
            }
            out.chunks.push(Chunk {
                addr: Addr(header + 16),
                usable: psize - 8,
                state: if in_use { ChunkState::InUse } else { ChunkState::Bin },
                arena: run.arena,
            });
        } else if flags & PREV_INUSE == 0 {
            return Err(bad(p, "the first chunk says that the one before it is free".into()));
        }
        if p == run.top {
            if size < 16 || p + size > run.limit {
                return Err(bad(p, format!("top chunk of {size:#x} bytes does not fit its segment")));
            }
            let usable = size - 16;
            out.chunks.push(Chunk { addr: Addr(p + 16), usable, state: ChunkState::Top, arena: run.arena });
            out.end = p + size;
            out.top = true;
            return Ok(out);
        }
        if flags & IS_MMAPPED != 0 {
            return Err(bad(p, format!("size word {size_word:#x} of a mapped chunk inside a run")));
        }
        if size == FENCE || size == 0 {
            out.end = fence(&mut headers, run, p, size)?.ok_or_else(|| {
                bad(p, format!("size word {size_word:#x} that is neither a chunk nor a pair of fenceposts"))
            })?;
            return Ok(out);
        }
        if size < MIN_CHUNK || size % 16 != 0 || size > run.limit - p {
            return Err(bad(p, format!("impossible size word {size_word:#x}")));
        }
        prev = Some((p, size, flags, [fd, bk]));
        p += size;
    }
}

/// End of a run that is closed by fenceposts at `p`: two of 16 bytes in the main arena, one of 16 and one of
/// 0 (or the latter alone) in a thread's heap.
fn fence(headers: &mut Headers<'_>, run: &Run<'_>, p: u64, size: u64) -> Result<Option<u64>, HeapError> {
    if size == 0 {
        return Ok((run.arena != 0 && p + 16 == run.limit).then_some(p + 16));
    }
    if p + 2 * FENCE > run.limit {
        return Ok(None);
    }
    let next = headers.at(p + FENCE)?[1];
    let ok = next == FENCE | PREV_INUSE || next == PREV_INUSE;
    Ok(ok.then_some(p + 2 * FENCE))
}
