//! From a booted host and a patch to the list of writes that joins them. Everything in here is a pure
//! function over memory views: no process is touched.

pub mod globals;
pub mod input;
pub mod kernel;
pub mod libc;
pub mod locals;
pub mod malloc;
mod malloc_check;
mod output;

pub mod overlay;
pub mod pairs;
pub mod state;

pub use input::{BootEpoll, BootFrame, BootModule, Booted, FdMatch, NewThread, Span};
pub use output::{KernelCall, LinkStats, MemWrite, Refusal, RegWrite, WriteList};

use mcr_image::proto;

/// A finding of this step.
fn finding(severity: proto::Severity, code: &str, message: String, path: &str) -> proto::Finding {
    proto::Finding {
        severity: severity as i32,
        code: code.to_owned(),
        message,
        path: path.to_owned(),
        ..proto::Finding::default()
    }
}
