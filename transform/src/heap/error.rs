//! What can be wrong with a heap.

use mcr_image::{Addr, MemoryError};

/// Why the heap of a process could not be read. None of these is survivable: without exact chunks there is
/// no proof that an object ends where it is believed to end.
#[derive(Debug, thiserror::Error)]
pub enum HeapError {
    /// No `main_arena` in any module.
    #[error(
        "no glibc malloc state found in the writable data of any module, although the process has a heap \
         at {heap}; a statically linked or foreign allocator is not understood yet"
    )]
    NoArena {
        /// Start of the brk heap.
        heap: Addr,
    },
    /// More than one thing looks like `main_arena`.
    #[error("{first} and {second} both look like glibc's main_arena: two copies of libc in one process?")]
    TwoArenas {
        /// One candidate.
        first: Addr,
        /// The other.
        second: Addr,
    },
    /// The ring of arenas does not close, or an arena is not inside a heap of its own.
    #[error("arena at {arena}: {why}")]
    Arena {
        /// The arena.
        arena: Addr,
        /// What is wrong.
        why: String,
    },
    /// Somebody holds an arena's lock.
    #[error(
        "a thread is inside malloc or free: the lock of the arena at {arena} is held ({value}); let the \
         process run to a quiescent point and try again"
    )]
    InMalloc {
        /// The arena.
        arena: Addr,
        /// The lock word.
        value: u32,
    },
    /// A chunk contradicts its neighbours.
    #[error("heap chunk {chunk} (in {segment}): {why}; the heap is corrupt or not glibc's")]
    Chunk {
        /// The chunk's header.
        chunk: Addr,
        /// The segment that holds it.
        segment: String,
        /// What is wrong.
        why: String,
    },
    /// A free list contradicts the chunks.
    #[error("{list} of the arena at {arena}: entry {entry}: {why}; the heap is corrupt or not glibc's")]
    List {
        /// Which list.
        list: String,
        /// The arena or thread cache that owns it.
        arena: Addr,
        /// The bad entry.
        entry: Addr,
        /// What is wrong.
        why: String,
    },
    /// No word below the thread pointers looks like `tcache`.
    #[error(
        "the per-thread cache of malloc was not found below the thread pointers ({threads} threads): glibc \
         2.31 to 2.41 are understood"
    )]
    NoTcache {
        /// How many threads were looked at.
        threads: usize,
    },
    /// Memory could not be read.
    #[error("reading the heap: {0}")]
    Memory(#[from] MemoryError),
}
