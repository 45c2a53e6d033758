//! Live processes: ptrace, freezing, collecting kernel state, snapshots and dumps.
//!
//! `unsafe` is confined to [`tracee`] and the private `sys` module.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod collect;
mod memory;
pub mod probe;
pub mod procfs;
#[allow(unsafe_code)]
mod sys;
#[allow(unsafe_code)]
pub mod tracee;

pub use memory::ProcessMemory;
pub use sys::{interrupted, set_interrupted};
pub use tracee::{Blocked, Call, Scratch, Stop, TraceError, Tracee, blocked_call};
