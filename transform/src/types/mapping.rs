//! How each field of a new type is made from an old object: worked out once per pair of types.

use super::diff::{LayoutDiff, renumbered};
use super::fields::{Field, Unions, fields, nested};
use super::model::{Encoding, RecordKind, Type, TypeId, TypeModel};
use mcr_plugin::{Expr, UnionRule};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, PoisonError};

/// Dotted paths in rules go this deep.
const RULE_DEPTH: u32 = 4;

/// A number's bits within an object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bitspan {
    pub start: u64,
    pub width: u32,
    pub signed: bool,
    /// Holds 0 or 1 only.
    pub bool: bool,
}

/// One step of a conversion. Offsets are from the start of the plan's records.
#[derive(Debug)]
pub(super) enum Op {
    /// The same bytes.
    Copy { from: u64, to: u64, len: u64, old_ty: TypeId },
    /// An integer of another width or place. `map`: enum constants that changed their values.
    Number {
        from: Bitspan,
        to: Bitspan,
        map: Option<HashMap<i128, Result<i128, String>>>,
        path: String,
        type_name: String,
    },
    /// `float` to `double` or back.
    Float { from: u64, from_size: u64, to: u64, to_size: u64, path: String },
    /// An embedded record.
    Sub { from: u64, to: u64, plan: Arc<Plan>, path: String },
    /// `count` elements.
    Array {
        from: u64,
        to: u64,
        count: u64,
        from_stride: u64,
        to_stride: u64,
        element: Vec<Op>,
        old_ty: TypeId,
        path: String,
    },
    /// Elements that the new array has no room for.
    Lost { from: Range<u64>, text: bool, path: String },
    /// A union that needs to be told which member is live.
    Union { by: UnionRule, members: Vec<(String, Vec<Op>)>, path: String },
    /// Computed by a rule.
    Expr { to: Bitspan, float: Option<u64>, expr: Expr, path: String },
    /// Only new has it.
    Native { range: Range<u64>, path: String },
    /// Only old has it.
    Dropped { from: Range<u64>, ty: TypeId, path: String },
    /// Cannot be done without a rule.
    Refused { code: &'static str, path: String, message: String, next_step: String },
}

/// How an old type becomes a new one.
#[derive(Debug)]
pub(super) struct Plan {
    pub old: TypeId,
    pub ops: Vec<Op>,
    /// For messages: "struct session".
    pub name: String,
}

/// The bits of an integer-like type; `None` for anything else.
pub(super) fn number(m: &TypeModel, f: &Field) -> Option<Bitspan> {
    let (start, end) = f.span(m);
    let width = u32::try_from(end - start).ok().filter(|w| *w > 0 && *w <= 64)?;
    let (signed, bool) = match m.strip(f.ty) {
        Type::Base { encoding, .. } if encoding.is_integer() => {
            (encoding.is_signed(), *encoding == Encoding::Bool)
        }
        Type::Enum(e) => (e.signed, false),
        Type::Pointer(_) => (false, false),
        _ => return None,
    };
    Some(Bitspan { start, width, signed, bool })
}

impl LayoutDiff<'_> {
    /// The plan for a pair of types.
    pub(super) fn plan(&self, old: TypeId, new: TypeId) -> Arc<Plan> {
        let key = (self.old.resolve(old), self.new.resolve(new));
        if let Some(p) = self.plans.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Arc::clone(p);
        }
        let plan = Arc::new(self.make(key.0, key.1));
        self.plans.write().unwrap_or_else(PoisonError::into_inner).insert(key, Arc::clone(&plan));
        plan
    }

    fn make(&self, o: TypeId, n: TypeId) -> Plan {
        let name = self.new.type_name(n).unwrap_or_else(|| self.new.display(n));
        let mut plan = Plan { old: o, ops: Vec::new(), name };
        match (&self.old[o], &self.new[n]) {
            (Type::Record(a), Type::Record(b))
                if a.kind == RecordKind::Struct
                    && b.kind == RecordKind::Struct
                    && !self.same_layout(o, n) =>
            {
                Maker::new(self, o, n).run(&mut plan);
            }
            _ => {
                let whole = |ty| Field { path: String::new(), ty, offset: 0, bits: None, in_union: false };
                let holder = (String::new(), plan.name.clone());
                plan.ops = self.field_ops(&whole(o), &whole(n), &holder);
            }
        }
        plan
    }

    /// Ops that turn one old field into one new one. `holder`: names of the old and new record around it.
    fn field_ops(&self, f: &Field, g: &Field, holder: &(String, String)) -> Vec<Op> {
        let (old, new) = (self.old, self.new);
        let (o, n) = (old.resolve(f.ty), new.resolve(g.ty));
        let path = g.path.clone();
        if f.bits.is_none() && g.bits.is_none() && self.same_layout(o, n) {
            return vec![Op::Copy { from: f.offset, to: g.offset, len: old.size_of(o), old_ty: o }];
        }
        let refused = |code, what: String| {
            let path = g.path.clone();
            let next_step = if path.is_empty() {
                "rename the type or variable, or keep the new value: [keep] NAME = \"new\"".into()
            } else {
                format!(
                    "say how it is computed in the rules file: [values] \"{}.{path}\" = \"old.{}\"",
                    holder.1, f.path
                )
            };
            vec![Op::Refused { code, path, message: what, next_step }]
        };
        match (&old[o], &new[n]) {
            (Type::Record(a), Type::Record(b))
                if a.kind == RecordKind::Union && b.kind == RecordKind::Union =>
            {
                self.union_op(f, g, holder)
            }
            (Type::Record(a), Type::Record(b)) if a.kind == b.kind && !a.incomplete && !b.incomplete => {
                vec![Op::Sub { from: f.offset, to: g.offset, plan: self.plan(o, n), path }]
            }
            (Type::Array { element: a, count: x }, Type::Array { element: b, count: y }) => {
                let (fs, ts) = (old.size_of(*a), new.size_of(*b));
                let (x, y) = (x.unwrap_or(0), y.unwrap_or(0));
                let common = x.min(y);
                let at = |ty| Field { path: String::new(), ty, offset: 0, bits: None, in_union: false };
                let mut ops = Vec::new();
                let inner = self.field_ops(&at(*a), &at(*b), holder);
                if common > 0 && self.same_layout(*a, *b) {
                    ops.push(Op::Copy {
                        from: f.offset,
                        to: g.offset,
                        len: fs.saturating_mul(common),
                        old_ty: o,
                    });
                } else if common > 0 {
                    if inner.iter().any(|op| matches!(op, Op::Refused { .. })) {
                        return refused(
                            "kind-changed",
                            format!(
                                "elements of {path} changed from {} to {}",
                                old.display(*a),
                                new.display(*b)
                            ),
                        );
                    }
                    ops.push(Op::Array {
                        from: f.offset,
                        to: g.offset,
                        count: common,
                        from_stride: fs,
                        to_stride: ts,
                        element: inner,
                        old_ty: o,
                        path: path.clone(),
                    });
                }
                if x > y {
                    let start = f.offset.saturating_add(fs.saturating_mul(common));
                    let end = f.offset.saturating_add(fs.saturating_mul(x));
                    let text = matches!(old.strip(*a), Type::Base { encoding, .. } if encoding.is_char());
                    ops.push(Op::Lost { from: start..end, text, path });
                } else if y > x {
                    let start = g.offset.saturating_add(ts.saturating_mul(common));
                    ops.push(Op::Native {
                        range: start..g.offset.saturating_add(ts.saturating_mul(y)),
                        path,
                    });
                }
                ops
            }
            (
                Type::Base { size: fs, encoding: Encoding::Float, .. },
                Type::Base { size: ts, encoding: Encoding::Float, .. },
            ) if matches!((fs, ts), (4 | 8, 4 | 8)) => {
                vec![Op::Float { from: f.offset, from_size: *fs, to: g.offset, to_size: *ts, path }]
            }
            (Type::Pointer(_), other) | (other, Type::Pointer(_))
                if !matches!(other, Type::Pointer(_)) && (old.size_of(o), new.size_of(n)) != (8, 8) =>
            {
                refused(
                    "kind-changed",
                    format!("{} changed from {} to {}", g.path, old.display(f.ty), new.display(g.ty)),
                )
            }
            (a, b) => match (number(old, f), number(new, g)) {
                (Some(from), Some(to)) => {
                    let map = match (a, b) {
                        (Type::Enum(a), Type::Enum(b)) if renumbered(a, b) => {
                            let tag = old.type_name(o).unwrap_or_else(|| "enum".into());
                            let values: HashMap<&str, i128> =
                                b.constants.iter().map(|c| (&*c.0, c.1)).collect();
                            let one = |(n, v): &(super::Name, i128)| {
                                let w =
                                    values.get(&**n).copied().ok_or_else(|| format!("{tag} constant {n}"));
                                (*v, w)
                            };
                            // The first name of a value counts, unless it is gone and another one is left.
                            let mut map: HashMap<i128, Result<i128, String>> = HashMap::new();
                            for (v, w) in a.constants.iter().map(one) {
                                let e = map.entry(v).or_insert_with(|| w.clone());
                                if e.is_err() && w.is_ok() {
                                    *e = w;
                                }
                            }
                            Some(map)
                        }
                        _ => None,
                    };
                    vec![Op::Number { from, to, map, path, type_name: new.display(g.ty) }]
                }
                _ => refused(
                    "kind-changed",
                    format!("{} changed from {} to {}", g.path, old.display(f.ty), new.display(g.ty)),
                ),
            },
        }
    }

    fn union_op(&self, f: &Field, g: &Field, holder: &(String, String)) -> Vec<Op> {
        let (old, new) = (self.old, self.new);
        let (Some(a), Some(b)) = (old.record(f.ty), new.record(g.ty)) else { return Vec::new() };
        let (x, y) = (fields(old, a, Unions::Whole), fields(new, b, Unions::Whole));
        // An anonymous union goes by any of its members' names.
        let name = match f.path.as_str() {
            "" => {
                x.iter().find(|m| self.rules.union_rule(&holder.0, &m.path).is_some()).map_or("", |m| &m.path)
            }
            p => p,
        };
        let rule =
            self.rules.union_rule(&holder.0, name).or_else(|| self.rules.union_rule(&holder.1, &g.path));
        let shown = if f.path.is_empty() { x.first().map_or("u", |m| m.path.as_str()) } else { &f.path };
        let path = if g.path.is_empty() { shown.to_owned() } else { g.path.clone() };
        let around = if holder.0.is_empty() { &holder.1 } else { &holder.0 };
        let Some(rule) = rule else {
            let example = x.first().map_or("member", |m| m.path.as_str());
            return vec![Op::Refused {
                code: "union-changed",
                path: path.clone(),
                message: format!(
                    "the union {path} of {around} changed; which of its members is live is not in the binaries"
                ),
                next_step: format!(
                    "say so in the rules file: [unions.\"{around}.{shown}\"] by = \"old.FIELD\" cases = {{ VALUE = \"{example}\" }}"
                ),
            }];
        };
        let tag = old.type_name(f.ty).unwrap_or_default();
        let members = x
            .iter()
            .filter_map(|m| {
                let want = self.rules.new_field(&tag, &m.path);
                let t = y.iter().find(|t| t.path == want)?;
                let shift = |p: &Field, base: u64| Field {
                    path: format!("{path}.{}", p.path),
                    offset: p.offset.saturating_add(base),
                    bits: p
                        .bits
                        .map(|b| super::Bits { start: b.start.saturating_add(base.saturating_mul(8)), ..b }),
                    ..p.clone()
                };
                Some((m.path.clone(), self.field_ops(&shift(m, f.offset), &shift(t, g.offset), holder)))
            })
            .collect();
        vec![Op::Union { by: rule.clone(), members, path }]
    }
}

