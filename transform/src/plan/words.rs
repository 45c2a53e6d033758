//! Words in the heap and in opaque memory, kernel objects, and the closing check.

use super::carry::{Fix, Fixes, Words, opaque_lost};
use super::fix::{Fixer, NewWord};
use super::objects::Convs;
use super::region::RegionPlan;
use super::{Work, read};
use crate::carry_fix::place_fixes;
use crate::layout::{Slot, SlotKind};
use crate::patch::PatchedMemory;
use crate::reach::Reach;
use crate::scan::{Wanted, scan};
use crate::space::{Space, Spot};
use crate::trace::Tracer;
use crate::types::TypeId;
use mcr_image::proto::{self, Severity, place};
use mcr_image::{Addr, FastMap, FastSet, Memory};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// What went through the typed pass.
#[derive(Default)]
pub(super) struct Typed {
    /// Old addresses of typed pointer slots that had to be looked at.
    handled: FastSet<u64>,
    /// New words by new address: in retained memory, or inside a converted object (index, offset).
    writes: Vec<(u64, u64)>,
    inside: HashMap<usize, Vec<(u64, u64)>>,
}

impl Typed {
    fn put(&mut self, w: &mut Work<'_>, fixer: &Fixer<'_>, old: u64, fix: Fix) {
        // Where the word is now.
        let now = match fixer.convs.at(old) {
            None => Some((old, None)),
            Some(n) => fixer.convs.list[n].place(fixer.rl, old).map(|a| (a, Some(n))),
        };
        let Some((addr, conv)) = now else { return }; // its member is gone
        match (fix, conv) {
            (Fix::Value(v), None) => self.writes.push((addr, v)),
            (Fix::Value(v), Some(n)) => self.inside.entry(n).or_default().push((addr, v)),
            (reloc @ Fix::Reloc { .. }, _) => {
                place_fixes(&mut w.patch, vec![(0, reloc)], &|_| (place::In::Addr(addr), 0));
            }
            (Fix::Native(..), _) => {}
        }
    }
}

/// Typed slots of every object in the heap.
pub(super) fn heap_objects(w: &mut Work<'_>, fixer: &Fixer<'_>, tracer: &Tracer<'_>) -> Typed {
    let mut done = Typed::default();
    let m = tracer.layouts.model;
    let mut live: FastMap<TypeId, u64> = FastMap::default();
    let (memory, mut buf) = (w.old.memory, Vec::new());
    w.stats().objects_typed = tracer.heap_objects().len() as u64;
    for id in tracer.heap_objects() {
        let o = &tracer.objs[id as usize];
        let size = m.size_of(o.ty);
        *live.entry(o.ty).or_default() += o.count;
        let slots = tracer.layouts.of(o.ty);
        if slots.slots.is_empty() {
            continue;
        }
        let Ok(bytes) = memory.view(Addr(o.addr), (o.count * size) as usize, &mut buf) else { continue };
        for i in 0..o.count {
            let base = o.addr + i * size;
            let one = &bytes[(i * size) as usize..((i + 1) * size) as usize];
            if slots.slots.iter().all(|s| settled(fixer, s, one)) {
                continue;
            }
            let words = Words {
                fixer,
                layouts: tracer.layouts,
                ty: o.ty,
                bytes: one,
                addr: base,
                weak: o.weak || i > 0,
                native_sync: false,
            };
            let path = || {
                let p = tracer.path(&o.via);
                if o.count > 1 { format!("{p}[{i}]") } else { p }
            };
            let (mut fixes, mut syncs) = (Fixes::new(), Vec::new());
            words.typed(&path, &mut w.findings, &mut syncs, &mut fixes);
            for s in &mut syncs {
                if let Some(a) =
                    fixer.convs.at(s.addr).and_then(|n| fixer.convs.list[n].place(fixer.rl, s.addr))
                {
                    s.addr = a;
                }
            }
            w.patch.syncs.extend(syncs);
            for (offset, fix) in fixes {
                done.handled.insert(base + offset);
                done.put(w, fixer, base + offset, fix);
            }
            // Slots that keep their value are settled, too.
            for s in &slots.slots {
                if matches!(s.kind, SlotKind::Pointer(_) | SlotKind::Function | SlotKind::Untyped)
                    && crate::trace::word_at(one, s.offset).is_some_and(|v| fixer.is_interesting(v))
                {
                    done.handled.insert(base + s.offset);
                }
            }
        }
    }
    let mut by_name: HashMap<String, u64> = HashMap::new();
    for (ty, n) in live {
        if let Some(name) = crate::layout::record_name(m, ty) {
            *by_name.entry(name).or_default() += n;
        }
    }
    for c in &mut w.patch.changes {
        c.live_objects = by_name.get(&c.type_name).copied().unwrap_or(0);
    }
    done
}

