//! Types against the compiler: read, compared, converted, printed.

mod diff;
mod read;
mod support;
