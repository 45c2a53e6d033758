//! I11: what got a new layout is converted back to the old one and compared.

use super::relations::ranges;
use super::{Broken, Placing, Root, Verdict, Verifier};
use crate::layout::SlotKind;
use crate::plan::Conv;
use crate::resolve::Elements;
use crate::trace::word_at;
use crate::types::{LayoutDiff, Type, TypeId};
use mcr_image::{Addr, Memory, proto};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::rc::Rc;

/// What was compared, and what cannot come back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoundTrip {
    /// Heap objects that came back byte for byte.
    pub objects: usize,
    /// Globals, thread-locals and locals that did.
    pub variables: usize,
    /// How many objects of which type.
    pub types: BTreeMap<String, usize>,
    /// Members that the new version does not have, or that a rule computes: "struct session.timeout".
    pub lost: BTreeSet<String>,
    /// Types of objects that were not compared, because the two versions' names do not say which they are.
    pub skipped: BTreeSet<String>,
}

impl RoundTrip {
    /// For the report.
    #[must_use]
    pub fn finding(&self) -> Option<proto::Finding> {
        if self.lost.is_empty() && self.skipped.is_empty() {
            return None;
        }
        let list = |s: &BTreeSet<String>| {
            let shown: Vec<&str> = s.iter().take(12).map(String::as_str).collect();
            let more = s.len() - shown.len();
            format!(
                "{}{}",
                shown.join(", "),
                if more > 0 { format!(" and {more} more") } else { String::new() }
            )
        };
        let mut message = format!(
            "{} objects and {} variables come back as they were when converted back",
            self.objects, self.variables
        );
        if !self.lost.is_empty() {
            message.push_str(&format!("; not {}", list(&self.lost)));
        }
        if !self.skipped.is_empty() {
            message.push_str(&format!("; not compared: {}", list(&self.skipped)));
        }
        Some(proto::Finding {
            severity: proto::Severity::Info.into(),
            code: "round-trip".into(),
            message,
            next_step: "see the type changes (`mcr types`) for what is dropped or computed".into(),
            ..Default::default()
        })
    }
}

/// How a pair of types is compared.
struct Pair {
    /// Old bits that come back and are no pointers.
    mask: Vec<u8>,
    /// The bytes are the same in both versions.
    same: bool,
}

struct Trip<'v, 'a, 'b> {
    v: &'v Verifier<'a>,
    back: &'b LayoutDiff<'b>,
    at: &'v dyn Placing,
    pairs: HashMap<(TypeId, TypeId), Rc<Pair>>,
    found: RoundTrip,
}

/// One value in both layouts.
struct Both<'b> {
    old_ty: TypeId,
    new_ty: TypeId,
    old: &'b [u8],
    new: &'b [u8],
    native: &'b [Range<u64>],
    addr: u64,
}

impl Verifier<'_> {
    /// I11: converted back, everything is what it was, save what is named.
    pub fn round_trip(&self, view: &dyn Memory, at: &dyn Placing) -> Result<RoundTrip, Broken> {
        let rules = self.prepared.rules.reversed();
        let back = LayoutDiff::new(self.prepared.types, self.prepared.old_types, &rules);
        let mut trip = Trip { v: self, back: &back, at, pairs: HashMap::new(), found: RoundTrip::default() };
        let paths: HashMap<u64, &str> =
            self.patch.objects.iter().map(|o| (o.old_addr, o.path.as_str())).collect();
        for o in &self.patch.objects {
            if o.relaid && self.convs.at(o.old_addr).is_none() {
                trip.found.skipped.insert(o.type_name.clone());
            }
        }
        for c in &self.convs.list {
            trip.object(c, view, paths.get(&c.old_addr).copied().unwrap_or_default())?;
        }
        for (i, g) in self.patch.globals.iter().enumerate() {
            let Some((old, new)) = self.global(g) else { continue };
            let rules = self.prepared.rules;
            if rules.global_value(&new.display()).or_else(|| rules.global_value(&new.name)).is_some() {
                trip.found.lost.insert(format!("{} (computed)", new.display()));
                continue;
            }
            if let (Some(now), Ok(then)) =
                (at.root(Root::Global(i)), self.memory.bytes(Addr(g.old_addr), old.size as usize))
            {
                trip.variable((old, new), &then, &now, &ranges(&g.keep_native), g.old_addr, &old.display())?;
            }
        }
        for (i, t) in self.patch.tls.iter().enumerate() {
            let Some((old, addr, new)) = self.thread_local(t) else { continue };
            if let (Some(now), Ok(then)) =
                (at.root(Root::Tls(i)), self.memory.bytes(Addr(addr), old.size as usize))
            {
                let name = format!("{} of thread {}", old.display(), t.old_tid);
                trip.variable((old, new), &then, &now, &ranges(&t.keep_native), addr, &name)?;
            }
        }
        Ok(trip.found)
    }
}

