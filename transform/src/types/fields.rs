//! Members of a record as the source names them: anonymous structs are seen through.

use super::model::{Bits, Record, RecordKind, TypeId, TypeModel};

/// A member by its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// "limits.soft"; empty for an anonymous union kept whole.
    pub path: String,
    pub ty: TypeId,
    pub offset: u64,
    pub bits: Option<Bits>,
    /// Inside an anonymous union.
    pub in_union: bool,
}

impl Field {
    /// First bit and one past the last.
    pub fn span(&self, m: &TypeModel) -> (u64, u64) {
        match self.bits {
            Some(b) => (b.start, b.start.saturating_add(b.width.into())),
            None => {
                let start = self.offset.saturating_mul(8);
                (start, start.saturating_add(m.size_of(self.ty).saturating_mul(8)))
            }
        }
    }
}

/// How anonymous unions are treated.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unions {
    /// As one field without a name.
    Whole,
    /// Their members are fields.
    Open,
}

/// The fields of a record.
pub(super) fn fields(m: &TypeModel, r: &Record, unions: Unions) -> Vec<Field> {
    let mut out = Vec::new();
    collect(m, r, 0, unions, r.kind == RecordKind::Union, &mut out);
    out
}

fn collect(m: &TypeModel, r: &Record, base: u64, unions: Unions, in_union: bool, out: &mut Vec<Field>) {
    for f in &r.members {
        let offset = base.saturating_add(f.offset);
        match (&f.name, m.record(f.ty)) {
            (None, Some(inner)) if inner.kind == RecordKind::Struct || unions == Unions::Open => {
                collect(m, inner, offset, unions, in_union || inner.kind == RecordKind::Union, out);
            }
            (name, _) => out.push(Field {
                path: name.as_deref().unwrap_or("").to_owned(),
                ty: f.ty,
                offset,
                bits: f.bits.map(|b| Bits { start: b.start.saturating_add(base.saturating_mul(8)), ..b }),
                in_union,
            }),
        }
    }
}

/// Fields of embedded structs, with dotted paths, down to `depth`.
pub(super) fn nested(m: &TypeModel, of: &[Field], depth: u32) -> Vec<Field> {
    let mut out = Vec::new();
    for f in of.iter().filter(|f| !f.path.is_empty() && depth > 0) {
        let Some(r) = m.record(f.ty).filter(|r| r.kind == RecordKind::Struct) else { continue };
        let inner: Vec<Field> = fields(m, r, Unions::Whole)
            .into_iter()
            .map(|i| Field {
                path: if i.path.is_empty() { String::new() } else { format!("{}.{}", f.path, i.path) },
                offset: f.offset.saturating_add(i.offset),
                bits: i.bits.map(|b| Bits { start: b.start.saturating_add(f.offset.saturating_mul(8)), ..b }),
                ..i
            })
            .collect();
        out.extend(nested(m, &inner, depth - 1));
        out.extend(inner);
    }
    out
}
