//! Which start-up object of the new version is which object of the old one: a walk of both, in parallel, in
//! the new version's types, from the same roots. Old memory is seen with the patch laid over it, so both
//! sides have the new layout.

use super::input::Span;
use super::path::{Path, Paths, Step};
use mcr_image::{Addr, FastMap, FastSet, Memory};
use mcr_transform::heap::GlibcHeap;
use mcr_transform::types::{Type, TypeId, TypeModel};
use std::collections::VecDeque;
use std::collections::hash_map::Entry;

/// How much a path says. Smaller is stronger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Evidence {
    /// Through named members from a root.
    Direct,
    /// Through an element of an array: the same index.
    Array,
    /// Through a pointer of a type to itself: the order of a list may be a race.
    List,
    /// The only objects of one size that callee-saved registers of the same frame hold.
    Register,
    /// Words at the same offset of two untyped chunks.
    Opaque,
}

/// A value on one side of the walk.
#[derive(Clone, Copy, Debug)]
pub enum Side<'a> {
    /// In memory.
    At(Addr),
    /// Bytes that are not in place yet (a global's value in the patch), from an offset on.
    In(&'a [u8], usize),
}

impl Side<'_> {
    fn add(self, n: u64) -> Self {
        match self {
            Self::At(a) => Self::At(a.add(n)),
            Self::In(b, o) => Self::In(b, o + n as usize),
        }
    }
    fn word(self, mem: &dyn Memory) -> Option<u64> {
        match self {
            Self::At(a) => mem.u64(a).ok(),
            Self::In(b, o) => Some(u64::from_le_bytes(b.get(o..o + 8)?.try_into().ok()?)),
        }
    }
}

/// One reason to believe that two objects are the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What to add to a native address to get the old one.
    pub delta: u64,
    /// An address on the old side.
    pub old: Addr,
    /// How much it says.
    pub evidence: Evidence,
    /// From a root.
    pub path: String,
    /// Type of the object, where the path says it.
    pub ty: TypeId,
}

/// The same while it is collected.
#[derive(Clone, Copy, Debug)]
struct Claim {
    delta: u64,
    old: Addr,
    evidence: Evidence,
    path: Path,
    ty: TypeId,
}

/// The one old object that a native one is paired with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partner {
    /// What to add to a native address to get the old one.
    pub delta: u64,
    /// How much the evidence says.
    pub evidence: Evidence,
}

/// A list that hardly ever has a second member.
#[derive(Clone, Debug)]
struct Few<T> {
    first: T,
    more: Vec<T>,
}

impl<T> Few<T> {
    fn iter(&self) -> impl Iterator<Item = &T> {
        std::iter::once(&self.first).chain(&self.more)
    }
    fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        std::iter::once(&mut self.first).chain(&mut self.more)
    }
}

/// What the candidates of one native chunk come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// One answer.
    Paired(Candidate),
    /// The strongest evidence disagrees with itself.
    Contradiction(Candidate, Candidate),
    /// Nothing is known.
    Unknown,
}

/// A synchronisation object that lies in a native chunk and in its old counterpart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SyncPair {
    /// The native one.
    pub native: Addr,
    /// The old one.
    pub old: Addr,
    /// Its size.
    pub size: u64,
    /// From a root.
    pub path: String,
}

/// An upper bound on what is walked; a graph of start-up objects is far smaller.
const MAX_STEPS: usize = 4_000_000;
/// Largest untyped chunk that is compared word by word.
const MAX_OPAQUE: u64 = 1 << 20;

/// The walk and what it found.
pub struct Pairs<'a> {
    types: &'a TypeModel,
    /// The host with the patch laid over retained memory.
    view: &'a dyn Memory,
    /// Chunks that the new version's start-up made.
    native_heap: &'a GlibcHeap,
    /// Chunks of the old version.
    old_heap: &'a GlibcHeap,
    /// Fresh memory with moved objects.
    regions: Vec<Span>,
    recursive: FastMap<TypeId, bool>,
    pointerful: FastMap<TypeId, bool>,
    seen: FastSet<(u64, u64, TypeId)>,
    queue: VecDeque<(TypeId, Addr, Addr, Path, Evidence)>,
    candidates: FastMap<u64, Few<Claim>>,
    by_old: FastMap<u64, Few<(Addr, Evidence)>>,
    /// From where on to their ends chunks were compared by [`Self::opaque`]: by end, delta and evidence.
    compared: FastMap<(Addr, u64, Evidence), u64>,
    syncs: Vec<SyncPair>,
    sync_seen: FastSet<(u64, u64)>,
    paths: Paths<'a>,
    steps: usize,
}

