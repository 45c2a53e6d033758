//! I10 over typed memory: the roots, and what the walk from them counts.

use super::walk::{Value, Walk};
use super::{Broken, Placing, Root, Verdict, Verifier};
use crate::layout::SlotKind;
use crate::resolve::Elements;
use crate::trace::word_at;
use crate::types::{Type, TypeId};
use mcr_image::elf::SectionKind;
use mcr_image::proto::{place, reloc};
use mcr_image::{Addr, Memory, proto};
use mcr_plugin::Keep;
use std::collections::HashSet;
use std::ops::Range;

/// What was compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Relations {
    /// Roots.
    pub roots: usize,
    /// Objects outside of roots.
    pub objects: usize,
    /// Pointers, thread and process ids.
    pub edges: usize,
    /// Of these, the ones of which nobody can say what they must become.
    pub unknown: usize,
}

impl Verifier<'_> {
    /// I10: every pointer that was true in the old version is true in the new one.
    pub fn relations(&self, view: &dyn Memory, at: &dyn Placing) -> Result<Relations, Broken> {
        self.moved_apart()?;
        self.changed_words()?;
        let mut walk = Walk::new(self, view, at);
        for (i, g) in self.patch.globals.iter().enumerate() {
            let Some((old, new)) = self.global(g) else { continue };
            let rules = self.prepared.rules;
            if rules.global_value(&new.display()).or_else(|| rules.global_value(&new.name)).is_some() {
                continue; // computed
            }
            let (Some(now), Ok(then)) =
                (at.root(Root::Global(i)), self.memory.bytes(Addr(g.old_addr), old.size as usize))
            else {
                continue;
            };
            let native = ranges(&g.keep_native);
            self.array(&mut walk, &old.display(), (old, new), &then, &now, &native, g.old_addr)?;
        }
        for (i, t) in self.patch.tls.iter().enumerate() {
            let Some((old, addr, new)) = self.thread_local(t) else { continue };
            let (Some(now), Ok(then)) =
                (at.root(Root::Tls(i)), self.memory.bytes(Addr(addr), old.size as usize))
            else {
                continue;
            };
            let native = ranges(&t.keep_native);
            let name = format!("{} of thread {}", old.display(), t.old_tid);
            self.array(&mut walk, &name, (old, new), &then, &now, &native, addr)?;
        }
        for (i, l) in self.patch.locals.iter().enumerate() {
            let (Some(old), Some(now)) = (self.local(l), at.root(Root::Local(i))) else { continue };
            walk.found.roots += 1;
            let node = walk.node(format!("{}::{} of thread {}", l.function, l.variable, l.old_tid));
            walk.value(
                node,
                &Value {
                    old_ty: old.ty,
                    new_ty: self.rl().pair(old.ty),
                    old: &old.bytes,
                    new: &now,
                    native: &ranges(&l.keep_native),
                    addr: old.addr,
                    weak: true,
                    local: true,
                },
            )?;
        }
        self.nothing_is_lost()?;
        walk.run()?;
        Ok(walk.found)
    }

    /// A variable: element by element where it is an array.
    #[allow(clippy::too_many_arguments)]
    fn array(
        &self,
        walk: &mut Walk<'_, '_>,
        name: &str,
        (old, new): (&crate::types::Variable, &crate::types::Variable),
        then: &[u8],
        now: &[u8],
        native: &[Range<u64>],
        addr: u64,
    ) -> Result<(), Broken> {
        walk.found.roots += 1;
        let (o, n) = (self.prepared.old_types, self.prepared.types);
        fn value<'b>(
            (old_ty, new_ty): (TypeId, TypeId),
            (old, new): (&'b [u8], &'b [u8]),
            native: &'b [Range<u64>],
            addr: u64,
        ) -> Value<'b> {
            Value { old_ty, new_ty: Some(new_ty), old, new, native, addr, weak: false, local: false }
        }
        let (Type::Array { element: a, .. }, Type::Array { element: b, .. }) =
            (o.strip(old.ty), n.strip(new.ty))
        else {
            let node = walk.node(name.to_owned());
            return walk.value(node, &value((old.ty, new.ty), (then, now), native, addr));
        };
        let (os, ns) = (o.size_of(*a), n.size_of(*b));
        if os == 0 || ns == 0 || self.prepared.layouts.of(*a).slots.is_empty() {
            return Ok(());
        }
        let elements = self.resolver.elements(old, new);
        let whole = walk.node(name.to_owned());
        let native = joined(native);
        for i in 0..then.len() as u64 / os {
            let j = match &*elements {
                Elements::Same => Some(i),
                Elements::Keyed(map) => map.get(i as usize).copied().flatten(),
                Elements::Unknown(_) => None,
            };
            let Some(to) = j.and_then(|j| now.get((j * ns) as usize..((j + 1) * ns) as usize)) else {
                continue;
            };
            let from = &then[(i * os) as usize..((i + 1) * os) as usize];
            let base = j.unwrap_or(i) * ns;
            let first = native.partition_point(|r| r.end <= base);
            let inside: Vec<Range<u64>> = native[first..]
                .iter()
                .take_while(|r| r.start < base + ns)
                .map(|r| r.start.saturating_sub(base)..r.end.min(base + ns) - base)
                .collect();
            let node = walk.element(whole, i);
            walk.value(node, &value((*a, *b), (from, to), &inside, addr + i * os))?;
        }
        Ok(())
    }

    /// Words of old memory that keep their place and change: each was an address of what moved, and is its new one.
    fn changed_words(&self) -> Result<(), Broken> {
        let wrong = |at: u64, p: u64, q: String, what: &str| {
            let place = self.patch.objects.iter().find(|o| o.addr <= at && at < o.addr + o.size);
            let path = place.map_or_else(|| format!("the word at {at:#x}"), |o| o.path.clone());
            Err(Broken::relation(format!("{path} was {p:#x}, {what}, and becomes {q}"), path, at))
        };
        let in_region =
            |a: u64| self.patch.regions.iter().any(|r| r.start <= a && a < r.start + r.content.len() as u64);
        let objects = joined(&self.patch.objects.iter().map(|o| o.addr..o.addr + o.size).collect::<Vec<_>>());
        let in_object = |a: u64| {
            let next = objects.partition_point(|r| r.end <= a);
            objects.get(next).is_some_and(|r| r.start <= a)
        };
        let lone = |w: &&proto::Write| w.content.len() == 8 && self.convs.at(w.addr).is_none();
        for w in self.patch.writes.iter().filter(lone).filter(|w| !in_object(w.addr)) {
            let (Ok(p), Some(q)) = (self.memory.u64(Addr(w.addr)), word_at(&w.content, 0)) else { continue };
            let Some(c) = self.convs.at(p).map(|n| &self.convs.list[n]) else {
                return wrong(w.addr, p, format!("{q:#x}"), "which stays where it is");
            };
            let len = c.count * c.new_size + c.tail.map_or(0, |t| c.end.saturating_sub(c.old_addr + t.0));
            let lead = c.old_addr - c.start;
            if q.wrapping_sub(c.new_addr - lead) > lead + len || (p == c.old_addr && q != c.new_addr) {
                return wrong(
                    w.addr,
                    p,
                    format!("{q:#x}"),
                    &format!("in the object that is at {:#x} now", c.new_addr),
                );
            }
        }
        for r in &self.patch.relocs {
            let Some((place::In::Addr(a), offset)) = r.place.as_ref().and_then(|p| Some((p.r#in?, p.offset)))
            else {
                continue;
            };
            let at = a + offset;
            // Also where an object grows in its block: what was behind its end is nobody's.
            if self.convs.at(at).is_some() || in_region(at) || in_object(at) {
                continue; // compared where its type is known
            }
            let Ok(p) = self.memory.u64(Addr(at)) else { continue };
            let right = match &r.target {
                Some(reloc::Target::NewLinkAddr(l)) => {
                    !matches!(self.judge(p, *l, None, &AtZero), Verdict::Wrong(_))
                }
                Some(reloc::Target::ThreadOf(tid)) => {
                    self.process.threads.iter().any(|t| t.tid == *tid && t.fs_base == p)
                }
                _ => true,
            };
            if !right {
                return wrong(at, p, r.symbol.clone(), "which is another symbol or thread");
            }
        }
        Ok(())
    }

    /// Objects with a new layout do not overlap each other: what was two is two.
    fn moved_apart(&self) -> Result<(), Broken> {
        let mut places: Vec<(u64, u64, u64)> =
            self.patch.objects.iter().map(|o| (o.addr, o.addr + o.size, o.old_addr)).collect();
        places.sort_unstable();
        match places.windows(2).find(|w| w[1].0 < w[0].1) {
            None => Ok(()),
            Some(w) => Err(Broken::relation(
                format!(
                    "the objects that were at {:#x} and {:#x} in the old version overlap in the new one, at {:#x}",
                    w[0].2, w[1].2, w[1].0
                ),
                self.patch
                    .objects
                    .iter()
                    .find(|o| o.old_addr == w[1].2)
                    .map_or(String::new(), |o| o.path.clone()),
                w[1].2,
            )),
        }
    }

    /// A global of old that points at a heap object is carried, or somebody decided otherwise.
    fn nothing_is_lost(&self) -> Result<(), Broken> {
        let carried: HashSet<u64> = self.patch.globals.iter().map(|g| g.old_addr).collect();
        let elf = self.resolver.old_elf;
        for v in self.prepared.old_types.globals() {
            let Some(link) = v.place.link() else { continue };
            let addr = link.at(Addr(self.bias)).0;
            if carried.contains(&addr)
                || v.size == 0
                || !matches!(elf.section_kind(link), SectionKind::Data | SectionKind::Bss)
                || elf.object_at(link).is_some_and(|s| s.addr != link)
            {
                continue;
            }
            let slots = &self.prepared.layouts.of(v.ty).slots;
            if !slots.iter().any(|s| matches!(s.kind, SlotKind::Pointer(_))) {
                continue;
            }
            let Some(new) = self.resolver.new_variable(v).filter(|n| n.place.link().is_some()) else {
                continue; // dropped, and told so
            };
            let rules = self.prepared.rules;
            if rules.keep(&new.name).or_else(|| rules.keep(&v.name)) == Some(Keep::New) {
                continue;
            }
            let Ok(bytes) = self.memory.bytes(Addr(addr), v.size as usize) else { continue };
            let lost = slots.iter().filter(|s| matches!(s.kind, SlotKind::Pointer(_))).find_map(|s| {
                word_at(&bytes, s.offset).filter(|p| self.is_object(*p)).map(|p| (s.offset, p))
            });
            if let Some((offset, p)) = lost {
                let initial = elf.initial_bytes(link, v.size as usize, Addr(self.bias));
                if crate::plan::is_copy(initial.as_ref()) {
                    continue;
                }
                let field = self.prepared.layouts.field_path(v.ty, offset);
                let dot = if field.is_empty() || field.starts_with('[') { "" } else { "." };
                let path = format!("{}{dot}{field}", v.display());
                let message =
                    format!("{path} led to the object at {p:#x} in the old version, and nothing carries it");
                return Err(Broken::relation(message, path, addr + offset));
            }
        }
        Ok(())
    }
}

/// The new program at its link addresses.
struct AtZero;

impl Placing for AtZero {
    fn program(&self) -> Option<Addr> {
        Some(Addr(0))
    }
    fn thread(&self, _: u32) -> Option<u64> {
        None
    }
    fn tls(&self, _: u32, _: u64) -> Option<u64> {
        None
    }
    fn local(&self, _: &proto::LocalAddr) -> Option<u64> {
        None
    }
    fn pid(&self, _: u32) -> Option<u32> {
        None
    }
    fn root(&self, _: Root) -> Option<Vec<u8>> {
        None
    }
}

/// What any of the ranges covers, as disjoint ones, ascending.
fn joined(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut all = ranges.to_vec();
    all.sort_unstable_by_key(|r| r.start);
    let mut out: Vec<Range<u64>> = Vec::new();
    for r in all.into_iter().filter(|r| !r.is_empty()) {
        match out.last_mut() {
            Some(last) if r.start <= last.end => last.end = last.end.max(r.end),
            _ => out.push(r),
        }
    }
    out
}

pub(super) fn ranges(native: &[proto::Range]) -> Vec<Range<u64>> {
    native.iter().map(|r| r.start..r.end).collect()
}
