//! A memory with a finished write list laid over it, nothing copied.

use super::super::output::MemWrite;
use mcr_image::{Addr, Memory, MemoryError, Region};

/// `base` under `writes`, which are ascending and disjoint.
pub(super) struct Listed<'a> {
    pub base: &'a dyn Memory,
    pub writes: &'a [MemWrite],
}

impl Listed<'_> {
    /// The writes from the first one that ends behind `addr`.
    fn from(&self, addr: Addr) -> &[MemWrite] {
        let first = self.writes.partition_point(|w| w.addr.0 + w.bytes.len() as u64 <= addr.0);
        &self.writes[first..]
    }
}

impl Memory for Listed<'_> {
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let end = addr.0.saturating_add(buf.len() as u64);
        let over = self.from(addr);
        let covered = over.first().is_some_and(|w| w.addr <= addr && end <= w.addr.0 + w.bytes.len() as u64);
        if !covered {
            self.base.read(addr, buf)?;
        }
        for w in over.iter().take_while(|w| w.addr.0 < end) {
            let (from, to) = (w.addr.0.max(addr.0), (w.addr.0 + w.bytes.len() as u64).min(end));
            buf[(from - addr.0) as usize..(to - addr.0) as usize]
                .copy_from_slice(&w.bytes[(from - w.addr.0) as usize..(to - w.addr.0) as usize]);
        }
        Ok(())
    }

    fn slice(&self, addr: Addr, len: usize) -> Option<&[u8]> {
        let end = addr.0.checked_add(len as u64)?;
        match self.from(addr).first().filter(|w| w.addr.0 < end) {
            None => self.base.slice(addr, len),
            Some(w) => {
                let at = addr.0.checked_sub(w.addr.0)? as usize;
                w.bytes.get(at..at + len)
            }
        }
    }

    fn regions(&self) -> Vec<Region> {
        self.base.regions()
    }
}
