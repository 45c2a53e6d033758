//! The pointer-like slots of a type, flattened, for tracing and for evidence.

use crate::types::{RecordKind, SyncKind, Type, TypeId, TypeModel};
use mcr_plugin::Rules;
use std::sync::OnceLock;

/// No type is flattened beyond this many slots; what lies behind stays opaque.
const MAX_SLOTS: usize = 1 << 20;

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlotKind {
    /// A pointer to an object of this type (typedefs and qualifiers removed).
    Pointer(TypeId),
    /// A pointer to a function.
    Function,
    /// `void *`, `char *`, a pointer to an incomplete type.
    Untyped,
    /// `pthread_t`.
    Thread,
    /// `pid_t` (4 bytes).
    Pid,
    /// A synchronisation object of this many bytes.
    Sync(SyncKind, u64),
    /// A union whose live member nobody named, of this many bytes.
    Union(u64),
    /// An enumeration.
    Enum(TypeId),
    /// `_Bool`.
    Bool,
}

/// A slot at an offset.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub offset: u64,
    pub kind: SlotKind,
}

/// The slots of a type, ascending, and its flexible tail.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    pub slots: Vec<Slot>,
    /// Offset and element of a flexible (or one-element trailing) array.
    pub tail: Option<(u64, TypeId)>,
}

/// Slots by type, computed once; may be asked by many threads.
pub(crate) struct Layouts<'m> {
    pub model: &'m TypeModel,
    rules: &'m Rules,
    cache: Vec<OnceLock<Slots>>,
}

impl<'m> Layouts<'m> {
    pub fn new(model: &'m TypeModel, rules: &'m Rules) -> Self {
        Self { model, rules, cache: model.ids().map(|_| OnceLock::new()).collect() }
    }

    pub fn of(&self, ty: TypeId) -> &Slots {
        // pthread_t and friends are typedefs: the name decides, so the cache is by unresolved id.
        self.cache[ty.0 as usize].get_or_init(|| {
            let mut out = Slots::default();
            self.flatten(ty, 0, &mut out, None, 0);
            out.tail = crate::diff::tail(self.model, ty);
            out
        })
    }

    fn flatten(&self, ty: TypeId, at: u64, out: &mut Slots, named: Option<&str>, depth: u32) {
        let m = self.model;
        if out.slots.len() >= MAX_SLOTS || depth > 64 {
            return;
        }
        let mut add = |kind| out.slots.push(Slot { offset: at, kind });
        if let Some(kind) = m.sync_kind(ty) {
            return add(SlotKind::Sync(kind, m.size_of(ty)));
        }
        if m.is_pthread_t(ty) {
            return add(SlotKind::Thread);
        }
        if m.is_pid_t(ty) {
            return add(SlotKind::Pid);
        }
        match m.strip(ty) {
            Type::Pointer(to) => add(self.pointer(*to, named)),
            Type::Enum(_) => add(SlotKind::Enum(m.resolve(ty))),
            Type::Base { encoding: crate::types::Encoding::Bool, .. } => add(SlotKind::Bool),
            Type::Record(r) if r.kind == RecordKind::Union => {
                let first = r.members.first();
                let same =
                    r.members.iter().all(|x| first.is_some_and(|f| m.resolve(f.ty) == m.resolve(x.ty)));
                match first {
                    // One member, or names for the same thing.
                    Some(f) if same && f.bits.is_none() => self.flatten(f.ty, at, out, named, depth + 1),
                    _ => add(SlotKind::Union(r.size)),
                }
            }
            Type::Record(r) => {
                let owner = record_name(m, ty);
                for member in r.members.iter().filter(|x| x.bits.is_none()) {
                    let rule = match (&owner, &member.name) {
                        (Some(o), Some(n)) => self.rules.slot_type(o, n),
                        _ => None,
                    };
                    if rule.is_none() && m.size_of(member.ty) == 0 {
                        continue;
                    }
                    self.flatten(member.ty, at + member.offset, out, rule, depth + 1);
                }
            }
            Type::Array { element, count: Some(n) } => {
                let size = m.size_of(*element);
                let before = out.slots.len();
                if size == 0 || *n == 0 {
                    return;
                }
                self.flatten(*element, at, out, named, depth + 1);
                let one: Vec<Slot> = out.slots[before..].to_vec();
                if one.is_empty() {
                    return;
                }
                for i in 1..*n {
                    if out.slots.len() + one.len() > MAX_SLOTS {
                        return;
                    }
                    out.slots.extend(one.iter().map(|s| Slot { offset: s.offset + i * size, kind: s.kind }));
                }
            }
            _ => {
                // A rule may say that an integer is a pointer.
                if named.is_some() && m.size_of(ty) == 8 {
                    add(self.pointer(TypeId::VOID, named));
                }
            }
        }
    }

