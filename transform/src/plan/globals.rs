//! Globals and thread-locals: which ones old's value wins at, and that value in the new layout.

use super::carry::{Fix, Fixes, Words};
use super::findings::Findings;
use super::fix::Fixer;
use crate::layout::Layouts;
use crate::relayout::Relayout;
use crate::resolve::Elements;
use crate::types::{Type, TypeId};
use mcr_image::proto::{self, Range as NativeRange};

/// Bytes for the new version, the words in them still old; `fixes` are by new offset.
#[derive(Default)]
pub(crate) struct Carried {
    pub content: Vec<u8>,
    pub native: Vec<NativeRange>,
    pub fixes: Vec<(u64, Fix)>,
}

pub(crate) struct Carrier<'a> {
    pub fixer: &'a Fixer<'a>,
    pub layouts: &'a Layouts<'a>,
    pub rl: &'a dyn Relayout,
}

/// What is carried: one variable, in both versions.
pub(crate) struct Item<'a> {
    pub name: &'a str,
    pub old_ty: TypeId,
    pub new_ty: TypeId,
    pub new_size: u64,
    pub bytes: &'a [u8],
    /// Old bytes as loaded, where they are known: what equals them in a table stays new's.
    pub initial: Option<&'a [u8]>,
    pub addr: u64,
    /// Which new elements continue which old ones.
    pub elements: &'a Elements,
    /// It may be uninitialised: contradictions are worth a warning only.
    pub weak: bool,
}

impl Carrier<'_> {
    pub fn carry(
        &self,
        item: &Item<'_>,
        findings: &mut Findings,
        syncs: &mut Vec<proto::SyncObject>,
    ) -> Carried {
        let m = self.layouts.model;
        let mut out = Carried { content: vec![0; item.new_size as usize], ..Carried::default() };
        let parts = match (m.strip(item.old_ty), self.rl.element_new(item.new_ty)) {
            (Type::Array { element, .. }, Some(ne))
                if m.size_of(*element) > 0 && self.rl.size_new(ne) > 0 =>
            {
                self.parts(item, *element, ne, &mut out)
            }
            _ => {
                vec![Part { old_ty: item.old_ty, new_ty: item.new_ty, from: 0, to: 0, label: String::new() }]
            }
        };
        let table = parts.len() > 1 && item.initial.is_some_and(|i| i.iter().any(|&b| b != 0));
        let mut leaves = None;
        for p in &parts {
            let old_size =
                m.size_of(p.old_ty).max(if parts.len() == 1 { item.bytes.len() as u64 } else { 0 });
            let Some(bytes) = item.bytes.get(p.from as usize..(p.from + old_size) as usize) else { continue };
            let path = || format!("{}{}", item.name, p.label);
            let initial = item.initial.and_then(|i| i.get(p.from as usize..(p.from + old_size) as usize));
            if table && initial == Some(bytes) {
                self.keep_native(&mut out, p, "as it was at the start");
                continue;
            }
            let done = self.rl.convert(p.old_ty, p.new_ty, bytes);
            let room = (item.new_size - p.to).min(done.bytes.len() as u64) as usize;
            out.content[p.to as usize..p.to as usize + room].copy_from_slice(&done.bytes[..room]);
            for r in done.fresh {
                out.native.push(NativeRange {
                    start: p.to + r.start,
                    end: p.to + r.end,
                    why: "only in the new version".into(),
                });
            }
            for problem in done.problems {
                let severity = if problem.refusal { proto::Severity::Refusal } else { proto::Severity::Info };
                findings.add(
                    severity,
                    problem.code,
                    problem.message,
                    path(),
                    &problem.next_step,
                    item.addr + p.from,
                );
            }
            if table && let Some(initial) = initial {
                // The parts of a table are of one type.
                let leaves = leaves.get_or_insert_with(|| self.mapped_leaves(p));
                native_leaves(leaves, &mut out, p, bytes, initial);
            }
            let words = Words {
                fixer: self.fixer,
                layouts: self.layouts,
                ty: p.old_ty,
                bytes,
                addr: item.addr + p.from,
                weak: item.weak,
                native_sync: true,
            };
            let mut fixes = Fixes::new();
            words.typed(&path, findings, syncs, &mut fixes);
            words.conservative(&path, findings, &mut fixes);
            for (o, fix) in fixes {
                let Some(n) = self.rl.map_slot(p.old_ty, p.new_ty, o) else { continue };
                self.put(&mut out, p.to + n, fix);
            }
        }
        out.native = merge(std::mem::take(&mut out.native));
        // A word that stays native needs no relocation.
        let native = joined(&out.native);
        out.fixes.retain(|(at, _)| {
            let i = native.partition_point(|r| r.1 <= *at);
            native.get(i).is_none_or(|r| *at < r.0)
        });
        out
    }

    fn put(&self, out: &mut Carried, at: u64, fix: Fix) {
        match fix {
            Fix::Value(v) => {
                if let Some(slot) = out.content.get_mut(at as usize..at as usize + 8) {
                    slot.copy_from_slice(&v.to_le_bytes());
                }
            }
            Fix::Native(size, why) => {
                out.native.push(NativeRange { start: at, end: at + size, why: why.into() })
            }
            reloc @ Fix::Reloc { .. } => {
                out.fixes.push((at, reloc));
            }
        }
    }

    fn keep_native(&self, out: &mut Carried, p: &Part, why: &str) {
        let end = p.to + self.rl.size_new(p.new_ty);
        out.native.push(NativeRange { start: p.to, end, why: why.into() });
    }

    /// The elements of an array, old and new.
    fn parts(&self, item: &Item<'_>, oe: TypeId, ne: TypeId, out: &mut Carried) -> Vec<Part> {
        let (os, ns) = (self.layouts.model.size_of(oe), self.rl.size_new(ne));
        let (on, nn) = (item.bytes.len() as u64 / os, item.new_size / ns);
        // Plain numbers and bytes: one copy.
        let plain = self.layouts.of(oe).slots.is_empty()
            && !self.rl.changed(oe, ne)
            && *item.elements == Elements::Same;
        if plain {
            let n = on.min(nn) * os;
            out.content[..n as usize].copy_from_slice(&item.bytes[..n as usize]);
            if nn > on {
                out.native.push(NativeRange {
                    start: n,
                    end: item.new_size,
                    why: "only in the new version".into(),
                });
            }
            let words = Words {
                fixer: self.fixer,
                layouts: self.layouts,
                ty: oe,
                bytes: &item.bytes[..n as usize],
                addr: item.addr,
                weak: item.weak,
                native_sync: true,
            };
            let mut fixes = Fixes::new();
            words.conservative(&|| item.name.to_owned(), &mut Findings::default(), &mut fixes);
            for (o, fix) in fixes {
                self.put(out, o, fix);
            }
            return Vec::new();
        }
        let mut used = vec![false; nn as usize];
        let mut parts = Vec::new();
        for i in 0..on {
            let j = match item.elements {
                Elements::Same => Some(i),
                Elements::Keyed(map) => map.get(i as usize).copied().flatten(),
                Elements::Unknown(_) => None,
            };
            let Some(j) = j.filter(|&j| j < nn) else { continue };
            used[j as usize] = true;
            parts.push(Part { old_ty: oe, new_ty: ne, from: i * os, to: j * ns, label: format!("[{i}]") });
        }
        for (j, _) in used.iter().enumerate().filter(|u| !u.1) {
            let start = j as u64 * ns;
            out.native.push(NativeRange { start, end: start + ns, why: "only in the new version".into() });
        }
        parts
    }

    /// Scalars that both types of a part have.
    fn mapped_leaves(&self, p: &Part) -> Vec<Leaf> {
        let both = |(o, len): (u64, u64)| {
            let to = self.rl.map_slot(p.old_ty, p.new_ty, o)?;
            let new_len = self.rl.leaf_new(p.old_ty, p.new_ty, o)?;
            Some(Leaf { from: o as usize..(o + len) as usize, to: to..to + new_len })
        };
        leaves(self.layouts, p.old_ty).into_iter().filter_map(both).collect()
    }
}

