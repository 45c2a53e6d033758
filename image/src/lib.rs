//! The image of a process tree: schema, container, pages, memory views, ELF files and stack unwinding.
//!
//! Everything here is offline: no live process is touched, and nothing needs privileges.
#![deny(unsafe_code)]

mod addr;
mod blocks;
mod cache;
mod core;
pub mod elf;
mod error;
mod format;
mod hash;
mod image;
mod image_memory;
mod map;
mod memory;
mod modules;
mod output;
mod pool;
/// The messages of `schema/*.proto`.
#[allow(missing_docs, clippy::all)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/mcr.rs"));
}
mod regs;
pub mod syscalls;
pub mod unwind;
mod update;
mod wire;
mod writer;

pub use self::core::{export_core, export_core_file};
pub use addr::{Addr, Fd, LinkAddr, Pid, Tid};
pub use blocks::{Blocks, ReadBlocks};
pub use elf::{DebugDirs, ElfError, ElfFile};
pub use error::ImageError;
pub use format::{PAGE, RecordKind};
pub use hash::{FastMap, FastSet, WordHasher};
pub use image::Image;
pub use image_memory::{ImageMemory, Stored};
pub use memory::{Memory, MemoryError, Region};
pub use modules::{Module, ModuleMap, Role, auxv_value, tls_block};
pub use regs::Regs;
pub use unwind::{End, Frame, Unwound, base_name, proto_signature, signature, unwind};
pub use writer::{ImageWriter, WriterOptions, Written, is_zero};