/// Works out the plan of two structs.
struct Maker<'d, 'm> {
    diff: &'d LayoutDiff<'m>,
    new: TypeId,
    names: (String, String),
    /// Top-level fields of the old struct.
    top: Vec<Field>,
    /// Fields of embedded structs, for rules with dotted paths.
    deep: Vec<Field>,
    /// New path → old field, by rule.
    renamed: HashMap<String, Field>,
    used: HashSet<String>,
}

impl<'d, 'm> Maker<'d, 'm> {
    fn new(diff: &'d LayoutDiff<'m>, old: TypeId, new: TypeId) -> Self {
        let name = |m: &TypeModel, t| m.type_name(t).unwrap_or_default();
        let names = (name(diff.old, old), name(diff.new, new));
        let top = diff.old.record(old).map(|r| fields(diff.old, r, Unions::Whole)).unwrap_or_default();
        let deep = if diff.rules.is_empty() { Vec::new() } else { nested(diff.old, &top, RULE_DEPTH) };
        let mut renamed = HashMap::new();
        for f in top.iter().chain(&deep).filter(|f| !f.path.is_empty()) {
            let to = diff.rules.new_field(&names.0, &f.path);
            if to != f.path {
                renamed.insert(to.to_owned(), f.clone());
            }
        }
        Self { diff, new, names, top, deep, renamed, used: HashSet::new() }
    }

