//! Bytes of an old object → bytes of a new one.

use super::diff::LayoutDiff;
use super::mapping::{Bitspan, Op, Plan};
use super::model::{Type, TypeId, Variable};
use super::slots::SlotKind;
use mcr_plugin::ExprPath;
use mcr_plugin::expr::Step;
use std::ops::Range;

/// An object in the new layout. Pointers have their old values; see [`LayoutDiff::pointer_moves`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// As long as the new type.
    pub bytes: Vec<u8>,
    /// Members that only the new version has and no rule fills: zero in `bytes`; the native object's value
    /// should stay there.
    pub native: Vec<Native>,
    /// Members that only the old version had.
    pub dropped: Vec<Dropped>,
    /// What could not be carried exactly.
    pub problems: Vec<Problem>,
}

impl Converted {
    /// Nothing that forbids the update.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.problems.iter().all(|p| !p.refusal)
    }
    /// Byte ranges of `native`, ascending and merged.
    #[must_use]
    pub fn native_ranges(&self) -> Vec<Range<u64>> {
        let mut all: Vec<Range<u64>> =
            self.native.iter().map(|n| n.range.clone()).filter(|r| !r.is_empty()).collect();
        all.sort_by_key(|r| r.start);
        let mut out: Vec<Range<u64>> = Vec::new();
        for r in all {
            match out.last_mut() {
                Some(l) if r.start <= l.end => l.end = l.end.max(r.end),
                _ => out.push(r),
            }
        }
        out
    }
}

/// A member that only the new version has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Native {
    /// Its bytes in the new object.
    pub range: Range<u64>,
    /// "limits.soft".
    pub path: String,
}

/// A member that only the old version had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// "timeout".
    pub path: String,
    /// Its offset in the old object.
    pub offset: u64,
    /// Its type in the old version.
    pub ty: TypeId,
    /// The old bytes (the first 64 of them).
    pub value: Vec<u8>,
}

impl Dropped {
    /// All bytes are zero: nothing is lost.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.value.iter().all(|b| *b == 0)
    }
}

/// A value that does not fit, a union that nobody explained, a member that became something else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Stable: "narrowed", "union-changed", "kind-changed", "enum-removed", "array-shrunk", "rule-failed",
    /// "rule-type", "sign-changed", "malformed".
    pub code: &'static str,
    /// The update may not go on.
    pub refusal: bool,
    /// The member.
    pub path: String,
    /// Names type, member and value.
    pub message: String,
    /// What to do, with the line for the rules file.
    pub next_step: String,
}

/// A pointer-like word and its place in both layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PointerMove {
    /// In the old object.
    pub old_offset: u64,
    /// In the new object; `None` if its member is gone.
    pub new_offset: Option<u64>,
    /// What it is, in old types.
    pub kind: SlotKind,
    /// What it points at in the new version.
    pub new_pointee: Option<TypeId>,
    /// One of several readings of the bytes.
    pub in_union: bool,
}

