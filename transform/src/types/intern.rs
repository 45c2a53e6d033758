//! Joins the types of all units: declarations find their definition, and what is the same in a hundred units
//! becomes one type.
//!
//! Types form a graph with cycles (through pointers), so sameness is found as a stable partition: classes by
//! shallow content first, then split by the classes of what a type refers to until nothing splits any more.

use super::dies::{RawKind, RawMember, RawUnit, Ref};
use super::model::{Bits, Encoding, Enumeration, Member, Record, RecordKind, Type, TypeId, TypeModel};
use super::read::Names;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// No child.
const VOID: u32 = u32::MAX;
/// Types that agree this deep are taken as one.
const MAX_ROUNDS: usize = 200;
/// By-value nesting (typedef, array, member) beyond this does not occur in real programs.
const MAX_HEIGHT: u32 = 200;
/// Members of one type, those of embedded types included. (Shared embedded types could double at each level.)
const MAX_MEMBERS: u64 = 1 << 20;

#[derive(Default, Clone, Copy)]
struct Identity(u64);
impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {}
    fn write_u64(&mut self, n: u64) {
        self.0 = n;
    }
}
type Prehashed = BuildHasherDefault<Identity>;

fn mix(h: u64, v: u64) -> u64 {
    let x = (h.rotate_left(23) ^ v).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let p = u128::from(x) * 0xd6e8_feb8_6659_fd93_u128;
    (p as u64) ^ ((p >> 64) as u64)
}

fn mix_bytes(mut h: u64, b: &[u8]) -> u64 {
    h = mix(h, b.len() as u64);
    for c in b.chunks(8) {
        let mut w = [0; 8];
        w[..c.len()].copy_from_slice(c);
        h = mix(h, u64::from_le_bytes(w));
    }
    h
}

/// A type before it is joined: unit, index in it, and dimension (arrays of arrays are taken apart).
#[derive(Clone, Copy)]
struct Node {
    unit: u32,
    index: u32,
    level: u32,
}

struct Graph<'r, 'a> {
    raw: &'r [&'r RawUnit<'a>],
    nodes: Vec<Node>,
    /// Entry → node, ascending.
    dies: Vec<(u64, u32)>,
    signatures: HashMap<u64, u64>,
    /// Children of all nodes; those of node `i` are `first[i]..first[i + 1]`.
    children: Vec<u32>,
    first: Vec<u32>,
    /// Typedef that names a nameless record or enum.
    alias: HashMap<u32, &'a [u8]>,
    /// Declaration → definition.
    redirect: HashMap<u32, u32>,
}

/// The joined types, before they go into the model.
pub(super) struct Interned {
    types: Vec<Type>,
    units: Vec<u32>,
    dies: Vec<(u64, TypeId)>,
    signatures: HashMap<u64, u64>,
}

impl Interned {
    pub(super) fn type_of(&self, r: Option<Ref>) -> TypeId {
        let die = match r {
            Some(Ref::Die(d)) => d,
            Some(Ref::Signature(s)) => self.signatures.get(&s).copied().unwrap_or(u64::MAX),
            None => return TypeId::VOID,
        };
        self.dies.binary_search_by_key(&die, |d| d.0).map_or(TypeId::VOID, |i| self.dies[i].1)
    }

    pub(super) fn finish(mut self, model: &mut TypeModel) {
        model.sizes = measure(&mut self.types);
        for (i, t) in self.types.iter().enumerate() {
            let id = TypeId(i as u32);
            let names = match t {
                Type::Base { name, .. } | Type::Typedef { name, .. } => Some(name.to_string()),
                Type::Record(Record { tag: Some(t), kind, .. }) => Some(format!("{} {t}", kind.keyword())),
                Type::Enum(Enumeration { tag: Some(t), .. }) => Some(format!("enum {t}")),
                _ => None,
            };
            if let Some(n) = names {
                model.by_name.entry(n).or_default().push(id);
            }
        }
        let incomplete = |id: &TypeId| match &self.types[id.0 as usize] {
            Type::Record(r) => r.incomplete,
            Type::Enum(e) => e.incomplete,
            _ => false,
        };
        for all in model.by_name.values_mut().filter(|v| v.len() > 1) {
            all.sort_by_key(incomplete);
        }
        model.types = self.types;
        model.type_units = self.units;
        model.dies = self.dies;
    }
}

