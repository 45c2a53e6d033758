//! What a word of the old version has to be in the new one, worked out from names, the list of objects with a new
//! layout, and the pairing of threads.

use super::{Placing, Verifier};
use crate::Prepared;
use crate::heap::GlibcHeap;
use crate::layout::Layouts;
use crate::plan::{Conv, Convs};
use crate::relayout::Relayout;
use crate::space::Spot;
use crate::types::{Type, TypeId};
use mcr_image::elf::SectionKind;
use mcr_image::{Addr, LinkAddr, proto};
use std::collections::HashMap;

/// What is to be said of a pair of words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They mean the same.
    Right,
    /// They do not: what the old word meant.
    Wrong(String),
    /// Nobody can tell.
    Unknown,
}

/// The objects that got a new layout, from the patch.
pub(super) fn converted(prepared: &Prepared<'_>, heap: &GlibcHeap, patch: &proto::Patch) -> Convs {
    let mut retired: Vec<(u64, u64)> = patch.retired.iter().map(|r| (r.start, r.end)).collect();
    retired.sort_unstable();
    let mut types: HashMap<(&str, &str), Vec<(TypeId, TypeId)>> = HashMap::new();
    let mut list: Vec<Conv> = Vec::with_capacity(patch.objects.len());
    for o in patch.objects.iter().filter(|o| o.relaid) {
        let key = (o.old_type_name.as_str(), o.type_name.as_str());
        let known = types.entry(key).or_insert_with(|| candidates(prepared, o));
        list.extend(one(prepared, heap, &retired, known, o));
    }
    Convs::new(list)
}

/// The pairs of types that an object of these names may have.
fn candidates(prepared: &Prepared<'_>, o: &proto::TypedObject) -> Vec<(TypeId, TypeId)> {
    let rl: &dyn Relayout = &prepared.diff;
    let pair = |ty: &TypeId| {
        let n = rl.pair(*ty)?;
        let fits = prepared.types.display(n) == o.type_name && rl.changed(*ty, n);
        fits.then(|| (prepared.old_types.resolve(*ty), n))
    };
    prepared.old_types.find_types(&o.old_type_name).iter().filter_map(pair).collect()
}

