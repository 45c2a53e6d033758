//! Memory of a living process through /proc/PID/mem.

use crate::procfs::maps::{self, MapsLine};
use mcr_image::{Addr, Memory, MemoryError, Pid, Region};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::RwLock;

/// Reads and writes the memory of a process. Works on a stopped thread's process, a COW child, and (with the
/// usual races) on a running one. The file stays bound to the address space it was opened on: after an
/// `execve` it must be opened again.
pub struct ProcessMemory {
    pid: Pid,
    file: File,
    regions: RwLock<Option<Vec<Region>>>,
}

impl ProcessMemory {
    /// Opens /proc/PID/mem for reading and writing.
    pub fn open(pid: Pid) -> std::io::Result<Self> {
        let file = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        Ok(Self { pid, file, regions: RwLock::new(None) })
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Writes all of `bytes` at `addr`. Read-only private pages are written too (the kernel copies them).
    pub fn write(&self, addr: Addr, bytes: &[u8]) -> Result<(), MemoryError> {
        crate::tracee::fault::point();
        let mut done = 0;
        while done < bytes.len() {
            match self.file.write_at(&bytes[done..], addr.add(done as u64).0) {
                Ok(0) => {
                    return Err(MemoryError::Unmapped {
                        addr: addr.add(done as u64),
                        len: bytes.len() - done,
                    });
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(Self::error(addr.add(done as u64), bytes.len() - done, source));
                }
            }
        }
        Ok(())
    }

    /// Writes a little-endian word.
    pub fn write_u64(&self, addr: Addr, value: u64) -> Result<(), MemoryError> {
        self.write(addr, &value.to_le_bytes())
    }

    /// Forgets the list of regions (it is read once and kept); call after the map has changed.
    pub fn refresh(&self) {
        if let Ok(mut r) = self.regions.write() {
            *r = None;
        }
    }

    /// Reads /proc/PID/maps now.
    pub fn maps(&self) -> std::io::Result<Vec<MapsLine>> {
        maps::read(self.pid)
    }

    fn error(addr: Addr, len: usize, source: std::io::Error) -> MemoryError {
        match source.raw_os_error() {
            Some(libc::EIO | libc::EFAULT) => MemoryError::Unmapped { addr, len },
            _ => MemoryError::Io { addr, len, source },
        }
    }
}

impl Memory for ProcessMemory {
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
        crate::tracee::fault::point();
        let mut done = 0;
        while done < buf.len() {
            let at = addr.add(done as u64);
            let left = buf.len() - done;
            match self.file.read_at(&mut buf[done..], at.0) {
                Ok(0) => {
                    return Err(MemoryError::Unmapped { addr: at, len: left });
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Self::error(at, left, source)),
            }
        }
        Ok(())
    }

    fn regions(&self) -> Vec<Region> {
        if let Ok(r) = self.regions.read()
            && let Some(v) = &*r
        {
            return v.clone();
        }
        let v: Vec<Region> = self
            .maps()
            .unwrap_or_default()
            .into_iter()
            .filter(|m| m.prot & libc::PROT_READ as u32 != 0)
            .map(|m| Region {
                start: m.start,
                end: m.end,
                prot: m.prot,
                name: String::from_utf8_lossy(&m.name).into_owned(),
            })
            .collect();
        if let Ok(mut r) = self.regions.write() {
            *r = Some(v.clone());
        }
        v
    }
}
