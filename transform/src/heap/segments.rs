//! Where the runs of chunks are: the break, thread heaps, mappings that the main arena took, and chunks with
//! a mapping of their own.

use super::walk::{Run, Walked, walk};
use super::{Arena, Chunk, ChunkState, HeapError, Segment, SegmentKind};
use mcr_image::{Addr, Memory, proto};

const PAGE: u64 = 4096;
const PROT_RW: u32 = 3;

/// Everything that the walks found.
#[derive(Default)]
pub(super) struct Found {
    pub segments: Vec<Segment>,
    pub chunks: Vec<Chunk>,
    /// Free chunks with their links, per arena.
    pub free: Vec<Vec<super::walk::FreeChunk>>,
}

impl Found {
    fn add(&mut self, segment: Segment, walked: Walked) {
        let arena = segment.arena as usize;
        self.segments.push(segment);
        self.chunks.extend(walked.chunks);
        if self.free.len() <= arena {
            self.free.resize_with(arena + 1, Vec::new);
        }
        self.free[arena].extend(walked.free);
    }
    fn covers(&self, at: u64) -> Option<u64> {
        self.segments.iter().find(|s| s.start.0 <= at && at < s.end.0).map(|s| s.end.0)
    }
}

pub(super) fn find(
    mem: &dyn Memory,
    arenas: &[Arena],
    threads: &[proto::Thread],
    vmas: &[proto::Vma],
) -> Result<Found, HeapError> {
    let mut found = Found::default();
    let Some(main) = arenas.first() else {
        return Ok(found);
    };
    for (i, arena) in arenas.iter().enumerate().skip(1) {
        thread_heaps(mem, arena, i as u16, &mut found)?;
    }
    brk(mem, main, vmas, &mut found)?;
    for range in anonymous(vmas, threads) {
        mapped(mem, main, range, &mut found)?;
    }
    if main.is_used() && found.covers(main.top.0).is_none() {
        return Err(HeapError::Arena {
            arena: main.addr,
            why: format!("its top chunk {} is in no run of chunks that could be found", main.top),
        });
    }
    Ok(found)
}

/// The heaps of a thread's arena, from the one that holds `top` back to the first.
fn thread_heaps(mem: &dyn Memory, arena: &Arena, index: u16, found: &mut Found) -> Result<(), HeapError> {
    let bad = |why: String| HeapError::Arena { arena: arena.addr, why };
    let first = Arena::heap_of(arena.addr);
    let header = arena.addr.since(first);
    if header != 0x20 && header != 0x30 {
        return Err(bad(format!("lies {header:#x} bytes into its heap, 0x20 or 0x30 were expected")));
    }
    let mut heap = Arena::heap_of(arena.top);
    for _ in 0..65536 {
        let raw = mem.bytes(heap, 32)?;
        let w = |o| super::arena::word(&raw, o);
        let (owner, prev, size, mprotected) = (w(0), w(8), w(16), w(24));
        if owner != arena.addr.0 || size > super::arena::HEAP_ALIGN || size > mprotected || size % 16 != 0 {
            return Err(bad(format!("heap at {heap}: owner {owner:#x}, size {size:#x} of {mprotected:#x}")));
        }
        let start = if heap == first {
            (arena.addr.0 + super::ARENA_SIZE).next_multiple_of(16)
        } else {
            heap.0 + header
        };
        let run = Run {
            start,
            limit: heap.0 + size,
            top: arena.top.0,
            arena: index,
            what: &format!("the thread heap at {heap}"),
        };
        let walked = walk(mem, &run)?;
        let end = Addr(heap.0 + size);
        found.add(Segment { start: heap, end, kind: SegmentKind::ThreadHeap, arena: index }, walked);
        if prev == 0 {
            if heap != first {
                return Err(bad(format!("its chain of heaps ends at {heap}, not at the first one {first}")));
            }
            return Ok(());
        }
        heap = Addr(prev);
    }
    Err(bad("its chain of heaps does not end".into()))
}

/// The break: normally one run up to `top`; more of them where the program itself called sbrk.
fn brk(mem: &dyn Memory, main: &Arena, vmas: &[proto::Vma], found: &mut Found) -> Result<(), HeapError> {
    let mut parts = vmas.iter().filter(|v| v.name == "[heap]");
    let Some(first) = parts.next() else {
        return Ok(());
    };
    let (start, mut end) = (first.start, first.end);
    for v in parts {
        if v.start == end {
            end = v.end;
        }
    }
    let top_inside = start <= main.top.0 && main.top.0 < end;
    let mut at = start;
    let mut first_error = None;
    while at + 32 <= end {
        let run = Run { start: at, limit: end, top: main.top.0, arena: 0, what: "[heap]" };
        match walk(mem, &run) {
            Ok(walked) => {
                let (stop, top) = (walked.end, walked.top);
                let segment = Segment { start: Addr(at), end: Addr(stop), kind: SegmentKind::Brk, arena: 0 };
                found.add(segment, walked);
                if top || !top_inside {
                    return Ok(());
                }
                at = stop.next_multiple_of(16);
            }
            Err(e) => {
                // Memory that the program took by sbrk lies between two runs: the next one starts where a
                // chain holds up to the top.
                first_error.get_or_insert(e);
                at += 16;
                if found.segments.iter().all(|s| s.kind != SegmentKind::Brk) && at > start + 16 * PAGE {
                    break;
                }
            }
        }
    }
    match first_error {
        Some(e) if top_inside || !main.noncontiguous => Err(e),
        _ => Ok(()),
    }
}

