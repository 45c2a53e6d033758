//! What changed between two versions, in words. The silent killers first.

use super::diff::{LayoutDiff, renumbered};
use super::fields::{Field, Unions, fields};
use super::model::{Encoding, Enumeration, RecordKind, Type, TypeId};
use serde::Serialize;
use std::collections::HashSet;

/// What kind of change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum ChangeKind {
    // Bytes keep their size and change their meaning.
    SameSizeOtherMeaning,
    PaddingBecameField,
    EnumRenumbered,
    SignednessChanged,
    BitfieldMoved,
    UnionChanged,
    KindChanged,
    // Visible in the size or the offsets.
    Added,
    Removed,
    Renamed,
    Moved,
    Widened,
    Narrowed,
    ArrayGrown,
    ArrayShrunk,
    EmbeddedChanged,
    PointerTargetChanged,
    EnumAdded,
    EnumRemoved,
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Which kind.
    pub kind: ChangeKind,
    /// The member or constant.
    pub member: Option<String>,
    /// For people.
    pub text: String,
}

/// All differences of one type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TypeDiff {
    /// "struct session".
    pub name: String,
    /// In the old model.
    pub old: TypeId,
    /// In the new model.
    pub new: TypeId,
    /// In bytes.
    pub old_size: u64,
    /// In bytes.
    pub new_size: u64,
    /// The size is the same, and yet old bytes are wrong in the new version.
    pub silent: bool,
    /// Old objects must be converted.
    pub layout_changed: bool,
    /// Worst first.
    pub changes: Vec<Change>,
}

pub(super) fn compare(d: &LayoutDiff<'_>) -> Vec<TypeDiff> {
    let mut out = Vec::new();
    for o in d.old.ids() {
        // Typedefs matter where they change what they stand for.
        let relevant = matches!(&d.old[o], Type::Record(_) | Type::Enum(_) | Type::Typedef { .. });
        let Some(n) = d.pair(o).filter(|_| relevant) else { continue };
        let name = d.old.type_name(o).unwrap_or_else(|| nameless(d, o));
        let changes = match (&d.old[o], &d.new[n]) {
            (Type::Record(a), Type::Record(b)) if a.incomplete || b.incomplete => Vec::new(),
            (Type::Record(a), Type::Record(b)) if a.kind == b.kind => records(d, o, n),
            (Type::Enum(a), Type::Enum(b)) => enums(a, b),
            (Type::Typedef { to: a, .. }, Type::Typedef { to: b, .. }) => typedefs(d, *a, *b),
            (Type::Typedef { .. }, _) | (_, Type::Typedef { .. }) => Vec::new(),
            _ => vec![Change {
                kind: ChangeKind::KindChanged,
                member: None,
                text: format!("was {}, is {}", d.old.display(o), d.new.display(n)),
            }],
        };
        if changes.is_empty() {
            continue;
        }
        let (old_size, new_size) = (d.old.size_of(o), d.new.size_of(n));
        let layout_changed = !d.same_layout(o, n);
        let meaning = changes.iter().any(|c| c.kind <= ChangeKind::KindChanged);
        let silent = old_size == new_size && (layout_changed || meaning);
        let mut t = TypeDiff { name, old: o, new: n, old_size, new_size, silent, layout_changed, changes };
        t.changes.sort_by_key(|c| c.kind);
        out.push(t);
    }
    out.sort_by(|a, b| {
        let key = |t: &TypeDiff| (!t.silent, !t.layout_changed, t.changes.first().map(|c| c.kind));
        key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
    });
    out.dedup_by(|a, b| a.name == b.name && a.changes == b.changes);
    out
}

fn nameless(d: &LayoutDiff<'_>, o: TypeId) -> String {
    // An anonymous record goes by the first one that holds it.
    for id in d.old.ids() {
        if let Type::Record(r) = &d.old[id]
            && let Some(m) = r.members.iter().find(|m| d.old.resolve(m.ty) == o)
        {
            let holder = d.old.type_name(id).unwrap_or_else(|| r.kind.keyword().into());
            return format!("{holder}.{}", m.name.as_deref().unwrap_or("(anonymous)"));
        }
    }
    d.old.display(o)
}

fn typedefs(d: &LayoutDiff<'_>, a: TypeId, b: TypeId) -> Vec<Change> {
    // The target's own change is shown under its own name.
    let both_named = matches!(
        (d.old.strip(a), d.new.strip(b)),
        (Type::Record(_), Type::Record(_)) | (Type::Enum(_), Type::Enum(_))
    );
    if both_named {
        return Vec::new();
    }
    field_change(d, "", a, b).into_iter().collect()
}

