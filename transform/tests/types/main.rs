//! Types against the compiler: read, compared, converted, printed.

mod read;
mod support;