impl LayoutDiff<'_> {
    /// Converts one object of type `old` to type `new`. Missing old bytes count as zero.
    #[must_use]
    pub fn convert(&self, old: TypeId, new: TypeId, bytes: &[u8]) -> Converted {
        let size = usize::try_from(self.new.size_of(new)).unwrap_or(usize::MAX);
        let mut out = Converted::default();
        // No object of a process is larger; a damaged file may say so.
        if size > 1 << 40 {
            out.problems.push(Problem {
                code: "malformed",
                refusal: true,
                path: String::new(),
                message: format!("{} is said to take {size} bytes", self.new.display(new)),
                next_step: "build the new version again".into(),
            });
            return out;
        }
        out.bytes = vec![0; size];
        let plan = self.plan(old, new);
        let mut run = Run { diff: self, old: bytes, out, prefix: Vec::new() };
        run.plan(&plan, 0, 0);
        run.out
    }

    /// Which bits of a new object a conversion makes from the old one: a mask of its bytes.
    #[must_use]
    pub fn covered(&self, old: TypeId, new: TypeId) -> Vec<u8> {
        let size = usize::try_from(self.new.size_of(new)).unwrap_or(usize::MAX);
        let mut mask = vec![0; if size > 1 << 40 { 0 } else { size }];
        self.cover(&self.plan(old, new).ops, 0, &mut mask);
        mask
    }

    fn cover(&self, ops: &[Op], base: u64, mask: &mut [u8]) {
        let bytes = |mask: &mut [u8], at: u64, len: u64| {
            let at = usize::try_from(base.saturating_add(at)).unwrap_or(usize::MAX);
            mask.iter_mut().skip(at).take(usize::try_from(len).unwrap_or(usize::MAX)).for_each(|b| *b = 0xff);
        };
        for op in ops {
            match op {
                Op::Copy { to, len, .. } => bytes(mask, *to, *len),
                Op::Float { to, to_size, .. } => bytes(mask, *to, *to_size),
                Op::Number { to, .. } => {
                    for bit in to.start..to.start.saturating_add(to.width.into()) {
                        let bit = bit.saturating_add(base.saturating_mul(8));
                        if let Some(b) = usize::try_from(bit / 8).ok().and_then(|n| mask.get_mut(n)) {
                            *b |= 1 << (bit % 8);
                        }
                    }
                }
                Op::Sub { to, plan, .. } => self.cover(&plan.ops, base.saturating_add(*to), mask),
                Op::Array { to, count, to_stride, element, .. } => {
                    for i in 0..*count {
                        let at = base.saturating_add(*to).saturating_add(i.saturating_mul(*to_stride));
                        if at >= mask.len() as u64 {
                            break;
                        }
                        self.cover(element, at, mask);
                    }
                }
                _ => {}
            }
        }
    }

    /// Whether a rule in `[values]` computes this whole variable.
    #[must_use]
    pub fn has_global_rule(&self, new: &Variable) -> bool {
        self.rules.global_value(&new.display()).or_else(|| self.rules.global_value(&new.name)).is_some()
    }

    /// Converts a global's value; a rule in `[values]` for the whole variable wins.
    #[must_use]
    pub fn convert_global(&self, old: &Variable, new: &Variable, bytes: &[u8]) -> Converted {
        let Some(e) = self.rules.global_value(&new.display()).or_else(|| self.rules.global_value(&new.name))
        else {
            return self.convert(old.ty, new.ty, bytes);
        };
        let mut lookup = |p: &ExprPath| {
            let here = p.root == "old" || *p.root == *old.name;
            here.then(|| integer_at(self, old.ty, 0, &p.steps, bytes)).flatten()
        };
        let value = e.eval(&mut lookup).map_err(|e| e.to_string());
        self.scalar(new, value)
    }

    /// The value of a global that only the new version has, where a rule in `[defaults]` gives one.
    #[must_use]
    pub fn default_global(&self, new: &Variable) -> Option<Converted> {
        let e = self.rules.global_default(&new.display()).or_else(|| self.rules.global_default(&new.name))?;
        let value = e.eval(&mut |_| None).map_err(|e| e.to_string());
        Some(self.scalar(new, value))
    }

    fn scalar(&self, new: &Variable, value: Result<i128, String>) -> Converted {
        let size = usize::try_from(self.new.size_of(new.ty)).unwrap_or(0).min(64);
        let out = Converted { bytes: vec![0; size], ..Converted::default() };
        let mut run = Run { diff: self, old: &[], out, prefix: Vec::new() };
        let f =
            super::fields::Field { path: new.display(), ty: new.ty, offset: 0, bits: None, in_union: false };
        match (super::mapping::number(self.new, &f), value) {
            (Some(to), Ok(v)) => run.put_number(to, 0, v, &f.path, &self.new.display(new.ty)),
            (None, _) => run.problem(
                "rule-type",
                &f.path,
                format!("a rule computes {}, but {} is no number", f.path, self.new.display(new.ty)),
                "name one of its members in the rule".into(),
            ),
            (_, Err(e)) => run.problem("rule-failed", &f.path, e, "correct the rule".into()),
        }
        run.out
    }

    /// Where each pointer, thread id, process id and synchronisation object of an old type is in the new
    /// one. `None` if there are too many of them to list.
    #[must_use]
    pub fn pointer_moves(&self, old: TypeId, new: TypeId) -> Option<Vec<PointerMove>> {
        let slots = self.old.pointer_map(old)?;
        let same = self.same_layout(old, new);
        Some(
            slots
                .into_iter()
                .map(|s| PointerMove {
                    old_offset: s.offset,
                    new_offset: if same { Some(s.offset) } else { self.map_slot(old, new, s.offset) },
                    kind: s.kind,
                    new_pointee: match s.kind {
                        SlotKind::Pointer(to) => self.pair(to),
                        _ => None,
                    },
                    in_union: s.in_union,
                })
                .collect(),
        )
    }

    /// Place of a word: not "the start stays the start", as of a pointer to it, but where this very member went.
    #[must_use]
    pub fn map_slot(&self, old: TypeId, new: TypeId, offset: u64) -> Option<u64> {
        let plan = self.plan(old, new);
        slot_in(&plan, self, offset)
    }
}

