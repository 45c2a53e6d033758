//! Precise tracing: which heap chunks hold objects of which type.
//!
//! From the roots (globals, thread-locals, locals of quiescent frames) typed pointers are followed. A claim
//! is *strong* when a typed pointer says so, *weak* when it comes from an array whose length is only known
//! from the chunk: a weak claim needs contents that fit, and never beats a strong one.

use crate::heap::Chunk;
use crate::layout::{Layouts, SlotKind, record_name};
use crate::space::{Space, Spot};
use crate::types::{Type, TypeId};
use mcr_image::{Addr, Memory};
use std::cell::OnceCell;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Slack that malloc may leave behind the requested bytes: rounding, and a remainder too small to split off.
const SLACK: u64 = 32;

/// Index of an object.
pub(crate) type ObjId = u32;

/// Where an object was reached from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Via {
    /// A root: its name's index.
    Root(u32),
    /// A slot of another object.
    Slot(ObjId, u64),
}

/// A typed extent.
#[derive(Clone, Debug)]
pub(crate) struct Obj {
    pub addr: u64,
    /// Type of one element, in the old program.
    pub ty: TypeId,
    pub count: u64,
    pub via: Via,
    pub weak: bool,
    /// Lives in the heap, in this chunk.
    pub chunk: Option<usize>,
    /// Swallowed by a bigger object.
    pub dead: bool,
    /// Bytes of the chunk behind the last element that no type explains.
    pub unexplained: u64,
    /// It is a root: a global, a thread-local or a local. Its bytes are not in the heap.
    pub root: bool,
    /// Steps from the root.
    depth: u32,
    /// The object on the way that is [`HEAD`] steps from the root.
    head: ObjId,
}

/// How many steps at the root's end a long path shows.
const HEAD: u32 = 4;
/// Paths up to this length are shown whole.
const WHOLE: u32 = 8;

/// Two types for one place.
#[derive(Clone, Debug)]
pub(crate) struct Conflict {
    pub addr: u64,
    pub kept: ObjId,
    pub claimed: TypeId,
    pub via: Via,
}

/// A typed pointer to a chunk that is too small for the type.
#[derive(Clone, Debug)]
pub(crate) struct TooSmall {
    pub addr: u64,
    pub ty: TypeId,
    pub room: u64,
    pub via: Via,
}

struct Claim {
    addr: u64,
    spot: Spot,
    ty: TypeId,
    weak: bool,
    via: Via,
}

/// No object.
const NONE: ObjId = ObjId::MAX;

/// Objects by address. They are disjoint, and one in a chunk ends in it.
struct Placed<'a> {
    chunks: &'a [Chunk],
    /// For each chunk the object at its start: nearly all there are.
    first: Vec<ObjId>,
    /// All others.
    rest: BTreeMap<u64, ObjId>,
}

impl<'a> Placed<'a> {
    fn new(chunks: &'a [Chunk]) -> Self {
        Self { chunks, first: vec![NONE; chunks.len()], rest: BTreeMap::new() }
    }

    /// The chunk that starts at `addr`.
    fn slot(&self, addr: u64, chunk: Option<usize>) -> Option<usize> {
        chunk.filter(|&i| self.chunks[i].addr.0 == addr)
    }

    /// The object that starts at `addr`, which is in that chunk.
    fn at(&self, addr: u64, chunk: Option<usize>) -> Option<ObjId> {
        match self.slot(addr, chunk) {
            Some(i) => Some(self.first[i]).filter(|&id| id != NONE),
            None => self.rest.get(&addr).copied(),
        }
    }

    /// The last object that starts at or before `addr` and may cover it.
    fn before(&self, addr: u64, chunk: Option<usize>) -> Option<ObjId> {
        let Some(i) = chunk else { return self.rest.range(..=addr).next_back().map(|(_, &id)| id) };
        let start = self.chunks[i].addr.0;
        if !self.rest.is_empty()
            && let Some((_, &id)) = self.rest.range(start..=addr).next_back()
        {
            return Some(id);
        }
        Some(self.first[i]).filter(|&id| id != NONE)
    }

    /// Objects that start in a range, ascending.
    fn range(&self, range: Range<u64>) -> Vec<(u64, ObjId)> {
        let from = self.chunks.partition_point(|c| c.addr.0 < range.start);
        let firsts = self.chunks[from..].iter().zip(&self.first[from..]);
        let mut out: Vec<(u64, ObjId)> = firsts
            .take_while(|(c, _)| c.addr.0 < range.end)
            .filter(|(_, id)| **id != NONE)
            .map(|(c, &id)| (c.addr.0, id))
            .collect();
        let more = out.len();
        out.extend(self.rest.range(range).map(|(a, &id)| (*a, id)));
        if more > 0 && out.len() > more {
            out.sort_by_key(|o| o.0);
        }
        out
    }

