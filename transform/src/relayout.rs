//! Bytes of an old type in the layout of the new one.

use crate::types::{TypeId, Variable};
use std::ops::Range;

/// Bytes in the new layout.
#[derive(Clone, Debug, Default)]
pub(crate) struct Converted {
    pub bytes: Vec<u8>,
    /// Ranges that nothing old fills: members that only the new type has.
    pub fresh: Vec<Range<u64>>,
    /// What could not be carried exactly.
    pub problems: Vec<Problem>,
}

/// A value that does not fit, a member that is dropped, a union nobody explained.
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    pub code: &'static str,
    pub refusal: bool,
    pub message: String,
    pub next_step: String,
}

/// How layouts change between the two versions.
pub(crate) trait Relayout: Sync {
    /// The new version's type of that name (and kind).
    fn pair(&self, old: TypeId) -> Option<TypeId>;
    /// Objects of the type have other bytes in the new version (transitively, by value).
    fn changed(&self, old: TypeId, new: TypeId) -> bool;
    /// One object.
    fn convert(&self, old: TypeId, new: TypeId, bytes: &[u8]) -> Converted;
    /// Where the new type has what the old one has at `offset`; `want`: the type that a pointer there expects.
    fn map_offset(&self, old: TypeId, new: TypeId, offset: u64, want: Option<TypeId>) -> Option<u64>;
    /// Where the new type has the member that the old one has at `offset`: of the word itself, not of a pointer to it.
    fn map_slot(&self, old: TypeId, new: TypeId, offset: u64) -> Option<u64>;
    /// `sizeof` in the new version.
    fn size_new(&self, new: TypeId) -> u64;
    /// Offset and element of a flexible array at the end of a new type.
    fn tail_new(&self, new: TypeId) -> Option<(u64, TypeId)>;
    /// Element type of a new array type.
    fn element_new(&self, new: TypeId) -> Option<TypeId>;
    /// Size in the new version of the scalar that the old type has at `offset`.
    fn leaf_new(&self, old: TypeId, new: TypeId, offset: u64) -> Option<u64>;
    /// The value of a matched global that a rule in `[values]` computes.
    fn global_rule(&self, old: &Variable, new: &Variable, bytes: &[u8]) -> Option<Converted>;
    /// The value of a global that only new has, from a rule in `[defaults]`.
    fn global_default(&self, new: &Variable) -> Option<Converted>;
}
