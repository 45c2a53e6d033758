//! A page of the target that is ours for a while.

use super::{TraceError, Tracee};
use mcr_image::{Addr, Memory};

/// Memory mapped in the target; unmapped when dropped.
pub struct Scratch<'t> {
    tracee: &'t mut Tracee,
    addr: Addr,
    len: u64,
}

impl<'t> Scratch<'t> {
    /// Maps `len` bytes (rounded up to pages) of anonymous memory with `prot`.
    pub fn map(tracee: &'t mut Tracee, len: usize, prot: i32) -> Result<Self, TraceError> {
        let len = (len.max(1) as u64).next_multiple_of(4096);
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let addr = tracee.syscall(libc::SYS_mmap, &[0, len, prot as u64, flags, u64::MAX, 0])?;
        Ok(Self { tracee, addr: Addr(addr), len })
    }

    /// Readable and writable.
    pub fn data(tracee: &'t mut Tracee, len: usize) -> Result<Self, TraceError> {
        Self::map(tracee, len, libc::PROT_READ | libc::PROT_WRITE)
    }

    /// Where it is.
    #[must_use]
    pub fn addr(&self) -> Addr {
        self.addr
    }

    /// Its length.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: a scratch has at least a page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The tracee, for calls that use the memory.
    pub fn tracee(&mut self) -> &mut Tracee {
        self.tracee
    }

    /// Writes at an offset (also where the protection is read-only).
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), TraceError> {
        self.tracee.mem.write(self.addr.add(offset), bytes).map_err(self.tracee.mem_error())
    }

    /// Reads at an offset.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, TraceError> {
        self.tracee.mem.bytes(self.addr.add(offset), len).map_err(self.tracee.mem_error())
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        // Fails only when the target is gone, and its memory with it.
        drop(self.tracee.syscall(libc::SYS_munmap, &[self.addr.0, self.len]));
    }
}
