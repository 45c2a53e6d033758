//! The conservative scan: words of memory that lie in a range of addresses.

use crate::space::page_down;
use mcr_image::{Addr, Memory};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

const BLOCK: u64 = 4 << 20;
/// How much of a memory that is at hand is looked at in one piece.
const PIECE: u64 = 64 << 10;
/// So much is scanned by one thread.
const FEW: u64 = 8 << 20;

/// Which values are wanted.
pub(crate) struct Wanted<'a> {
    /// Aligned words in one of these ranges (at most a handful) are looked at closer.
    pub ranges: Vec<Range<u64>>,
    /// Of those, these are hits.
    pub aligned: &'a (dyn Fn(u64) -> bool + Sync),
    /// Words at any byte offset in this range are looked for, too, and reported apart. Empty: none.
    pub hidden: Range<u64>,
    /// Of those, these are hits.
    pub unaligned: &'a (dyn Fn(u64) -> bool + Sync),
}

/// (place, value), ascending by place.
#[derive(Debug, Default)]
pub(crate) struct Hits {
    pub aligned: Vec<(u64, u64)>,
    pub unaligned: Vec<(u64, u64)>,
    /// Bytes looked at.
    pub bytes: u64,
}

/// Scans `places` on all cores. Pages that cannot be read are skipped: nothing that is not there can hold a
/// pointer (a shared file mapping behind the end of its file).
pub(crate) fn scan(mem: &dyn Memory, places: &[Range<u64>], wanted: &Wanted<'_>) -> Hits {
    let mut blocks = Vec::new();
    for r in places {
        let mut at = r.start;
        while at < r.end {
            let end = (page_down(at) + BLOCK).min(r.end);
            blocks.push(at..end);
            at = end;
        }
    }
    let (next, bytes, out) = (AtomicUsize::new(0), AtomicU64::new(0), Mutex::new(Hits::default()));
    let work = || {
        let mut mine = Hits::default();
        let mut buf = Vec::new();
        while let Some(b) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) {
            bytes.fetch_add(b.end - b.start, Ordering::Relaxed);
            let b = &in_place(mem, b, wanted, &mut mine);
            if b.is_empty() {
                continue;
            }
            // Seven bytes more, so that an unaligned word over the border is seen.
            let more = if wanted.hidden.is_empty() { 0 } else { 7 };
            buf.resize((b.end - b.start + more) as usize, 0);
            let whole = (mem.read(Addr(b.start), &mut buf).is_ok()).then_some(buf.len()).or_else(|| {
                let n = (b.end - b.start) as usize;
                mem.read(Addr(b.start), &mut buf[..n]).is_ok().then_some(n)
            });
            match whole {
                Some(n) => words(b.start, &buf[..n], b.end, wanted, &mut mine),
                None => pages(mem, b, wanted, &mut mine),
            }
        }
        let mut all = out.lock().expect("no panic while held");
        all.aligned.append(&mut mine.aligned);
        all.unaligned.append(&mut mine.unaligned);
    };
    // This thread is one of the workers. A little is not worth another one, which may have to wait for its turn.
    let all: u64 = blocks.iter().map(|b| b.end - b.start).sum();
    let helpers = if all < FEW { 0 } else { cores().min(blocks.len()) - 1 };
    std::thread::scope(|s| {
        for _ in 0..helpers {
            s.spawn(work);
        }
        work();
    });
    let mut out = out.into_inner().expect("no panic while held");
    out.bytes = bytes.into_inner();
    out.aligned.sort_unstable();
    out.unaligned.sort_unstable();
    out
}

/// How many threads may run at once. Asking takes a dozen system calls.
fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Looks at what is at hand without a copy, from the start of the block on. Returns the rest.
fn in_place(mem: &dyn Memory, block: &Range<u64>, wanted: &Wanted<'_>, out: &mut Hits) -> Range<u64> {
    let mut at = block.start;
    while at < block.end {
        let end = ((at / PIECE + 1) * PIECE).min(block.end);
        let Some(raw) = mem.slice(Addr(at), (end - at) as usize) else { break };
        words(at, raw, end, wanted, out);
        // Unaligned words over the border.
        if !wanted.hidden.is_empty() && raw.len() >= 7 {
            let mut border = raw[raw.len() - 7..].to_vec();
            border.resize(14, 0);
            if mem.read(Addr(end), &mut border[7..]).is_ok() {
                hidden(end - 7, &border, wanted, out);
            }
        }
        at = end;
    }
    at..block.end
}

