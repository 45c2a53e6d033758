//! A thread's own words stay its own. Start-up objects of equal threads look alike; exchanged, every client test
//! passes, and each worker uses another one's object.

use super::super::output::Refusal;
use super::super::scan;
use super::kernel::lost;
use super::{Final, relation};
use mcr_image::{Addr, Memory, Regs, Tid, proto};
use mcr_transform::heap::GlibcHeap;
use std::collections::{BTreeMap, BTreeSet};

/// Bytes below the stack pointer that a leaf function may use.
const RED_ZONE: u64 = 128;
/// Above this a stack is not searched.
const MAX_STACK: u64 = 1 << 20;

pub(super) fn check(
    now: &Final<'_>,
    native: &GlibcHeap,
    findings: &mut Vec<proto::Finding>,
) -> Result<usize, Refusal> {
    let mut words = 0;
    for (old, new) in now.threads() {
        words += own_block(now, native, old, (new.tid, new.fs_base), findings)?;
    }
    words += caches(now, native)?;
    exchanged(now)?;
    Ok(words)
}

/// Thread-specific data and the rest of `struct pthread`.
fn own_block(
    now: &Final<'_>,
    native: &GlibcHeap,
    old: &proto::Thread,
    (tid, fs_base): (Tid, Addr),
    findings: &mut Vec<proto::Finding>,
) -> Result<usize, Refusal> {
    let mut words = 0;
    let mut before = 0;
    for off in scan::pthread_words() {
        let Ok(p) = now.input.old.u64(Addr(old.fs_base).add(off)) else { continue };
        let key = std::mem::replace(&mut before, p);
        if !now.verifier.is_object(p) {
            continue;
        }
        let Ok(q) = now.view.u64(fs_base.add(off)) else { continue };
        words += 1;
        let path = format!("thread {tid}: word {off:#x} of struct pthread");
        if now.verifier.carried(p, None).is_none_or(|c| c == q) {
            continue;
        }
        // glibc marks a key in use by an odd sequence number in front of the value.
        let specific = key & 1 == 1 && key < 1 << 32 && off % 16 == 8;
        let start_up = native.find(Addr(q)).is_some_and(|c| c.state.in_use());
        if now.is_old_object(q) || start_up || (specific && q != 0) {
            return Err(relation(
                format!(
                    "{path} is the thread's own {p:#x} in the old version, and would be {q:#x}{} in the new one",
                    owner(now, q, off).map_or(String::new(), |t| format!(", which is thread {t}'s,"))
                ),
                path,
            ));
        }
        if specific {
            findings.push(lost(path, p));
        }
    }
    Ok(words)
}

/// malloc's own words of each thread: the cache and the arena of the old thread that it takes over.
fn caches(now: &Final<'_>, native: &GlibcHeap) -> Result<usize, Refusal> {
    let (Some(heap), Some(offsets)) = (&now.input.patch.heap, now.malloc_offsets(native)) else {
        return Ok(0);
    };
    let mut words = 0;
    for c in heap.tcaches.iter().filter(|_| heap.main_arena != 0) {
        let Some(t) = now.input.booted.thread_for(Tid(c.old_tid as i32)) else { continue };
        for (off, want, what) in
            [(offsets.tcache, c.tcache, "malloc cache"), (offsets.arena, c.thread_arena, "malloc arena")]
        {
            let Ok(is) = now.view.u64(t.fs_base.add(off)) else { continue };
            words += 1;
            if off != 0 && is != want {
                let path = format!("thread {}: its {what}", t.tid);
                return Err(relation(
                    format!(
                        "{path} is at {want:#x} in the old version, and would be at {is:#x} in the new one"
                    ),
                    path,
                ));
            }
        }
    }
    Ok(words)
}

/// The old thread that has an object in the same word.
fn owner(now: &Final<'_>, object: u64, off: u64) -> Option<u32> {
    let mine = |t: &&proto::Thread| {
        now.input
            .old
            .u64(Addr(t.fs_base).add(off))
            .is_ok_and(|p| now.verifier.carried(p, None) == Some(object))
    };
    now.input.process.threads.iter().find(mine).map(|t| t.tid)
}

