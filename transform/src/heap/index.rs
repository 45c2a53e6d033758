//! Where in the list of chunks to look for an address: a search over a million chunks misses the cache at each
//! step, one over the few of half a kilobyte does not.

use super::{Chunk, Segment};
use mcr_image::Addr;
use std::ops::Range;

/// Bytes of a segment that share an entry.
const STEP: u64 = 512;
/// Up to this many chunks of a segment are searched as they are.
const FEW: usize = 16;

/// For every segment the part of the list that is its own, and entries if that is long.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    parts: Vec<Part>,
    /// How many chunks start at or before each multiple of [`STEP`] bytes into a segment.
    entries: Vec<u32>,
}

#[derive(Clone, Debug)]
struct Part {
    chunks: Range<usize>,
    entries: Range<usize>,
}

impl Index {
    /// Both sorted by address.
    pub fn new(chunks: &[Chunk], segments: &[Segment]) -> Self {
        let mut out = Self::default();
        let apart = segments.windows(2).all(|w| w[0].end <= w[1].start);
        if !apart || u32::try_from(chunks.len()).is_err() {
            return out;
        }
        let mut next = 0;
        for s in segments {
            let first = next + chunks[next..].partition_point(|c| c.addr < s.start);
            next = first + chunks[first..].partition_point(|c| c.addr < s.end);
            let from = out.entries.len();
            // Few chunks over much memory are searched fast enough.
            let dense = s.end.since(s.start) / STEP <= 64 * (next - first) as u64;
            if next - first > FEW && dense {
                let mut n = first;
                let mut at = s.start;
                while at < s.end {
                    while n < next && chunks[n].addr <= at {
                        n += 1;
                    }
                    out.entries.push(n as u32);
                    at = at.add(STEP);
                }
                out.entries.push(next as u32);
            }
            out.parts.push(Part { chunks: first..next, entries: from..out.entries.len() });
        }
        out
    }

    /// The part of the list where the last chunk that starts at or before `addr` is, or right before it;
    /// `None`: anywhere.
    pub fn near(&self, segments: &[Segment], addr: Addr) -> Option<Range<usize>> {
        if self.parts.len() != segments.len() {
            return None;
        }
        let i = segments.partition_point(|s| s.start <= addr).checked_sub(1)?;
        let (s, part) = (&segments[i], &self.parts[i]);
        if addr >= s.end || part.entries.is_empty() {
            return Some(part.chunks.clone());
        }
        let e = part.entries.start + (addr.since(s.start) / STEP) as usize;
        Some(self.entries[e] as usize..self.entries[e + 1] as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ChunkState, SegmentKind};
    use super::*;

    #[test]
    fn the_part_holds_what_a_search_of_everything_finds() {
        let mut chunks = Vec::new();
        let mut segments = Vec::new();
        let mut x = 1u64;
        for s in 0..4u64 {
            let start = 0x10_0000 * (s + 1);
            let mut at = start;
            for _ in 0..(if s == 2 { 1 } else { 300 }) {
                x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let size = 0x20 + 16 * ((x >> 33) % if x >> 60 == 0 { 300 } else { 6 });
                let state = ChunkState::InUse;
                chunks.push(Chunk { addr: Addr(at + 16), usable: size - 8, state, arena: 0 });
                at += size;
            }
            let kind = SegmentKind::Mapped;
            segments.push(Segment { start: Addr(start), end: Addr(at + 24), kind, arena: 0 });
        }
        let index = Index::new(&chunks, &segments);
        for at in (0xf_0000..0x52_0000).step_by(8) {
            let want = chunks.partition_point(|c| c.addr <= Addr(at));
            let near = index.near(&segments, Addr(at)).unwrap_or(0..chunks.len());
            let got = near.start + chunks[near].partition_point(|c| c.addr <= Addr(at));
            let inside = segments.iter().any(|s| s.start.0 <= at && at < s.end.0);
            assert!(got == want || !inside, "{at:#x}: {got} {want}");
        }
    }
}