    fn run(mut self, plan: &mut Plan) {
        let new = self.diff.new;
        let targets = new.record(self.new).map(|r| fields(new, r, Unions::Whole)).unwrap_or_default();
        let sources: HashSet<String> = self.renamed.values().map(|f| f.path.clone()).collect();
        self.emit(&targets, &sources, 0, &mut plan.ops);
        let leaf = |f: &&Field| self.diff.old.record(f.ty).is_none_or(|r| r.kind == RecordKind::Union);
        for f in &self.top {
            let key = if f.path.is_empty() { anonymous(f) } else { f.path.clone() };
            let inside = format!("{key}.");
            if self.used.contains(&key) {
                continue;
            }
            if !self.used.iter().any(|u| u.starts_with(&inside)) {
                plan.ops.push(self.dropped(f));
                continue;
            }
            // Taken apart by rules: what of it is left over?
            let taken = |p: &str| {
                self.used
                    .iter()
                    .any(|u| p == u || p.strip_prefix(u.as_str()).is_some_and(|r| r.starts_with('.')))
            };
            let left =
                self.deep.iter().filter(leaf).filter(|d| d.path.starts_with(&inside) && !taken(&d.path));
            plan.ops.extend(left.map(|d| self.dropped(d)));
        }
        self.limit_native(plan);
    }

