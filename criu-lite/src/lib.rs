//! Live processes: ptrace, freezing, collecting kernel state, snapshots and dumps.
//!
//! `unsafe` is confined to [`tracee`], the private `sys` module and single calls in [`collect`].
#![deny(unsafe_code)]

pub mod collect;
pub mod dump;
pub mod freeze;
mod memory;
pub mod modules;
pub mod probe;
pub mod procfs;
pub mod quiesce;
mod snapshot;
#[allow(unsafe_code)]
mod sys;
mod threads;
#[allow(unsafe_code)]
pub mod tracee;

pub use collect::{CollectError, CollectOptions, Collected};
pub use freeze::{FreezeError, FreezeOptions, Frozen, await_end, reap_hidden, tids};
pub use memory::ProcessMemory;
pub use quiesce::{QuiesceError, QuiesceOptions, ThreadState};
pub use snapshot::{own_pages, same_pages};
pub use sys::{interrupted, pidfd_getfd, pidfd_open, set_interrupted};
pub use tracee::{Agent, Blocked, Call, CloneFlags, Resume, Scratch, Stop, TraceError, Tracee, blocked_call};