impl<'a> Pairs<'a> {
    /// No roots yet.
    #[must_use]
    pub fn new(
        types: &'a TypeModel,
        view: &'a dyn Memory,
        native_heap: &'a GlibcHeap,
        old_heap: &'a GlibcHeap,
        regions: Vec<Span>,
    ) -> Self {
        let few = native_heap.chunks.len().min(1 << 16);
        Self {
            types,
            view,
            native_heap,
            old_heap,
            regions,
            recursive: FastMap::default(),
            pointerful: FastMap::default(),
            seen: FastSet::with_capacity_and_hasher(few, Default::default()),
            queue: VecDeque::new(),
            candidates: FastMap::with_capacity_and_hasher(few, Default::default()),
            by_old: FastMap::with_capacity_and_hasher(few, Default::default()),
            compared: FastMap::default(),
            syncs: Vec::new(),
            sync_seen: FastSet::default(),
            paths: Paths::default(),
            steps: 0,
        }
    }

    /// Walks a root: a variable that exists on both sides. `own`: it belongs to one thread (a local, a
    /// thread-local), so even a list node it points at is this thread's.
    pub fn root(&mut self, ty: TypeId, native: Side<'_>, old: Side<'_>, path: &str, own: bool) {
        let path = self.paths.root(path);
        self.value(ty, native, old, path, Evidence::Direct, own);
        self.run();
    }

    /// Two words that must mean the same: an epoll watch's data, an argument of the same blocking call.
    pub fn words(&mut self, native: u64, old: u64, path: &str, evidence: Evidence) {
        let path = self.paths.root(path);
        self.pointer(TypeId::VOID, native, old, path, evidence);
        self.run();
    }

    fn run(&mut self) {
        while let Some((ty, native, old, path, evidence)) = self.queue.pop_front() {
            self.value(ty, Side::At(native), Side::At(old), path, evidence, false);
        }
    }

    fn value(&mut self, ty: TypeId, native: Side<'_>, old: Side<'_>, path: Path, ev: Evidence, own: bool) {
        self.steps += 1;
        if self.steps > MAX_STEPS {
            return;
        }
        let types = self.types;
        if types.sync_kind(ty).is_some() {
            if let (Side::At(n), Side::At(o)) = (native, old)
                && self.native_heap.find(n).is_some_and(|c| c.state.in_use())
                && self.sync_seen.insert((n.0, o.0))
            {
                let size = types.size_of(ty);
                let path = self.paths.text(path);
                self.syncs.push(SyncPair { native: n, old: o, size, path });
            }
            return;
        }
        match types.strip(ty) {
            Type::Pointer(to) => {
                let (Some(n), Some(o)) = (native.word(self.view), old.word(self.view)) else {
                    return;
                };
                let ev = if !own && self.is_recursive(*to) { ev.max(Evidence::List) } else { ev };
                self.pointer(*to, n, o, path, ev);
            }
            Type::Record(r) if r.kind == mcr_transform::types::RecordKind::Struct => {
                for m in &r.members {
                    // Paths are made for what may be paired only: most members are numbers or null.
                    if m.bits.is_some() || !self.may_point(m.ty, native.add(m.offset)) {
                        continue;
                    }
                    let p = m.name.as_ref().map_or(path, |n| self.paths.step(path, Step::Member(n)));
                    self.value(m.ty, native.add(m.offset), old.add(m.offset), p, ev, own);
                }
            }
            Type::Record(r) => {
                // A union: words that are addresses on both sides are evidence, but weak.
                for i in 0..r.size / 8 {
                    let (n, o) = (native.add(8 * i), old.add(8 * i));
                    if let (Some(n), Some(o)) = (n.word(self.view), o.word(self.view)) {
                        self.pointer(TypeId::VOID, n, o, path, ev.max(Evidence::Opaque));
                    }
                }
            }
            Type::Array { element, count: Some(count) } => {
                let size = types.size_of(*element);
                if size == 0 || !self.has_pointers(*element) {
                    return;
                }
                for i in 0..(*count).min(1 << 20) {
                    if !self.may_point(*element, native.add(i * size)) {
                        continue;
                    }
                    let p = self.paths.step(path, Step::Index(i));
                    let at = i * size;
                    self.value(*element, native.add(at), old.add(at), p, ev.max(Evidence::Array), own);
                }
            }
            _ => {}
        }
    }

