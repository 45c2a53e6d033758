//! Objects whose type changed: which, where they go, and what their bytes become.

use super::findings::Findings;
use super::region::RegionPlan;
use crate::relayout::Relayout;
use crate::trace::{Obj, ObjId, Tracer};
use crate::types::TypeId;
use mcr_image::{Addr, Memory, proto};
use std::collections::{HashMap, HashSet};

/// An object that gets a new layout.
pub(crate) struct Conv {
    pub id: ObjId,
    pub old_addr: u64,
    /// Start and end of everything that moves with it: its chunk, or just its own bytes.
    pub start: u64,
    pub end: u64,
    pub old_ty: TypeId,
    pub new_ty: TypeId,
    pub count: u64,
    pub old_size: u64,
    pub new_size: u64,
    pub new_addr: u64,
    pub moved: bool,
    /// Old and new offset of a flexible tail.
    pub tail: Option<(u64, u64)>,
    /// New bytes from `new_addr`.
    pub content: Vec<u8>,
    /// Bytes of the chunk before the object (moved with it).
    pub prefix: Vec<u8>,
}

/// All of them, by old address.
#[derive(Default)]
pub(crate) struct Convs {
    pub list: Vec<Conv>,
    /// Start and end of each, close together: this is asked for every word.
    spans: Vec<(u64, u64)>,
}

impl Convs {
    /// From all of them.
    pub fn new(mut list: Vec<Conv>) -> Self {
        list.sort_by_key(|c| c.start);
        let spans = list.iter().map(|c| (c.start, c.end)).collect();
        Self { list, spans }
    }

    /// The conversion whose old bytes hold `addr`.
    pub fn at(&self, addr: u64) -> Option<usize> {
        if addr < self.spans.first()?.0 || addr >= self.spans.last()?.1 {
            return None;
        }
        let n = self.spans.partition_point(|s| s.0 <= addr).checked_sub(1)?;
        (addr < self.spans[n].1).then_some(n)
    }

    /// Where what was at `addr` is now; `Err`: it is inside a converted object, but in no member that the new
    /// type has.
    pub fn map(&self, rl: &dyn Relayout, addr: u64, want: Option<TypeId>) -> Option<Result<u64, usize>> {
        let n = self.at(addr)?;
        Some(self.list[n].map(rl, addr, want).ok_or(n))
    }
}

impl Conv {
    /// The new place of an old word inside this object.
    pub fn place(&self, rl: &dyn Relayout, addr: u64) -> Option<u64> {
        let off = addr.checked_sub(self.old_addr).filter(|o| *o < self.count * self.old_size);
        match off.filter(|o| self.tail.is_none_or(|t| *o < t.0)) {
            None => self.map(rl, addr, None),
            Some(off) => {
                let inner = rl.map_slot(self.old_ty, self.new_ty, off % self.old_size)?;
                Some(self.new_addr + off / self.old_size * self.new_size + inner)
            }
        }
    }

    /// The new address of an old one inside this object.
    pub fn map(&self, rl: &dyn Relayout, addr: u64, want: Option<TypeId>) -> Option<u64> {
        if addr < self.old_addr {
            return Some(self.new_addr - (self.old_addr - addr));
        }
        let off = addr - self.old_addr;
        if let Some((old, new)) = self.tail
            && off >= old
        {
            return Some(self.new_addr + new + (off - old));
        }
        let whole = self.count * self.old_size;
        if off < whole {
            let inner = rl.map_offset(self.old_ty, self.new_ty, off % self.old_size, want)?;
            return Some(self.new_addr + off / self.old_size * self.new_size + inner);
        }
        // One past the last element.
        (off == whole).then_some(self.new_addr + self.count * self.new_size)
    }
}

/// Chooses the objects to convert, their places, and computes their bytes (pointers in them still old).
pub(crate) fn convert_all(
    tracer: &Tracer<'_>,
    rl: &dyn Relayout,
    memory: &dyn Memory,
    findings: &mut Findings,
) -> (Convs, RegionPlan) {
    let changed = changed_types(tracer, rl, findings);
    let mut list = Vec::new();
    let mut region = RegionPlan::default();
    let mut said: HashSet<String> = HashSet::new();
    for id in tracer.heap_objects() {
        let o = &tracer.objs[id as usize];
        let Some(&new_ty) = changed.get(&tracer.layouts.model.resolve(o.ty)) else { continue };
        let Some(mut c) = place(tracer, rl, id, o, new_ty, findings) else { continue };
        let Ok(old) = memory.bytes(Addr(c.start), (c.end - c.start) as usize) else { continue };
        let lead = (c.old_addr - c.start) as usize;
        c.prefix = old[..lead].to_vec();
        let old = &old[lead..];
        for i in 0..c.count {
            let one = &old[(i * c.old_size) as usize..((i + 1) * c.old_size) as usize];
            let out = rl.convert(c.old_ty, c.new_ty, one);
            for p in out.problems {
                if said.insert(format!("{}{}", p.code, p.message)) || p.refusal {
                    let path = tracer.path(&o.via);
                    let severity = if p.refusal { proto::Severity::Refusal } else { proto::Severity::Info };
                    findings.add(severity, p.code, p.message, path, &p.next_step, c.old_addr);
                }
            }
            c.content.extend(out.bytes);
        }
        if let Some((from, to)) = c.tail {
            c.content.resize(to as usize, 0);
            c.content.extend(&old[from as usize..]);
        }
        if c.moved {
            let lead = c.prefix.len() as u64;
            c.new_addr = region.allocate(lead + c.content.len() as u64) + lead;
        }
        list.push(c);
    }
    (Convs::new(list), region)
}