/// Anonymous private writable mappings that may hold chunks: not the break, not a stack in use.
fn anonymous(vmas: &[proto::Vma], threads: &[proto::Thread]) -> Vec<(u64, u64)> {
    const RSP: usize = 19; // struct user_regs_struct
    let mut out: Vec<(u64, u64)> = Vec::new();
    for v in vmas {
        let fits = v.kind() == proto::VmaKind::VmaAnonPrivate
            && v.prot & PROT_RW == PROT_RW
            && (v.name.is_empty() || v.name.starts_with("[anon:"));
        let is_stack = threads.iter().any(|t| {
            let inside = |a: u64| v.start <= a && a < v.end;
            t.regs.get(RSP).is_some_and(|&sp| inside(sp))
        });
        if !fits || is_stack {
            continue;
        }
        match out.last_mut() {
            Some(last) if last.1 == v.start => last.1 = v.end,
            _ => out.push((v.start, v.end)),
        }
    }
    out
}

/// Chunks in one anonymous mapping. Neighbouring mappings merge in the kernel's books, so every page that is
/// not explained yet may be the start of something.
fn mapped(
    mem: &dyn Memory,
    main: &Arena,
    (start, end): (u64, u64),
    found: &mut Found,
) -> Result<(), HeapError> {
    let mut at = start;
    while at + 32 <= end {
        if let Some(stop) = found.covers(at) {
            at = stop.next_multiple_of(PAGE);
            continue;
        }
        let head = mem.bytes(Addr(at), 16)?;
        let (prev_size, size_word) = (super::arena::word(&head, 0), super::arena::word(&head, 8));
        if let Some((header, stop)) = own_mapping(mem, at, end, prev_size, size_word)? {
            let chunk = Chunk {
                addr: Addr(header + 16),
                usable: stop - header - 16,
                state: ChunkState::InUse,
                arena: Chunk::MMAPPED,
            };
            let kind = SegmentKind::MmappedChunk;
            found.segments.push(Segment { start: Addr(at), end: Addr(stop), kind, arena: Chunk::MMAPPED });
            found.chunks.push(chunk);
            at = stop;
            continue;
        }
        // A fresh mapping may hold nothing but the top chunk: then that fills it to its end.
        let plausible =
            main.noncontiguous && size_word & 7 == 1 && size_word >= 0x20 && size_word - 1 <= end - at;
        if plausible {
            let run = Run { start: at, limit: end, top: main.top.0, arena: 0, what: "an anonymous mapping" };
            // A chain that breaks is simply not one: the mapping belongs to the program.
            match walk(mem, &run) {
                Ok(walked) => {
                    let stop = walked.end;
                    let kind = SegmentKind::Mapped;
                    found.add(Segment { start: Addr(at), end: Addr(stop), kind, arena: 0 }, walked);
                    at = stop.next_multiple_of(PAGE);
                    continue;
                }
                Err(HeapError::Memory(e)) => return Err(e.into()),
                Err(e) if (at..end).contains(&main.top.0) => return Err(e),
                Err(_) => {}
            }
        }
        at += PAGE;
    }
    Ok(())
}

/// Header and end of a chunk with a mapping of its own that starts at `at`. Where aligned_alloc(3) moved the
/// chunk further in, the first header is still there, and the real one has the gap in `prev_size`.
fn own_mapping(
    mem: &dyn Memory,
    at: u64,
    end: u64,
    prev_size: u64,
    size_word: u64,
) -> Result<Option<(u64, u64)>, HeapError> {
    let total = size_word & !7;
    let fits = size_word & 7 == 2 && total.is_multiple_of(PAGE) && total >= PAGE;
    if prev_size != 0 || !fits {
        return Ok(None);
    }
    // realloc(3) may have changed the mapping since: then only the real header knows its size.
    for shift in 5..=30 {
        let header = (at + 16).next_multiple_of(1 << shift) - 16;
        if header == at {
            continue;
        }
        if header + 32 > end {
            break;
        }
        let raw = mem.bytes(Addr(header), 16)?;
        let gap = header - at;
        let (before, size) = (super::arena::word(&raw, 0), super::arena::word(&raw, 8));
        let stop = header + (size & !7);
        if before == gap && size & 7 == 2 && size > 32 && stop.is_multiple_of(PAGE) && stop <= end {
            return Ok(Some((header, stop)));
        }
    }
    Ok((total <= end - at).then_some((at, at + total)))
}