    fn pointer(&mut self, to: TypeId, native: u64, old: u64, path: Path, ev: Evidence) {
        if native == 0 || old == 0 || native == old {
            return;
        }
        let Some(n) = self.native_heap.find(Addr(native)).copied() else {
            return;
        };
        if !n.state.in_use() || !self.is_old_object(Addr(old)) {
            return;
        }
        let delta = old.wrapping_sub(native);
        let ty = self.types.resolve(to);
        let claim = Claim { delta, old: Addr(old), evidence: ev, path, ty };
        match self.candidates.entry(n.addr.0) {
            Entry::Vacant(e) => {
                e.insert(Few { first: claim, more: Vec::new() });
            }
            Entry::Occupied(e) => {
                let list = e.into_mut();
                let known = list.iter_mut().find(|c| c.delta == delta);
                match known {
                    Some(c) if c.evidence <= ev => {}
                    Some(c) => (c.evidence, c.ty, c.path) = (ev, ty, path),
                    None => list.more.push(claim),
                }
            }
        }
        match self.by_old.entry(n.addr.0.wrapping_add(delta)) {
            Entry::Vacant(e) => {
                e.insert(Few { first: (n.addr, ev), more: Vec::new() });
            }
            Entry::Occupied(mut e) => {
                if !e.get().iter().any(|c| *c == (n.addr, ev)) {
                    e.get_mut().more.push((n.addr, ev));
                }
            }
        }
        if !self.seen.insert((native, old, ty)) {
            return;
        }
        let size = self.types.size_of(to);
        if size > 0 && size <= n.end().since(Addr(native)) {
            let behind = self.paths.step(path, Step::Deref);
            self.queue.push_back((to, Addr(native), Addr(old), behind, ev));
            // Behind the first object: more of its kind, or something else. Same offset, weak.
            self.opaque(n.end(), native + size, delta, path, ev);
        } else if size == 0 {
            self.opaque(n.end(), native, delta, path, ev);
        }
    }

    /// Words at the same offset of two chunks of the same size.
    fn opaque(&mut self, end: Addr, from: u64, delta: u64, path: Path, ev: Evidence) {
        let from = (from + 7) & !7;
        let len = end.0.saturating_sub(from);
        let Some(o) = self.old_heap.find(Addr(from.wrapping_add(delta))) else {
            return;
        };
        if !(8..=MAX_OPAQUE).contains(&len) || o.end().0 != end.0.wrapping_add(delta) {
            return;
        }
        // A pool has thousands of objects, and each of them leads here: what is behind all of them is compared once.
        let ev = ev.max(Evidence::Opaque);
        let done = self.compared.entry((end, delta, ev)).or_insert(end.0);
        let until = (*done).min(from + (len & !7));
        if from >= until {
            return;
        }
        *done = from;
        let len = (until - from) as usize;
        let (view, mut one, mut other) = (self.view, Vec::new(), Vec::new());
        let (Ok(n), Ok(o)) = (
            view.view(Addr(from), len, &mut one),
            view.view(Addr(from.wrapping_add(delta)), len, &mut other),
        ) else {
            return;
        };
        let word = |b: &[u8]| u64::from_le_bytes(b.try_into().unwrap_or_default());
        for (i, (n, o)) in n.chunks_exact(8).zip(o.chunks_exact(8)).enumerate() {
            let (n, o) = (word(n), word(o));
            // Memory that malloc gave may hold words of its last owner: an address at the same place is no evidence
            // before what it leads to looks alike.
            if n != 0 && o != 0 && n != o && self.alike(Addr(n), Addr(o)) {
                let path = self.paths.step(path, Step::Opaque(8 * i as u64));
                self.pointer(TypeId::VOID, n, o, path, ev);
            }
        }
    }

