//! Fresh memory for moved objects, laid out as chunks of glibc's main arena.

use mcr_image::proto::NewRegion;

const PREV_INUSE: u64 = 1;
const FENCE: u64 = 0x10;

/// Addresses and sizes of the chunks of a region, in order.
#[derive(Default)]
pub(crate) struct RegionPlan {
    /// (offset of the user's bytes, chunk size)
    chunks: Vec<(u64, u64)>,
    at: u64,
}

impl RegionPlan {
    /// Room for `len` bytes; returns the offset of the first one from the region's start.
    pub fn allocate(&mut self, len: u64) -> u64 {
        let size = (len + 8).next_multiple_of(16).max(0x20);
        let user = self.at + 16;
        self.chunks.push((user, size));
        self.at += size;
        user
    }
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }
    /// Length of the region in bytes: whole pages, with two fenceposts.
    pub fn len(&self) -> u64 {
        (self.at + 2 * FENCE).next_multiple_of(4096)
    }
    /// The region's bytes, the chunks filled by `content`. What is left over at its end is one more chunk in
    /// use, so that a walk finds nothing but chunks.
    pub fn finish(mut self, start: u64, content: &[(u64, &[u8])]) -> NewRegion {
        let len = self.len();
        let rest = len - 2 * FENCE - self.at;
        if rest >= 0x20 {
            self.chunks.push((self.at + 16, rest));
        } else if rest > 0
            && let Some(last) = self.chunks.last_mut()
        {
            last.1 += rest;
        }
        let mut bytes = vec![0; len as usize];
        let mut put = |at: u64, v: u64| bytes[at as usize..at as usize + 8].copy_from_slice(&v.to_le_bytes());
        for (user, size) in &self.chunks {
            put(user - 8, size | PREV_INUSE);
        }
        put(len - 2 * FENCE + 8, FENCE | PREV_INUSE);
        put(len - FENCE + 8, FENCE | PREV_INUSE);
        for (user, raw) in content {
            bytes[*user as usize..*user as usize + raw.len()].copy_from_slice(raw);
        }
        NewRegion { start, content: bytes, malloc_chunks: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_region() {
        for n in [1, 24, 25, 100, 4000, 4040, 4048, 4049, 5000] {
            let mut plan = RegionPlan::default();
            let a = plan.allocate(n);
            let b = plan.allocate(40);
            assert!(a % 16 == 0 && b % 16 == 0);
            let r = plan.finish(0x10000, &[(a, &[7]), (b, &[9; 40])]);
            let word = |at: usize| u64::from_le_bytes(r.content[at..at + 8].try_into().unwrap());
            let mut at = 0;
            loop {
                let size = word(at + 8);
                assert_eq!(size & 7, 1);
                if size == 0x11 {
                    break;
                }
                assert!(size >= 0x20, "{n}: {size:#x} at {at:#x}");
                at += (size & !7) as usize;
            }
            assert_eq!(at + 0x20, r.content.len(), "{n}");
            assert_eq!(word(at + 0x18), 0x11);
            assert_eq!(r.content[b as usize], 9);
        }
    }
}
