//! The walk of both memories in parallel, each in its own types.

use super::{Broken, Placing, Relations, Verdict, Verifier};
use crate::layout::{SlotKind, record_name};
use crate::space::Spot;
use crate::trace::word_at;
use crate::types::{Type, TypeId};
use mcr_image::{Addr, FastMap, FastSet, Memory};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Slack that malloc may leave behind the requested bytes.
const SLACK: u64 = 32;
/// Paths up to this length are shown whole.
const WHOLE: usize = 8;

/// How an object was reached.
enum Node {
    Root(String),
    /// An element of a root that is an array.
    Element(u32, u64),
    /// From another one, by this slot of this type.
    Step {
        from: u32,
        ty: TypeId,
        offset: u64,
    },
}

/// An object to look at.
struct Task {
    node: u32,
    old: u64,
    ty: TypeId,
    /// Index in `convs`, if it has a new layout.
    conv: Option<usize>,
    new: u64,
    count: u64,
    /// What leads here may be no pointer.
    weak: bool,
}

/// Pointer slots by old and new type, for more than one walk: they depend on the programs alone.
#[derive(Default)]
pub(crate) struct KnownSlots(Mutex<ByTypes>);

type ByTypes = FastMap<(TypeId, Option<TypeId>), Arc<[Mapped]>>;

/// A slot with its place in the new layout.
#[derive(Clone, Copy)]
struct Mapped {
    old: u64,
    new: u64,
    kind: SlotKind,
}

/// Old and new bytes of one value, and where it came from.
pub(super) struct Value<'b> {
    pub old_ty: TypeId,
    /// `None`: it keeps its layout.
    pub new_ty: Option<TypeId>,
    pub old: &'b [u8],
    pub new: &'b [u8],
    /// In `new`: what keeps the new version's own bytes.
    pub native: &'b [Range<u64>],
    pub addr: u64,
    /// It may be no such value at all: a word that keeps its value is no evidence.
    pub weak: bool,
    /// A local: it may be uninitialised, or share its place with another one.
    pub local: bool,
}

pub(super) struct Walk<'v, 'a> {
    v: &'v Verifier<'a>,
    view: &'v dyn Memory,
    at: &'v dyn Placing,
    nodes: Vec<Node>,
    seen: FastSet<(u64, TypeId)>,
    queue: VecDeque<Task>,
    mapped: ByTypes,
    pub found: Relations,
}

impl<'v, 'a> Walk<'v, 'a> {
    pub fn new(v: &'v Verifier<'a>, view: &'v dyn Memory, at: &'v dyn Placing) -> Self {
        Self {
            v,
            view,
            at,
            nodes: Vec::new(),
            seen: FastSet::default(),
            queue: VecDeque::new(),
            mapped: FastMap::default(),
            found: Relations::default(),
        }
    }

    pub fn node(&mut self, name: String) -> u32 {
        self.nodes.push(Node::Root(name));
        (self.nodes.len() - 1) as u32
    }

    /// An element of a root.
    pub fn element(&mut self, root: u32, index: u64) -> u32 {
        self.nodes.push(Node::Element(root, index));
        (self.nodes.len() - 1) as u32
    }

    fn is_root(&self, node: u32) -> bool {
        matches!(self.nodes[node as usize], Node::Root(_) | Node::Element(..))
    }

    /// Pointer slots of a type, with their places in the new one.
    fn slots(&mut self, old: TypeId, new: Option<TypeId>) -> Arc<[Mapped]> {
        if let Some(m) = self.mapped.get(&(old, new)) {
            return Arc::clone(m);
        }
        let known = &self.v.prepared.slots.0;
        if let Some(m) = known.lock().unwrap_or_else(PoisonError::into_inner).get(&(old, new)) {
            self.mapped.insert((old, new), Arc::clone(m));
            return Arc::clone(m);
        }
        let (layouts, rl) = (&self.v.prepared.layouts, self.v.rl());
        let wanted = |k: SlotKind| {
            matches!(
                k,
                SlotKind::Pointer(_)
                    | SlotKind::Function
                    | SlotKind::Untyped
                    | SlotKind::Thread
                    | SlotKind::Pid
            )
        };
        let list: Arc<[Mapped]> = layouts
            .of(old)
            .slots
            .iter()
            .filter(|s| wanted(s.kind))
            .filter_map(|s| {
                let to = new.map_or(Some(s.offset), |n| rl.map_slot(old, n, s.offset));
                Some(Mapped { old: s.offset, new: to?, kind: s.kind })
            })
            .collect();
        self.mapped.insert((old, new), Arc::clone(&list));
        known.lock().unwrap_or_else(PoisonError::into_inner).insert((old, new), Arc::clone(&list));
        list
    }