fn slot_in(plan: &Plan, d: &LayoutDiff<'_>, offset: u64) -> Option<u64> {
    fn one(op: &Op, d: &LayoutDiff<'_>, offset: u64) -> Option<u64> {
        match op {
            Op::Copy { from, to, len, .. } => offset.checked_sub(*from).filter(|r| r < len).map(|r| to + r),
            Op::Number { from, to, .. } => {
                (from.start == offset * 8 && to.start % 8 == 0 && to.width >= from.width)
                    .then_some(to.start / 8)
            }
            Op::Float { from, to, .. } => (*from == offset).then_some(*to),
            Op::Sub { from, to, plan, .. } => {
                let rel = offset.checked_sub(*from).filter(|r| *r < d.old.size_of(plan.old))?;
                slot_in(plan, d, rel).map(|r| to + r)
            }
            Op::Array { from, to, count, from_stride, to_stride, element, .. } => {
                let rel = offset.checked_sub(*from)?;
                let i = rel.checked_div(*from_stride).filter(|i| i < count)?;
                element.iter().find_map(|op| one(op, d, rel % from_stride)).map(|r| to + i * to_stride + r)
            }
            _ => None,
        }
    }
    plan.ops.iter().find_map(|op| one(op, d, offset))
}

struct Run<'r, 'm> {
    diff: &'r LayoutDiff<'m>,
    old: &'r [u8],
    out: Converted,
    /// Path of the record that is being converted, from the object.
    prefix: Vec<String>,
}

/// Bits of a number at a base offset; bytes that are not there are zero.
fn get_number(data: &[u8], at: Bitspan, base: u64) -> i128 {
    let start = at.start.saturating_add(base.saturating_mul(8));
    let first = usize::try_from(start / 8).unwrap_or(usize::MAX);
    let mut raw = 0u128;
    for i in 0..((start % 8) as u32 + at.width).div_ceil(8) {
        let b = first.checked_add(i as usize).and_then(|n| data.get(n)).copied().unwrap_or(0);
        raw |= u128::from(b) << (8 * i);
    }
    raw >>= start % 8;
    let mask = (1u128 << at.width) - 1;
    let v = raw & mask;
    if at.signed && v >> (at.width - 1) & 1 == 1 { v as i128 - (1i128 << at.width) } else { v as i128 }
}

