//! What in a type is a pointer, a thread or process id, or a synchronisation object.

use super::model::{RecordKind, SyncKind, Type, TypeId, TypeModel};

/// What a word of an object means to the tracer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotKind {
    /// A pointer to data of this type (`void` included).
    Pointer(TypeId),
    /// A pointer to a function.
    Function,
    /// `pthread_t`.
    Thread,
    /// `pid_t`, 4 bytes.
    Pid,
    /// A mutex, condition variable, …; with its size.
    Sync(SyncKind, u64),
}

/// One such word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    /// Bytes from the start of the object.
    pub offset: u64,
    /// What it is.
    pub kind: SlotKind,
    /// One of several readings of the same bytes.
    pub in_union: bool,
}

/// More slots than this in one type are cut off: the caller scans such an object word by word.
pub const MAX_SLOTS: usize = 1 << 20;

impl TypeModel {
    /// All slots of a type, by offset. `None` if there are more than [`MAX_SLOTS`].
    #[must_use]
    pub fn pointer_map(&self, id: TypeId) -> Option<Vec<Slot>> {
        let mut out = Vec::new();
        self.slots(id, 0, false, &mut out)?;
        out.sort_by_key(|s| s.offset);
        out.dedup();
        Some(out)
    }

    fn slots(&self, id: TypeId, at: u64, in_union: bool, out: &mut Vec<Slot>) -> Option<()> {
        let mut push = |kind| {
            out.push(Slot { offset: at, kind, in_union });
            (out.len() <= MAX_SLOTS).then_some(())
        };
        if let Some(kind) = self.sync_kind(id) {
            return push(SlotKind::Sync(kind, self.size_of(id)));
        }
        if self.is_pthread_t(id) {
            return push(SlotKind::Thread);
        }
        if self.is_pid_t(id) {
            return push(SlotKind::Pid);
        }
        match self.strip(id) {
            Type::Pointer(to) => match self.strip(*to) {
                Type::Function { .. } => push(SlotKind::Function),
                _ => push(SlotKind::Pointer(*to)),
            },
            Type::Record(r) => {
                let in_union = in_union || r.kind == RecordKind::Union;
                for m in r.members.iter().filter(|m| m.bits.is_none()) {
                    self.slots(m.ty, at.saturating_add(m.offset), in_union, out)?;
                }
                Some(())
            }
            Type::Array { element, count } => {
                let mut one = Vec::new();
                self.slots(*element, 0, in_union, &mut one)?;
                let (stride, count) = (self.size_of(*element), count.unwrap_or(0));
                if one.is_empty() {
                    return Some(());
                }
                if count.saturating_mul(one.len() as u64) > (MAX_SLOTS - out.len().min(MAX_SLOTS)) as u64 {
                    return None;
                }
                for i in 0..count {
                    let base = at.saturating_add(i.saturating_mul(stride));
                    out.extend(one.iter().map(|s| Slot { offset: base.saturating_add(s.offset), ..*s }));
                }
                Some(())
            }
            _ => Some(()),
        }
    }
}
