//! Values that live outside of the heap: their bytes in the new layout, and the words in them.

use super::findings::Findings;
use super::fix::{Fixer, NewWord};
use super::sync;
use crate::layout::{Layouts, SlotKind};
use mcr_image::proto;

/// What a typed word in some memory turned into.
pub(crate) enum Fix {
    Value(u64),
    Reloc {
        target: proto::reloc::Target,
        symbol: String,
        conservative: bool,
    },
    /// It keeps what the new version's start-up put there (this many bytes).
    Native(u64, &'static str),
}

/// A typed run of bytes to go through.
pub(crate) struct Words<'a> {
    pub fixer: &'a Fixer<'a>,
    pub layouts: &'a Layouts<'a>,
    /// Type of the bytes (of one element).
    pub ty: crate::types::TypeId,
    /// The bytes, old layout.
    pub bytes: &'a [u8],
    /// Their old address (0: in registers).
    pub addr: u64,
    /// Contradictions here are worth a warning only.
    pub weak: bool,
    /// Synchronisation objects keep their native bytes (globals); otherwise they are only recorded.
    pub native_sync: bool,
}

/// Offsets (in the old bytes) of words that change, with what they become.
pub(crate) type Fixes = Vec<(u64, Fix)>;

impl Words<'_> {
    /// Typed slots. `path` names the object.
    pub fn typed(
        &self,
        path: &dyn Fn() -> String,
        findings: &mut Findings,
        syncs: &mut Vec<proto::SyncObject>,
        out: &mut Fixes,
    ) {
        let slots = self.layouts.of(self.ty);
        let at = |offset: u64| {
            let field = self.layouts.field_path(self.ty, offset);
            let p = path();
            if field.is_empty() || field.starts_with('[') {
                format!("{p}{field}")
            } else {
                format!("{p}.{field}")
            }
        };
        for s in &slots.slots {
            let o = s.offset;
            let Some(v) = crate::trace::word_at(self.bytes, o) else {
                if s.kind == SlotKind::Pid && o as usize + 4 <= self.bytes.len() {
                    self.pid(o, out);
                }
                continue;
            };
            let (new, typed) = match s.kind {
                SlotKind::Pointer(to) => (self.fixer.word(v, Some(to)), true),
                SlotKind::Function => (self.fixer.word(v, None), true),
                SlotKind::Untyped => (self.fixer.word(v, None), false),
                SlotKind::Thread => (self.fixer.thread(v), true),
                SlotKind::Pid => {
                    self.pid(o, out);
                    continue;
                }
                SlotKind::Sync(kind, size) => {
                    self.sync(o, kind, size, &at, findings, syncs, out);
                    continue;
                }
                SlotKind::Union(_) | SlotKind::Enum(_) | SlotKind::Bool => continue,
            };
            match new {
                NewWord::Same => {}
                NewWord::Value(n) => out.push((o, Fix::Value(n))),
                NewWord::Reloc(target, symbol) => {
                    out.push((o, Fix::Reloc { target, symbol, conservative: false }))
                }
                NewWord::Lost(code, why) => {
                    if code == "stack-reference" && self.fixer.is_stale_stack(v) {
                        continue;
                    }
                    if code == "stack-reference" && self.native_sync && (!typed || self.fixer.is_argument(v))
                    {
                        // argv and environment, mostly: the new version's start-up has its own.
                        out.push((o, Fix::Native(8, "points at the old stack")));
                        continue;
                    }
                    let message = format!("the pointer {v:#x} cannot be carried: {why}");
                    let next = "make it reachable for the new version by the name it gives, or set it to NULL before the update";
                    if (typed || code == "I7-interior") && !self.weak {
                        findings.refuse(code, message, at(o), next, self.addr + o);
                    } else {
                        findings.warn("opaque-reference", message, at(o), next, self.addr + o);
                    }
                }
            }
        }
    }

    fn pid(&self, o: u64, out: &mut Fixes) {
        let raw = &self.bytes[o as usize..o as usize + 4];
        let v = u32::from_le_bytes(raw.try_into().expect("four bytes"));
        if let NewWord::Reloc(target, symbol) = self.fixer.pid(v) {
            out.push((o, Fix::Reloc { target, symbol, conservative: false }));
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn sync(
        &self,
        o: u64,
        kind: crate::types::SyncKind,
        size: u64,
        at: &dyn Fn(u64) -> String,
        findings: &mut Findings,
        syncs: &mut Vec<proto::SyncObject>,
        out: &mut Fixes,
    ) {
        let end = (o + size).min(self.bytes.len() as u64);
        let held = sync::held(kind, &self.bytes[o as usize..end as usize]);
        if let Some(owner) = held {
            let who = self.fixer.threads.iter().find(|t| t.tid == owner);
            let who = who.map_or(format!("thread {owner}"), |t| format!("thread {owner} ({})", t.comm));
            findings.refuse(
                "I8-lock-held",
                format!("{} is held by {who}", sync::name(kind)),
                at(o),
                "update at a moment when the lock is free; a quiescent point may be named in the rules: [[quiescent]] stack = [\"…\"]",
                self.addr + o,
            );
        }
        if self.native_sync {
            out.push((o, Fix::Native(size, sync::name(kind))));
        } else {
            syncs.push(proto::SyncObject {
                addr: self.addr + o,
                size: size as u32,
                type_name: sync::name(kind).into(),
                locked: held.is_some(),
                owner_tid: held.unwrap_or(0),
                path: at(o),
            });
        }
    }

    /// Aligned words that no typed pointer slot covers, `start` bytes into the object at most to its end.
    pub fn conservative(&self, path: &dyn Fn() -> String, findings: &mut Findings, out: &mut Fixes) {
        let slots = self.layouts.of(self.ty);
        // Asked for the few words that matter.
        let handled = |o: u64| {
            slots.slots.iter().any(|s| {
                s.offset == o
                    && matches!(
                        s.kind,
                        SlotKind::Pointer(_) | SlotKind::Function | SlotKind::Untyped | SlotKind::Thread
                    )
            })
        };
        let mut o = self.addr.next_multiple_of(8) - self.addr;
        while let Some(v) = crate::trace::word_at(self.bytes, o) {
            if self.fixer.is_interesting(v) && !handled(o) {
                match self.fixer.word(v, None) {
                    NewWord::Same => {}
                    NewWord::Value(n) => out.push((o, Fix::Value(n))),
                    NewWord::Reloc(target, symbol) => {
                        out.push((o, Fix::Reloc { target, symbol, conservative: true }))
                    }
                    NewWord::Lost(code, why) => {
                        let message =
                            format!("the word {v:#x}, which may be a pointer, cannot be carried: {why}");
                        opaque_lost(findings, code, message, format!("{}+{o:#x}", path()), self.addr + o);
                    }
                }
            }
            o += 8;
        }
    }
}

/// An opaque word that looks like a pointer and has no counterpart.
pub(crate) fn opaque_lost(findings: &mut Findings, code: &str, message: String, path: String, addr: u64) {
    if code == "I7-interior" {
        let next =
            "say what it points at: [types] \"TYPE.FIELD\" = \"TYPE\" (or \"opaque\" if it is no pointer)";
        findings.refuse("I7-opaque-reference", message, path, next, addr);
    } else {
        findings.info("opaque-reference", message, path, "nothing, if it is no pointer", addr);
    }
}
