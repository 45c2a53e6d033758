//! The layout diff, as the plan sees it.

use crate::relayout::{Converted, Problem, Relayout};
use crate::types::{LayoutDiff, RecordKind, Type, TypeDiff, TypeId, TypeModel, Variable};
use mcr_image::proto;
use mcr_plugin::Rules;

/// The layout diff of two versions and its record for the patch.
pub(crate) fn of<'m>(
    old: &'m TypeModel,
    new: &'m TypeModel,
    rules: &'m Rules,
) -> (Diff<'m>, Vec<proto::TypeChange>) {
    let diff = LayoutDiff::new(old, new, rules);
    let changes = diff.changes().iter().map(record).collect();
    (Diff { diff }, changes)
}

/// Rules about things that neither program has, as findings that refuse.
pub(crate) fn rule_mistakes(old: &TypeModel, new: &TypeModel, rules: &Rules) -> Vec<proto::Finding> {
    if rules.is_empty() {
        return Vec::new();
    }
    let found = LayoutDiff::new(old, new, rules).rule_mistakes().into_iter();
    found
        .map(|m| proto::Finding {
            severity: proto::Severity::Refusal.into(),
            code: "rule-about-nothing".into(),
            message: m.message,
            next_step: "correct the name, or take the rule out; `mcr types` shows the names of both versions"
                .into(),
            ..Default::default()
        })
        .collect()
}

/// Two versions of a program, as the plan asks.
pub(crate) struct Diff<'m> {
    diff: LayoutDiff<'m>,
}

impl<'m> Diff<'m> {
    /// The comparison itself.
    pub(crate) fn layout(&self) -> &LayoutDiff<'m> {
        &self.diff
    }
}

/// A scalar local has no type of a name to be paired by: `void` stands for "as it is".
const AS_IT_IS: TypeId = TypeId::VOID;

impl Relayout for Diff<'_> {
    fn pair(&self, old: TypeId) -> Option<TypeId> {
        self.diff.pair(old)
    }
    fn changed(&self, old: TypeId, new: TypeId) -> bool {
        new != AS_IT_IS && !self.diff.same_layout(old, new)
    }
    fn convert(&self, old: TypeId, new: TypeId, bytes: &[u8]) -> Converted {
        if !self.changed(old, new) {
            return Converted { bytes: bytes.to_vec(), ..Converted::default() };
        }
        let done = self.diff.convert(old, new, bytes);
        let fresh = done.native_ranges();
        let dropped = done.dropped.iter().filter(|d| !d.is_zero()).map(|d| {
            let name = self.diff.old().display(old);
            Problem {
                code: "field-dropped",
                refusal: false,
                message: format!("{name}.{} is not in the new version; its value is dropped", d.path),
                next_step: format!("if it was renamed: [rename.fields] \"{name}.{}\" = \"…\"", d.path),
            }
        });
        let dropped: Vec<Problem> = dropped.collect();
        let mut out = plain(done);
        out.fresh = fresh;
        out.problems.extend(dropped);
        out
    }
    fn map_offset(&self, old: TypeId, new: TypeId, offset: u64, want: Option<TypeId>) -> Option<u64> {
        if !self.changed(old, new) {
            return Some(offset);
        }
        self.diff.map_offset(old, new, offset, want)
    }
    fn map_slot(&self, old: TypeId, new: TypeId, offset: u64) -> Option<u64> {
        if !self.changed(old, new) {
            return Some(offset);
        }
        self.diff.map_slot(old, new, offset)
    }
    fn size_new(&self, new: TypeId) -> u64 {
        self.diff.new_model().size_of(new)
    }
    fn tail_new(&self, new: TypeId) -> Option<(u64, TypeId)> {
        tail(self.diff.new_model(), new)
    }
    fn element_new(&self, new: TypeId) -> Option<TypeId> {
        match self.diff.new_model().strip(new) {
            Type::Array { element, .. } => Some(*element),
            _ => None,
        }
    }
    fn global_rule(&self, old: &Variable, new: &Variable, bytes: &[u8]) -> Option<Converted> {
        self.diff.has_global_rule(new).then(|| plain(self.diff.convert_global(old, new, bytes)))
    }
    fn global_default(&self, new: &Variable) -> Option<Converted> {
        self.diff.default_global(new).map(plain)
    }
    fn leaf_new(&self, old: TypeId, new: TypeId, offset: u64) -> Option<u64> {
        let at = self.map_slot(old, new, offset)?;
        scalar_at(self.diff.new_model(), new, at)
    }
}

/// Bytes and problems as the plan knows them.
fn plain(done: crate::types::Converted) -> Converted {
    let told = done.problems.into_iter().map(|p| Problem {
        code: p.code,
        refusal: p.refusal,
        message: p.message,
        next_step: p.next_step,
    });
    Converted { bytes: done.bytes, fresh: Vec::new(), problems: told.collect() }
}

/// The flexible tail of a record: a last member that is an array of 0, 1 or no stated elements.
pub(crate) fn tail(m: &TypeModel, ty: TypeId) -> Option<(u64, TypeId)> {
    let r = m.record(ty).filter(|r| r.kind == RecordKind::Struct)?;
    let last = r.members.last()?;
    match m.strip(last.ty) {
        Type::Array { element, count } if count.unwrap_or(0) <= 1 => Some((last.offset, *element)),
        Type::Record(_) => tail(m, last.ty).map(|(o, e)| (last.offset + o, e)),
        _ => None,
    }
}

/// Size of the scalar (or union) that a type has at an offset.
fn scalar_at(m: &TypeModel, ty: TypeId, offset: u64) -> Option<u64> {
    match m.strip(ty) {
        Type::Record(r) if r.kind == RecordKind::Struct => {
            let x = r
                .members
                .iter()
                .filter(|x| x.bits.is_none())
                .find(|x| x.offset <= offset && offset < x.offset + m.size_of(x.ty))?;
            scalar_at(m, x.ty, offset - x.offset)
        }
        Type::Array { element, .. } => scalar_at(m, *element, offset.checked_rem(m.size_of(*element))?),
        _ => (offset == 0).then(|| m.size_of(ty)),
    }
}

/// For the patch.
fn record(d: &TypeDiff) -> proto::TypeChange {
    proto::TypeChange {
        type_name: d.name.clone(),
        kind: d.changes.first().map_or(String::new(), |c| kebab(&format!("{:?}", c.kind))),
        details: d.changes.iter().map(|c| c.text.clone()).collect(),
        old_size: d.old_size,
        new_size: d.new_size,
        silent: d.silent,
        live_objects: 0,
    }
}

/// "EnumRenumbered" as "enum-renumbered".
fn kebab(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push('-');
        }
        out.extend(c.to_lowercase());
    }
    out
}