impl<'r, 'a> Graph<'r, 'a> {
    fn new(raw: &'r [&'r RawUnit<'a>]) -> Self {
        let mut g = Self {
            raw,
            nodes: Vec::new(),
            dies: Vec::new(),
            signatures: raw.iter().filter_map(|u| u.signature).collect(),
            children: Vec::new(),
            first: Vec::new(),
            alias: HashMap::new(),
            redirect: HashMap::new(),
        };
        for (u, unit) in raw.iter().enumerate() {
            for (i, n) in unit.nodes.iter().enumerate() {
                g.dies.push((n.die, g.nodes.len() as u32));
                g.nodes.push(Node { unit: u as u32, index: i as u32, level: 0 });
            }
        }
        g.dies.sort_unstable();
        // Inner dimensions get nodes of their own behind all others.
        let own = g.nodes.len();
        let mut inner: HashMap<u32, u32> = HashMap::new();
        for i in 0..own {
            if let RawKind::Array { counts, .. } = g.kind(i as u32) {
                for level in 1..counts.len() {
                    if level == 1 {
                        inner.insert(i as u32, g.nodes.len() as u32);
                    }
                    g.nodes.push(Node { level: level as u32, ..g.nodes[i] });
                }
            }
        }
        for i in 0..g.nodes.len() as u32 {
            g.first.push(g.children.len() as u32);
            let node = g.nodes[i as usize];
            let raw = g.raw;
            let kind = &raw[node.unit as usize].nodes[node.index as usize].kind;
            match kind {
                RawKind::Base { .. } | RawKind::Enum { .. } => {}
                RawKind::Pointer(to) => g.add(*to),
                RawKind::Typedef { to, name } => {
                    g.add(*to);
                    let target = g.children.last().copied().unwrap_or(VOID);
                    if target != VOID {
                        let raw = g.raw;
                        let t = g.nodes[target as usize];
                        let nameless = matches!(
                            raw[t.unit as usize].nodes[t.index as usize].kind,
                            RawKind::Record { name: None, .. } | RawKind::Enum { name: None, .. }
                        );
                        if nameless {
                            g.alias.entry(target).or_insert(name);
                        }
                    }
                }
                RawKind::Qualified { to, .. } => g.add(*to),
                RawKind::Record { members, .. } => members.iter().for_each(|m| g.add(m.ty)),
                RawKind::Array { element, counts } => {
                    if node.level as usize + 1 < counts.len() {
                        let next = if node.level == 0 { inner[&i] } else { i + 1 };
                        g.children.push(next);
                    } else {
                        g.add(*element);
                    }
                }
                RawKind::Function { result, params, .. } => {
                    g.add(*result);
                    params.iter().for_each(|p| g.add(*p));
                }
            }
        }
        g.first.push(g.children.len() as u32);
        g
    }

    fn add(&mut self, r: Option<Ref>) {
        let n = self.node_of(r);
        self.children.push(n);
    }

    fn node_of(&self, r: Option<Ref>) -> u32 {
        let die = match r {
            Some(Ref::Die(d)) => d,
            Some(Ref::Signature(s)) => match self.signatures.get(&s) {
                Some(d) => *d,
                None => return VOID,
            },
            None => return VOID,
        };
        self.dies.binary_search_by_key(&die, |d| d.0).map_or(VOID, |i| self.dies[i].1)
    }

    fn kind(&self, i: u32) -> &'r RawKind<'a> {
        let n = self.nodes[i as usize];
        &self.raw[n.unit as usize].nodes[n.index as usize].kind
    }

    fn children(&self, i: u32) -> &[u32] {
        let i = i as usize;
        &self.children[self.first[i] as usize..self.first[i + 1] as usize]
    }