    fn insert(&mut self, addr: u64, chunk: Option<usize>, id: ObjId) {
        match self.slot(addr, chunk) {
            Some(i) => self.first[i] = id,
            None => {
                self.rest.insert(addr, id);
            }
        }
    }

    fn remove(&mut self, addr: u64) {
        if self.rest.remove(&addr).is_none()
            && let Ok(i) = self.chunks.binary_search_by_key(&addr, |c| c.addr.0)
        {
            self.first[i] = NONE;
        }
    }
}

/// The tracer, and what it found.
pub(crate) struct Tracer<'a> {
    pub memory: &'a dyn Memory,
    pub space: &'a Space<'a>,
    pub layouts: &'a Layouts<'a>,
    pub objs: Vec<Obj>,
    placed: Placed<'a>,
    names: Vec<String>,
    /// All objects outside of roots, ascending, once everything has been followed.
    order: OnceCell<Vec<ObjId>>,
    strong: VecDeque<Claim>,
    weak: VecDeque<Claim>,
    pub conflicts: Vec<Conflict>,
    pub too_small: Vec<TooSmall>,
}

impl<'a> Tracer<'a> {
    pub fn new(memory: &'a dyn Memory, space: &'a Space<'a>, layouts: &'a Layouts<'a>) -> Self {
        Self {
            memory,
            space,
            layouts,
            objs: Vec::new(),
            placed: Placed::new(&space.heap.chunks),
            names: Vec::new(),
            order: OnceCell::new(),
            strong: VecDeque::new(),
            weak: VecDeque::new(),
            conflicts: Vec::new(),
            too_small: Vec::new(),
        }
    }

    /// Adds a root whose bytes are `bytes` (they need not be in memory: a local may live in registers).
    /// A local may be uninitialised still: it is a `weak` witness.
    pub fn root(&mut self, addr: u64, ty: TypeId, name: &str, bytes: &[u8], weak: bool) -> ObjId {
        let id = self.objs.len() as ObjId;
        let via = self.named(name);
        self.objs.push(Obj {
            addr,
            ty,
            count: 1,
            via,
            weak,
            chunk: None,
            dead: false,
            unexplained: 0,
            root: true,
            depth: 0,
            head: id,
        });
        self.follow(id, bytes, 0, weak);
        id
    }

    /// Claims a pointee directly (a rule types a `void *` variable).
    pub fn claim(&mut self, addr: u64, ty: TypeId, name: &str) {
        let (spot, via) = (self.space.spot(addr), self.named(name));
        self.strong.push_back(Claim { addr, spot, ty, weak: false, via });
    }

    fn named(&mut self, name: &str) -> Via {
        self.names.push(name.to_owned());
        Via::Root(self.names.len() as u32 - 1)
    }

    /// Follows everything to the end.
    pub fn run(&mut self) {
        self.order = OnceCell::new();
        while let Some(c) = self.strong.pop_front().or_else(|| self.weak.pop_front()) {
            self.take(c);
        }
    }

    /// The live object that covers an address.
    pub fn covering(&self, addr: u64) -> Option<ObjId> {
        self.covering_in(addr, self.space.spot(addr).chunk())
    }

    /// The same where it is known which chunk the address is in.
    fn covering_in(&self, addr: u64, chunk: Option<usize>) -> Option<ObjId> {
        let id = self.placed.before(addr, chunk)?;
        let o = &self.objs[id as usize];
        (addr < o.addr + self.extent(o)).then_some(id)
    }

    /// How many other live objects lie in `start..end`.
    pub fn neighbours(&self, id: ObjId, start: u64, end: u64) -> usize {
        self.placed.range(start..end).into_iter().filter(|o| o.1 != id).count()
    }

