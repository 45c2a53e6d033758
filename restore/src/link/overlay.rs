//! A memory with writes laid over it: what the host will look like, before anything is written.

use super::output::MemWrite;
use mcr_image::{Addr, Memory, MemoryError, Region};
use std::collections::BTreeMap;

/// `base` with disjoint runs of bytes laid over it; later writes win.
pub struct Overlay<'a> {
    base: &'a dyn Memory,
    runs: BTreeMap<u64, Vec<u8>>,
}

impl<'a> Overlay<'a> {
    /// Nothing written yet.
    #[must_use]
    pub fn new(base: &'a dyn Memory) -> Self {
        Self { base, runs: BTreeMap::new() }
    }

    /// Lays `bytes` over `addr`.
    pub fn write(&mut self, addr: Addr, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let (start, end) = (addr.0, addr.0 + bytes.len() as u64);
        // A run that begins at or before `start` and touches it takes the bytes; later ones that it reaches
        // now are joined to it.
        let last = self.runs.range_mut(..=start).next_back().filter(|(s, b)| **s + b.len() as u64 >= start);
        let first = match last {
            Some((&s, run)) => {
                let (from, to) = ((start - s) as usize, (end - s) as usize);
                if run.len() < to {
                    run.resize(to, 0);
                }
                run[from..to].copy_from_slice(bytes);
                s
            }
            None => {
                self.runs.insert(start, bytes.to_vec());
                start
            }
        };
        // Disjoint from the first one until now, so that what they have behind `end` follows it.
        let later: Vec<u64> = self.runs.range(start + 1..end).map(|(s, _)| *s).collect();
        for s in later {
            let run = self.runs.remove(&s).unwrap_or_default();
            let tail = run.get((end - s) as usize..).unwrap_or_default();
            if let Some(joined) = self.runs.get_mut(&first) {
                joined.extend_from_slice(tail);
            }
        }
    }

    /// Lays a 64-bit word over `addr`.
    pub fn write_u64(&mut self, addr: Addr, value: u64) {
        self.write(addr, &value.to_le_bytes());
    }

    /// Whether any byte of the range has been written.
    #[must_use]
    pub fn touched(&self, addr: Addr, len: u64) -> bool {
        self.runs.range(..addr.0 + len).next_back().is_some_and(|(s, b)| s + b.len() as u64 > addr.0)
    }

    /// Everything written so far, ascending.
    pub fn runs(&self) -> impl Iterator<Item = (Addr, &[u8])> {
        self.runs.iter().map(|(a, b)| (Addr(*a), &b[..]))
    }

    /// Bytes written so far.
    #[must_use]
    pub fn written(&self) -> usize {
        self.runs.values().map(Vec::len).sum()
    }

    /// The writes, ascending and disjoint; those that change nothing are left out.
    #[must_use]
    pub fn into_writes(self) -> Vec<MemWrite> {
        let mut out = Vec::with_capacity(self.runs.len());
        for (addr, bytes) in self.runs {
            let addr = Addr(addr);
            if self.base.bytes(addr, bytes.len()).is_ok_and(|b| b == bytes) {
                continue;
            }
            out.push(MemWrite { addr, bytes });
        }
        out
    }
}

impl Memory for Overlay<'_> {
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let (start, end) = (addr.0, addr.0.wrapping_add(buf.len() as u64));
        if end < start {
            return Err(MemoryError::Unmapped { addr, len: buf.len() });
        }
        let mut covered = false;
        let first = self.runs.range(..=start).next_back().map_or(start, |(s, _)| *s);
        if let Some((s, b)) = self.runs.range(first..end).next() {
            covered = *s <= start && s + b.len() as u64 >= end;
        }
        if !covered {
            self.base.read(addr, buf)?;
        }
        for (&s, b) in self.runs.range(first..end) {
            let e = s + b.len() as u64;
            let (from, to) = (s.max(start), e.min(end));
            if from < to {
                buf[(from - start) as usize..(to - start) as usize]
                    .copy_from_slice(&b[(from - s) as usize..(to - s) as usize]);
            }
        }
        Ok(())
    }

    fn slice(&self, addr: Addr, len: usize) -> Option<&[u8]> {
        let end = addr.0.checked_add(len as u64)?;
        match self.runs.range(..end).next_back() {
            Some((s, b)) if s + b.len() as u64 > addr.0 => {
                let from = addr.0.checked_sub(*s)? as usize;
                b.get(from..from + len)
            }
            _ => self.base.slice(addr, len),
        }
    }

    fn regions(&self) -> Vec<Region> {
        self.base.regions()
    }
}

