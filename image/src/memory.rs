//! One way to read memory, whatever is behind it: pages of an image, a frozen process, a COW child, or an
//! image with a patch over it.

use crate::Addr;

/// A range of readable memory, half open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: Addr,
    /// One past the last address.
    pub end: Addr,
    /// `PROT_*` bits.
    pub prot: u32,
    /// Path, `[heap]`, `[stack]`, or empty.
    pub name: String,
}

/// Why memory could not be read.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No readable mapping covers the range.
    #[error("no readable memory at {addr} ({len} bytes)")]
    Unmapped {
        /// Start of the failed read.
        addr: Addr,
        /// Its length in bytes.
        len: usize,
    },
    /// The backing store failed.
    #[error("reading {len} bytes at {addr}: {source}")]
    Io {
        /// Start of the failed read.
        addr: Addr,
        /// Its length in bytes.
        len: usize,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Memory that can be read at virtual addresses.
pub trait Memory: Send + Sync {
    /// Fills `buf` from `addr`, or fails without a partial result that anyone may use.
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError>;

    /// The readable regions, ascending and disjoint.
    fn regions(&self) -> Vec<Region>;

    /// Calls `f` with the non-zero content of `start..end` in pieces, ascending. Pieces start and end at
    /// multiples of 8 where the range does; all-zero and unreadable parts may be left out, so this is for
    /// scanning, not for copying.
    fn for_each_run(
        &self,
        start: Addr,
        end: Addr,
        f: &mut dyn FnMut(Addr, &[u8]),
    ) -> Result<(), MemoryError> {
        const CHUNK: u64 = 256 << 10;
        let mut buf = Vec::new();
        for r in self.regions() {
            let (mut at, end) = (r.start.max(start), r.end.min(end));
            while at < end {
                let len = end.since(at).min(CHUNK - at.0 % CHUNK) as usize;
                buf.resize(len, 0);
                self.read(at, &mut buf)?;
                if !crate::is_zero(&buf) {
                    f(at, &buf);
                }
                at = at.add(len as u64);
            }
        }
        Ok(())
    }

    /// The bytes in place, where they are at hand in one piece: no copy is made.
    fn slice(&self, addr: Addr, len: usize) -> Option<&[u8]> {
        let _ = (addr, len);
        None
    }

    /// The bytes in place, or read into `buf`.
    fn view<'s>(&'s self, addr: Addr, len: usize, buf: &'s mut Vec<u8>) -> Result<&'s [u8], MemoryError> {
        if let Some(s) = self.slice(addr, len) {
            return Ok(s);
        }
        buf.clear();
        buf.resize(len, 0);
        self.read(addr, buf)?;
        Ok(buf)
    }

    /// Reads `len` bytes.
    fn bytes(&self, addr: Addr, len: usize) -> Result<Vec<u8>, MemoryError> {
        let mut v = vec![0; len];
        self.read(addr, &mut v)?;
        Ok(v)
    }

    /// Reads a little-endian 64-bit word.
    fn u64(&self, addr: Addr) -> Result<u64, MemoryError> {
        if let Some(b) = self.slice(addr, 8).and_then(|s| s.try_into().ok()) {
            return Ok(u64::from_le_bytes(b));
        }
        let mut b = [0; 8];
        self.read(addr, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }

    /// Reads a little-endian 32-bit word.
    fn u32(&self, addr: Addr) -> Result<u32, MemoryError> {
        let mut b = [0; 4];
        self.read(addr, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }

    /// Reads a NUL-terminated string of at most `max` bytes (without the NUL).
    fn cstr(&self, addr: Addr, max: usize) -> Result<Vec<u8>, MemoryError> {
        let mut out = Vec::new();
        let mut at = addr;
        while out.len() < max {
            // Up to the next page border, so that a string at the end of a mapping can be read.
            let step = (4096 - (at.0 & 4095) as usize).min(max - out.len());
            let chunk = self.bytes(at, step)?;
            if let Some(n) = chunk.iter().position(|&b| b == 0) {
                out.extend_from_slice(&chunk[..n]);
                return Ok(out);
            }
            out.extend_from_slice(&chunk);
            at = at.add(step as u64);
        }
        Ok(out)
    }
}