fn one(
    prepared: &Prepared<'_>,
    heap: &GlibcHeap,
    retired: &[(u64, u64)],
    types: &[(TypeId, TypeId)],
    o: &proto::TypedObject,
) -> Option<Conv> {
    let (rl, layouts): (&dyn Relayout, &Layouts<'_>) = (&prepared.diff, &prepared.layouts);
    let count = u64::from(o.count.max(1));
    let fits = |t: &&(TypeId, TypeId)| count.checked_mul(rl.size_new(t.1)).is_some_and(|s| s <= o.size);
    let &(old_ty, new_ty) = types.iter().find(fits)?;
    let (old_size, new_size) = (prepared.old_types.size_of(old_ty), rl.size_new(new_ty));
    let chunk = heap.find(Addr(o.old_addr)).map(|c| c.end().0);
    let tail = layouts.of(old_ty).tail.filter(|_| count == 1).zip(rl.tail_new(new_ty));
    let tail = tail.map(|(a, b)| (a.0, b.0)).filter(|t| chunk.is_some() && o.size > t.1);
    let whole = o.old_addr.checked_add(count.checked_mul(old_size)?)?;
    // What moves takes its chunk with it.
    let left = retired.partition_point(|r| r.0 <= o.old_addr).checked_sub(1).map(|i| retired[i]);
    let left = left.filter(|r| o.moved && o.old_addr < r.1);
    let own = (o.old_addr, if tail.is_some() { chunk? } else { whole });
    let (start, end) = left.unwrap_or(own);
    Some(Conv {
        id: 0,
        old_addr: o.old_addr,
        start,
        end,
        old_ty,
        new_ty,
        count,
        old_size,
        new_size,
        new_addr: o.addr,
        moved: o.moved,
        tail,
        content: Vec::new(),
        prefix: Vec::new(),
    })
}

impl Verifier<'_> {
    /// Where the object behind an old data pointer is in the new version: the same address, or where it moved.
    /// `None`: inside an object that has nothing there any more.
    #[must_use]
    pub fn carried(&self, old: u64, want: Option<TypeId>) -> Option<u64> {
        match self.convs.map(self.rl(), old, want) {
            None => Some(old),
            Some(hit) => hit.ok(),
        }
    }

    /// Whether an old address lies in a chunk of the heap that is in use.
    #[must_use]
    pub fn is_object(&self, old: u64) -> bool {
        matches!(self.space.spot(old), Spot::Chunk(i) if self.space.heap.chunks[i].state.in_use())
    }

    /// Where the heap block in use begins that an old address lies in.
    #[must_use]
    pub fn object_start(&self, old: u64) -> Option<u64> {
        self.space.heap.find(Addr(old)).filter(|c| c.state.in_use()).map(|c| c.addr.0)
    }

    /// Usable bytes of that block; 0 if there is none.
    #[must_use]
    pub fn object_size(&self, old: u64) -> u64 {
        self.space.heap.find(Addr(old)).filter(|c| c.state.in_use()).map_or(0, |c| c.usable)
    }

    /// Nothing of the new version may hold this address: an object moved away from it, or a function of the old
    /// program began there.
    pub(super) fn has_left(&self, old: u64) -> bool {
        if let Some(n) = self.convs.at(old) {
            let c = &self.convs.list[n];
            return c.moved && c.old_addr == old;
        }
        self.space.program.contains(&old) && {
            let link = LinkAddr(old.wrapping_sub(self.bias));
            let text = self.resolver.old_elf.section_kind(link) == SectionKind::Text;
            text && self.function(link).is_some()
        }
    }

    /// Whether `new` is in the new version what `old` was in the old one. `want`: what a typed pointer leads to.
    #[must_use]
    pub fn judge(&self, old: u64, new: u64, want: Option<TypeId>, at: &dyn Placing) -> Verdict {
        let same = |what: &str| if old == new { Verdict::Right } else { Verdict::Wrong(what.to_owned()) };
        if old < 4096 {
            return same(if old == 0 { "nothing (NULL)" } else { "a small number" });
        }
        if let Some(t) = self.process.threads.iter().find(|t| t.fs_base == old) {
            return exactly(at.thread(t.tid), new, || format!("thread {}", t.tid));
        }
        match self.space.spot(old) {
            Spot::Program => self.judge_program(old, new, at),
            Spot::Tls(thread, offset) => self.judge_tls(thread, offset, new, at),
            Spot::Stack(thread) => self.judge_stack(thread, old, new, at),
            Spot::Chunk(_) | Spot::Other => match self.convs.map(self.rl(), old, want) {
                None => same("the object there, which stays where it was"),
                Some(Err(_)) => Verdict::Unknown,
                Some(Ok(to)) => exactly(Some(to), new, || format!("the object that is at {to:#x} now")),
            },
            Spot::HeapGap | Spot::Library | Spot::Unmapped => same("memory that stays where it was"),
        }
    }

    fn judge_program(&self, old: u64, new: u64, at: &dyn Placing) -> Verdict {
        let link = LinkAddr(old.wrapping_sub(self.bias));
        let kind = self.resolver.old_elf.section_kind(link);
        let constant = matches!(kind, SectionKind::Rodata | SectionKind::ReadOnlyOther);
        if constant && old == new {
            return Verdict::Right; // old's constants stay mapped
        }
        let Some(base) = at.program() else { return Verdict::Unknown };
        let to = LinkAddr(new.wrapping_sub(base.0));
        if matches!(kind, SectionKind::Text | SectionKind::Plt) {
            let Some(name) = self.function(link) else { return Verdict::Unknown };
            return match self.function_new(to) {
                Some(n) if n == self.prepared.rules.new_function(&name) => Verdict::Right,
                // Nothing could be said of it, and the plan told so.
                _ if old == new && !self.has_function(self.prepared.rules.new_function(&name)) => {
                    Verdict::Unknown
                }
                _ => Verdict::Wrong(format!("function {name}")),
            };
        }
        let Some(v) = self.prepared.old_types.global_at(link) else { return Verdict::Unknown };
        let Some(n) = self.resolver.new_variable(v) else { return Verdict::Unknown };
        let (Some(from), Some(start)) = (v.place.link(), n.place.link()) else { return Verdict::Unknown };
        let (offset, size) = (link.0 - from.0, n.size.max(1));
        let wrong = || Verdict::Wrong(format!("global {}+{offset:#x}", v.display()));
        if to.0 < start.0 || to.0 > start.0 + size {
            return wrong();
        }
        // In a table, elements may have changed places.
        let table = matches!(self.prepared.old_types.strip(v.ty), Type::Array { .. });
        match self.rl().map_offset(v.ty, n.ty, offset, None) {
            Some(o) if !table && offset == 0 && to.0 != start.0 + o => wrong(),
            Some(o) if !table && !self.rl().changed(v.ty, n.ty) && to.0 != start.0 + o => wrong(),
            _ => Verdict::Right,
        }
    }

    /// The old function that begins at an address.
    fn function(&self, link: LinkAddr) -> Option<String> {
        let entry = |f: &crate::types::Function| f.ranges.first().map(|r| r.0) == Some(link);
        match self.prepared.old_types.function_at(link) {
            Some(f) => entry(f).then(|| f.name.to_string()),
            None => {
                self.resolver.old_elf.function_at(link).filter(|s| s.addr == link).map(|s| s.name.to_owned())
            }
        }
    }

    fn has_function(&self, name: &str) -> bool {
        self.prepared.types.functions_named(name).next().is_some() || self.prepared.new.symbol(name).is_some()
    }

    fn function_new(&self, link: LinkAddr) -> Option<String> {
        let entry = |f: &crate::types::Function| f.ranges.first().map(|r| r.0) == Some(link);
        match self.prepared.types.function_at(link) {
            Some(f) => entry(f).then(|| f.name.to_string()),
            None => self.prepared.new.function_at(link).filter(|s| s.addr == link).map(|s| s.name.to_owned()),
        }
    }

    fn judge_tls(&self, thread: usize, offset: u64, new: u64, at: &dyn Placing) -> Verdict {
        let Some(t) = self.process.threads.get(thread) else { return Verdict::Unknown };
        let holds = |v: &&crate::types::Variable| {
            v.place.tls().is_some_and(|o| o <= offset && offset < o + v.size.max(1))
        };
        let Some(v) = self.prepared.old_types.globals().iter().find(holds) else { return Verdict::Unknown };
        let (Some(from), Some(to)) =
            (v.place.tls(), self.resolver.new_variable(v).and_then(|n| n.place.tls()))
        else {
            return Verdict::Unknown;
        };
        match at.tls(t.tid, to) {
            Some(a) if offset == from => {
                exactly(Some(a), new, || format!("thread-local {} of thread {}", v.display(), t.tid))
            }
            _ => Verdict::Unknown,
        }
    }

    fn judge_stack(&self, thread: usize, old: u64, new: u64, at: &dyn Placing) -> Verdict {
        let Some(t) = self.process.threads.get(thread) else { return Verdict::Unknown };
        let holds =
            |l: &&super::OldLocal| l.tid == t.tid && l.size > 0 && l.addr <= old && old < l.addr + l.size;
        let Some(l) = self.locals().iter().find(holds) else { return Verdict::Unknown };
        let place = proto::LocalAddr {
            old_tid: l.tid,
            frame: l.frame,
            function: l.function.clone(),
            variable: l.name.clone(),
            offset: old - l.addr,
        };
        // Inside of a variable its layout may have changed.
        match at.local(&place) {
            Some(a) if old == l.addr => {
                exactly(Some(a), new, || format!("local {}::{} of thread {}", l.function, l.name, t.tid))
            }
            _ => Verdict::Unknown,
        }
    }
}

fn exactly(want: Option<u64>, new: u64, what: impl Fn() -> String) -> Verdict {
    match want {
        None => Verdict::Unknown,
        Some(w) if w == new => Verdict::Right,
        Some(_) => Verdict::Wrong(what()),
    }
}