fn enums(a: &Enumeration, b: &Enumeration) -> Vec<Change> {
    let mut out = Vec::new();
    if renumbered(a, b) {
        for (n, v) in &a.constants {
            if let Some(w) = b.value_of(n).filter(|w| w != v) {
                let text = format!("{n} was {v}, is {w}");
                out.push(Change { kind: ChangeKind::EnumRenumbered, member: Some(n.to_string()), text });
            }
        }
    }
    for (n, v) in &a.constants {
        if b.value_of(n).is_none() {
            let now = b.name_of(*v).map(|o| format!("; {v} is now {o}")).unwrap_or_default();
            let kind =
                if now.is_empty() { ChangeKind::EnumRemoved } else { ChangeKind::SameSizeOtherMeaning };
            out.push(Change { kind, member: Some(n.to_string()), text: format!("{n} = {v} is gone{now}") });
        }
    }
    for (n, v) in &b.constants {
        if a.value_of(n).is_none() {
            let text = format!("{n} = {v} is new");
            out.push(Change { kind: ChangeKind::EnumAdded, member: Some(n.to_string()), text });
        }
    }
    out
}

fn records(d: &LayoutDiff<'_>, o: TypeId, n: TypeId) -> Vec<Change> {
    let (old, new) = (d.old, d.new);
    let (Some(a), Some(b)) = (old.record(o), new.record(n)) else { return Vec::new() };
    let (x, y) = (fields(old, a, Unions::Open), fields(new, b, Unions::Open));
    let holder = old.type_name(o).unwrap_or_default();
    let union = a.kind == RecordKind::Union;
    let mut out = Vec::new();
    let mut continued = HashSet::new();
    for f in x.iter().filter(|f| !f.path.is_empty()) {
        let want = d.rules.new_field(&holder, &f.path);
        let shown = if want == f.path { f.path.clone() } else { format!("{} (now {want})", f.path) };
        let Some(g) = y.iter().find(|g| g.path == want) else {
            if want != f.path {
                continued.insert(want.to_owned());
                out.push(change(ChangeKind::Renamed, &f.path, format!("{} is now {want}, by rule", f.path)));
                continue;
            }
            let heir = y
                .iter()
                .find(|g| !union && !x.iter().any(|f| f.path == g.path) && g.span(new) == f.span(old));
            out.push(match heir {
                Some(g) => change(
                    ChangeKind::SameSizeOtherMeaning,
                    &f.path,
                    format!(
                        "{} at offset {} was replaced by {}",
                        old.declare(f.ty, &f.path),
                        f.offset,
                        new.declare(g.ty, &g.path)
                    ),
                ),
                None => change(
                    ChangeKind::Removed,
                    &f.path,
                    format!("{} is gone (offset {})", old.declare(f.ty, &f.path), f.offset),
                ),
            });
            continue;
        };
        continued.insert(g.path.clone());
        if want != f.path {
            out.push(change(ChangeKind::Renamed, &f.path, format!("{} is now {want}, by rule", f.path)));
        }
        if f.bits != g.bits {
            let bits = |f: &Field| match f.bits {
                Some(b) => format!("bits {}..{}", b.start, b.start + u64::from(b.width)),
                None => format!("offset {}", f.offset),
            };
            out.push(change(
                ChangeKind::BitfieldMoved,
                &f.path,
                format!("{shown} moved from {} to {}", bits(f), bits(g)),
            ));
        } else if f.offset != g.offset && f.bits.is_none() {
            out.push(change(
                ChangeKind::Moved,
                &f.path,
                format!("{shown} moved from offset {} to {}", f.offset, g.offset),
            ));
        }
        out.extend(field_change(d, &shown, f.ty, g.ty).map(|c| Change { member: Some(f.path.clone()), ..c }));
    }
    for g in y.iter().filter(|g| !g.path.is_empty() && !continued.contains(&g.path)) {
        if d.rules.old_field(&holder, &g.path) != g.path {
            continue;
        }
        let span = g.span(new);
        let free = x.iter().all(|f| {
            let s = f.span(old);
            s.1 <= span.0 || span.1 <= s.0
        });
        let in_padding =
            !union && !g.in_union && free && span.1 <= a.size.saturating_mul(8) && a.size == b.size;
        let what = new.declare(g.ty, &g.path);
        out.push(if in_padding {
            change(
                ChangeKind::PaddingBecameField,
                &g.path,
                format!("{what} now lies where padding was (offset {})", g.offset),
            )
        } else {
            change(ChangeKind::Added, &g.path, format!("{what} is new (offset {})", g.offset))
        });
    }
    // A union, named or not, whose bytes cannot be taken as they are.
    if union && !d.same_layout(o, n) && a.size == b.size {
        out.push(Change {
            kind: ChangeKind::UnionChanged,
            member: None,
            text: "its members differ at the same size".into(),
        });
    }
    out
}

