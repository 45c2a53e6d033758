//! Types against the compiler: read, compared, converted, printed.

mod diff;
mod live;
#[path = "../../../image/tests/support/mod.rs"]
mod procs;
mod read;
mod support;
