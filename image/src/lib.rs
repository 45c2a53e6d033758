//! The image of a process tree: schema, container, pages, memory views, ELF files and stack unwinding.
//!
//! Everything here is offline: no live process is touched, and nothing needs privileges.
#![deny(unsafe_code)]

mod addr;
mod memory;
/// The messages of `schema/*.proto`.
#[allow(missing_docs, clippy::all)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/mcr.rs"));
}
mod regs;

pub use addr::{Addr, Fd, LinkAddr, Pid, Tid};
pub use memory::{Memory, MemoryError, Region};
pub use regs::Regs;