/// A slot whose word keeps its value and is not looked for anywhere else: most elements of most arrays have no other.
fn settled(fixer: &Fixer<'_>, slot: &Slot, bytes: &[u8]) -> bool {
    match slot.kind {
        SlotKind::Pointer(_) | SlotKind::Function | SlotKind::Untyped => {
            crate::trace::word_at(bytes, slot.offset).is_none_or(|v| fixer.keeps(v))
        }
        SlotKind::Union(_) | SlotKind::Enum(_) | SlotKind::Bool => true,
        SlotKind::Thread | SlotKind::Pid | SlotKind::Sync(..) => false,
    }
}

/// Everything that no type explains, word by word. Also every aligned word of the old memory that points into the
/// program or at a converted object, with its place.
pub(super) fn opaque(
    w: &mut Work<'_>,
    fixer: &Fixer<'_>,
    tracer: &Tracer<'_>,
    typed: &Typed,
    reach: &Reach<'_>,
) -> (Typed, Vec<(u64, u64)>) {
    let space = fixer.space;
    let mut places: Vec<Range<u64>> = space.retained.clone();
    places.extend(space.heap.segments.iter().map(|s| s.start.0..s.end.0));
    places.sort_by_key(|r| r.start);
    let mut ranges = vec![space.program.clone()];
    ranges.extend(envelopes(fixer.convs));
    let moved: HashSet<u64> = fixer.convs.list.iter().filter(|c| c.moved).map(|c| c.old_addr).collect();
    let lo = moved.iter().min().copied().unwrap_or(0);
    let hi = moved.iter().max().map_or(0, |m| m + 1);
    let hits = scan(
        w.old.memory,
        &places,
        &Wanted {
            ranges,
            aligned: &|v| space.program.contains(&v) || fixer.convs.at(v).is_some(),
            hidden: lo..hi,
            unaligned: &|v| moved.contains(&v),
        },
    );
    w.stats().bytes_scanned = hits.bytes;
    let mut out = Typed::default();
    for &(at, v) in &hits.aligned {
        if typed.handled.contains(&at) || !lives(space, at) {
            continue;
        }
        let fix = match fixer.word(v, None) {
            NewWord::Same => continue,
            NewWord::Value(n) => {
                let c = fixer.convs.at(v).map(|n| &fixer.convs.list[n]);
                if c.is_some_and(|c| v != c.old_addr) {
                    w.findings.info(
                        "conservative",
                        format!("the word {v:#x} points inside an object that gets a new layout; it becomes {n:#x}"),
                        whereabouts(tracer, at),
                        "check that it is a pointer",
                        at,
                    );
                }
                Fix::Value(n)
            }
            NewWord::Reloc(target, symbol) => Fix::Reloc { target, symbol, conservative: true },
            NewWord::Lost(code, _) if code == "I7-interior" && !reach.is_live(at) => continue,
            NewWord::Lost(code, why) => {
                let message = format!("the word {v:#x}, which may be a pointer, cannot be carried: {why}");
                opaque_lost(&mut w.findings, code, message, whereabouts(tracer, at), at);
                continue;
            }
        };
        out.put(w, fixer, at, fix);
    }
    for (at, v) in hits.unaligned {
        if !lives(space, at) || !lives(space, at + 7) || is_text(w, at) || !reach.is_live(at) {
            continue;
        }
        // Packed structs (struct epoll_event is one) hold pointers at multiples of four, and eight bytes that
        // equal the start of a live object by accident are not a thing that happens.
        let conv = fixer.convs.at(v).map(|n| &fixer.convs.list[n]).filter(|c| at % 4 == 0 && c.old_addr == v);
        match conv.map(|c| c.new_addr) {
            Some(new) => {
                w.findings.info(
                    "packed-pointer",
                    format!(
                        "the bytes at {at:#x} hold the address of an object that moves ({v:#x}, now {new:#x})"
                    ),
                    whereabouts(tracer, at),
                    "check that it is a pointer",
                    at,
                );
                out.put(w, fixer, at, Fix::Value(new));
            }
            None => hidden_pointer(w, v, at, whereabouts(tracer, at)),
        }
    }
    (out, hits.aligned)
}

/// An unaligned pointer to an object that moves.
pub(super) fn hidden_pointer(w: &mut Work<'_>, v: u64, at: u64, path: String) {
    w.findings.refuse(
        "I7-hidden-pointer",
        format!("the unaligned bytes at {at:#x} look like a pointer to an object that has to move ({v:#x})"),
        path,
        "say what is stored there: [types] \"TYPE.FIELD\" = \"TYPE\" (or \"opaque\" if it is no pointer)",
        at,
    );
}