    /// Live objects outside of roots, ascending. To be asked when everything has been followed.
    pub fn heap_objects(&self) -> impl ExactSizeIterator<Item = ObjId> + '_ {
        let all = || self.placed.range(0..u64::MAX).into_iter().map(|o| o.1).collect();
        self.order.get_or_init(all).iter().copied()
    }

    /// Bytes that an object covers.
    pub fn extent(&self, o: &Obj) -> u64 {
        o.count * self.layouts.model.size_of(o.ty)
    }

    /// Queues what the slots of element `first..` of an object point at.
    fn follow(&mut self, id: ObjId, bytes: &[u8], first: u64, weak: bool) {
        let o = &self.objs[id as usize];
        let size = self.layouts.model.size_of(o.ty);
        let (ty, count) = (o.ty, o.count);
        let layouts = self.layouts;
        let slots = layouts.of(ty);
        for i in first..count {
            for s in &slots.slots {
                let SlotKind::Pointer(to) = s.kind else { continue };
                let at = i * size + s.offset;
                let Some(value) = word_at(bytes, at) else { continue };
                self.push(value, to, weak, Via::Slot(id, at));
            }
        }
        if let Some((at, element)) = slots.tail.filter(|_| count == 1 && first == 0) {
            self.follow_tail(id, bytes, at, element);
        }
    }

    /// A flexible array at the end of a chunk: pointers in it are weak claims, as far as they fit.
    fn follow_tail(&mut self, id: ObjId, bytes: &[u8], at: u64, element: TypeId) {
        let size = self.layouts.model.size_of(element);
        let layouts = self.layouts;
        let slots = layouts.of(element);
        if size == 0 || slots.slots.is_empty() {
            return;
        }
        let mut base = at;
        while base + size <= bytes.len() as u64 {
            for s in &slots.slots {
                let SlotKind::Pointer(to) = s.kind else { continue };
                let Some(value) = word_at(bytes, base + s.offset) else { return };
                if value != 0 && !matches!(self.space.spot(value), Spot::Chunk(_)) {
                    return;
                }
                self.push(value, to, true, Via::Slot(id, base + s.offset));
            }
            base += size;
        }
    }

    fn push(&mut self, value: u64, ty: TypeId, weak: bool, via: Via) {
        // Cheap first: most pointers are NULL or lead to what is known.
        if value == 0 {
            return;
        }
        let object = self.space.object(value);
        let spot = object.map_or_else(|| self.space.spot(value), Spot::Chunk);
        if let Some(id) = self.placed.at(value, spot.chunk())
            && self.layouts.same(self.objs[id as usize].ty, ty)
        {
            return;
        }
        // What `take` would turn away at once is not queued.
        let chunks = &self.space.heap.chunks;
        if object.is_none()
            && !matches!(spot, Spot::Other)
            && !spot.chunk().is_some_and(|i| chunks[i].state.in_use())
        {
            return;
        }
        let claim = Claim { addr: value, spot, ty, weak, via };
        if weak { self.weak.push_back(claim) } else { self.strong.push_back(claim) }
    }

    fn take(&mut self, c: Claim) {
        let m = self.layouts.model;
        let ty = m.resolve(c.ty);
        // `struct foo (*)[4]`: elements with a count that is known.
        let (element, fixed) = match &m[ty] {
            Type::Array { element, count: Some(n) } => (m.resolve(*element), Some(*n)),
            _ => (ty, None),
        };
        let size = m.size_of(element);
        if size == 0 {
            return;
        }
        let (chunk, room) = match c.spot {
            Spot::Chunk(i) => {
                let chunk = &self.space.heap.chunks[i];
                if !chunk.state.in_use() {
                    return; // a stale pointer: nobody may follow it
                }
                (Some(i), chunk.end().0 - c.addr)
            }
            Spot::Other => (None, self.space.mapping_end(c.addr) - c.addr),
            _ => return,
        };
        if let Some(id) = self.covering_in(c.addr, chunk) {
            let o = &self.objs[id as usize];
            let inside = (c.addr - o.addr) % m.size_of(o.ty).max(1);
            if self.layouts.has_at(o.ty, inside, element) {
                return;
            }
            // The object that is known may be the first member of the claimed one.
            let grows = o.addr == c.addr && self.layouts.has_at(element, 0, o.ty) && size <= room;
            if !grows {
                if !c.weak || self.objs[id as usize].weak {
                    self.conflicts.push(Conflict { addr: c.addr, kept: id, claimed: element, via: c.via });
                }
                return;
            }
        }
        if size > room {
            if !c.weak {
                self.too_small.push(TooSmall { addr: c.addr, ty: element, room, via: c.via });
            }
            return;
        }
        let memory = self.memory;
        let mut buf = Vec::new();
        let len = extent_to_read(room, chunk.is_some(), size, fixed);
        let Ok(bytes) = memory.view(Addr(c.addr), len, &mut buf) else { return };
        if c.weak && !self.fits(element, &bytes[..size as usize], false) {
            return;
        }
        let (count, unexplained) = match (chunk, fixed) {
            (_, Some(n)) => (n.min(room / size), 0),
            (None, None) => (1, 0),
            (Some(_), None) => self.count(element, size, bytes, room),
        };
        if self.swallow(&c, chunk, element, count * size) {
            return;
        }
        let id = self.objs.len() as ObjId;
        let depth = self.steps(&c.via);
        let head = match &c.via {
            Via::Slot(from, _) if depth > HEAD => self.objs[*from as usize].head,
            _ => id,
        };
        self.objs.push(Obj {
            addr: c.addr,
            ty: element,
            count,
            via: c.via,
            weak: c.weak,
            chunk,
            dead: false,
            unexplained,
            root: false,
            depth,
            head,
        });
        self.placed.insert(c.addr, chunk, id);
        let one = self.is_pointer(element);
        if one {
            // An array of pointers: no element is better known than another.
            self.follow(id, bytes, 0, true);
        } else {
            self.follow(id, bytes, 1, true);
            let whole = std::mem::replace(&mut self.objs[id as usize].count, 1);
            self.follow(id, bytes, 0, c.weak);
            self.objs[id as usize].count = whole;
        }
    }

    /// Objects inside `[c.addr, +len)` must be members of the claimed one; true: they are not, no claim.
    fn swallow(&mut self, c: &Claim, chunk: Option<usize>, element: TypeId, len: u64) -> bool {
        let size = self.layouts.model.size_of(element);
        let inside = match self.placed.at(c.addr, chunk) {
            // A chunk's only object.
            Some(id) if chunk.is_some() && self.placed.rest.is_empty() => vec![(c.addr, id)],
            None if chunk.is_some() && self.placed.rest.is_empty() => Vec::new(),
            _ => self.placed.range(c.addr..c.addr + len),
        };
        for &(addr, id) in &inside {
            let ty = self.objs[id as usize].ty;
            if !self.layouts.has_at(element, (addr - c.addr) % size, ty) {
                self.conflicts.push(Conflict { addr: c.addr, kept: id, claimed: element, via: c.via });
                return true;
            }
        }
        for (addr, id) in inside {
            self.objs[id as usize].dead = true;
            self.placed.remove(addr);
        }
        false
    }

    fn is_pointer(&self, ty: TypeId) -> bool {
        matches!(self.layouts.model.strip(ty), Type::Pointer(_))
    }

    /// How many elements a chunk holds, and how many bytes behind them nothing explains.
    fn count(&self, element: TypeId, size: u64, bytes: &[u8], room: u64) -> (u64, u64) {
        let most = room / size;
        if self.is_pointer(element) {
            let good = |i: &u64| word_at(bytes, i * 8).is_some_and(|v| v == 0 || self.plausible(v));
            return ((0..most).take_while(good).count().max(1) as u64, 0);
        }
        if self.layouts.of(element).tail.is_some() {
            return (1, 0); // the rest is its tail
        }
        if most == 1 {
            return (1, if room - size < SLACK { 0 } else { room - size });
        }
        let rest = room - most * size;
        let all = (1..most).all(|i| {
            let one = &bytes[(i * size) as usize..((i + 1) * size) as usize];
            one.iter().all(|&b| b == 0) || self.fits(element, one, true)
        });
        if all && rest < SLACK {
            return (most, 0);
        }
        (1, if room - size < SLACK { 0 } else { room - size })
    }

    /// Whether `bytes` can be an object of type `ty`. `evidence`: it takes a non-NULL pointer, too, where the
    /// type has any.
    pub fn fits(&self, ty: TypeId, bytes: &[u8], evidence: bool) -> bool {
        let m = self.layouts.model;
        let slots = self.layouts.of(ty);
        let (mut pointers, mut good) = (0, 0);
        for s in &slots.slots {
            let at = s.offset as usize;
            match s.kind {
                SlotKind::Pointer(_) | SlotKind::Function | SlotKind::Untyped => {
                    pointers += 1;
                    let Some(v) = word_at(bytes, s.offset) else { return false };
                    if v == 0 {
                        continue;
                    }
                    let ok = match s.kind {
                        SlotKind::Function => matches!(self.space.spot(v), Spot::Program | Spot::Library),
                        SlotKind::Pointer(_) if self.space.object(v).is_some() => true,
                        SlotKind::Pointer(_) => match self.space.spot(v) {
                            Spot::Chunk(i) => self.space.heap.chunks[i].state.in_use(),
                            Spot::Unmapped | Spot::HeapGap => false,
                            _ => true,
                        },
                        _ => self.space.spot(v) != Spot::Unmapped,
                    };
                    if !ok {
                        return false;
                    }
                    good += 1;
                }
                SlotKind::Bool if bytes.get(at).is_some_and(|&b| b > 1) => return false,
                SlotKind::Enum(e) => {
                    let Type::Enum(e) = &m[e] else { continue };
                    let Some(raw) = bytes.get(at..at + e.size as usize) else { return false };
                    let mut v = [0; 16];
                    v[..raw.len()].copy_from_slice(raw);
                    let v = i128::from_le_bytes(v);
                    let bits = 8 * raw.len() as u32;
                    let v =
                        if e.signed && bits < 128 && v >> (bits - 1) & 1 == 1 { v - (1 << bits) } else { v };
                    // Flags are combined: anything up to the highest constant's bits may be meant.
                    let most = e.constants.iter().map(|c| c.1).max().unwrap_or(0);
                    if v != 0 && e.name_of(v).is_none() && (v < 0 || v > most.saturating_mul(2)) {
                        return false;
                    }
                }
                _ => {}
            }
        }
        !evidence || pointers == 0 || good > 0
    }

    fn plausible(&self, v: u64) -> bool {
        if self.space.object(v).is_some() {
            return true;
        }
        match self.space.spot(v) {
            Spot::Chunk(i) => {
                let c = &self.space.heap.chunks[i];
                c.state.in_use() && c.addr.0 == v
            }
            Spot::Unmapped | Spot::HeapGap => false,
            _ => true,
        }
    }

    /// How many slots lie between a root and a place.
    fn steps(&self, via: &Via) -> u32 {
        match via {
            Via::Root(_) => 0,
            Via::Slot(id, _) => self.objs[*id as usize].depth + 1,
        }
    }

    /// "sessions->next->name", shortened in the middle where it is long.
    pub fn path(&self, via: &Via) -> String {
        let mut out = String::new();
        match via {
            Via::Slot(id, offset) if self.steps(via) > WHOLE => {
                // A list may be long: its middle is not even walked.
                let last = &self.objs[*id as usize];
                self.chain(&self.objs[last.head as usize].via, &mut out);
                out.push_str(&format!("…({} steps)…", self.steps(via) - HEAD - 2));
                if let Via::Slot(before, at) = &last.via {
                    self.step(*before, *at, &mut out);
                }
                self.step(*id, *offset, &mut out);
            }
            _ => self.chain(via, &mut out),
        }
        out
    }

    /// A whole path.
    fn chain(&self, via: &Via, out: &mut String) {
        let mut steps: Vec<(ObjId, u64)> = Vec::new();
        let mut at = via;
        let root = loop {
            match at {
                Via::Root(name) => break &self.names[*name as usize],
                Via::Slot(id, offset) => {
                    steps.push((*id, *offset));
                    at = &self.objs[*id as usize].via;
                }
            }
        };
        out.push_str(root);
        for &(id, offset) in steps.iter().rev() {
            self.step(id, offset, out);
        }
    }

    /// "->next", "[3].name": one step of a path.
    fn step(&self, id: ObjId, offset: u64, out: &mut String) {
        let o = &self.objs[id as usize];
        let size = self.layouts.model.size_of(o.ty).max(1);
        if o.count > 1 {
            out.push_str(&format!("[{}]", offset / size));
        }
        let field = self.layouts.field_path(o.ty, offset % size);
        if !field.is_empty() {
            let joint = match (o.root, o.count > 1 || field.starts_with('[')) {
                (_, true) if field.starts_with('[') => "",
                (true, _) | (_, true) => ".",
                _ => "->",
            };
            out.push_str(joint);
            out.push_str(&field);
        }
    }

    /// Name of a type, for people.
    pub fn type_name(&self, ty: TypeId) -> String {
        let m = self.layouts.model;
        match m.strip(ty) {
            Type::Pointer(to) => format!("{} *", self.type_name(*to)),
            Type::Array { element, count } => {
                format!("{}[{}]", self.type_name(*element), count.map_or(String::new(), |n| n.to_string()))
            }
            Type::Base { name, .. } => name.to_string(),
            Type::Void => "void".into(),
            _ => record_name(m, ty).unwrap_or_else(|| "an unnamed type".into()),
        }
    }
}

/// How many bytes of an object are worth reading.
fn extent_to_read(room: u64, in_chunk: bool, size: u64, fixed: Option<u64>) -> usize {
    let len = match (in_chunk, fixed) {
        (_, Some(n)) => n.saturating_mul(size).min(room),
        (true, None) => room,
        (false, None) => size,
    };
    len.max(size) as usize
}

pub(crate) fn word_at(bytes: &[u8], at: u64) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    bytes.get(at..at + 8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")))
}