    /// One value: every pointer in it, and where they lead.
    pub fn value(&mut self, node: u32, b: &Value<'_>) -> Result<(), Broken> {
        for s in self.slots(b.old_ty, b.new_ty).iter() {
            let len = if s.kind == SlotKind::Pid { 4 } else { 8 };
            if b.native.iter().any(|r| s.new < r.end && r.start < s.new + len) {
                continue;
            }
            let place = b.addr.wrapping_add(s.old);
            if s.kind == SlotKind::Pid {
                self.pid(node, b, s, place)?;
                continue;
            }
            let (Some(p), Some(q)) = (word_at(b.old, s.old), word_at(b.new, s.new)) else { continue };
            let want = if let SlotKind::Pointer(to) = s.kind { Some(to) } else { None };
            let unchanged = b.weak && p == q;
            if !unchanged || (!b.local && self.v.has_left(p)) {
                self.found.edges += 1;
                match self.v.judge(p, q, want, self.at) {
                    Verdict::Right => {}
                    Verdict::Unknown => self.found.unknown += 1,
                    // It may be no pointer at all, and be carried as something else.
                    Verdict::Wrong(_) if b.local && !self.v.is_object(p) => self.found.unknown += 1,
                    Verdict::Wrong(what) => {
                        let path = self.path(node, b.old_ty, s.old);
                        return Err(Broken::relation(
                            format!(
                                "{path} led to {what} ({p:#x}) in the old version, and to {q:#x} in the new one"
                            ),
                            path,
                            place,
                        ));
                    }
                }
            }
            if let Some(to) = want {
                self.push(p, to, b.weak, node, b.old_ty, s.old);
            }
        }
        Ok(())
    }