    /// Hash of everything but the children.
    fn shallow(&self, i: u32) -> u64 {
        let alias = self.alias.get(&i).copied().unwrap_or(b"");
        let name = |h, n: &Option<&[u8]>| match n {
            Some(n) => mix_bytes(mix(h, 1), n),
            None => mix_bytes(mix(h, 2), alias),
        };
        let option = |h, o: Option<u64>| o.map_or(mix(h, 3), |v| mix(mix(h, 4), v));
        match self.kind(i) {
            RawKind::Base { name, size, encoding } => mix_bytes(mix(mix(1, *size), *encoding as u64), name),
            RawKind::Pointer(_) => 2,
            RawKind::Record { union, name: n, size, decl, members, .. } => {
                let mut h = name(mix(mix(3, u64::from(*union)), u64::from(*decl)), n);
                h = mix(h, *size);
                for m in members {
                    h = match m.name {
                        Some(n) => mix_bytes(mix(h, 5), n),
                        None => mix(h, 6),
                    };
                    h = mix(h, m.offset);
                    h = option(h, m.bit_size);
                    h = option(h, m.data_bit_offset);
                    h = option(h, m.old_bit_offset.map(|v| v as u64));
                    h = option(h, m.byte_size);
                }
                h
            }
            RawKind::Enum { name: n, size, decl, constants, .. } => {
                let mut h = name(mix(4, u64::from(*decl)), n);
                h = option(h, *size);
                for (n, v) in constants {
                    h = mix(mix(mix_bytes(h, n), *v as u64), (*v >> 64) as u64);
                }
                h
            }
            RawKind::Array { counts, .. } => {
                let level = self.nodes[i as usize].level as usize;
                option(5, counts.get(level).copied().flatten())
            }
            RawKind::Typedef { name, .. } => mix_bytes(6, name),
            RawKind::Qualified { qualifier, .. } => mix(7, *qualifier as u64),
            RawKind::Function { variadic, params, .. } => {
                mix(mix(8, u64::from(*variadic)), params.len() as u64)
            }
        }
    }

    /// Declarations of a tag that has one definition (or the same one many times) become that definition.
    fn complete(&mut self, shallow: &[u64]) {
        let tag = |k: &RawKind<'a>| match k {
            RawKind::Record { name: Some(n), decl, union, members, size, signature } => {
                let declared = *decl || (members.is_empty() && *size == 0 && signature.is_some());
                Some((u8::from(*union), *n, declared, *signature))
            }
            RawKind::Enum { name: Some(n), decl, .. } => Some((2, *n, *decl, None)),
            _ => None,
        };
        let mut defined: HashMap<(u8, &'a [u8]), (u32, u64, bool)> = HashMap::new();
        let mut declared = Vec::new();
        for i in 0..self.nodes.len() as u32 {
            let Some((kind, name, decl, signature)) = tag(self.kind(i)) else {
                continue;
            };
            if decl {
                declared.push((i, kind, name, signature));
                continue;
            }
            let look = |c: &u32| shallow.get(*c as usize).copied().unwrap_or(0);
            let key = self.children(i).iter().fold(shallow[i as usize], |h, c| mix(h, look(c)));
            let e = defined.entry((kind, name)).or_insert((i, key, false));
            e.2 |= e.1 != key;
        }
        for (i, kind, name, signature) in declared {
            let by_signature = signature.map(|s| self.node_of(Some(s))).filter(|n| *n != VOID && *n != i);
            let unique = defined.get(&(kind, name)).filter(|d| !d.2).map(|d| d.0);
            if let Some(to) = by_signature.or(unique) {
                self.redirect.insert(i, to);
            }
        }
        for c in &mut self.children {
            // At most two steps: a signature may name a declaration.
            for _ in 0..2 {
                *c = self.redirect.get(c).copied().unwrap_or(*c);
            }
        }
    }

    /// Class of each node.
    fn partition(&self, shallow: Vec<u64>) -> Vec<u64> {
        let count = |h: &[u64]| h.iter().copied().collect::<HashSet<u64, Prehashed>>().len();
        let mut now = shallow.clone();
        let mut classes = count(&now);
        let mut next = vec![0; now.len()];
        for _ in 0..MAX_ROUNDS {
            for (i, n) in next.iter_mut().enumerate() {
                let look = |c: &u32| now.get(*c as usize).copied().unwrap_or(0x766f_6964);
                *n = self.children(i as u32).iter().fold(shallow[i], |h, c| mix(h, look(c)));
            }
            std::mem::swap(&mut now, &mut next);
            let n = count(&now);
            if n == classes {
                break;
            }
            classes = n;
        }
        now
    }

    /// Size of the storage of a bit-field's type.
    fn storage(&self, mut i: u32) -> u64 {
        for _ in 0..16 {
            if i == VOID {
                break;
            }
            match self.kind(i) {
                RawKind::Base { size, .. } => return *size,
                RawKind::Enum { size, .. } => return size.unwrap_or(4),
                _ => i = self.children(i).first().copied().unwrap_or(VOID),
            }
        }
        4
    }

