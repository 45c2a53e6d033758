//! Objects of changed types that tracing cannot vouch for: contradictions, and blocks that only look like one.

use super::Work;
use super::objects::Convs;
use crate::layout::{SlotKind, record_name};
use crate::reach::Reach;
use crate::space::Spot;
use crate::trace::Tracer;
use crate::types::{RecordKind, Type, TypeId};
use mcr_image::FastMap;

/// Adds a refusal for each of them: silence is never compatible.
pub(super) fn report(w: &mut Work<'_>, tracer: &Tracer<'_>, convs: &Convs, reach: &Reach<'_>) {
    let changed: Vec<(TypeId, u64)> = changed_records(w, tracer);
    let is_changed = |ty: TypeId| changed.iter().any(|c| tracer.layouts.same(c.0, ty));
    for c in &tracer.conflicts {
        let kept = &tracer.objs[c.kept as usize];
        if (!is_changed(kept.ty) && !is_changed(c.claimed)) || !reach.is_live(c.addr) {
            continue;
        }
        w.findings.refuse(
            "type-conflict",
            format!(
                "the object at {:#x} is {} by {}, but {} by {}; at least one of them changed",
                c.addr,
                tracer.type_name(kept.ty),
                tracer.path(&kept.via),
                tracer.type_name(c.claimed),
                tracer.path(&c.via)
            ),
            tracer.path(&c.via),
            "say which it is: [types] \"TYPE.FIELD\" = \"…\" for the wrong one (or \"opaque\")",
            c.addr,
        );
    }
    for s in &tracer.too_small {
        if !is_changed(s.ty) || !reach.is_live(s.addr) {
            continue;
        }
        w.findings.refuse(
            "object-too-small",
            format!(
                "{} at {:#x} has {} bytes in the old version, but its block only {}",
                tracer.type_name(s.ty),
                s.addr,
                tracer.layouts.model.size_of(s.ty),
                s.room
            ),
            tracer.path(&s.via),
            "it may be a shorter variant of the type: [types] \"TYPE.FIELD\" = \"the shorter struct\" (or \"opaque\")",
            s.addr,
        );
    }
    candidates(w, tracer, convs, &changed, reach);
}

/// Structs whose layout differs, with their size.
fn changed_records(w: &Work<'_>, tracer: &Tracer<'_>) -> Vec<(TypeId, u64)> {
    let m = tracer.layouts.model;
    let is_struct = |t: &TypeId| matches!(&m[*t], Type::Record(r) if r.kind == RecordKind::Struct && !r.incomplete && r.size > 0);
    m.ids()
        .filter(is_struct)
        .filter(|&t| record_name(m, t).is_some())
        .filter(|&t| w.rl.pair(t).is_some_and(|n| w.rl.changed(t, n)))
        .map(|t| (t, m.size_of(t)))
        .collect()
}

/// Sizes that are told apart at first sight.
const SIZES: u64 = 4096;

/// Opaque blocks of the right size whose contents can be nothing but such a struct.
fn candidates(
    w: &mut Work<'_>,
    tracer: &Tracer<'_>,
    convs: &Convs,
    changed: &[(TypeId, u64)],
    reach: &Reach<'_>,
) {
    let mut by_usable: FastMap<u64, Vec<TypeId>> = FastMap::default();
    for &(ty, size) in changed {
        let usable = (size + 8).next_multiple_of(16).max(0x20) - 8;
        by_usable.entry(usable).or_default().push(ty);
        by_usable.entry(usable + 16).or_default().push(ty);
    }
    // Of millions of blocks few have such a size: usable sizes are 8 more than a multiple of 16.
    let place = |usable: u64| (usable / 16 % SIZES) as usize;
    let mut sizes = [false; SIZES as usize];
    by_usable.keys().for_each(|usable| sizes[place(*usable)] = true);
    for c in tracer.space.heap.chunks.iter().filter(|c| sizes[place(c.usable)] && c.state.in_use()) {
        let Some(types) = by_usable.get(&c.usable) else { continue };
        if convs.at(c.addr.0).is_some() || tracer.covering(c.addr.0).is_some() {
            continue;
        }
        let Some(bytes) = super::read(w.old.memory, c.addr.0, c.usable) else { continue };
        for &ty in types {
            if tracer.fits(ty, &bytes, true) && distinctive(w, tracer, ty, &bytes) && reach.is_live(c.addr.0)
            {
                let name = tracer.type_name(ty);
                w.findings.refuse(
                    "untyped-object",
                    format!(
                        "the block at {} ({} bytes) is reached by no typed pointer, but its contents are those of a {name}, \
                         whose layout changed",
                        c.addr, c.usable
                    ),
                    String::new(),
                    &format!("say which pointer leads to it: [types] \"TYPE.FIELD\" = \"{name}\""),
                    c.addr.0,
                );
                break;
            }
        }
    }
}

/// At least one function of the program, or two typed objects of the right types.
fn distinctive(w: &Work<'_>, tracer: &Tracer<'_>, ty: TypeId, bytes: &[u8]) -> bool {
    let mut score = 0;
    for s in &tracer.layouts.of(ty).slots {
        let Some(v) = crate::trace::word_at(bytes, s.offset).filter(|&v| v != 0) else { continue };
        match s.kind {
            SlotKind::Function if tracer.space.spot(v) == Spot::Program => {
                let link = mcr_image::LinkAddr(v.wrapping_sub(w.bias));
                if w.old.elf.function_at(link).is_none_or(|f| f.addr != link) {
                    return false;
                }
                score += 2;
            }
            SlotKind::Pointer(to) => {
                let Some(id) = tracer.covering(v) else { continue };
                let o = &tracer.objs[id as usize];
                let inside = (v - o.addr) % tracer.layouts.model.size_of(o.ty).max(1);
                if tracer.layouts.has_at(o.ty, inside, to) {
                    score += 1;
                }
            }
            _ => {}
        }
    }
    score >= 2
}