fn pages(mem: &dyn Memory, block: &Range<u64>, wanted: &Wanted<'_>, out: &mut Hits) {
    let mut at = block.start;
    while at < block.end {
        let end = (page_down(at) + 4096).min(block.end);
        if let Ok(b) = mem.bytes(Addr(at), (end - at) as usize) {
            words(at, &b, end, wanted, out);
        }
        at = end;
    }
}

/// Looks at `bytes`, which are at `start`; aligned words up to `end`.
fn words(start: u64, bytes: &[u8], end: u64, wanted: &Wanted<'_>, out: &mut Hits) {
    let skip = (start.next_multiple_of(8) - start) as usize;
    let len = ((end - start) as usize).min(bytes.len());
    if skip < len {
        // One range test per word for the groups that hold nothing, which is nearly all of them.
        const GROUP: usize = 256;
        for (g, group) in bytes[skip..len].chunks(GROUP).enumerate() {
            let mut any = false;
            for w in group.chunks_exact(8) {
                let v = u64::from_le_bytes(w.try_into().expect("eight bytes"));
                for r in &wanted.ranges {
                    any |= v.wrapping_sub(r.start) < r.end - r.start;
                }
            }
            if !any {
                continue;
            }
            for (i, w) in group.chunks_exact(8).enumerate() {
                let v = u64::from_le_bytes(w.try_into().expect("eight bytes"));
                if wanted.ranges.iter().any(|r| r.contains(&v)) && (wanted.aligned)(v) {
                    out.aligned.push((start + (skip + g * GROUP + i * 8) as u64, v));
                }
            }
        }
    }
    hidden(start, bytes, wanted, out);
}

/// Looks at unaligned words.
fn hidden(start: u64, bytes: &[u8], wanted: &Wanted<'_>, out: &mut Hits) {
    let range = &wanted.hidden;
    if range.is_empty() || bytes.len() < 8 {
        return;
    }
    let mut look = |from: usize, to: usize| {
        for i in from..to {
            let v = u64::from_le_bytes(bytes[i..i + 8].try_into().expect("eight bytes"));
            if v.wrapping_sub(range.start) < range.end - range.start
                && !(start + i as u64).is_multiple_of(8)
                && (wanted.unaligned)(v)
            {
                out.unaligned.push((start + i as u64, v));
            }
        }
    };
    let places = bytes.len() - 7;
    let upper = [(range.start >> 32) as u32, ((range.end - 1) >> 32) as u32];
    if upper[1] - upper[0] > 1 || range.end - range.start > 1 << 32 {
        return look(0, places);
    }
    // Their upper halves are one of two words: a group of places without those is passed over at once.
    const GROUP: usize = 256;
    let mut at = 0;
    while at + GROUP <= places {
        let halves = &bytes[at + 4..at + 4 + GROUP + 3];
        let mut any = false;
        for k in 0..4 {
            for w in halves[k..k + GROUP].chunks_exact(4) {
                let w = u32::from_le_bytes(w.try_into().expect("four bytes"));
                any |= w == upper[0] || w == upper[1];
            }
        }
        if any {
            look(at, at + GROUP);
        }
        at += GROUP;
    }
    look(at, places);
}

#[cfg(test)]
mod tests {
    use super::*;
    use mcr_image::{MemoryError, Region};

