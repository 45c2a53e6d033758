//! Which chunk holds an address: a search over a million chunks misses the cache at each step, a count of bits
//! misses it once.

use super::{Chunk, Segment};
use std::ops::Range;

/// Bytes that share an entry, as a power of two: 32 places where a chunk may start.
const STEP_BITS: u64 = 9;
/// Chunks start at multiples of this, as a power of two.
const PLACE_BITS: u64 = 4;
/// Up to this many chunks of a segment are searched as they are.
const FEW: usize = 16;

/// The places of one step.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// How many chunks of the whole list start before it.
    before: u32,
    /// Where in it chunks start.
    starts: u32,
    /// Where in it chunks in use start.
    used: u32,
}

/// For every segment the part of the list that is its own, and entries if that is long.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    parts: Vec<Part>,
    entries: Vec<Entry>,
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
            let own = &chunks[first..next];
            let steps = (s.end.0.saturating_sub(1) >> STEP_BITS) - (s.start.0 >> STEP_BITS) + 1;
            // Few chunks over much memory are searched fast enough.
            let dense = own.len() > FEW && steps <= 64 * own.len() as u64;
            if dense && own.iter().all(|c| c.addr.0 & ((1 << PLACE_BITS) - 1) == 0) {
                out.entries.resize(from + steps as usize, Entry::default());
                let entries = &mut out.entries[from..];
                for c in own {
                    let step = (c.addr.0 >> STEP_BITS) - (s.start.0 >> STEP_BITS);
                    let e = &mut entries[step as usize];
                    e.starts |= 1 << place(c.addr.0);
                    e.used |= u32::from(c.state.in_use() && c.usable > 0) << place(c.addr.0);
                }
                let mut before = first as u32;
                for e in entries {
                    e.before = before;
                    before += e.starts.count_ones();
                }
            }
            out.parts.push(Part { chunks: first..next, entries: from..out.entries.len() });
        }
        out
    }

    /// How many chunks of the whole list start at or before `addr`, which is inside a segment; more where it is not.
    pub fn up_to(&self, chunks: &[Chunk], segments: &[Segment], addr: u64) -> usize {
        let search = |r: Range<usize>| r.start + chunks[r].partition_point(|c| c.addr.0 <= addr);
        if self.parts.len() != segments.len() {
            return search(0..chunks.len());
        }
        let Some(i) = segments.partition_point(|s| s.start.0 <= addr).checked_sub(1) else { return 0 };
        let (s, part) = (&segments[i], &self.parts[i]);
        if addr >= s.end.0 || part.entries.is_empty() {
            return search(part.chunks.clone());
        }
        let e = self.entry(s, part, addr);
        let so_far = e.starts & (u32::MAX >> (31 - place(addr)));
        e.before as usize + so_far.count_ones() as usize
    }
}

impl Index {
    fn entry(&self, s: &Segment, part: &Part, addr: u64) -> Entry {
        let step = (addr >> STEP_BITS) - (s.start.0 >> STEP_BITS);
        self.entries[part.entries.start + step as usize]
    }

    /// The chunk in use that starts at `addr`, where that can be told without looking at the list. `None` says nothing.
    pub fn used_at(&self, segments: &[Segment], addr: u64) -> Option<usize> {
        if addr & ((1 << PLACE_BITS) - 1) != 0 || self.parts.len() != segments.len() {
            return None;
        }
        let i = segments.partition_point(|s| s.start.0 <= addr).checked_sub(1)?;
        let (s, part) = (&segments[i], &self.parts[i]);
        if addr >= s.end.0 || part.entries.is_empty() {
            return None;
        }
        let e = self.entry(s, part, addr);
        let bit = 1u32 << place(addr);
        (e.used & bit != 0).then(|| e.before as usize + (e.starts & (bit - 1)).count_ones() as usize)
    }
}

/// Which place of its step an address is in.
fn place(addr: u64) -> u64 {
    (addr >> PLACE_BITS) & 31
}

#[cfg(test)]
mod tests {
    use super::super::{ChunkState, SegmentKind};
    use super::*;
    use mcr_image::Addr;

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
                let state = if x >> 62 == 0 { ChunkState::Bin } else { ChunkState::InUse };
                chunks.push(Chunk { addr: Addr(at + 16), usable: size - 8, state, arena: 0 });
                at += size;
            }
            let kind = SegmentKind::Mapped;
            segments.push(Segment { start: Addr(start), end: Addr(at + 24), kind, arena: 0 });
        }
        let index = Index::new(&chunks, &segments);
        for at in (0xf_0000..0x52_0000).step_by(8) {
            let want = chunks.partition_point(|c| c.addr <= Addr(at));
            let got = index.up_to(&chunks, &segments, at);
            let inside = segments.iter().any(|s| s.start.0 <= at && at < s.end.0);
            assert!(got == want || !inside, "{at:#x}: {got} {want}");
            let last = want.checked_sub(1).map(|i| (i, chunks[i]));
            let used = last.filter(|(_, c)| c.addr.0 == at && c.state.in_use()).map(|l| l.0);
            match index.used_at(&segments, at) {
                Some(i) => assert_eq!(Some(i), used, "{at:#x}"),
                // One segment has too few chunks to be worth it.
                None => assert!(
                    used.is_none() || segments[2].start.0 <= at && at < segments[3].start.0,
                    "{at:#x}"
                ),
            }
        }
    }
}
