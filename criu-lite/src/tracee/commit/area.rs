//! The staging area as memory: a memfd mapped in the target and in the engine.

use super::outcome::CommitError;
use crate::tracee::{TraceError, Tracee, fault, ptrace};
use crate::{Frozen, pidfd_getfd};
use mcr_image::{Addr, Memory};
use nix::errno::Errno;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::AtomicU32;

/// The memfd's name: leftovers in a process are recognised by it.
pub(super) const NAME: &[u8] = b"mcr-commit";

/// The engine's mapping of the area.
pub(super) struct Map {
    at: *mut u8,
    len: usize,
}

impl Map {
    fn new(fd: &OwnedFd, len: u64) -> Result<Self, (&'static str, Errno)> {
        fault::point();
        // SAFETY: plain numbers.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), len as i64) } < 0 {
            return Err(("ftruncate of the staging area", Errno::last()));
        }
        fault::point();
        let (prot, len) = (libc::PROT_READ | libc::PROT_WRITE, len as usize);
        // SAFETY: a fresh mapping; its pages belong to the memfd, which nobody can truncate but the target
        // within the microseconds that it has the descriptor.
        let at = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
            libc::mmap(std::ptr::null_mut(), len, prot, flags, fd.as_raw_fd(), 0)
        };
        if at == libc::MAP_FAILED {
            return Err(("mmap of the staging area", Errno::last()));
        }
        Ok(Self { at: at.cast(), len })
    }

    /// The bytes, while the target does not run in the area.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped for as long as self; the target's threads are stopped.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }

    /// A word that the target may change.
    pub(super) fn word(&self, offset: u64) -> &AtomicU32 {
        assert!(offset as usize + 4 <= self.len && offset.is_multiple_of(4));
        // SAFETY: inside the mapping and aligned; only accessed atomically while the target runs.
        unsafe { &*self.at.add(offset as usize).cast::<AtomicU32>() }
    }

    /// A 64-bit value that the target wrote before it said that it was done.
    pub(super) fn value(&self, offset: u64) -> u64 {
        assert!(offset as usize + 8 <= self.len);
        // SAFETY: inside the mapping.
        unsafe { self.at.add(offset as usize).cast::<u64>().read_unaligned() }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: our mapping; every reference into it borrowed self.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// The area in the target.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mapped {
    pub at: Addr,
    pub len: u64,
}

impl Mapped {
    /// Takes it out again.
    pub(super) fn unmap(self, t: &mut Tracee) -> Result<(), TraceError> {
        if self.len > 0 {
            t.syscall(libc::SYS_munmap, &[self.at.0, self.len])?;
        }
        t.put_back()
    }
}

/// Maps `len` bytes at `at` in the target; the first `code` bytes are executable. On an error nothing is left.
pub(super) fn map(frozen: &mut Frozen, at: Addr, len: u64, code: u64) -> Result<(Mapped, Map), CommitError> {
    let pid = frozen.pid();
    let trace = |source| CommitError::Trace { pid, source };
    frozen.share_site().map_err(trace)?;
    let fd = memfd(frozen.leader()).map_err(trace)?;
    let pidfd = frozen.pidfd();
    fault::point();
    let local = pidfd_getfd(pidfd, fd as i32)
        .map_err(|e| ("pidfd_getfd", e))
        .and_then(|local| Map::new(&local, len))
        .map_err(|(call, errno)| CommitError::Engine { pid, call, errno });
    let t = frozen.leader();
    let mapped = match local {
        Ok(m) => map_in(t, fd, at, len, code).map(|a| (a, m)).map_err(trace),
        Err(e) => Err(e),
    };
    // Whatever happened before: the descriptor goes first, then the registers come back.
    let closed = t.syscall(libc::SYS_close, &[fd]).map(drop);
    let back = closed.and(t.put_back()).map_err(trace);
    match (mapped, back) {
        (Ok(m), Ok(())) => Ok(m),
        (Ok((a, _)), Err(e)) => {
            drop(a.unmap(t));
            Err(e)
        }
        (Err(e), _) => Err(e),
    }
}

/// memfd_create(2) in the target. Its name lies for the moment far below the red zone of the stack.
fn memfd(t: &mut Tracee) -> Result<u64, TraceError> {
    const MFD_CLOEXEC: u64 = 1;
    t.syscall(libc::SYS_getpid, &[])?;
    let at = Addr((ptrace::get_regs(t.tid())?.rsp - 512) & !15);
    let mut name = NAME.to_vec();
    name.resize(16, 0);
    let mem = t.memory().clone();
    let tid = t.tid();
    let error = |source| TraceError::Memory { tid, source };
    let under = mem.bytes(at, name.len()).map_err(error)?;
    mem.write(at, &name).map_err(error)?;
    let fd = t.syscall(libc::SYS_memfd_create, &[at.0, MFD_CLOEXEC]);
    mem.write(at, &under).map_err(error)?;
    fd
}

/// Code and data are two mappings: nothing is ever writable and executable, nor becomes so (PR_SET_MDWE).
fn map_in(t: &mut Tracee, fd: u64, at: Addr, len: u64, code: u64) -> Result<Mapped, TraceError> {
    let (r, w, x) = (libc::PROT_READ as u64, libc::PROT_WRITE as u64, libc::PROT_EXEC as u64);
    let flags = (libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE) as u64;
    let mut done = Mapped { at, len: 0 };
    for (from, to, prot) in [(0, code, r | x), (code, len, r | w)] {
        let want = at.0 + from;
        match t.syscall(libc::SYS_mmap, &[want, to - from, prot, flags, fd, from]) {
            Ok(got) if got == want => done.len = to,
            // A kernel before 4.17 takes the address as a hint.
            Ok(got) => {
                drop(Mapped { at: Addr(got), len: to - from }.unmap(t));
                drop(done.unmap(t));
                return Err(TraceError::Syscall { tid: t.tid(), nr: libc::SYS_mmap, errno: Errno::EEXIST });
            }
            Err(e) => {
                drop(done.unmap(t));
                return Err(e);
            }
        }
    }
    Ok(done)
}