    fn dropped(&self, f: &Field) -> Op {
        let (a, b) = f.span(self.diff.old);
        let path = if f.path.is_empty() { "(union)".into() } else { f.path.clone() };
        Op::Dropped { from: a / 8..b.div_ceil(8), ty: f.ty, path }
    }

    /// The old field that a new one continues.
    fn source(&self, g: &Field, sources: &HashSet<String>) -> Option<Field> {
        if g.path.is_empty() {
            return self.same_union(g);
        }
        if let Some(f) = self.renamed.get(&g.path) {
            return Some(f.clone());
        }
        let by_name = |f: &&Field| f.path == g.path && !sources.contains(&f.path);
        self.top.iter().chain(&self.deep).find(by_name).cloned()
    }

    /// The anonymous union that shares a member's name.
    fn same_union(&self, g: &Field) -> Option<Field> {
        let names = |m: &TypeModel, t| -> Vec<String> {
            let all = m.record(t).map(|r| fields(m, r, Unions::Open)).unwrap_or_default();
            all.into_iter().map(|f| f.path).collect()
        };
        let wanted = names(self.diff.new, g.ty);
        let shares =
            |f: &&Field| f.path.is_empty() && names(self.diff.old, f.ty).iter().any(|n| wanted.contains(n));
        self.top.iter().find(shares).cloned()
    }

