//! Which type, variable and function of the new version stands for which of the old one.

use super::model::{Function, Type, TypeId, TypeModel, Variable};
use mcr_plugin::Rules;
use std::collections::{HashMap, HashSet};

/// Types that are told apart by what they are made of.
#[derive(PartialEq, Eq, Hash)]
enum Made {
    Pointer(TypeId),
    Array(TypeId, Option<u64>),
    Qualified(super::Qualifier, TypeId),
    Function(TypeId, Vec<TypeId>, bool),
}

/// Old types → new types.
pub(super) struct Pairing {
    pairs: HashMap<TypeId, TypeId>,
    back: HashMap<TypeId, TypeId>,
    made: HashMap<Made, TypeId>,
}

/// Last component of a path.
fn file_name(unit: &str) -> &str {
    unit.rsplit('/').next().unwrap_or(unit)
}

impl Pairing {
    pub(super) fn new(old: &TypeModel, new: &TypeModel, rules: &Rules) -> Self {
        let mut p = Self { pairs: HashMap::new(), back: HashMap::new(), made: HashMap::new() };
        p.pairs.insert(TypeId::VOID, TypeId::VOID);
        for id in new.ids() {
            let key = match &new[id] {
                Type::Pointer(to) => Made::Pointer(*to),
                Type::Array { element, count } => Made::Array(*element, *count),
                Type::Qualified { qualifier, to } => Made::Qualified(*qualifier, *to),
                Type::Function { result, params, variadic } => {
                    Made::Function(*result, params.clone(), *variadic)
                }
                _ => continue,
            };
            p.made.entry(key).or_insert(id);
        }
        // Names that mean one type on both sides are certain.
        let mut queue = Vec::new();
        for (name, olds) in &old.by_name {
            let news = new.find_types(rules.new_type(name));
            if let ([o], [n]) = (olds.as_slice(), news) {
                queue.push((*o, *n));
            }
        }
        queue.sort_unstable();
        let certain: HashSet<TypeId> = queue.iter().map(|q| q.0).collect();
        for &(o, n) in &queue {
            p.insert(o, n);
        }
        // Then what hangs on them, and on variables of the same name.
        for v in old.globals() {
            if let Some(n) = pair_global(old, new, rules, v) {
                queue.push((v.ty, n.ty));
            }
        }
        p.walk(old, new, rules, queue, &certain);
        // Several definitions of a name: the same content, else the same unit.
        for (name, olds) in &old.by_name {
            let news = new.find_types(rules.new_type(name));
            for &o in olds.iter().filter(|_| olds.len() > 1 || news.len() > 1) {
                if p.pairs.contains_key(&o) {
                    continue;
                }
                let free: Vec<TypeId> = news.iter().copied().filter(|n| !p.back.contains_key(n)).collect();
                let like = |n: &&TypeId| old.size_of(o) == new.size_of(**n) && alike(old, o, new, **n);
                let in_unit = |n: &&TypeId| {
                    let unit = |m: &TypeModel, t: TypeId| {
                        let u = *m.type_units.get(t.0 as usize)?;
                        m.unit_names.get(u as usize).map(|n| file_name(n).to_owned())
                    };
                    unit(old, o) == unit(new, **n)
                };
                let pick = free.iter().find(|n| like(n) && in_unit(n));
                let pick = pick.or_else(|| free.iter().find(in_unit)).or_else(|| free.iter().find(like));
                let only = pick.or(free.first().filter(|_| free.len() == 1)).copied();
                if let Some(n) = only {
                    p.insert(o, n);
                    p.walk(old, new, rules, vec![(o, n)], &certain);
                }
            }
        }
        p
    }

    fn insert(&mut self, o: TypeId, n: TypeId) {
        self.pairs.insert(o, n);
        self.back.entry(n).or_insert(o);
    }