    fn member(&self, m: &RawMember<'a>, ty: TypeId, child: u32, names: &mut Names) -> Member {
        let bits = m.bit_size.map(|width| {
            let start = match (m.data_bit_offset, m.old_bit_offset) {
                (Some(b), _) => b.saturating_add(m.offset.saturating_mul(8)),
                (None, Some(old)) => {
                    // Counted from the most significant bit of the storage unit; we count from the least.
                    let unit = m.byte_size.unwrap_or_else(|| self.storage(child)).min(16) as i64 * 8;
                    let low = unit - old.clamp(-128, 128) - width.min(128) as i64;
                    m.offset.saturating_mul(8).saturating_add_signed(low)
                }
                (None, None) => m.offset.saturating_mul(8),
            };
            Bits { start, width: width.min(128) as u32 }
        });
        Member {
            name: m.name.map(|n| names.get(n)),
            ty,
            offset: bits.map_or(m.offset, |b| b.start / 8),
            bits,
        }
    }

    /// Whether the type under an enum is signed.
    fn signed(&self, under: Option<Ref>, constants: &[(&[u8], i128)]) -> bool {
        let mut i = self.node_of(under);
        for _ in 0..16 {
            if i == VOID {
                break;
            }
            match self.kind(i) {
                RawKind::Base { encoding, .. } => return encoding.is_signed(),
                _ => i = self.children(i).first().copied().unwrap_or(VOID),
            }
        }
        constants.iter().any(|c| c.1 < 0)
    }

    fn emit(&self, i: u32, id: &dyn Fn(u32) -> TypeId, names: &mut Names) -> Type {
        let children = self.children(i);
        let child = |n: usize| children.get(n).map_or(TypeId::VOID, |&c| id(c));
        let alias = self.alias.get(&i);
        match self.kind(i) {
            RawKind::Base { name, size, encoding } => {
                if *size == 0 && *encoding == Encoding::Other && *name == b"void" {
                    return Type::Void;
                }
                Type::Base { name: names.get(name), size: (*size).min(64), encoding: *encoding }
            }
            RawKind::Pointer(_) => Type::Pointer(child(0)),
            RawKind::Record { union, name, size, decl, members, .. } => Type::Record(Record {
                kind: if *union { RecordKind::Union } else { RecordKind::Struct },
                tag: name.map(|n| names.get(n)),
                alias: alias.filter(|_| name.is_none()).map(|n| names.get(n)),
                size: *size,
                members: members
                    .iter()
                    .enumerate()
                    .map(|(n, m)| self.member(m, child(n), children.get(n).copied().unwrap_or(VOID), names))
                    .collect(),
                incomplete: *decl,
            }),
            RawKind::Enum { name, size, under, decl, constants } => Type::Enum(Enumeration {
                tag: name.map(|n| names.get(n)),
                alias: alias.filter(|_| name.is_none()).map(|n| names.get(n)),
                size: size.unwrap_or(4).min(16),
                signed: self.signed(*under, constants),
                constants: constants.iter().map(|(n, v)| (names.get(n), *v)).collect(),
                incomplete: *decl && constants.is_empty(),
            }),
            RawKind::Array { counts, .. } => Type::Array {
                element: child(0),
                count: counts.get(self.nodes[i as usize].level as usize).copied().flatten(),
            },
            RawKind::Typedef { name, .. } => Type::Typedef { name: names.get(name), to: child(0) },
            RawKind::Qualified { qualifier, .. } => Type::Qualified { qualifier: *qualifier, to: child(0) },
            RawKind::Function { params, variadic, .. } => Type::Function {
                result: child(0),
                params: (1..=params.len()).map(child).collect(),
                variadic: *variadic,
            },
        }
    }
}