    fn pid(&mut self, node: u32, b: &Value<'_>, s: &Mapped, place: u64) -> Result<(), Broken> {
        let int = |bytes: &[u8], at: u64| {
            let raw = bytes.get(at as usize..at as usize + 4)?;
            Some(u32::from_le_bytes(raw.try_into().ok()?))
        };
        let (Some(p), Some(q)) = (int(b.old, s.old), int(b.new, s.new)) else { return Ok(()) };
        let ours = p == self.v.process.pid || self.v.process.threads.iter().any(|t| t.tid == p);
        let want = if ours && p != 0 { self.at.pid(p) } else { Some(p) };
        self.found.edges += 1;
        match want {
            Some(w) if w != q && !b.weak => {
                let path = self.path(node, b.old_ty, s.old);
                let message = format!("{path} is process or thread {p}, which is {w} now, and became {q}");
                Err(Broken::relation(message, path, place))
            }
            None => {
                self.found.unknown += 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Something that a pointer leads to, once a type.
    fn push(&mut self, old: u64, to: TypeId, weak: bool, from: u32, ty: TypeId, offset: u64) {
        let m = self.v.prepared.old_types;
        if old < 4096 {
            return;
        }
        let to = m.resolve(to);
        if self.seen.contains(&(old, to)) {
            return;
        }
        let (element, fixed) = match &m[to] {
            Type::Array { element, count: Some(n) } => (m.resolve(*element), Some(*n)),
            _ => (to, None),
        };
        let size = m.size_of(element);
        if size == 0 || self.v.prepared.layouts.of(element).slots.is_empty() {
            return;
        }
        // A pointer into the middle of a block leads to one element: its array was reached at its beginning, and
        // a pool would be read once from each of its objects to its end.
        let (room, first) = match self.v.space.spot(old) {
            Spot::Chunk(i) => {
                let c = &self.v.space.heap.chunks[i];
                if !c.state.in_use() {
                    return;
                }
                (c.end().0 - old, c.addr.0 == old)
            }
            Spot::Other => (size, true),
            _ => return,
        };
        // The C library's streams are joined with new's.
        let stream = record_name(m, element).is_some_and(|n| n == "struct _IO_FILE");
        if size > room || stream {
            return;
        }
        let conv = self.v.convs.at(old);
        let new = match conv {
            None => old,
            Some(n) => match self.v.convs.list[n].map(self.v.rl(), old, Some(element)) {
                Some(a) => a,
                None => return,
            },
        };
        let count = match (conv.map(|n| &self.v.convs.list[n]), fixed) {
            (_, Some(n)) => n.min(room / size),
            (Some(c), _) if c.old_addr == old && c.old_ty == element => c.count,
            (Some(_), _) => 1,
            _ if !first => 1,
            _ if matches!(m.strip(element), Type::Pointer(_)) => room / size,
            _ if room % size < SLACK => room / size,
            _ => 1,
        };
        self.seen.insert((old, to));
        self.nodes.push(Node::Step { from, ty, offset });
        let node = (self.nodes.len() - 1) as u32;
        self.queue.push_back(Task { node, old, ty: element, conv, new, count, weak });
    }

    /// Follows everything to the end.
    pub fn run(&mut self) -> Result<(), Broken> {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        while let Some(t) = self.queue.pop_front() {
            let rl = self.v.rl();
            let (model, size) = (self.v.prepared.old_types, self.v.prepared.old_types.size_of(t.ty));
            // An object that keeps its layout is read in old's types on both sides.
            let new_ty = t.conv.and_then(|_| rl.pair(t.ty)).filter(|n| rl.changed(t.ty, *n));
            let new_size = new_ty.map_or(size, |n| rl.size_new(n));
            let memory = self.v.memory;
            let Ok(old) = memory.view(Addr(t.old), (t.count * size) as usize, &mut a) else { continue };
            let view = self.view;
            let new = view.view(Addr(t.new), (t.count * new_size) as usize, &mut b).map_err(|e| {
                let path = self.path_of(t.node);
                let message = format!("{path}: its bytes in the new version cannot be read: {e}");
                Broken::relation(message, path, t.old)
            })?;
            self.found.objects += 1;
            let pointers = matches!(model.strip(t.ty), Type::Pointer(_));
            for i in 0..t.count {
                let one = |bytes: &'_ [u8], size: u64| {
                    (i * size) as usize..(((i + 1) * size) as usize).min(bytes.len())
                };
                let value = Value {
                    old_ty: t.ty,
                    new_ty,
                    old: &old[one(old, size)],
                    new: &new[one(new, new_size)],
                    native: &[],
                    addr: t.old + i * size,
                    weak: t.weak || i > 0 || (pointers && t.count > 1),
                    local: false,
                };
                self.value(t.node, &value)?;
            }
        }
        Ok(())
    }

    /// "sessions->next->name": the slot of an object.
    fn path(&self, node: u32, ty: TypeId, offset: u64) -> String {
        let field = self.v.prepared.layouts.field_path(ty, offset);
        join(self.path_of(node), &field, self.is_root(node))
    }

    fn path_of(&self, node: u32) -> String {
        let mut steps = Vec::new();
        let mut at = node;
        let root = loop {
            match &self.nodes[at as usize] {
                Node::Root(name) => break name.clone(),
                Node::Element(root, i) => break format!("{}[{i}]", self.path_of(*root)),
                Node::Step { from, ty, offset } => {
                    steps.push((*ty, *offset, self.is_root(*from)));
                    at = *from;
                }
            }
        };
        steps.reverse();
        let left_out = steps.len().saturating_sub(WHOLE);
        let mut out = root;
        for (i, (ty, offset, first)) in steps.into_iter().enumerate() {
            if left_out > 0 && i == WHOLE / 2 {
                out.push_str(&format!("…({left_out} steps)…"));
            }
            if i < WHOLE / 2 || i >= WHOLE / 2 + left_out {
                out = join(out, &self.v.prepared.layouts.field_path(ty, offset), first);
            }
        }
        out
    }
}

fn join(mut path: String, field: &str, root: bool) -> String {
    if !field.is_empty() {
        path.push_str(match (root, field.starts_with('[')) {
            (_, true) => "",
            (true, false) => ".",
            (false, false) => "->",
        });
        path.push_str(field);
    }
    path
}