    /// A rule speaks of something inside this field.
    fn rule_inside(&self, g: &Field, sources: &HashSet<String>) -> bool {
        let (d, new) = (self.diff, self.diff.new);
        if d.rules.is_empty() || g.path.is_empty() {
            return false;
        }
        let prefix = format!("{}.", g.path);
        if self.renamed.keys().chain(sources).any(|k| k.starts_with(&prefix)) {
            return true;
        }
        let inner = nested(new, std::slice::from_ref(g), RULE_DEPTH);
        let n = &self.names.1;
        inner
            .iter()
            .any(|f| d.rules.value(n, &f.path).is_some() || d.rules.default_value(n, &f.path).is_some())
    }

    fn emit(&mut self, targets: &[Field], sources: &HashSet<String>, depth: u32, ops: &mut Vec<Op>) {
        let (d, new) = (self.diff, self.diff.new);
        for g in targets {
            if let Some(e) = d.rules.value(&self.names.1, &g.path) {
                // What the expression reads is not lost.
                for p in e.paths().iter().filter(|p| p.root == "old") {
                    self.used.insert(p.field_path());
                }
                ops.push(self.expr(g, e));
                continue;
            }
            let inner = new.record(g.ty).filter(|r| r.kind == RecordKind::Struct);
            if let Some(r) = inner.filter(|_| {
                depth < RULE_DEPTH && self.rule_inside(g, sources) && !self.renamed.contains_key(&g.path)
            }) {
                let inner: Vec<Field> = fields(new, r, Unions::Whole)
                    .into_iter()
                    .map(|i| Field {
                        path: if i.path.is_empty() {
                            String::new()
                        } else {
                            format!("{}.{}", g.path, i.path)
                        },
                        offset: g.offset.saturating_add(i.offset),
                        bits: i.bits.map(|b| super::Bits {
                            start: b.start.saturating_add(g.offset.saturating_mul(8)),
                            ..b
                        }),
                        ..i
                    })
                    .collect();
                self.emit(&inner, sources, depth + 1, ops);
                continue;
            }
            if let Some(f) = self.source(g, sources) {
                self.used.insert(if f.path.is_empty() { anonymous(&f) } else { f.path.clone() });
                ops.extend(d.field_ops(&f, g, &self.names));
            } else if let Some(e) = d.rules.default_value(&self.names.1, &g.path) {
                ops.push(self.expr(g, e));
            } else {
                let (a, b) = g.span(new);
                let path = if g.path.is_empty() { "(union)".into() } else { g.path.clone() };
                ops.push(Op::Native { range: a / 8..b.div_ceil(8), path });
            }
        }
    }

    fn expr(&self, g: &Field, e: &Expr) -> Op {
        let new = self.diff.new;
        let float = match new.strip(g.ty) {
            Type::Base { encoding: Encoding::Float, size, .. } if matches!(size, 4 | 8) => Some(*size),
            _ => None,
        };
        let to = match float {
            Some(size) => Some(Bitspan {
                start: g.offset.saturating_mul(8),
                width: size as u32 * 8,
                signed: true,
                bool: false,
            }),
            None => number(new, g),
        };
        match to {
            Some(to) => Op::Expr { to, float, expr: e.clone(), path: g.path.clone() },
            None => Op::Refused {
                code: "rule-type",
                path: g.path.clone(),
                message: format!(
                    "a rule computes {}.{}, but {} is no number",
                    self.names.1,
                    g.path,
                    new.display(g.ty)
                ),
                next_step: "name one of its members in the rule".into(),
            },
        }
    }

