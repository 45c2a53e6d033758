//! Allocator readers: which parts of a process's memory are heap objects, found from outside.

mod arena;
mod error;
mod glibc;
mod index;
mod lists;
mod segments;
mod tcache;
mod walk;

pub use arena::{ARENA_SIZE, Arena};
pub use error::HeapError;
pub use glibc::{GlibcHeap, Known};
pub use tcache::Tcache;
pub use walk::{Segment, SegmentKind};

use mcr_image::Addr;

/// What a chunk is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ChunkState {
    /// Allocated by the program.
    InUse,
    /// Free, in the unsorted, a small or a large bin.
    Bin,
    /// Free, in a fastbin.
    Fastbin,
    /// Free, in a thread's cache.
    Tcache,
    /// The arena's wilderness.
    Top,
    /// The allocator's own (a thread's cache).
    Allocator,
}

impl ChunkState {
    /// The program holds it.
    #[must_use]
    pub fn in_use(self) -> bool {
        self == Self::InUse
    }
}

/// One chunk, as the program sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// What malloc returned.
    pub addr: Addr,
    /// What `malloc_usable_size` would say.
    pub usable: u64,
    /// In use, or how it is free.
    pub state: ChunkState,
    /// Index in `GlibcHeap::arenas`; `Chunk::MMAPPED` for a chunk with a mapping of its own.
    pub arena: u16,
}

impl Chunk {
    /// `arena` of a chunk that malloc took from mmap directly.
    pub const MMAPPED: u16 = u16::MAX;

    /// One past the last usable byte.
    #[must_use]
    pub fn end(&self) -> Addr {
        self.addr.add(self.usable)
    }
}
