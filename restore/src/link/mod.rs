//! From a booted host and a patch to the list of writes that joins them. Everything in here is a pure
//! function over memory views: no process is touched.

pub mod input;
mod output;

pub use input::{BootEpoll, BootFrame, BootModule, Booted, FdMatch, NewThread, Span};
pub use output::{KernelCall, LinkStats, MemWrite, Refusal, RegWrite, WriteList};
