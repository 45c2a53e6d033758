//! The offline half of an update: types, heap, tracing, plan and patch.
#![forbid(unsafe_code)]

pub mod heap;
pub mod types;