    fn is_old_object(&self, a: Addr) -> bool {
        self.old_heap.find(a).is_some_and(|c| c.state.in_use()) || self.regions.iter().any(|r| r.contains(a))
    }

    /// The record has a pointer to its own kind.
    fn is_recursive(&mut self, to: TypeId) -> bool {
        let to = self.types.resolve(to);
        if let Some(&known) = self.recursive.get(&to) {
            return known;
        }
        let found = self.points_to(to, to, 0);
        self.recursive.insert(to, found);
        found
    }

    fn points_to(&self, ty: TypeId, target: TypeId, depth: u32) -> bool {
        if depth > 8 {
            return false;
        }
        match self.types.strip(ty) {
            Type::Record(r) => r.members.iter().any(|m| match self.types.strip(m.ty) {
                Type::Pointer(to) => self.types.resolve(*to) == target,
                _ => self.points_to(m.ty, target, depth + 1),
            }),
            Type::Array { element, .. } => match self.types.strip(*element) {
                Type::Pointer(to) => self.types.resolve(*to) == target,
                _ => self.points_to(*element, target, depth + 1),
            },
            _ => false,
        }
    }

    /// The value may hold the address of a start-up object, or a synchronisation object.
    fn may_point(&mut self, ty: TypeId, native: Side<'_>) -> bool {
        match self.types.strip(ty) {
            Type::Pointer(_) => {
                native.word(self.view).is_some_and(|w| w > 4096 && self.native_heap.find(Addr(w)).is_some())
            }
            _ => self.has_pointers(ty),
        }
    }

    fn has_pointers(&mut self, ty: TypeId) -> bool {
        if self.types.sync_kind(ty).is_some() {
            return true;
        }
        let ty = self.types.resolve(ty);
        if let Some(&known) = self.pointerful.get(&ty) {
            return known;
        }
        // A type that holds itself by value does not exist; nonsense in the file ends here.
        self.pointerful.insert(ty, false);
        let types = self.types;
        let found = match &types[ty] {
            Type::Pointer(_) => true,
            Type::Record(r) if r.kind == mcr_transform::types::RecordKind::Struct => {
                r.members.iter().any(|m| self.has_pointers(m.ty))
            }
            Type::Record(r) => r.size >= 8,
            Type::Array { element, .. } => self.has_pointers(*element),
            _ => false,
        };
        self.pointerful.insert(ty, found);
        found
    }

    /// Objects that only callee-saved registers of a frame hold: compilers keep a pointer there without
    /// saying so in the debug information. A native one and an old one are the same if they are alike in
    /// size and shape and no other object of the frame is. Returns whether old has objects left that
    /// nothing pairs.
    pub fn frame_registers(&mut self, native: &[u64], old: &[u64], path: &str) -> bool {
        let mut news: Vec<Addr> = native.iter().map(|&w| Addr(w)).collect();
        news.retain(|&w| {
            self.native_heap
                .find(w)
                .is_some_and(|c| c.state.in_use() && self.verdict(c.addr) == Verdict::Unknown)
        });
        let mut olds: Vec<Addr> = old.iter().map(|&w| Addr(w)).collect();
        olds.retain(|&w| {
            self.old_heap.find(w).is_some_and(|c| c.state.in_use() && !self.by_old.contains_key(&c.addr.0))
        });
        news.sort();
        news.dedup();
        olds.sort();
        olds.dedup();
        let mut left = olds.len();
        for &n in &news {
            let fits: Vec<Addr> = olds.iter().copied().filter(|&o| self.alike(n, o)).collect();
            if let [o] = fits[..]
                && news.iter().filter(|&&m| self.alike(m, o)).count() == 1
            {
                self.words(n.0, o.0, path, Evidence::Register);
                left -= 1;
            }
        }
        left > 0
    }

    /// The same place in chunks of one size, with addresses at the same offsets.
    fn alike(&self, native: Addr, old: Addr) -> bool {
        let (Some(n), Some(o)) = (self.native_heap.find(native), self.old_heap.find(old)) else {
            return false;
        };
        if n.usable != o.usable || native.since(n.addr) != old.since(o.addr) {
            return false;
        }
        let words = (n.usable / 8).min(64);
        (0..words).all(|i| {
            let (a, b) = (self.view.u64(n.addr.add(8 * i)), self.view.u64(o.addr.add(8 * i)));
            let (Ok(a), Ok(b)) = (a, b) else { return false };
            let native_object = self.native_heap.find(Addr(a)).is_some_and(|c| c.state.in_use());
            // A pointer that start-up leaves null may be set by now, and the other way round.
            a == 0 || b == 0 || native_object == self.is_old_object(Addr(b))
        })
    }