    /// Native ranges are whole bytes: a new bit-field that shares its byte with an old one starts as zero.
    fn limit_native(&self, plan: &mut Plan) {
        let mut carried = HashSet::new();
        for op in &plan.ops {
            if let Op::Number { to, .. } | Op::Expr { to, .. } = op
                && (to.start % 8 != 0 || to.width % 8 != 0)
            {
                carried.extend(to.start / 8..(to.start + u64::from(to.width)).div_ceil(8));
            }
        }
        if carried.is_empty() {
            return;
        }
        let mut i = 0;
        while i < plan.ops.len() {
            if let Op::Native { range, path } = &plan.ops[i]
                && range.end - range.start <= 16
                && range.clone().any(|b| carried.contains(&b))
            {
                let free: Vec<Op> = range
                    .clone()
                    .filter(|b| !carried.contains(b))
                    .map(|b| Op::Native { range: b..b + 1, path: path.clone() })
                    .collect();
                let n = free.len();
                plan.ops.splice(i..=i, free);
                i += n;
            } else {
                i += 1;
            }
        }
    }
}

/// How an anonymous union is remembered as used.
fn anonymous(f: &Field) -> String {
    format!("#{}", f.offset)
}

impl Plan {
    /// See [`LayoutDiff::map_offset`].
    pub(super) fn map_offset(&self, d: &LayoutDiff<'_>, offset: u64, want: Option<TypeId>) -> Option<u64> {
        self.ops.iter().find_map(|op| map_op(d, op, offset, want))
    }
}

fn map_op(d: &LayoutDiff<'_>, op: &Op, offset: u64, want: Option<TypeId>) -> Option<u64> {
    match op {
        Op::Copy { from, to, len, old_ty } => {
            let rel = offset.checked_sub(*from).filter(|r| r < len)?;
            // Inside of unchanged bytes everything keeps its distance.
            let fits = want.is_none_or(|w| holds(d.old, *old_ty, rel, w, 32));
            fits.then(|| to + rel)
        }
        Op::Number { from, to, .. } => {
            let start = from.start / 8;
            let rel = offset.checked_sub(start)?;
            (rel == 0 && want.is_none() && from.start % 8 == 0 && to.start % 8 == 0).then_some(to.start / 8)
        }
        Op::Float { from, to, .. } => (*from == offset && want.is_none()).then_some(*to),
        Op::Sub { from, to, plan, .. } => {
            let rel = offset.checked_sub(*from).filter(|r| *r < d.old.size_of(plan.old))?;
            if rel == 0 && want.is_none_or(|w| w == plan.old) {
                return Some(*to);
            }
            plan.map_offset(d, rel, want).map(|r| to + r)
        }
        Op::Array { from, to, count, from_stride, to_stride, element, old_ty, .. } => {
            let rel = offset.checked_sub(*from)?;
            if rel == 0 && want.is_none_or(|w| w == *old_ty) {
                return Some(*to);
            }
            if *from_stride == 0 || rel / from_stride >= *count {
                return None;
            }
            let (i, inner) = (rel / from_stride, rel % from_stride);
            element.iter().find_map(|op| map_op(d, op, inner, want)).map(|r| to + i * to_stride + r)
        }
        _ => None,
    }
}

/// The type has `want` at an offset.
fn holds(m: &TypeModel, ty: TypeId, offset: u64, want: TypeId, depth: u32) -> bool {
    let ty = m.resolve(ty);
    if offset == 0 && ty == want {
        return true;
    }
    if depth == 0 {
        return false;
    }
    match &m[ty] {
        Type::Record(r) => r.members.iter().any(|f| {
            let inside = offset.checked_sub(f.offset).filter(|o| *o < m.size_of(f.ty).max(1));
            inside.is_some_and(|o| holds(m, f.ty, o, want, depth - 1))
        }),
        Type::Array { element, .. } => match m.size_of(*element) {
            0 => false,
            size => holds(m, *element, offset % size, want, depth - 1),
        },
        _ => false,
    }
}