/// Adds the region's start to the offsets that `convert_all` left.
pub(crate) fn rebase(convs: &mut Convs, start: u64) {
    for c in convs.list.iter_mut().filter(|c| c.moved) {
        c.new_addr += start;
    }
}

/// Old types of live objects that have another layout in the new version.
fn changed_types(tracer: &Tracer<'_>, rl: &dyn Relayout, findings: &mut Findings) -> HashMap<TypeId, TypeId> {
    let m = tracer.layouts.model;
    let mut seen = HashSet::new();
    let mut out = HashMap::new();
    for id in tracer.heap_objects() {
        let o = &tracer.objs[id as usize];
        let ty = m.resolve(o.ty);
        if !seen.insert(ty) {
            continue;
        }
        match rl.pair(ty) {
            Some(new) if rl.changed(ty, new) => {
                out.insert(ty, new);
            }
            Some(_) => {}
            None => {
                let named = crate::layout::record_name(m, ty);
                if let Some(name) = named {
                    findings.info(
                        "type-only-in-old",
                        format!("{name} is not in the new version; its objects stay as they are"),
                        tracer.path(&o.via),
                        &format!("if it was renamed: [rename.types] \"{name}\" = \"…\""),
                        o.addr,
                    );
                }
            }
        }
    }
    out
}

/// Where an object goes; `None`: it cannot be done, and a finding says why.
fn place(
    tracer: &Tracer<'_>,
    rl: &dyn Relayout,
    id: ObjId,
    o: &Obj,
    new_ty: TypeId,
    findings: &mut Findings,
) -> Option<Conv> {
    let _ = rl;
    let m = tracer.layouts.model;
    let (old_size, new_size) = (m.size_of(o.ty), rl.size_new(new_ty));
    let name = || tracer.type_name(o.ty);
    let path = || tracer.path(&o.via);
    let chunk = o.chunk.map(|i| &tracer.space.heap.chunks[i]);
    let (start, end) = chunk.map_or((o.addr, o.addr + o.count * old_size), |c| (c.addr.0, c.end().0));
    // Others in the same chunk: then it is a pool, and its objects cannot move.
    let alone = tracer.neighbours(id, start, end) == 0;
    let tail = tracer.layouts.of(o.ty).tail.filter(|_| o.count == 1 && chunk.is_some());
    let tail = match tail {
        Some((from, element)) => match rl.tail_new(new_ty) {
            Some((to, new_element)) if !rl.changed(element, new_element) => Some((from, to)),
            _ => {
                findings.refuse(
                    "unknown-tail",
                    format!(
                        "{} changed, and the array at its end has other elements in the new version",
                        name()
                    ),
                    path(),
                    "keep the elements' type, or start the new version afresh",
                    o.addr,
                );
                return None;
            }
        },
        None => None,
    };
    let same_start = |moved| Conv {
        id,
        old_addr: o.addr,
        start: if alone { start } else { o.addr },
        end: if alone { end } else { o.addr + o.count * old_size },
        old_ty: o.ty,
        new_ty,
        count: o.count,
        old_size,
        new_size,
        new_addr: if moved { 0 } else { o.addr },
        moved,
        tail,
        content: Vec::new(),
        prefix: Vec::new(),
    };
    if o.unexplained > 0 && new_size > old_size {
        findings.refuse(
            "unknown-tail",
            format!(
                "{} grows from {old_size} to {new_size} bytes, but its chunk goes on for {} bytes that no type \
                 explains: an array, a bigger struct that starts with it, or a pool",
                name(),
                o.unexplained
            ),
            path(),
            &format!(
                "say what the pointer leads to: [types] \"TYPE.FIELD\" = \"the bigger struct\" (here {})",
                path()
            ),
            o.addr,
        );
        return None;
    }
    let need = match tail {
        Some((from, to)) => to + (end - o.addr - from),
        None => o.count * new_size,
    };
    let room = if alone { end - o.addr } else { o.count * old_size };
    if need <= room {
        return Some(same_start(false));
    }
    if !alone || chunk.is_none() {
        findings.refuse(
            "I7-cannot-move",
            format!(
                "{} grows from {old_size} to {new_size} bytes, but it lies inside memory that the program \
                 divides up itself ({})",
                name(),
                if chunk.is_none() { "a mapping" } else { "a chunk with other objects in it" }
            ),
            path(),
            "nothing can be moved there; keep the type's size, or restart",
            o.addr,
        );
        return None;
    }
    Some(same_start(true))
}