/// Memory made of byte runs, for tests.
#[cfg(test)]
pub(crate) mod test {
    use super::*;

    /// Runs of bytes at addresses.
    #[derive(Clone, Default)]
    pub struct Runs(pub Vec<(u64, Vec<u8>)>);

    impl Runs {
        pub fn with(mut self, addr: u64, bytes: Vec<u8>) -> Self {
            self.0.push((addr, bytes));
            self
        }
        pub fn put(&mut self, addr: u64, value: u64) {
            let (s, b) = self
                .0
                .iter_mut()
                .find(|(s, b)| *s <= addr && addr + 8 <= *s + b.len() as u64)
                .expect("mapped");
            let at = (addr - *s) as usize;
            b[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    impl Memory for Runs {
        fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
            for (s, b) in &self.0 {
                if *s <= addr.0 && addr.0 + buf.len() as u64 <= s + b.len() as u64 {
                    let at = (addr.0 - s) as usize;
                    buf.copy_from_slice(&b[at..at + buf.len()]);
                    return Ok(());
                }
            }
            Err(MemoryError::Unmapped { addr, len: buf.len() })
        }
        fn regions(&self) -> Vec<Region> {
            self.0
                .iter()
                .map(|(s, b)| Region {
                    start: Addr(*s),
                    end: Addr(s + b.len() as u64),
                    prot: 3,
                    name: String::new(),
                })
                .collect()
        }
    }

    #[test]
    fn overlapping_writes_join_and_the_later_wins() {
        let base = Runs::default().with(0x1000, vec![0; 64]);
        let mut o = Overlay::new(&base);
        o.write(Addr(0x1000), &[1; 8]);
        o.write(Addr(0x1010), &[2; 8]);
        o.write(Addr(0x1004), &[3; 16]);
        assert_eq!(
            o.bytes(Addr(0x1000), 32).unwrap()[..24],
            [[1, 1, 1, 1, 3, 3, 3, 3], [3, 3, 3, 3, 3, 3, 3, 3], [3, 3, 3, 3, 2, 2, 2, 2]].concat()
        );
        o.write(Addr(0x1006), &[9]);
        assert_eq!(o.bytes(Addr(0x1006), 1).unwrap(), [9]);
        o.write(Addr(0x1030), &[0; 4]);
        let w = o.into_writes();
        assert_eq!(w.len(), 1, "a write that changes nothing is left out: {w:?}");
        assert_eq!((w[0].addr, w[0].bytes.len()), (Addr(0x1000), 24));
    }

    #[test]
    fn random_writes_read_back_like_a_plain_buffer() {
        let base = Runs::default().with(0x1000, vec![7; 256]);
        let mut plain = vec![7u8; 256];
        let mut o = Overlay::new(&base);
        let mut x = 12345u64;
        for i in 0..500u64 {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = (x >> 33) as usize % 240;
            let len = 1 + (x >> 20) as usize % 16;
            o.write(Addr(0x1000 + at as u64), &vec![i as u8; len]);
            plain[at..at + len].fill(i as u8);
            assert_eq!(o.bytes(Addr(0x1000), 256).unwrap(), plain, "after write {i}");
            if let Some(s) = o.slice(Addr(0x1000 + at as u64), len) {
                assert_eq!(s, &plain[at..at + len], "in place, after write {i}");
            }
        }
        let mut at = 0;
        for w in o.into_writes() {
            assert!(w.addr.0 >= at, "ascending and disjoint");
            at = w.addr.0 + w.bytes.len() as u64;
        }
    }
}