impl Trip<'_, '_, '_> {
    fn pair(&mut self, old: TypeId, new: TypeId) -> Rc<Pair> {
        if let Some(p) = self.pairs.get(&(old, new)) {
            return Rc::clone(p);
        }
        let same = !self.v.rl().changed(old, new);
        let size = self.v.prepared.old_types.size_of(old) as usize;
        let mut mask = if same { vec![0xff; size] } else { self.back.covered(new, old) };
        mask.resize(size, 0);
        for s in &self.v.prepared.layouts.of(old).slots {
            let len = match s.kind {
                SlotKind::Pointer(_) | SlotKind::Function | SlotKind::Untyped | SlotKind::Thread => 8,
                SlotKind::Pid => 4,
                SlotKind::Sync(_, size) => size,
                SlotKind::Union(_) | SlotKind::Enum(_) | SlotKind::Bool => continue,
            };
            let end = ((s.offset + len) as usize).min(size);
            mask[(s.offset as usize).min(end)..end].fill(0);
        }
        let p = Rc::new(Pair { mask, same });
        self.pairs.insert((old, new), Rc::clone(&p));
        p
    }

    fn object(&mut self, c: &Conv, view: &dyn Memory, path: &str) -> Result<(), Broken> {
        let name = self.v.prepared.old_types.display(c.old_ty);
        let unread = |e: &dyn std::fmt::Display| {
            broken(
                format!("{path} ({name} at {:#x}): its new bytes cannot be read: {e}", c.new_addr),
                path,
                c.old_addr,
            )
        };
        let old =
            self.v.memory.bytes(Addr(c.old_addr), (c.count * c.old_size) as usize).map_err(|e| unread(&e))?;
        let new = view.bytes(Addr(c.new_addr), (c.count * c.new_size) as usize).map_err(|e| unread(&e))?;
        for i in 0..c.count {
            let both = Both {
                old_ty: c.old_ty,
                new_ty: c.new_ty,
                old: &old[(i * c.old_size) as usize..((i + 1) * c.old_size) as usize],
                new: &new[(i * c.new_size) as usize..((i + 1) * c.new_size) as usize],
                native: &[],
                addr: c.old_addr + i * c.old_size,
            };
            let path = || if c.count > 1 { format!("{path}[{i}]") } else { path.to_owned() };
            self.compare(&both, &path)?;
        }
        if let Some((from, to)) = c.tail {
            self.tail(c, (from, to), view, path)?;
        }
        self.found.objects += c.count as usize;
        *self.found.types.entry(name).or_default() += c.count as usize;
        Ok(())
    }

    /// A flexible array at the end: the same bytes, and words that point at what moved.
    fn tail(&self, c: &Conv, (from, to): (u64, u64), view: &dyn Memory, path: &str) -> Result<(), Broken> {
        let len = (c.end - (c.old_addr + from)) as usize;
        let (Ok(a), Ok(b)) =
            (self.v.memory.bytes(Addr(c.old_addr + from), len), view.bytes(Addr(c.new_addr + to), len))
        else {
            return Ok(());
        };
        match (0..len).find(|&i| a[i] != b[i] && !self.moved_word(&a, &b, i, i)) {
            None => Ok(()),
            Some(i) => Err(broken(
                format!(
                    "{path}: byte {i} of the array at its end was {:#04x} and is {:#04x} in the new version",
                    a[i], b[i]
                ),
                path,
                c.old_addr + from + i as u64,
            )),
        }
    }

    fn variable(
        &mut self,
        (old, new): (&crate::types::Variable, &crate::types::Variable),
        then: &[u8],
        now: &[u8],
        native: &[Range<u64>],
        addr: u64,
        name: &str,
    ) -> Result<(), Broken> {
        let (o, n) = (self.v.prepared.old_types, self.v.prepared.types);
        self.found.variables += 1;
        let elements = self.v.resolver.elements(old, new);
        if let (Type::Array { element: a, .. }, Type::Array { element: b, .. }) =
            (o.strip(old.ty), n.strip(new.ty))
            && o.size_of(*a) > 0
            && n.size_of(*b) > 0
            && (*elements != Elements::Same || self.v.rl().changed(*a, *b))
        {
            let (os, ns) = (o.size_of(*a), n.size_of(*b));
            for i in 0..then.len() as u64 / os {
                let j = match &*elements {
                    Elements::Same => Some(i),
                    Elements::Keyed(map) => map.get(i as usize).copied().flatten(),
                    Elements::Unknown(_) => None,
                };
                let Some(to) = j.and_then(|j| now.get((j * ns) as usize..((j + 1) * ns) as usize)) else {
                    self.found.lost.insert(format!("{name}[{i}]"));
                    continue;
                };
                let base = j.unwrap_or(i) * ns;
                let inside: Vec<Range<u64>> = native
                    .iter()
                    .filter(|r| r.start < base + ns && base < r.end)
                    .map(|r| r.start.saturating_sub(base)..r.end.min(base + ns) - base)
                    .collect();
                let both = Both {
                    old_ty: *a,
                    new_ty: *b,
                    old: &then[(i * os) as usize..((i + 1) * os) as usize],
                    new: to,
                    native: &inside,
                    addr: addr + i * os,
                };
                self.compare(&both, &|| format!("{name}[{i}]"))?;
            }
            return Ok(());
        }
        let both = Both { old_ty: old.ty, new_ty: new.ty, old: then, new: now, native, addr };
        self.compare(&both, &|| name.to_owned())
    }

    fn compare(&mut self, b: &Both<'_>, path: &dyn Fn() -> String) -> Result<(), Broken> {
        let pair = self.pair(b.old_ty, b.new_ty);
        if pair.same {
            return self.compare_with(b, b.new, &pair, path);
        }
        let size = self.v.prepared.types.size_of(b.new_ty) as usize;
        let returned = self.back.convert(b.new_ty, b.old_ty, b.new.get(..size).unwrap_or(b.new));
        for n in &returned.native {
            let name = self.v.prepared.old_types.display(b.old_ty);
            // Bytes that were never anything but zero are no loss.
            let bytes = b.old.get(n.range.start as usize..(n.range.end as usize).min(b.old.len()));
            if bytes.is_some_and(|v| v.iter().any(|x| *x != 0)) {
                self.found.lost.insert(format!("{name}.{}", n.path));
            }
        }
        for p in returned.problems.iter().filter(|p| p.code == "union-changed" || p.code == "kind-changed") {
            self.found.lost.insert(format!("{}.{}", self.v.prepared.old_types.display(b.old_ty), p.path));
        }
        self.compare_with(b, &returned.bytes, &pair, path)
    }

    fn compare_with(
        &mut self,
        b: &Both<'_>,
        returned: &[u8],
        pair: &Pair,
        path: &dyn Fn() -> String,
    ) -> Result<(), Broken> {
        let n = b.old.len().min(returned.len());
        let differs = |i: usize| (b.old[i] ^ returned[i]) & pair.mask.get(i).copied().unwrap_or(0) != 0;
        let mut i = 0;
        while i < n {
            // Eight at a time: nearly all are equal.
            if i + 8 <= n && b.old[i..i + 8] == returned[i..i + 8] {
                i += 8;
                continue;
            }
            if differs(i) && !self.excused(b, returned, pair, i) {
                let at = path();
                let field = self.v.prepared.layouts.field_path(b.old_ty, i as u64);
                let dot = if field.is_empty() || field.starts_with('[') { "" } else { "." };
                let word = i & !7;
                let show = |v: &[u8]| {
                    v[word..(word + 8).min(v.len())].iter().map(|x| format!("{x:02x}")).collect::<String>()
                };
                let message = format!(
                    "{at}{dot}{field} ({}) does not come back: its bytes were {} and would be {} again",
                    self.v.prepared.old_types.display(b.old_ty),
                    show(b.old),
                    show(&returned[..n])
                );
                return Err(broken(message, &format!("{at}{dot}{field}"), b.addr + i as u64));
            }
            i += 1;
        }
        Ok(())
    }

    /// A byte that differs and has a reason to.
    fn excused(&mut self, b: &Both<'_>, returned: &[u8], pair: &Pair, i: usize) -> bool {
        let at = i as u64;
        let leaf = self.leaf(b.old_ty, at);
        let place = if pair.same {
            Some(at)
        } else {
            self.v.rl().map_slot(b.old_ty, b.new_ty, leaf).map(|n| n + (at - leaf))
        };
        if let Some(p) = place
            && b.native.iter().any(|r| r.contains(&p))
        {
            return true;
        }
        if self.moved_word(b.old, returned, i, i) {
            return true;
        }
        let name = self.v.prepared.old_types.display(b.old_ty);
        let field = self.v.prepared.layouts.field_path(b.old_ty, at);
        if place.is_none() && !self.v.prepared.rules.is_empty() {
            self.found.lost.insert(format!("{name}.{field} (computed)"));
            return true;
        }
        if pair.same {
            return false;
        }
        // Named when it was converted: a sign, the digits of a float.
        let diff = self.v.prepared.diff.layout();
        let told = diff.convert(b.old_ty, b.new_ty, b.old).problems.iter().any(|p| {
            !p.refusal && (field.starts_with(p.path.as_str()) || p.path.starts_with(field.as_str()))
        });
        if told {
            self.found.lost.insert(format!("{name}.{field} (not exact)"));
        }
        told
    }

    /// Start of the scalar that holds an offset.
    fn leaf(&self, ty: TypeId, offset: u64) -> u64 {
        let m = self.v.prepared.old_types;
        let (mut ty, mut base) = (ty, 0);
        for _ in 0..64 {
            match m.strip(ty) {
                Type::Record(r) => {
                    let inside = |x: &&crate::types::Member| {
                        x.bits.is_none()
                            && base + x.offset <= offset
                            && offset < base + x.offset + m.size_of(x.ty)
                    };
                    let Some(x) = r.members.iter().find(inside) else { break };
                    (ty, base) = (x.ty, base + x.offset);
                }
                Type::Array { element, .. } if m.size_of(*element) > 0 => {
                    base += (offset - base) / m.size_of(*element) * m.size_of(*element);
                    ty = *element;
                }
                _ => break,
            }
        }
        base
    }

    /// An eight-byte word over byte `i` that is an address of something that moved, and became its new one.
    fn moved_word(&self, old: &[u8], new: &[u8], i: usize, j: usize) -> bool {
        (0..8usize.min(i + 1).min(j + 1)).any(|back| {
            let (Some(p), Some(q)) = (word_at(old, (i - back) as u64), word_at(new, (j - back) as u64))
            else {
                return false;
            };
            p != q && self.points(p) && !matches!(self.v.judge(p, q, None, self.at), Verdict::Wrong(_))
        })
    }

    /// It is the address of something whose place depends on the version.
    fn points(&self, p: u64) -> bool {
        use crate::space::Spot;
        p >= 4096
            && (self.v.convs.at(p).is_some()
                || matches!(self.v.space.outside(p), Spot::Program | Spot::Stack(_) | Spot::Tls(..))
                || self.v.process.threads.iter().any(|t| t.fs_base == p))
    }
}

fn broken(message: String, path: &str, addr: u64) -> Broken {
    let next_step = "the old server goes on; a rule can say what the member becomes ([values]), or report this with \
                     the image and both programs";
    Broken { invariant: "I11", message, path: path.to_owned(), next_step, addr }
}
