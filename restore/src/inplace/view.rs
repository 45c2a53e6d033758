//! The booted host as it would be had it been made from the old process as that is now.

use crate::link::Span;
use mcr_image::{Addr, Memory, MemoryError, Region};

/// What the start-up made, from the host; everything else from the old process, which has gone on since.
pub struct Laid<'a> {
    /// Ranges that the start-up made; ascending, disjoint.
    pub native: &'a [Span],
    /// The booted host.
    pub host: &'a dyn Memory,
    /// The old process.
    pub old: &'a dyn Memory,
}

impl Laid<'_> {
    /// The part of `at..end` that lies on one side, and whether that is the host's.
    fn part(&self, at: Addr, end: Addr) -> (Addr, bool) {
        let i = self.native.partition_point(|s| s.end <= at);
        match self.native.get(i) {
            Some(s) if s.start <= at => (s.end.min(end), true),
            Some(s) => (s.start.min(end), false),
            None => (end, false),
        }
    }
}

impl Memory for Laid<'_> {
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let end =
            Addr(addr.0.checked_add(buf.len() as u64).ok_or(MemoryError::Unmapped { addr, len: buf.len() })?);
        let mut at = addr;
        while at < end {
            let (to, native) = self.part(at, end);
            let piece = &mut buf[at.since(addr) as usize..to.since(addr) as usize];
            if native {
                self.host.read(at, piece)?
            } else {
                self.old.read(at, piece)?
            }
            at = to;
        }
        Ok(())
    }

    fn slice(&self, addr: Addr, len: usize) -> Option<&[u8]> {
        let end = Addr(addr.0.checked_add(len as u64)?);
        match self.part(addr, end) {
            (to, true) if to == end => self.host.slice(addr, len),
            (to, false) if to == end => self.old.slice(addr, len),
            _ => None,
        }
    }

    fn regions(&self) -> Vec<Region> {
        let mut out = Vec::new();
        for (memory, host) in [(self.host, true), (self.old, false)] {
            for r in memory.regions() {
                let mut at = r.start;
                while at < r.end {
                    let (to, native) = self.part(at, r.end);
                    if native == host {
                        out.push(Region { start: at, end: to, ..r.clone() });
                    }
                    at = to;
                }
            }
        }
        out.sort_by_key(|r| r.start);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Filled(u8, u64, u64);
    impl Memory for Filled {
        fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
            if addr.0 < self.1 || addr.0 + buf.len() as u64 > self.2 {
                return Err(MemoryError::Unmapped { addr, len: buf.len() });
            }
            buf.fill(self.0);
            Ok(())
        }
        fn regions(&self) -> Vec<Region> {
            vec![Region { start: Addr(self.1), end: Addr(self.2), prot: 3, name: String::new() }]
        }
    }

    #[test]
    fn each_side_answers_for_its_ranges() {
        let native = [Span::new(Addr(0x2000), Addr(0x3000)), Span::new(Addr(0x5000), Addr(0x6000))];
        let (host, old) = (Filled(1, 0x1000, 0x6000), Filled(2, 0x1000, 0x5000));
        let v = Laid { native: &native, host: &host, old: &old };
        assert_eq!(v.bytes(Addr(0x1ffe), 4).unwrap(), [2, 2, 1, 1]);
        assert_eq!(v.bytes(Addr(0x2ffe), 4).unwrap(), [1, 1, 2, 2]);
        assert_eq!(v.bytes(Addr(0x5000), 2).unwrap(), [1, 1]);
        assert!(v.bytes(Addr(0x5ffe), 4).is_err(), "nobody has it");
        let regions: Vec<_> = v.regions().iter().map(|r| (r.start.0, r.end.0)).collect();
        assert_eq!(regions, [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x5000), (0x5000, 0x6000)]);
    }
}