    /// Follows two types in step and pairs the named and nameless types on the way.
    fn walk(
        &mut self,
        old: &TypeModel,
        new: &TypeModel,
        rules: &Rules,
        mut queue: Vec<(TypeId, TypeId)>,
        certain: &HashSet<TypeId>,
    ) {
        let mut seen = HashSet::new();
        while let Some((o, n)) = queue.pop() {
            let (o, n) = (old.unqualified(o), new.unqualified(n));
            if !seen.insert((o, n)) {
                continue;
            }
            let same_kind = matches!(
                (&old[o], &new[n]),
                (Type::Record(_), Type::Record(_))
                    | (Type::Enum(_), Type::Enum(_))
                    | (Type::Typedef { .. }, Type::Typedef { .. })
            );
            if same_kind
                && !certain.contains(&o)
                && !self.pairs.contains_key(&o)
                && !self.back.contains_key(&n)
            {
                let named = |m: &TypeModel, t| m.type_name(t);
                // Two names that both sides know, but for different things, are no pair.
                let clash = match (named(old, o), named(new, n)) {
                    (Some(a), Some(b)) => {
                        let a = rules.new_type(&a).to_owned();
                        a != b && a.rsplit(' ').next() != b.rsplit(' ').next()
                    }
                    _ => false,
                };
                if !clash {
                    self.insert(o, n);
                }
            }
            match (&old[o], &new[n]) {
                (Type::Pointer(a), Type::Pointer(b)) => queue.push((*a, *b)),
                (Type::Array { element: a, .. }, Type::Array { element: b, .. }) => queue.push((*a, *b)),
                (Type::Typedef { to: a, .. }, Type::Typedef { to: b, .. }) => queue.push((*a, *b)),
                (Type::Typedef { to: a, .. }, _) => queue.push((*a, n)),
                (_, Type::Typedef { to: b, .. }) => queue.push((o, *b)),
                (
                    Type::Function { result: a, params: x, .. },
                    Type::Function { result: b, params: y, .. },
                ) => {
                    queue.push((*a, *b));
                    if x.len() == y.len() {
                        queue.extend(x.iter().copied().zip(y.iter().copied()));
                    }
                }
                (Type::Record(a), Type::Record(b)) if self.pairs.get(&o) == Some(&n) => {
                    let holder = old.type_name(o).unwrap_or_default();
                    for (i, m) in a.members.iter().enumerate() {
                        let other = match &m.name {
                            Some(name) => {
                                let want = rules.new_field(&holder, name);
                                b.members.iter().find(|x| x.name.as_deref() == Some(want))
                            }
                            None => {
                                let k = a.members[..i].iter().filter(|x| x.name.is_none()).count();
                                b.members.iter().filter(|x| x.name.is_none()).nth(k)
                            }
                        };
                        if let Some(x) = other {
                            queue.push((m.ty, x.ty));
                        }
                    }
                }
                _ => {}
            }
        }
    }

    pub(super) fn get(&self, old: &TypeModel, id: TypeId) -> Option<TypeId> {
        self.get_at(old, id, 32)
    }

    fn get_at(&self, old: &TypeModel, id: TypeId, depth: u32) -> Option<TypeId> {
        let depth = depth.checked_sub(1)?;
        let sub = |t: TypeId| self.get_at(old, t, depth);
        let key = match &old[id] {
            Type::Void => return Some(TypeId::VOID),
            Type::Pointer(to) => Made::Pointer(sub(*to)?),
            Type::Array { element, count } => Made::Array(sub(*element)?, *count),
            Type::Qualified { qualifier, to } => Made::Qualified(*qualifier, sub(*to)?),
            Type::Function { result, params, variadic } => {
                let params: Option<Vec<_>> = params.iter().map(|&p| sub(p)).collect();
                Made::Function(sub(*result)?, params?, *variadic)
            }
            _ => return self.pairs.get(&id).copied(),
        };
        self.made.get(&key).copied()
    }

    /// The old type that a new one stands for.
    pub(super) fn back(&self, new: TypeId) -> Option<TypeId> {
        self.back.get(&new).copied()
    }
}

/// The same members at the same places, by name only.
fn alike(old: &TypeModel, o: TypeId, new: &TypeModel, n: TypeId) -> bool {
    match (&old[o], &new[n]) {
        (Type::Record(a), Type::Record(b)) => {
            a.members.len() == b.members.len()
                && a.members.iter().zip(&b.members).all(|(x, y)| (&x.name, x.offset) == (&y.name, y.offset))
        }
        (Type::Enum(a), Type::Enum(b)) => a.constants == b.constants,
        _ => false,
    }
}

/// The new version's variable for an old one: by name (or rule), function, and unit where that is needed.
pub(super) fn pair_global<'n>(
    old: &TypeModel,
    new: &'n TypeModel,
    rules: &Rules,
    v: &Variable,
) -> Option<&'n Variable> {
    let full = v.display();
    let renamed = rules.new_global(&full);
    let (function, name) = match (renamed == full, renamed.rsplit_once("::")) {
        (false, Some((f, n))) => (Some(f), n),
        (false, None) => (None, renamed),
        (true, _) => (v.function.as_deref().map(|f| rules.new_function(f)), rules.new_global(&v.name)),
    };
    let mut all: Vec<&Variable> = new
        .globals_named(name)
        .filter(|n| n.function.as_deref() == function && n.ordinal == v.ordinal)
        .filter(|n| n.place.link().is_some() == v.place.link().is_some())
        .collect();
    if let Some(e) = all.iter().find(|n| v.external && n.external) {
        return Some(e);
    }
    let twins = old
        .globals_named(&v.name)
        .filter(|o| o.function == v.function && o.ordinal == v.ordinal && !o.external)
        .count();
    if all.len() == 1 && twins <= 1 {
        return all.pop();
    }
    let by_unit = all.iter().find(|n| n.unit == v.unit);
    let by_file = || {
        let mut same = all.iter().filter(|n| file_name(&n.unit) == file_name(&v.unit));
        same.next().filter(|_| same.next().is_none())
    };
    by_unit.or_else(by_file).copied()
}

/// The new version's function for an old one.
pub(super) fn pair_function<'n>(new: &'n TypeModel, rules: &Rules, f: &Function) -> Option<&'n Function> {
    let all: Vec<&Function> = new.functions_named(rules.new_function(&f.name)).collect();
    let by_unit = all.iter().find(|n| n.unit == f.unit && n.ranges.is_empty() == f.ranges.is_empty());
    by_unit.or(all.first().filter(|n| all.len() == 1 || all.iter().all(|m| m.unit == n.unit))).copied()
}
