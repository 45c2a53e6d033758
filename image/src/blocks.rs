//! A memory that stands still, read once: a walk asks for many words, and each would be a system call.

use crate::{Addr, Memory, MemoryError, Region};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Read at once.
const BLOCK: u64 = 64 << 10;
/// No more than this is kept; what does not fit is read each time.
const MOST: u64 = 2 << 30;

type Block = OnceLock<Option<Box<[u8]>>>;

struct Kept {
    start: u64,
    end: u64,
    blocks: Vec<Block>,
}

/// Blocks of another memory, read when they are first needed. May be asked by many threads at once.
pub struct Blocks<'a> {
    base: &'a dyn Memory,
    kept: Vec<Kept>,
    bytes: AtomicU64,
}

/// What was read of a memory, for another one that is the same in part.
#[derive(Default)]
pub struct ReadBlocks(Vec<Kept>);

impl<'a> Blocks<'a> {
    /// As [`Self::new`]; what was read before of `same` (ascending, disjoint) is not read again: the caller knows that
    /// both memories have the same bytes there.
    #[must_use]
    pub fn again(base: &'a dyn Memory, before: ReadBlocks, same: &[(Addr, Addr)]) -> Self {
        let mut out = Self::new(base);
        let whole = |start: u64, end: u64| {
            let i = same.partition_point(|s| s.1.0 <= start);
            same.get(i).is_some_and(|s| s.0.0 <= start && end <= s.1.0)
        };
        for k in before.0 {
            for (i, slot) in k.blocks.into_iter().enumerate() {
                let Some(Some(bytes)) = slot.into_inner() else { continue };
                let start = ((k.start / BLOCK + i as u64) * BLOCK).max(k.start);
                let end = start + bytes.len() as u64;
                let n = out.kept.partition_point(|k| k.end <= start);
                let Some(now) = out.kept.get_mut(n).filter(|_| whole(start, end)) else { continue };
                let place = start / BLOCK * BLOCK;
                // The same piece of the region as it is now.
                if start == place.max(now.start) && end == (place + BLOCK).min(now.end) {
                    let index = (start / BLOCK - now.start / BLOCK) as usize;
                    if let Some(slot) = now.blocks.get_mut(index) {
                        out.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                        *slot = Block::from(Some(bytes));
                    }
                }
            }
        }
        out
    }

    /// What was read until now.
    #[must_use]
    pub fn into_read(self) -> ReadBlocks {
        ReadBlocks(self.kept)
    }

    /// Nothing read yet. `base` must not change from now on.
    #[must_use]
    pub fn new(base: &'a dyn Memory) -> Self {
        let kept = base
            .regions()
            .iter()
            .map(|r| {
                let count = (r.end.0.div_ceil(BLOCK)) - r.start.0 / BLOCK;
                // A reservation of terabytes is not walked.
                let count = if count > (MOST / BLOCK) * 4 { 0 } else { count };
                Kept { start: r.start.0, end: r.end.0, blocks: (0..count).map(|_| Block::new()).collect() }
            })
            .collect();
        Self { base, kept, bytes: AtomicU64::new(0) }
    }

    /// The region that holds `at`.
    fn region(&self, at: u64) -> Option<&Kept> {
        let i = self.kept.partition_point(|k| k.end <= at);
        self.kept.get(i).filter(|k| k.start <= at)
    }

    /// The block that holds `at`, with its first address.
    fn block<'s>(&'s self, k: &'s Kept, at: u64) -> Option<(u64, &'s [u8])> {
        let slot = k.blocks.get((at / BLOCK - k.start / BLOCK) as usize)?;
        let start = (at / BLOCK * BLOCK).max(k.start);
        if let Some(b) = slot.get() {
            return b.as_ref().map(|b| (start, &**b));
        }
        if self.bytes.load(Ordering::Relaxed) > MOST {
            return None;
        }
        let read = || {
            let end = ((at / BLOCK + 1) * BLOCK).min(k.end);
            let b = self.base.bytes(Addr(start), (end - start) as usize).ok()?.into_boxed_slice();
            self.bytes.fetch_add(b.len() as u64, Ordering::Relaxed);
            Some(b)
        };
        slot.get_or_init(read).as_ref().map(|b| (start, &**b))
    }
}