/// Memory whose content counts: not a free chunk, not a malloc header.
fn lives(space: &Space<'_>, at: u64) -> bool {
    match space.spot(at) {
        Spot::Chunk(i) => space.heap.chunks[i].state.in_use(),
        Spot::Other | Spot::Library => true,
        _ => false,
    }
}

/// Ranges that hold all converted objects, split where they are far apart.
fn envelopes(convs: &Convs) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for c in &convs.list {
        match out.last_mut() {
            Some(r) if c.start - r.end < 1 << 32 => r.end = r.end.max(c.end),
            _ => out.push(c.start..c.end),
        }
    }
    out
}

/// Printable bytes all around: text, and no pointer.
fn is_text(w: &Work<'_>, at: u64) -> bool {
    let around = read(w.old.memory, at, 8).unwrap_or_default();
    around.iter().take(6).all(|b| (32..127).contains(b))
}

/// "sessions->buffer+0x10", or the chunk.
fn whereabouts(tracer: &Tracer<'_>, at: u64) -> String {
    if let Some(id) = tracer.covering(at) {
        let o = &tracer.objs[id as usize];
        let size = tracer.layouts.model.size_of(o.ty).max(1);
        let field = tracer.layouts.field_path(o.ty, (at - o.addr) % size);
        return format!("{}: {}", tracer.path(&o.via), field);
    }
    match tracer.space.spot(at) {
        Spot::Chunk(i) => {
            let c = &tracer.space.heap.chunks[i];
            format!("opaque heap block {} of {} bytes, +{:#x}", c.addr, c.usable, at - c.addr.0)
        }
        Spot::Library => format!("data of a library at {at:#x}"),
        _ => format!("mapping at {at:#x}"),
    }
}

/// A word that the kernel keeps, in the new version; `None`: it stays, or a finding says why it cannot.
fn kept(
    w: &mut Work<'_>,
    fixer: &Fixer<'_>,
    word: u64,
    what: &dyn Fn() -> String,
    path: &dyn Fn() -> String,
) -> Option<(u64, Option<proto::Reloc>)> {
    match fixer.word(word, None) {
        NewWord::Same => None,
        NewWord::Value(n) => Some((n, None)),
        NewWord::Reloc(target, symbol) => {
            let reloc = proto::Reloc { place: None, target: Some(target), symbol, conservative: true };
            Some((word, Some(reloc)))
        }
        NewWord::Lost(code, why) => {
            w.findings.refuse(
                code,
                format!("{} ({word:#x}) cannot be carried: {why}", what()),
                path(),
                "nothing can be done about it but an update at another moment",
                word,
            );
            None
        }
    }
}

/// What the kernel keeps for epoll.
pub(super) fn epoll(w: &mut Work<'_>, fixer: &Fixer<'_>) {
    for fd in &w.old.process.fds {
        let Some(proto::fd::Object::Epoll(e)) = &fd.object else { continue };
        for watch in &e.watches {
            let what = || format!("the data of fd {} in epoll {}", watch.fd, fd.number);
            let path = || format!("epoll {}", fd.number);
            let Some((new_data, reloc)) = kept(w, fixer, watch.data, &what, &path) else { continue };
            let (epoll_fd, fd, old_data) = (fd.number, watch.fd, watch.data);
            w.patch.epoll.push(proto::EpollData { epoll_fd, fd, old_data, new_data, reloc });
        }
    }
}

/// The words that POSIX timers send along.
pub(super) fn timers(w: &mut Work<'_>, fixer: &Fixer<'_>) {
    for t in &w.old.process.posix_timers {
        let what = || format!("the value of POSIX timer {}", t.id);
        let path = || format!("POSIX timer {}", t.id);
        let Some((new_sigval, reloc)) = kept(w, fixer, t.sigval, &what, &path) else { continue };
        w.patch.timers.push(proto::TimerData { id: t.id, old_sigval: t.sigval, new_sigval, reloc });
    }
}

