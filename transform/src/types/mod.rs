//! Types of a C program: read from DWARF, compared between two versions, converted, printed.

mod dies;
mod error;
pub mod expr;
mod intern;
mod locals;
mod model;
mod names;
pub mod print;
mod read;
mod sections;

pub use error::TypesError;
pub use locals::{Local, LocalPlace};
pub use mcr_image::elf::DebugDirs;
pub use model::{
    Bits, Encoding, Enumeration, Function, Member, Name, Qualifier, Record, RecordKind, SyncKind,
    Type, TypeId, TypeModel, VarPlace, Variable,
};