fn fits(v: i128, to: Bitspan) -> bool {
    match (to.bool, to.signed) {
        (true, _) => (0..=1).contains(&v),
        (false, true) => (-(1i128 << (to.width - 1))..(1i128 << (to.width - 1))).contains(&v),
        (false, false) => (0..(1i128 << to.width)).contains(&v),
    }
}

impl Run<'_, '_> {
    fn path(&self, p: &str) -> String {
        let mut s = String::new();
        for part in self.prefix.iter().map(String::as_str).chain([p]).filter(|p| !p.is_empty()) {
            if !s.is_empty() && !part.starts_with('[') {
                s.push('.');
            }
            s.push_str(part);
        }
        s
    }

    fn problem(&mut self, code: &'static str, path: &str, message: String, next_step: String) {
        let path = self.path(path);
        self.out.problems.push(Problem { code, refusal: true, path, message, next_step });
    }

    fn old_bytes(&self, r: Range<u64>) -> &[u8] {
        let (a, b) =
            (usize::try_from(r.start).unwrap_or(usize::MAX), usize::try_from(r.end).unwrap_or(usize::MAX));
        let len = self.old.len();
        &self.old[a.min(len)..b.min(len).max(a.min(len))]
    }

    fn plan(&mut self, plan: &Plan, from: u64, to: u64) {
        for op in &plan.ops {
            self.op(plan, op, from, to, from);
        }
    }