    /// What a pointer slot is; `named`: the type that a rule gives for it.
    pub fn pointer(&self, to: TypeId, named: Option<&str>) -> SlotKind {
        let m = self.model;
        if let Some(name) = named {
            let bare = name.trim_end_matches(['*', ' ']);
            return match m.find_type(bare) {
                Some(t) if name != "opaque" => SlotKind::Pointer(m.resolve(t)),
                _ => SlotKind::Untyped,
            };
        }
        let target = m.resolve(to);
        match &m[target] {
            Type::Function { .. } => SlotKind::Function,
            Type::Record(r) if !r.incomplete && r.size > 0 => SlotKind::Pointer(target),
            Type::Pointer(_) => SlotKind::Pointer(to),
            Type::Array { element, count: Some(_) } if self.carries_types(*element) => {
                SlotKind::Pointer(target)
            }
            Type::Enum(_) => SlotKind::Pointer(target),
            _ => SlotKind::Untyped,
        }
    }

    fn carries_types(&self, ty: TypeId) -> bool {
        match self.model.strip(ty) {
            Type::Record(_) | Type::Pointer(_) | Type::Enum(_) => true,
            Type::Array { element, .. } => self.carries_types(*element),
            _ => false,
        }
    }

    /// Whether an object of type `outer` has a `inner` at `offset` (a member, an element, or itself).
    pub fn has_at(&self, outer: TypeId, offset: u64, inner: TypeId) -> bool {
        let m = self.model;
        let (outer, inner) = (m.resolve(outer), m.resolve(inner));
        if offset == 0 && self.same(outer, inner) {
            return true;
        }
        match &m[outer] {
            Type::Record(r) => r.members.iter().filter(|x| x.bits.is_none()).any(|x| {
                let size = m.size_of(x.ty);
                x.offset <= offset
                    && (offset < x.offset + size || (size == 0 && self.is_tail(x.ty)))
                    && self.has_at(x.ty, offset - x.offset, inner)
            }),
            Type::Array { element, count } => {
                let size = m.size_of(*element);
                size > 0
                    && count.is_none_or(|n| n <= 1 || offset < n * size)
                    && self.has_at(*element, offset % size, inner)
            }
            _ => false,
        }
    }

    fn is_tail(&self, ty: TypeId) -> bool {
        matches!(self.model.strip(ty), Type::Array { count: None | Some(0), .. })
    }

    /// The same type: one id, or one name and one size (a type that two units define alike).
    pub fn same(&self, a: TypeId, b: TypeId) -> bool {
        let m = self.model;
        let (a, b) = (m.resolve(a), m.resolve(b));
        if a == b {
            return true;
        }
        match (&m[a], &m[b]) {
            (Type::Pointer(x), Type::Pointer(y)) => {
                m.resolve(*x) == m.resolve(*y)
                    || (record_name(m, *x).is_some() && record_name(m, *x) == record_name(m, *y))
            }
            (Type::Record(_), Type::Record(_)) => {
                m.size_of(a) == m.size_of(b)
                    && record_name(m, a).is_some()
                    && record_name(m, a) == record_name(m, b)
            }
            (Type::Enum(x), Type::Enum(y)) => x.constants == y.constants && x.size == y.size,
            _ => false,
        }
    }

    /// "next", "limits.soft", "slot[3].key": the member at an offset, for people.
    pub fn field_path(&self, ty: TypeId, offset: u64) -> String {
        let m = self.model;
        let mut out = String::new();
        let (mut ty, mut offset) = (ty, offset);
        for _ in 0..32 {
            if m.sync_kind(ty).is_some() {
                break;
            }
            match m.strip(ty) {
                Type::Record(r) => {
                    let Some(x) = r
                        .members
                        .iter()
                        .filter(|x| x.offset <= offset && x.bits.is_none())
                        .find(|x| offset < x.offset + m.size_of(x.ty).max(1))
                    else {
                        break;
                    };
                    if let Some(n) = &x.name {
                        if !out.is_empty() {
                            out.push('.');
                        }
                        out.push_str(n);
                    }
                    offset -= x.offset;
                    ty = x.ty;
                }
                Type::Array { element, .. } if m.size_of(*element) > 0 => {
                    let size = m.size_of(*element);
                    out.push_str(&format!("[{}]", offset / size));
                    offset %= size;
                    ty = *element;
                }
                _ => break,
            }
        }
        if offset != 0 {
            out.push_str(&format!("+{offset:#x}"));
        }
        out
    }
}

/// "struct foo", or the typedef that names an untagged record.
pub(crate) fn record_name(m: &TypeModel, ty: TypeId) -> Option<String> {
    match m.strip(ty) {
        Type::Record(r) => match (&r.tag, &r.alias) {
            (Some(t), _) => Some(format!("{} {t}", r.kind.keyword())),
            (None, Some(a)) => Some(a.to_string()),
            _ => None,
        },
        Type::Enum(e) => match (&e.tag, &e.alias) {
            (Some(t), _) => Some(format!("enum {t}")),
            (None, Some(a)) => Some(a.to_string()),
            _ => None,
        },
        _ => None,
    }
}