/// Writes, the new region, the records about objects.
pub(super) fn finish(
    w: &mut Work<'_>,
    convs: &Convs,
    passes: [Typed; 2],
    region: RegionPlan,
    region_start: Option<u64>,
    tracer: &Tracer<'_>,
) {
    let mut contents: Vec<Vec<u8>> =
        convs.list.iter().map(|c| [&c.prefix[..], &c.content[..]].concat()).collect();
    for pass in passes {
        for (n, words) in pass.inside {
            let c = &convs.list[n];
            let base = c.new_addr - c.prefix.len() as u64;
            for (addr, v) in words {
                let at = (addr - base) as usize;
                if let Some(slot) = contents[n].get_mut(at..at + 8) {
                    slot.copy_from_slice(&v.to_le_bytes());
                }
            }
        }
        w.patch.writes.extend(pass.writes.into_iter().map(|(addr, v)| proto::Write {
            addr,
            content: v.to_le_bytes().to_vec(),
            object: 0,
        }));
    }
    let mut moved: Vec<(u64, &[u8])> = Vec::new();
    let mut names: FastMap<(TypeId, TypeId), (String, String)> = FastMap::default();
    for (c, content) in convs.list.iter().zip(&contents) {
        let o = &tracer.objs[c.id as usize];
        let index = w.patch.objects.len() as u32;
        let (new_name, old_name) = names
            .entry((c.new_ty, c.old_ty))
            .or_insert_with(|| (w.new.types.display(c.new_ty), w.old.types.display(c.old_ty)))
            .clone();
        w.patch.objects.push(proto::TypedObject {
            addr: c.new_addr,
            old_addr: c.old_addr,
            size: c.content.len() as u64,
            type_name: new_name,
            old_type_name: old_name,
            count: c.count as u32,
            old_stride: c.old_size,
            stride: c.new_size,
            path: tracer.path(&o.via),
            moved: c.moved,
            relaid: true,
        });
        w.stats().relaid += 1;
        let base = c.new_addr - c.prefix.len() as u64;
        if c.moved {
            w.stats().moved += 1;
            w.patch.retired.push(proto::Retired { start: c.start, end: c.end });
            if let Some(start) = region_start {
                moved.push((base - start, content));
            }
        } else {
            w.patch.writes.push(proto::Write {
                addr: c.old_addr,
                content: content[c.prefix.len()..].to_vec(),
                object: index,
            });
        }
    }
    match region_start {
        Some(start) => w.patch.regions.push(region.finish(start, &moved)),
        None if !region.is_empty() => w.findings.refuse(
            "no-room",
            format!("no free range of {} bytes for moved objects", region.len()),
            String::new(),
            "report this with the process's memory map",
            0,
        ),
        None => {}
    }
}

/// I9: no word of what stays points at a place that a moved object left. `before`: the words of the old memory that
/// point at converted objects. What the patch does not touch is as it was then, so only those are asked again, and
/// what the patch writes is looked through.
pub(super) fn rescan(w: &mut Work<'_>, space: &Space<'_>, convs: &Convs, before: &[(u64, u64)]) {
    let moved = |v: u64| convs.at(v).is_some_and(|n| convs.list[n].moved);
    if !convs.list.iter().any(|c| c.moved) {
        return;
    }
    let patched = PatchedMemory::new(w.old.memory, &w.patch);
    let mut hits: Vec<(u64, u64)> = before
        .iter()
        .filter(|h| moved(h.1))
        .filter_map(|h| Some((h.0, patched.u64(Addr(h.0)).ok()?)))
        .filter(|h| moved(h.1))
        .collect();
    for (start, bytes) in patched.laid_over() {
        // Words that are written in part, too.
        let (first, end) = (start & !7, (start + bytes.len() as u64).next_multiple_of(8));
        let ends = [first, end - 8].into_iter().filter_map(|at| Some((at, patched.u64(Addr(at)).ok()?)));
        let skip = (start.next_multiple_of(8) - start) as usize;
        let inside = bytes.get(skip..).unwrap_or_default().chunks_exact(8).zip(0..).map(|(b, i)| {
            (start + skip as u64 + 8 * i, u64::from_le_bytes(b.try_into().expect("eight bytes")))
        });
        hits.extend(ends.chain(inside).filter(|h| moved(h.1)));
    }
    hits.sort_unstable();
    hits.dedup();
    let mut relocated: FastSet<u64> = FastSet::default();
    if !hits.is_empty() {
        relocated.extend(w.patch.relocs.iter().filter_map(|r| match r.place.as_ref()?.r#in.as_ref()? {
            place::In::Addr(a) => Some(*a),
            _ => None,
        }));
    }
    for (at, v) in hits {
        let in_region =
            w.patch.regions.iter().any(|r| r.start <= at && at < r.start + r.content.len() as u64);
        if moved(at) || relocated.contains(&at) || !(in_region || lives(space, at)) {
            continue;
        }
        w.findings.add(
            Severity::Refusal,
            "I9-moved-set-open",
            format!("the word {v:#x} at {at:#x} still points at a place that a moved object left"),
            String::new(),
            "this is a bug in mcr: please report it with the image",
            at,
        );
    }
}