    /// `from`, `to`: what the offsets of `op` are relative to; `record`: start of the plan's old record.
    fn op(&mut self, plan: &Plan, op: &Op, from: u64, to: u64, record: u64) {
        match op {
            Op::Copy { from: f, to: t, len, .. } => {
                let start = from.saturating_add(*f);
                let src = self.old_bytes(start..start.saturating_add(*len)).to_vec();
                let at = usize::try_from(to.saturating_add(*t)).unwrap_or(usize::MAX);
                if let Some(dst) = self.out.bytes.get_mut(at..) {
                    let n = src.len().min(dst.len());
                    dst[..n].copy_from_slice(&src[..n]);
                }
            }
            Op::Number { from: f, to: t, map, path, type_name } => {
                let mut v = get_number(self.old, *f, from);
                match map.as_ref().map(|m| m.get(&v)) {
                    Some(Some(Ok(w))) => v = *w,
                    Some(Some(Err(gone))) => {
                        let message = format!(
                            "{}.{path} is {v}, {gone}, which the new version does not have",
                            plan.name
                        );
                        return self.problem("enum-removed", path, message, rule(plan, path));
                    }
                    Some(None) => {
                        let message = format!(
                            "{}.{path} is {v}, which is no constant of its enum, and the enum is renumbered",
                            plan.name
                        );
                        return self.problem("enum-unknown", path, message, rule(plan, path));
                    }
                    None => {}
                }
                if !fits(v, *t) && v < 0 && !t.signed && !t.bool && t.width >= f.width {
                    // C's conversion: (size_t)-1 stays "all ones".
                    let w = v + (1i128 << t.width);
                    let message =
                        format!("{}.{path} is {v} and becomes {w}: the new type is unsigned", plan.name);
                    let (path_, next_step) = (self.path(path), rule(plan, path));
                    self.out.problems.push(Problem {
                        code: "sign-changed",
                        refusal: false,
                        path: path_,
                        message,
                        next_step,
                    });
                    v = w;
                } else if !fits(v, *t) && t.signed && !f.signed && t.width == f.width {
                    let w = v - (1i128 << t.width);
                    let message =
                        format!("{}.{path} is {v} and becomes {w}: the new type is signed", plan.name);
                    return self.problem("sign-changed", path, message, rule(plan, path));
                }
                self.put_named(plan, *t, to, v, path, type_name);
            }
            Op::Float { from: f, from_size, to: t, to_size, path } => {
                let start = from.saturating_add(*f);
                let b = self.old_bytes(start..start + from_size).to_vec();
                let v = match (from_size, <[u8; 4]>::try_from(&b[..]), <[u8; 8]>::try_from(&b[..])) {
                    (4, Ok(w), _) => f64::from(f32::from_le_bytes(w)),
                    (_, _, Ok(w)) => f64::from_le_bytes(w),
                    _ => 0.0,
                };
                if *to_size == 4 && f64::from(v as f32) != v && !v.is_nan() {
                    let message = format!("{}.{path} = {v} loses digits in a float", plan.name);
                    let (path_, next_step) = (self.path(path), rule(plan, path));
                    self.out.problems.push(Problem {
                        code: "narrowed",
                        refusal: false,
                        path: path_,
                        message,
                        next_step,
                    });
                }
                self.put_float(v, *to_size, to.saturating_add(*t));
            }
            Op::Sub { from: f, to: t, plan: inner, path } => {
                self.prefix.push(path.clone());
                self.plan(inner, from.saturating_add(*f), to.saturating_add(*t));
                self.prefix.pop();
            }
            Op::Array { from: f, to: t, count, from_stride, to_stride, element, path, .. } => {
                let before = self.out.problems.len();
                for i in 0..*count {
                    let a = from.saturating_add(*f).saturating_add(i.saturating_mul(*from_stride));
                    let b = to.saturating_add(*t).saturating_add(i.saturating_mul(*to_stride));
                    if b >= self.out.bytes.len() as u64 {
                        break;
                    }
                    self.prefix.push(format!("{path}[{i}]"));
                    element.iter().for_each(|op| self.op(plan, op, a, b, record));
                    self.prefix.pop();
                    if self.out.problems.len() > before + 16 {
                        break;
                    }
                }
            }
            Op::Lost { from: r, text, path } => {
                let lost = self.old_bytes(from.saturating_add(r.start)..from.saturating_add(r.end));
                let kept_end = from.saturating_add(r.start);
                let terminated =
                    *text && self.old_bytes(kept_end.saturating_sub(256).max(from)..kept_end).contains(&0);
                if lost.iter().any(|b| *b != 0) && !terminated {
                    let message =
                        format!("{}.{path} has fewer elements now, and the ones behind hold data", plan.name);
                    self.problem("array-shrunk", path, message, rule(plan, path));
                }
            }
            Op::Union { by, members, path } => {
                let old_ty = plan.old;
                let mut lookup = |p: &ExprPath| {
                    (p.root == "old")
                        .then(|| integer_at(self.diff, old_ty, record, &p.steps, self.old))
                        .flatten()
                };
                let value = match by.by.eval(&mut lookup) {
                    Ok(v) => v,
                    Err(e) => {
                        return self.problem("rule-failed", path, e.to_string(), "correct the rule".into());
                    }
                };
                let live = by.member(value, |c| self.diff.old_constant(c)).map(str::to_owned);
                match live.as_ref().and_then(|n| members.iter().find(|m| m.0 == *n)) {
                    Some((_, ops)) => ops.iter().for_each(|op| self.op(plan, op, from, to, record)),
                    None => {
                        let what = live.map_or_else(
                            || format!("no case for {value}"),
                            |n| format!("no member {n} on both sides"),
                        );
                        let message = format!("the rule for the union {}.{path} has {what}", plan.name);
                        self.problem("union-changed", path, message, "add the case, or a default".into());
                    }
                }
            }
            Op::Expr { to: t, float, expr, path } => {
                let mut lookup = |p: &ExprPath| {
                    (p.root == "old")
                        .then(|| integer_at(self.diff, plan.old, record, &p.steps, self.old))
                        .flatten()
                };
                match (expr.eval(&mut lookup), float) {
                    (Ok(v), Some(size)) => self.put_float(v as f64, *size, to.saturating_add(t.start / 8)),
                    (Ok(v), None) => self.put_named(plan, *t, to, v, path, "its type"),
                    (Err(e), _) => {
                        self.problem("rule-failed", path, e.to_string(), "correct the rule".into())
                    }
                }
            }
            Op::Native { range, path } => {
                let range = to.saturating_add(range.start)..to.saturating_add(range.end);
                let path = self.path(path);
                self.out.native.push(Native { range, path });
            }
            Op::Dropped { from: r, ty, path } => {
                let (a, b) = (from.saturating_add(r.start), from.saturating_add(r.end));
                let value = self.old_bytes(a..b.min(a.saturating_add(64))).to_vec();
                let path = self.path(path);
                self.out.dropped.push(Dropped { path, offset: a, ty: *ty, value });
            }
            Op::Refused { code, path, message, next_step } => {
                let message =
                    if plan.name.is_empty() { message.clone() } else { format!("{}: {message}", plan.name) };
                self.problem(code, path, message, next_step.clone());
            }
        }
    }