fn change(kind: ChangeKind, member: &str, text: String) -> Change {
    Change { kind, member: Some(member.to_owned()), text }
}

/// How a member's type changed.
pub(super) fn field_change(d: &LayoutDiff<'_>, name: &str, a: TypeId, b: TypeId) -> Option<Change> {
    use ChangeKind as K;
    let (old, new) = (d.old, d.new);
    let (o, n) = (old.resolve(a), new.resolve(b));
    let (was, is) = (old.display(a), new.display(b));
    let named = if name.is_empty() { String::new() } else { format!("{name}: ") };
    let make = |kind, text: String| Some(Change { kind, member: None, text: format!("{named}{text}") });
    match (&old[o], &new[n]) {
        (Type::Pointer(x), Type::Pointer(y)) => {
            let same = d.pair(*x).is_some_and(|p| new.resolve(p) == new.resolve(*y))
                || old.display(*x) == new.display(*y);
            let function = |m: &super::TypeModel, t| matches!(m.strip(t), Type::Function { .. });
            // Signatures of functions differ by their parameters' types, which are shown themselves.
            let both = function(old, *x) && function(new, *y) && old.declare(o, "") == new.declare(n, "");
            if same || both {
                None
            } else {
                make(
                    K::PointerTargetChanged,
                    format!("pointed at {}, points at {}", old.display(*x), new.display(*y)),
                )
            }
        }
        (Type::Array { element: x, count: c }, Type::Array { element: y, count: e }) => {
            let (c, e) = (c.unwrap_or(0), e.unwrap_or(0));
            match c.cmp(&e) {
                std::cmp::Ordering::Less => make(K::ArrayGrown, format!("{c} elements, now {e}")),
                std::cmp::Ordering::Greater => make(K::ArrayShrunk, format!("{c} elements, now {e}")),
                std::cmp::Ordering::Equal => field_change(d, name, *x, *y),
            }
        }
        (Type::Record(x), Type::Record(y)) => {
            if x.kind != y.kind {
                return make(K::KindChanged, format!("was {was}, is {is}"));
            }
            if d.same_layout(o, n) {
                let same = d.pair(o).is_none_or(|p| p == n);
                return if same {
                    None
                } else {
                    make(K::SameSizeOtherMeaning, format!("was {was}, is {is}"))
                };
            }
            make(K::EmbeddedChanged, format!("{was} changed"))
        }
        (Type::Enum(_), Type::Enum(_)) if d.same_layout(o, n) => None,
        (Type::Enum(_), Type::Enum(_)) => make(K::EmbeddedChanged, format!("{was} changed")),
        (Type::Function { .. }, Type::Function { .. }) | (Type::Void, Type::Void) => None,
        (x, y) => {
            let integer = |t: &Type| match t {
                Type::Base { encoding, .. } if encoding.is_integer() => Some(*encoding),
                Type::Enum(e) => Some(if e.signed { Encoding::Signed } else { Encoding::Unsigned }),
                _ => None,
            };
            let float = |t: &Type| matches!(t, Type::Base { encoding: Encoding::Float, .. });
            let (s, t) = (old.size_of(o), new.size_of(n));
            let comparable = (integer(x).is_some() && integer(y).is_some()) || (float(x) && float(y));
            if !comparable {
                let kind = match (x, y) {
                    (Type::Base { encoding: p, size: s, .. }, Type::Base { encoding: q, size: t, .. })
                        if (p, s) == (q, t) =>
                    {
                        return None;
                    }
                    _ => K::KindChanged,
                };
                return make(kind, format!("was {was}, is {is}"));
            }
            if s < t {
                make(K::Widened, format!("{was} became {is}"))
            } else if s > t {
                make(K::Narrowed, format!("{was} became {is}"))
            } else if integer(x).map(Encoding::is_signed) != integer(y).map(Encoding::is_signed)
                && !(matches!(x, Type::Enum(_)) && matches!(y, Type::Enum(_)))
            {
                make(K::SignednessChanged, format!("{was} became {is}"))
            } else {
                None
            }
        }
    }
}
