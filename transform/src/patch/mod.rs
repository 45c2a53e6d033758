//! The patch as memory.

mod memory;

pub use memory::PatchedMemory;