    struct Flat(u64, Vec<u8>);
    impl Memory for Flat {
        fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
            let at = addr.0.wrapping_sub(self.0) as usize;
            let bad = MemoryError::Unmapped { addr, len: buf.len() };
            let end = at.checked_add(buf.len()).filter(|&e| e <= self.1.len()).ok_or(bad)?;
            buf.copy_from_slice(&self.1[at..end]);
            Ok(())
        }
        fn regions(&self) -> Vec<Region> {
            let (start, end) = (Addr(self.0), Addr(self.0 + self.1.len() as u64));
            vec![Region { start, end, prot: 3, name: String::new() }]
        }
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init)]
    fn aligned_and_unaligned_words_are_told_apart() {
        let mut m = Flat(0x10000, vec![0; 9 << 20]);
        let put = |m: &mut Flat, at: usize, v: u64| m.1[at..at + 8].copy_from_slice(&v.to_le_bytes());
        put(&mut m, 0x100, 0x5555_0000_1000);
        put(&mut m, 0x203, 0x5555_0000_1008);
        put(&mut m, 0x300, 0x5555_0000_2000); // one past the range
        put(&mut m, (4 << 20) - 3, 0x5555_0000_1010); // over the border of two blocks
        put(&mut m, (9 << 20) - 8, 0x5555_0000_1fff);
        let range = 0x5555_0000_1000..0x5555_0000_2000;
        let all = |_| true;
        let wanted = Wanted { ranges: vec![range.clone()], aligned: &all, hidden: range, unaligned: &all };
        let places = vec![0x10000..0x10000 + (9 << 20)];
        let hits = scan(&m, &places, &wanted);
        assert_eq!(hits.aligned, [(0x10100, 0x5555_0000_1000), (0x10000 + (9 << 20) - 8, 0x5555_0000_1fff)]);
        assert_eq!(hits.unaligned.len(), 2, "{:x?}", hits.unaligned);
        assert_eq!(hits.unaligned[0], (0x10203, 0x5555_0000_1008));
        assert_eq!(hits.bytes, 9 << 20);

        // The same where the bytes are looked at in place.
        put(&mut m, (2 << 20) - 5, 0x5555_0000_1018); // over the border of two pieces
        let blocks = mcr_image::Blocks::new(&m);
        let wanted = Wanted { ranges: wanted.ranges.clone(), hidden: wanted.hidden.clone(), ..wanted };
        let (there, here) = (scan(&m, &places, &wanted), scan(&blocks, &places, &wanted));
        assert!(blocks.slice(Addr(0x10000), 8).is_some(), "at hand");
        assert_eq!(there.unaligned.len(), 3);
        assert_eq!((here.aligned, here.unaligned), (there.aligned, there.unaligned));
        assert_eq!(here.bytes, 9 << 20);
    }

    #[test]
    fn passing_over_groups_loses_no_hidden_word() {
        let mut bytes = vec![0u8; 5000];
        let mut x = 7u64;
        let mut random = || {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            x >> 33
        };
        // Within one upper half, over the border of two, and more.
        for range in [0x5555_0000_1000..0x5555_0020_0000, 0x5555_ffff_0000..0x5556_0001_0000, 0x1000..1 << 40]
        {
            for _ in 0..200 {
                let at = random() as usize % (bytes.len() - 8);
                let v = range.start + random() % (range.end - range.start);
                bytes[at..at + 8].copy_from_slice(&v.to_le_bytes());
            }
            for len in [7, 8, 262, 263, 264, 519, 4999, 5000] {
                let bytes = &bytes[5000 - len..];
                let wanted = Wanted {
                    ranges: vec![],
                    aligned: &|_| true,
                    hidden: range.clone(),
                    unaligned: &|_| true,
                };
                let mut hits = Hits::default();
                hidden(0x1003, bytes, &wanted, &mut hits);
                let all = bytes
                    .windows(8)
                    .zip(0x1003..)
                    .map(|(b, at)| (at, u64::from_le_bytes(b.try_into().unwrap())));
                let want: Vec<_> = all.filter(|h| range.contains(&h.1) && h.0 % 8 != 0).collect();
                assert_eq!(hits.unaligned, want, "{range:x?} {len}");
                assert!(len < 1000 || !want.is_empty());
            }
        }
    }

    #[test]
    #[ignore = "prints a speed"]
    #[allow(clippy::single_range_in_vec_init)]
    fn speed() {
        let m = Flat(0x10000, vec![0x55; 512 << 20]);
        let wanted = Wanted {
            ranges: vec![0x5555_0000_1000..0x5555_0020_0000, 0x5555_0100_0000..0x5555_0200_0000],
            aligned: &|_| true,
            hidden: 0..0,
            unaligned: &|_| true,
        };
        for hidden in [0..0, 0x5555_0100_0000..0x5555_0200_0000] {
            let t = std::time::Instant::now();
            let hits = scan(
                &m,
                &[0x10000..0x10000 + (512 << 20)],
                &Wanted { hidden: hidden.clone(), ranges: wanted.ranges.clone(), ..wanted },
            );
            let s = t.elapsed().as_secs_f64();
            eprintln!("hidden {}: {:.2} GiB/s, {} hits", !hidden.is_empty(), 0.5 / s, hits.aligned.len());
        }
    }
}