impl Memory for Blocks<'_> {
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut done = 0;
        while done < buf.len() {
            let at = addr.0 + done as u64;
            let Some((start, bytes)) = self.region(at).and_then(|k| self.block(k, at)) else {
                return self.base.read(Addr(at), &mut buf[done..]);
            };
            let from = (at - start) as usize;
            let n = (bytes.len() - from).min(buf.len() - done);
            buf[done..done + n].copy_from_slice(&bytes[from..from + n]);
            done += n;
        }
        Ok(())
    }

    fn slice(&self, addr: Addr, len: usize) -> Option<&[u8]> {
        let (start, bytes) = self.region(addr.0).and_then(|k| self.block(k, addr.0))?;
        let from = (addr.0 - start) as usize;
        bytes.get(from..from.checked_add(len)?)
    }

    fn regions(&self) -> Vec<Region> {
        self.base.regions()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two regions that touch, one that does not, counting reads.
    struct Base(AtomicU64);
    impl Memory for Base {
        fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            let end = addr.0 + buf.len() as u64;
            let inside = |a, b| a <= addr.0 && end <= b;
            if !inside(0x1000, 0x5_3000) && !inside(0x10_0000, 0x10_1000) {
                return Err(MemoryError::Unmapped { addr, len: buf.len() });
            }
            for (i, b) in buf.iter_mut().enumerate() {
                *b = ((addr.0 + i as u64) / 7) as u8;
            }
            Ok(())
        }
        fn regions(&self) -> Vec<Region> {
            [(0x1000, 0x2_5000), (0x2_5000, 0x5_3000), (0x10_0000, 0x10_1000)]
                .map(|(a, b)| Region { start: Addr(a), end: Addr(b), prot: 3, name: String::new() })
                .to_vec()
        }
    }

    #[test]
    fn blocks_read_like_the_memory_behind_them() {
        let base = Base(AtomicU64::new(0));
        let blocks = Blocks::new(&base);
        for (at, len) in
            [(0x1000, 8), (0xfffc, 8), (0x2_4ffc, 16), (0x5_2ff8, 8), (0x10_0800, 0x800), (0x1000, 0x5_2000)]
        {
            let plain = base.bytes(Addr(at), len).unwrap();
            assert_eq!(blocks.bytes(Addr(at), len).unwrap(), plain, "{at:#x}");
            assert_eq!(blocks.view(Addr(at), len, &mut Vec::new()).unwrap(), plain, "{at:#x}");
        }
        for (at, len) in [(0xfff, 8), (0x5_2ffc, 8), (0x10_0ffc, 8), (0, 8)] {
            assert!(blocks.bytes(Addr(at), len).is_err(), "{at:#x}");
            assert!(blocks.view(Addr(at), len, &mut Vec::new()).is_err(), "{at:#x}");
        }
        let other = Blocks::new(&base);
        other.bytes(Addr(0x1000), 0x5_2000).unwrap();
        // One page is not known to be the same; a block of it is read again, and nothing else.
        let same = [
            (Addr(0x1000), Addr(0x2_5000)),
            (Addr(0x2_5000), Addr(0x4_1000)),
            (Addr(0x4_2000), Addr(0x5_3000)),
        ];
        let before = base.0.load(Ordering::Relaxed);
        let again = Blocks::again(&base, other.into_read(), &same);
        let plain = base.bytes(Addr(0x1000), 0x5_2000).unwrap();
        assert_eq!(again.bytes(Addr(0x1000), 0x5_2000).unwrap(), plain);
        assert_eq!(base.0.load(Ordering::Relaxed) - before, 2, "the plain read, and one block");

        let before = base.0.load(Ordering::Relaxed);
        for _ in 0..100 {
            blocks.u64(Addr(0x2_0000)).unwrap();
        }
        assert_eq!(base.0.load(Ordering::Relaxed), before, "read once");
    }
}
