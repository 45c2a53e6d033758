//! The bytes of an image file: mapped, or owned. The only module of this crate with unsafe code.
#![allow(unsafe_code)]

use crate::ImageError;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Read-only bytes.
#[derive(Debug)]
pub(crate) enum Map {
    /// A private mapping of a regular file.
    Mapped(memmap2::Mmap),
    /// Bytes in memory.
    Owned(Vec<u8>),
}

impl Map {
    /// Maps a regular file; anything else (a pipe, "-" for standard input) is read to its end.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let io = |call| move |e| ImageError::io(call, path, e);
        if path.as_os_str() == "-" {
            let mut v = Vec::new();
            std::io::stdin().lock().read_to_end(&mut v).map_err(io("read"))?;
            return Ok(Self::Owned(v));
        }
        let mut file = File::open(path).map_err(io("open"))?;
        let meta = file.metadata().map_err(io("fstat"))?;
        if meta.is_dir() {
            return Err(io("open")(std::io::Error::from_raw_os_error(libc_eisdir())));
        }
        if !meta.is_file() || meta.len() == 0 {
            let mut v = Vec::new();
            file.read_to_end(&mut v).map_err(io("read"))?;
            return Ok(Self::Owned(v));
        }
        // SAFETY: the mapping is read-only and private, and handed out as `&[u8]` only while `self` lives.
        // What this cannot rule out is another process changing the file in place: images are written under
        // a temporary name and renamed, never changed afterwards, and are owned and readable by one user
        // alone (0600). A file that is cut while it is mapped ends this process by SIGBUS; it cannot change
        // what safe code may assume about already checked copies, because every frame is checksummed when it
        // is used and decoded into memory of its own.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io("mmap"))?;
        Ok(Self::Mapped(map))
    }

    /// Maps an ELF file, without copying it.
    pub fn elf(path: &Path) -> std::io::Result<Self> {
        let mut file = File::open(path)?;
        let meta = file.metadata()?;
        if !meta.is_file() || meta.len() < 1 << 16 {
            // Small, or not a file that can be mapped (an endless device is cut off: it is no ELF file).
            let mut v = Vec::new();
            file.by_ref().take(1 << 30).read_to_end(&mut v)?;
            return Ok(Self::Owned(v));
        }
        // SAFETY: read-only and private, handed out as `&[u8]` only while `self` lives. Programs and
        // libraries are replaced by renaming (linkers, package managers), and the kernel refuses to write to
        // one that runs (ETXTBSY). Should a file be cut nevertheless, this process ends by SIGBUS, and what
        // it held stopped goes on; bytes that change under the parser are checked where they are used.
        let map = unsafe { memmap2::Mmap::map(&file) }?;
        Ok(Self::Mapped(map))
    }

    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(m) => m,
            Self::Owned(v) => v,
        }
    }
}

const fn libc_eisdir() -> i32 {
    21
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}