/// Joins the types of all units.
pub(super) fn intern(raw: &[&RawUnit<'_>], names: &mut Names) -> Interned {
    let mut g = Graph::new(raw);
    let shallow: Vec<u64> = (0..g.nodes.len() as u32).map(|i| g.shallow(i)).collect();
    g.complete(&shallow);
    let class = g.partition(shallow);
    // Ids in the order of first appearance; 0 is void.
    let mut ids: HashMap<u64, u32, Prehashed> = HashMap::default();
    let mut representatives = Vec::new();
    for (i, &c) in class.iter().enumerate() {
        if g.redirect.contains_key(&(i as u32)) {
            continue;
        }
        ids.entry(c).or_insert_with(|| {
            representatives.push(i as u32);
            representatives.len() as u32
        });
    }
    let id = |n: u32| {
        let mut n = n;
        for _ in 0..2 {
            n = g.redirect.get(&n).copied().unwrap_or(n);
        }
        let class = class.get(n as usize);
        class.and_then(|c| ids.get(c)).map_or(TypeId::VOID, |&i| TypeId(i))
    };
    let mut types = vec![Type::Void];
    let mut units = vec![0];
    for &r in &representatives {
        types.push(g.emit(r, &id, names));
        units.push(g.nodes[r as usize].unit);
    }
    let dies = g.dies.iter().map(|&(d, n)| (d, id(n))).collect();
    Interned { types, units, dies, signatures: g.signatures.clone() }
}

/// Computes sizes, and cuts what a damaged file could do to recursive code: a type that contains itself by
/// value, or nests without end.
fn measure(types: &mut [Type]) -> Vec<u64> {
    #[derive(Clone, Copy, PartialEq)]
    enum State {
        New,
        Open,
        Done,
    }
    fn edges(t: &Type) -> usize {
        match t {
            Type::Typedef { .. } | Type::Qualified { .. } | Type::Array { .. } => 1,
            Type::Record(r) => r.members.len(),
            _ => 0,
        }
    }
    fn edge(t: &mut Type, n: usize) -> Option<&mut TypeId> {
        match t {
            Type::Typedef { to, .. } | Type::Qualified { to, .. } => Some(to),
            Type::Array { element, .. } => Some(element),
            Type::Record(r) => r.members.get_mut(n).map(|m| &mut m.ty),
            _ => None,
        }
    }
    let n = types.len();
    let mut state = vec![State::New; n];
    let mut sizes = vec![0u64; n];
    let mut height = vec![0u32; n];
    let mut members = vec![1u64; n];
    let mut path: Vec<(usize, usize)> = Vec::new();
    for start in 0..n {
        if state[start] != State::New {
            continue;
        }
        state[start] = State::Open;
        path.push((start, 0));
        while let Some((at, next)) = path.last_mut() {
            let at = *at;
            if *next < edges(&types[at]) {
                let e = *next;
                *next += 1;
                let Some(to) = edge(&mut types[at], e) else {
                    continue;
                };
                let child = to.0 as usize;
                if child >= n || state[child] == State::Open {
                    *to = TypeId::VOID;
                } else if state[child] == State::New {
                    state[child] = State::Open;
                    path.push((child, 0));
                }
                continue;
            }
            for e in 0..edges(&types[at]) {
                let Some(to) = edge(&mut types[at], e) else {
                    continue;
                };
                let more = members[at].saturating_add(members[to.0 as usize]);
                if height[to.0 as usize] >= MAX_HEIGHT || more > MAX_MEMBERS {
                    *to = TypeId::VOID;
                } else {
                    members[at] = more;
                    height[at] = height[at].max(height[to.0 as usize] + 1);
                }
            }
            sizes[at] = match &types[at] {
                Type::Void | Type::Function { .. } => 0,
                Type::Base { size, .. } => *size,
                Type::Pointer(_) => 8,
                Type::Record(r) => r.size,
                Type::Enum(e) => e.size,
                Type::Array { element, count } => {
                    sizes[element.0 as usize].saturating_mul(count.unwrap_or(0))
                }
                Type::Typedef { to, .. } | Type::Qualified { to, .. } => sizes[to.0 as usize],
            };
            state[at] = State::Done;
            path.pop();
        }
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 60 structs, each holding the one before twice: 2^60 members if walked.
    #[test]
    fn doubling_nests_are_cut() {
        let member = |ty, offset| Member { name: None, ty: TypeId(ty), offset, bits: None };
        let mut types = vec![Type::Void];
        for i in 1..=60u32 {
            types.push(Type::Record(Record {
                kind: RecordKind::Struct,
                tag: None,
                alias: None,
                size: 8,
                members: vec![member(i - 1, 0), member(i - 1, 4)],
                incomplete: false,
            }));
        }
        // One that holds itself.
        types.push(Type::Qualified { qualifier: super::super::Qualifier::Const, to: TypeId(61) });
        let sizes = measure(&mut types);
        assert_eq!((sizes[60], sizes[61]), (8, 0));
        let model = TypeModel { types, sizes, ..TypeModel::default() };
        assert_eq!(model.pointer_map(TypeId(60)), Some(Vec::new()));
        assert_eq!(model.resolve(TypeId(61)), TypeId::VOID);
    }
}