/// Which thread holds which of old's heap objects.
#[derive(Default)]
struct Held {
    by_object: BTreeMap<u64, BTreeSet<u32>>,
}

impl Held {
    fn add(&mut self, object: u64, thread: u32) {
        self.by_object.entry(object).or_default().insert(thread);
    }
    /// Objects that one thread alone holds.
    fn alone(&self) -> BTreeMap<u64, u32> {
        let one = |(o, t): (&u64, &BTreeSet<u32>)| t.first().filter(|_| t.len() == 1).map(|t| (*o, *t));
        self.by_object.iter().filter_map(one).collect()
    }
}

/// Two objects of one size that changed hands: each was held by one thread alone, and would be held by the other.
fn exchanged(now: &Final<'_>) -> Result<(), Refusal> {
    if now.input.process.threads.len() < 2 {
        return Ok(());
    }
    let back: BTreeMap<u64, &proto::TypedObject> =
        now.input.patch.objects.iter().filter(|o| o.moved).map(|o| (o.addr, o)).collect();
    let mut then = Held::default();
    let mut later = Held::default();
    for (old, new) in now.threads() {
        let Some(regs) = Regs::from_words(&old.regs) else { continue };
        for w in held_words(now.input.old, &regs, Addr(old.fs_base), &now.input.process.vmas) {
            if let Some(o) = now.verifier.object_start(w) {
                then.add(o, old.tid);
            }
        }
        let regs = now.regs(new);
        for w in held_words(now.view, &regs, new.fs_base, &now.input.booted.vmas) {
            let before = back.range(..=w).next_back();
            let moved = before.filter(|(n, o)| w - **n < o.size).map(|(n, o)| o.old_addr + (w - n));
            let old_place = if now.verifier.is_object(w) { Some(w) } else { moved };
            if let Some(o) = old_place.and_then(|w| now.verifier.object_start(w)) {
                later.add(o, old.tid);
            }
        }
    }
    let (then_alone, later_alone) = (then.alone(), later.alone());
    let holds = |o: u64, t: u32| later.by_object.get(&o).is_some_and(|s| s.contains(&t));
    for (x, a) in &then_alone {
        let Some(b) = later_alone.get(x).filter(|b| *b != a) else { continue };
        let size = now.verifier.object_size(*x);
        // What was b's is a's now, or nobody's.
        let other = then_alone.iter().find(|(y, t)| {
            *t == b && now.verifier.object_size(**y) == size && !holds(**y, *b) && holds(**y, *a)
        });
        if let Some((y, _)) = other {
            return Err(relation(
                format!(
                    "the objects at {x:#x} and {y:#x} belong to threads {a} and {b} in the old version, and would \
                     belong to {b} and {a} in the new one"
                ),
                format!("stacks of threads {a} and {b}"),
            ));
        }
    }
    Ok(())
}

/// Words of a thread's stack in use, of its registers and of its own block.
fn held_words(memory: &dyn Memory, regs: &Regs, fs_base: Addr, vmas: &[proto::Vma]) -> Vec<u64> {
    let mut out = regs.to_words();
    let sp = regs.rsp.saturating_sub(RED_ZONE) & !7;
    let end = vmas.iter().find(|v| v.start <= regs.rsp && regs.rsp < v.end).map_or(sp, |v| v.end);
    let mut read = |from: u64, to: u64| {
        if let Ok(b) = memory.bytes(Addr(from), to.saturating_sub(from) as usize) {
            out.extend(b.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default())));
        }
    };
    // A pthread's block lies above its stack, in the same mapping.
    let stack_end = if (sp..end).contains(&fs_base.0) { fs_base.0 } else { end };
    read(sp, stack_end.min(sp + MAX_STACK));
    for off in scan::pthread_words() {
        read(fs_base.0 + off, fs_base.0 + off + 8);
    }
    out
}