/// A scalar in the old and in the new layout.
struct Leaf {
    from: std::ops::Range<usize>,
    to: std::ops::Range<u64>,
}

/// In a table, what the old process never changed stays new's, member by member.
fn native_leaves(leaves: &[Leaf], out: &mut Carried, p: &Part, bytes: &[u8], initial: &[u8]) {
    for l in leaves.iter().filter(|l| bytes.get(l.from.clone()) == initial.get(l.from.clone())) {
        out.native.push(NativeRange {
            start: p.to + l.to.start,
            end: p.to + l.to.end,
            why: "as it was at the start".into(),
        });
    }
}

struct Part {
    old_ty: TypeId,
    new_ty: TypeId,
    from: u64,
    to: u64,
    label: String,
}

/// Scalars of a type: (offset, size).
fn leaves(layouts: &Layouts<'_>, ty: TypeId) -> Vec<(u64, u64)> {
    fn go(layouts: &Layouts<'_>, ty: TypeId, at: u64, out: &mut Vec<(u64, u64)>) {
        let m = layouts.model;
        match m.strip(ty) {
            Type::Record(r) if r.kind == crate::types::RecordKind::Struct => {
                r.members
                    .iter()
                    .filter(|x| x.bits.is_none())
                    .for_each(|x| go(layouts, x.ty, at + x.offset, out));
            }
            Type::Array { element, count: Some(n) } if *n <= 64 => {
                let size = m.size_of(*element);
                (0..*n).for_each(|i| go(layouts, *element, at + i * size, out));
            }
            _ => {
                let size = m.size_of(ty);
                if size > 0 {
                    out.push((at, size));
                }
            }
        }
    }
    let mut out = Vec::new();
    go(layouts, ty, 0, &mut out);
    out
}

fn merge(mut v: Vec<NativeRange>) -> Vec<NativeRange> {
    v.sort_by_key(|r| (r.start, r.end));
    let mut out: Vec<NativeRange> = Vec::new();
    for r in v.into_iter().filter(|r| r.start < r.end) {
        match out.last_mut() {
            Some(last) if r.start <= last.end && last.why == r.why => last.end = last.end.max(r.end),
            _ => out.push(r),
        }
    }
    out
}

/// The bytes that any of the ranges (ascending by start) covers, as disjoint runs.
fn joined(ranges: &[NativeRange]) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for r in ranges {
        match out.last_mut() {
            Some(last) if r.start <= last.1 => last.1 = last.1.max(r.end),
            _ => out.push((r.start, r.end)),
        }
    }
    out
}

/// Whether a value differs from what the file says it starts with; words that the file does not determine
/// (addresses in libraries) do not count.
pub(crate) fn changed(initial: Option<&mcr_image::elf::Initial>, now: &[u8]) -> bool {
    initial.is_none_or(|i| !i.same_but_unknown(now))
}

/// A copy relocation: a variable of a library that lives in the program.
pub(crate) fn is_copy(initial: Option<&mcr_image::elf::Initial>) -> bool {
    initial.is_some_and(|i| i.unknown.iter().any(|u| matches!(u.why, mcr_image::elf::Unknown::Copy { .. })))
}
