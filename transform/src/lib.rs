//! The offline half of an update: types, heap, tracing, plan and patch.
#![forbid(unsafe_code)]

mod carry_fix;
mod diff;
mod entry;
mod error;
pub mod heap;
mod layout;
pub mod patch;
pub mod plan;
mod reach;
mod relayout;
mod resolve;
mod scan;
mod space;
mod trace;
pub mod types;
pub mod verify;

pub use entry::{
    Loaded, Options, Prepared, image_modules, plan_loaded, plan_process, refuse, transform,
    transform_process, transform_with_findings,
};
pub use error::{Refusal, TransformError};
pub use patch::PatchedMemory;