    /// The strongest claim on the old object for the native chunk, if nothing rivals it.
    fn accepted(&self, chunk: Addr, list: &Few<Claim>) -> Option<Claim> {
        let best = list.iter().map(|c| c.evidence).min()?;
        let mut strongest = list.iter().filter(|c| c.evidence == best);
        let first = strongest.next().filter(|_| strongest.next().is_none())?;
        let claims = self.by_old.get(&chunk.0.wrapping_add(first.delta));
        let rival = claims.is_some_and(|l| l.iter().any(|(n, ev)| *n != chunk && *ev <= best));
        (!rival).then_some(*first)
    }

    /// The one old object that the native chunk which starts at `chunk` is paired with.
    #[must_use]
    pub fn paired(&self, chunk: Addr) -> Option<Partner> {
        let c = self.accepted(chunk, self.candidates.get(&chunk.0)?)?;
        Some(Partner { delta: c.delta, evidence: c.evidence })
    }

    /// How many native chunks are paired, and how many of them by direct evidence.
    #[must_use]
    pub fn count(&self) -> (usize, usize) {
        let all = self.candidates.iter().filter_map(|(a, l)| self.accepted(Addr(*a), l));
        all.fold((0, 0), |(n, strong), c| (n + 1, strong + usize::from(c.evidence == Evidence::Direct)))
    }

    fn told(&self, c: &Claim) -> Candidate {
        let path = self.paths.text(c.path);
        Candidate { delta: c.delta, old: c.old, evidence: c.evidence, path, ty: c.ty }
    }

    /// What is known about the native chunk that starts at `chunk`.
    #[must_use]
    pub fn verdict(&self, chunk: Addr) -> Verdict {
        let Some(list) = self.candidates.get(&chunk.0) else {
            return Verdict::Unknown;
        };
        if let Some(c) = self.accepted(chunk, list) {
            return Verdict::Paired(self.told(&c));
        }
        let best = list.iter().map(|c| c.evidence).min().unwrap_or(Evidence::Opaque);
        let mut strongest = list.iter().filter(|c| c.evidence == best);
        let Some(first) = strongest.next() else {
            return Verdict::Unknown;
        };
        if let Some(other) = strongest.next() {
            return Verdict::Contradiction(self.told(first), self.told(other));
        }
        // The same old object claimed by another start-up object with evidence at least as strong.
        let mine = chunk.0.wrapping_add(first.delta);
        let rivals = self.by_old.get(&mine);
        let rival = rivals.and_then(|l| l.iter().find(|(n, ev)| *n != chunk && *ev <= best));
        if let Some((n, ev)) = rival {
            let path = self
                .candidates
                .get(&n.0)
                .and_then(|l| l.iter().find(|c| n.0.wrapping_add(c.delta) == mine))
                .map_or_else(String::new, |c| self.paths.text(c.path));
            let other = Candidate { delta: first.delta, old: *n, evidence: *ev, path, ty: first.ty };
            return Verdict::Contradiction(self.told(first), other);
        }
        Verdict::Paired(self.told(first))
    }

    /// A pair that rests on the order of a list which has other members of its kind: a guess, if it matters
    /// which is which.
    #[must_use]
    pub fn by_order(&self, c: &Candidate) -> bool {
        let same = |list: &&Few<Claim>| {
            list.iter()
                .min_by_key(|m| m.evidence)
                .is_some_and(|m| m.evidence == Evidence::List && m.ty == c.ty)
        };
        c.evidence == Evidence::List && self.candidates.values().filter(same).count() > 1
    }

    /// Synchronisation objects inside paired chunks.
    pub fn syncs(&self) -> impl Iterator<Item = &SyncPair> {
        self.syncs.iter().filter(|s| {
            self.native_heap.find(s.native).is_some_and(|c| {
                self.paired(c.addr).is_some_and(|p| s.native.0.wrapping_add(p.delta) == s.old.0)
            })
        })
    }
}
