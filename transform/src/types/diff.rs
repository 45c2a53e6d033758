//! How layouts differ between two versions.

use super::changes::{TypeDiff, compare};
use super::fields::{Unions, fields};
use super::mapping::Plan;
use super::model::{Enumeration, Function, RecordKind, Type, TypeId, TypeModel, Variable};
use super::pairing::{Pairing, pair_function, pair_global};
use mcr_plugin::Rules;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

/// Two versions of a program, type by type. Cheap to ask: answers are remembered.
pub struct LayoutDiff<'m> {
    pub(super) old: &'m TypeModel,
    pub(super) new: &'m TypeModel,
    pub(super) rules: &'m Rules,
    pub(super) pairing: Pairing,
    same: RwLock<HashMap<(TypeId, TypeId), bool>>,
    pub(super) plans: RwLock<HashMap<(TypeId, TypeId), Arc<Plan>>>,
    constants: OnceLock<HashMap<String, i128>>,
}

impl<'m> LayoutDiff<'m> {
    /// Pairs the types of two versions. Nothing is compared yet.
    #[must_use]
    pub fn new(old: &'m TypeModel, new: &'m TypeModel, rules: &'m Rules) -> Self {
        Self {
            old,
            new,
            rules,
            pairing: Pairing::new(old, new, rules),
            same: RwLock::default(),
            plans: RwLock::default(),
            constants: OnceLock::new(),
        }
    }
    /// The old version.
    #[must_use]
    pub fn old(&self) -> &'m TypeModel {
        self.old
    }
    /// The new version.
    #[must_use]
    pub fn new_model(&self) -> &'m TypeModel {
        self.new
    }
    /// The rules in force.
    #[must_use]
    pub fn rules(&self) -> &'m Rules {
        self.rules
    }
    /// The new version's type for an old one: by kind and name, rule, or place in paired types. Pointers,
    /// arrays and qualified types are paired by what they are made of.
    #[must_use]
    pub fn pair(&self, old: TypeId) -> Option<TypeId> {
        self.pairing.get(self.old, old)
    }
    /// The old type that a new struct, union, enum or typedef stands for.
    #[must_use]
    pub fn pair_back(&self, new: TypeId) -> Option<TypeId> {
        self.pairing.back(new)
    }
    /// The new version's variable for an old one.
    #[must_use]
    pub fn pair_global(&self, old: &Variable) -> Option<&'m Variable> {
        pair_global(self.old, self.new, self.rules, old)
    }
    /// The new version's function for an old one.
    #[must_use]
    pub fn pair_function(&self, old: &Function) -> Option<&'m Function> {
        pair_function(self.new, self.rules, old)
    }
    /// The value of an enum constant of the old version.
    pub(super) fn old_constant(&self, name: &str) -> Option<i128> {
        let all = self.constants.get_or_init(|| {
            let mut all = HashMap::new();
            for id in self.old.ids() {
                if let Type::Enum(e) = &self.old[id] {
                    for (n, v) in &e.constants {
                        all.entry(n.to_string()).or_insert(*v);
                    }
                }
            }
            all
        });
        all.get(name).copied()
    }

    /// Whether an old object's bytes are right as they are in the new version: same size, every member at
    /// its place with the same meaning, embedded members included, pointers' targets not. An enum's common
    /// constants must have their values. A rule that computes a member makes it `false`.
    #[must_use]
    pub fn same_layout(&self, old: TypeId, new: TypeId) -> bool {
        let key = (self.old.resolve(old), self.new.resolve(new));
        if let Some(&known) = self.same.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return known;
        }
        let same = self.compare_layout(key.0, key.1);
        self.same.write().unwrap_or_else(PoisonError::into_inner).insert(key, same);
        same
    }

    fn compare_layout(&self, o: TypeId, n: TypeId) -> bool {
        let (old, new) = (self.old, self.new);
        match (&old[o], &new[n]) {
            (Type::Void, Type::Void) | (Type::Function { .. }, Type::Function { .. }) => true,
            (Type::Pointer(_), Type::Pointer(_)) => true,
            (Type::Base { size: a, encoding: x, .. }, Type::Base { size: b, encoding: y, .. }) => {
                use super::Encoding::Bool;
                a == b && (x == y || (x.is_integer() && y.is_integer() && *y != Bool))
            }
            (Type::Enum(a), Type::Enum(b)) => a.size == b.size && !renumbered(a, b),
            (Type::Array { element: a, count: x }, Type::Array { element: b, count: y }) => {
                x == y && self.same_layout(*a, *b)
            }
            (Type::Record(a), Type::Record(b)) => {
                if a.incomplete || b.incomplete || a.kind != b.kind || a.size != b.size {
                    // Two opaque types are only ever pointed to.
                    return a.incomplete && b.incomplete;
                }
                let names = (old.type_name(o).unwrap_or_default(), new.type_name(n).unwrap_or_default());
                let (x, y) = (fields(old, a, Unions::Whole), fields(new, b, Unions::Whole));
                let member = |f: &super::fields::Field| {
                    let want = self.rules.new_field(&names.0, &f.path);
                    let mut at =
                        y.iter().filter(|g| g.path == want && g.offset == f.offset && g.bits == f.bits);
                    at.any(|g| self.same_layout(f.ty, g.ty))
                };
                let computed = || {
                    !self.rules.is_empty() && y.iter().any(|g| self.rules.value(&names.1, &g.path).is_some())
                };
                let count = if a.kind == RecordKind::Union { x.len() <= y.len() } else { x.len() == y.len() };
                count && x.iter().all(member) && !computed()
            }
            // An enum that became a plain integer, or the other way round.
            (Type::Enum(a), Type::Base { size, encoding, .. }) => a.size == *size && encoding.is_integer(),
            (Type::Base { size, encoding, .. }, Type::Enum(b)) => b.size == *size && encoding.is_integer(),
            _ => false,
        }
    }

    /// What differs, the silent killers first: types whose size is the same but whose bytes mean something
    /// else.
    #[must_use]
    pub fn changes(&self) -> Vec<TypeDiff> {
        compare(self)
    }

    /// Where the new type has what the old one has at `offset`. `want` is the old type that a pointer to
    /// there points at, where it is known: it tells a struct from its first member.
    #[must_use]
    pub fn map_offset(&self, old: TypeId, new: TypeId, offset: u64, want: Option<TypeId>) -> Option<u64> {
        let want = want.map(|w| self.old.resolve(w)).filter(|w| *w != TypeId::VOID);
        let (o, n) = (self.old.resolve(old), self.new.resolve(new));
        if offset == 0 && want.is_none_or(|w| w == o) {
            return Some(0);
        }
        let found = self.plan(o, n).map_offset(self, offset, want);
        // A pointer to the start by another type (char *, a common header) stays at the start.
        found
            .or_else(|| (offset == 0).then_some(0))
            .or_else(|| want.and_then(|_| self.map_offset(o, n, offset, None)))
    }
}

/// A constant of both has different values.
pub(super) fn renumbered(a: &Enumeration, b: &Enumeration) -> bool {
    let values: HashMap<&str, i128> = b.constants.iter().map(|c| (&*c.0, c.1)).collect();
    a.constants.iter().any(|(n, v)| values.get(&**n).is_some_and(|w| w != v))
}
