//! Types of a C program: read from DWARF, compared between two versions, converted, printed.

mod changes;
mod convert;
mod dies;
mod diff;
mod error;
pub mod expr;
mod fields;
mod intern;
mod locals;
mod mapping;
mod model;
mod names;
mod pairing;
pub mod print;
mod read;
mod report;
mod rule_names;
mod sections;
mod slots;

pub use changes::{Change, ChangeKind, TypeDiff};
pub use convert::{Converted, Dropped, Native, PointerMove, Problem};
pub use diff::LayoutDiff;
pub use error::TypesError;
pub use locals::{Local, LocalPlace};
pub use mcr_image::elf::DebugDirs;
pub use model::{
    Bits, Encoding, Enumeration, Function, Member, Name, Qualifier, Record, RecordKind, SyncKind, Type,
    TypeId, TypeModel, VarPlace, Variable,
};
pub use report::{Compared, GlobalChange, GlobalRow, NeedsRule, TypesReport};
pub use rule_names::RuleMistake;
pub use slots::{MAX_SLOTS, Slot, SlotKind};

#[cfg(test)]
mod hostile_tests;