    fn put_named(&mut self, plan: &Plan, to: Bitspan, base: u64, v: i128, path: &str, type_name: &str) {
        if fits(v, to) {
            return self.put_number(to, base, v, path, type_name);
        }
        let message = format!("{}.{path} = {v} does not fit in {type_name}", plan.name);
        self.problem("narrowed", path, message, rule(plan, path));
    }

    fn put_number(&mut self, to: Bitspan, base: u64, v: i128, path: &str, type_name: &str) {
        if !fits(v, to) {
            let message = format!("{path} = {v} does not fit in {type_name}");
            return self.problem("narrowed", path, message, "correct the rule".into());
        }
        let start = to.start.saturating_add(base.saturating_mul(8));
        for i in 0..u64::from(to.width) {
            let bit = start.saturating_add(i);
            let Some(b) = usize::try_from(bit / 8).ok().and_then(|n| self.out.bytes.get_mut(n)) else {
                return;
            };
            let mask = 1u8 << (bit % 8);
            if v >> i & 1 == 1 { *b |= mask } else { *b &= !mask }
        }
    }

    fn put_float(&mut self, v: f64, size: u64, at: u64) {
        let bytes = if size == 4 { (v as f32).to_le_bytes().to_vec() } else { v.to_le_bytes().to_vec() };
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        if let Some(dst) = at.checked_add(bytes.len()).and_then(|e| self.out.bytes.get_mut(at..e)) {
            dst.copy_from_slice(&bytes);
        }
    }
}

/// The line that a rules file would need.
fn rule(plan: &Plan, path: &str) -> String {
    format!(
        "say what it shall be in the rules file: [values] \"{}.{path}\" = \"old.{path} & 0x7fffffff\"",
        plan.name
    )
}

/// The integer at a path in an old object.
fn integer_at(d: &LayoutDiff<'_>, ty: TypeId, base: u64, steps: &[Step], bytes: &[u8]) -> Option<i128> {
    use super::fields::{Field, Unions, fields};
    let m = d.old;
    let mut at = Field { path: String::new(), ty, offset: base, bits: None, in_union: false };
    for s in steps {
        at = match (s, m.strip(at.ty)) {
            (Step::Field(name), Type::Record(r)) => {
                let f = fields(m, r, Unions::Open).into_iter().find(|f| f.path == *name)?;
                let base = at.offset.saturating_mul(8);
                let bits = f.bits.map(|b| super::Bits { start: b.start.saturating_add(base), ..b });
                Field { offset: at.offset.checked_add(f.offset)?, bits, ..f }
            }
            (Step::Index(i), Type::Array { element, count }) => {
                if count.is_some_and(|c| *i >= c) {
                    return None;
                }
                let offset = at.offset.checked_add(i.checked_mul(m.size_of(*element))?)?;
                Field { ty: *element, offset, bits: None, ..at }
            }
            _ => return None,
        };
    }
    let span = super::mapping::number(m, &at)?;
    (span.start.checked_add(span.width.into())?.div_ceil(8) <= bytes.len() as u64)
        .then(|| get_number(bytes, span, 0))
}
