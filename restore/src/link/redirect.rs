//! Words of surviving native memory that point at start-up objects: sent to the old object where there is
//! one, kept where the object is new's alone, refused where nobody can tell.

use super::output::Refusal;
use super::pairs::{Candidate, Evidence, Pairs, Verdict};
use super::state::State;
use mcr_image::{Addr, Memory, proto};
use mcr_transform::heap::{ChunkState, GlibcHeap};
use std::collections::{BTreeMap, BTreeSet};

/// Where a word was found: decides what an unpaired target means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// An argument of the call that a thread is blocked in: the kernel will use it.
    Argument,
    /// A register, or the slot where a frame saved one: it may be live.
    Register {
        /// The old frame's registers hold objects, too, that nothing pairs.
        open: bool,
    },
    /// A variable of a frame that stays. `carried`: the old frame has a variable of that name.
    Local {
        /// The old frame has it, too, so its value should have come over.
        in_old: bool,
    },
    /// A stack word that no variable owns.
    Stack,
    /// The thread's own block: thread-locals, `struct pthread`.
    Thread,
    /// A global of the new program that keeps its native value.
    Global,
    /// A start-up object that survives.
    Heap,
    /// Data of libc and ld.so, which are new's.
    Library,
}

/// The redirection in progress.
pub struct Redirect<'a> {
    /// What is known about native objects.
    pub pairs: &'a Pairs<'a>,
    /// Native chunks.
    pub native: &'a GlibcHeap,
    /// Old chunks.
    pub old: &'a GlibcHeap,
    /// The host as booted.
    pub host: &'a dyn Memory,
    /// Moved objects.
    pub regions: &'a [super::Span],
    survivors: BTreeMap<u64, String>,
    todo: Vec<(Addr, u64)>,
    weak: BTreeSet<u64>,
}

impl<'a> Redirect<'a> {
    /// Nothing seen yet.
    #[must_use]
    pub fn new(
        pairs: &'a Pairs<'a>,
        native: &'a GlibcHeap,
        old: &'a GlibcHeap,
        host: &'a dyn Memory,
        regions: &'a [super::Span],
    ) -> Self {
        Self {
            pairs,
            native,
            old,
            host,
            regions,
            survivors: BTreeMap::new(),
            todo: Vec::new(),
            weak: BTreeSet::new(),
        }
    }

    /// The old address for a native one, without judging.
    #[must_use]
    pub fn translate(&self, word: u64) -> Option<u64> {
        let c = self.native.find(Addr(word))?;
        Some(word.wrapping_add(self.pairs.paired(c.addr)?.delta))
    }

    /// What a word that was found at `path` becomes; `None`: it stays.
    pub fn word(
        &mut self,
        word: u64,
        holder: &Holder,
        path: &str,
        state: &mut State<'_>,
    ) -> Result<Option<u64>, Refusal> {
        let Some(c) = self.native.find(Addr(word)).copied() else {
            return Ok(None);
        };
        if !c.state.in_use() {
            if c.state != ChunkState::Allocator && *holder == Holder::Argument {
                return Err(unpaired(word, path, "is free memory of the new version's heap"));
            }
            return Ok(None);
        }
        match self.pairs.verdict(c.addr) {
            Verdict::Paired(p) => {
                let to = word.wrapping_add(p.delta);
                if !self.inside(to) {
                    if *holder == Holder::Stack {
                        state.stats.stale_words += 1;
                        return Ok(None);
                    }
                    return Err(Refusal::new(
                        "I5",
                        format!(
                            "{path} points {:#x} bytes into a start-up object of the new version; old's object (at {}) is shorter",
                            word - c.addr.0,
                            p.path
                        ),
                        "the object has another size in the two versions; a rule for its type must say how it grows",
                    )
                    .at(p.path));
                }
                let one_thread_s = matches!(
                    holder,
                    Holder::Argument | Holder::Register { .. } | Holder::Local { .. } | Holder::Thread
                );
                if one_thread_s && self.pairs.by_order(&p) {
                    return Err(Refusal::new(
                        "I5",
                        format!(
                            "{path} points at a start-up object that only its place in a list pairs with an old one ({})",
                            p.path
                        ),
                        "list order may be a race of the start-up; a rule must say which object is which",
                    )
                    .at(p.path));
                }
                if p.evidence >= Evidence::List && self.weak.insert(c.addr.0) && *holder != Holder::Stack {
                    state.find(
                        proto::Severity::Info,
                        "pair-weak",
                        format!(
                            "{path} points at a start-up object that is paired by weak evidence only ({:?}, {})",
                            p.evidence, p.path
                        ),
                        &p.path,
                    );
                }
                Ok(Some(to))
            }
            Verdict::Contradiction(a, b) => match holder {
                Holder::Stack | Holder::Library => {
                    state.stats.stale_words += 1;
                    Ok(None)
                }
                _ => Err(contradiction(path, &a, &b)),
            },
            Verdict::Unknown => match holder {
                Holder::Argument => Err(unpaired(
                    word,
                    path,
                    "is a start-up object that has no counterpart in the old version",
                )),
                Holder::Local { in_old: true } => Err(unpaired(
                    word,
                    path,
                    "is a start-up object; the old version has this variable, but its value could not be carried over",
                )),
                Holder::Stack => {
                    // Nobody's variable: dead, or a copy that a callee made. The object stays, so a read is safe.
                    state.stats.stale_words += 1;
                    self.survive(c.addr, c.usable, path);
                    Ok(None)
                }
                Holder::Library => Ok(None),
                Holder::Register { open: true } => Err(unpaired(
                    word,
                    path,
                    "is a start-up object; the old version's frame holds objects in registers, too, and nothing says which is which",
                )),
                Holder::Register { open: false } => {
                    state.find(
                        proto::Severity::Warning,
                        "native-register",
                        format!("{path} holds {word:#x}, a start-up object without a counterpart; it stays the new version's"),
                        path,
                    );
                    self.survive(c.addr, c.usable, path);
                    Ok(None)
                }
                Holder::Local { in_old: false } | Holder::Thread | Holder::Global | Holder::Heap => {
                    self.survive(c.addr, c.usable, path);
                    Ok(None)
                }
            },
        }
    }

    fn inside(&self, to: u64) -> bool {
        // One past the end is a valid pointer, too.
        let ok = |a: u64| {
            self.old.find(Addr(a)).is_some_and(|c| c.state.in_use())
                || self.regions.iter().any(|r| r.contains(Addr(a)))
        };
        ok(to) || ok(to.wrapping_sub(1))
    }

    fn survive(&mut self, chunk: Addr, usable: u64, path: &str) {
        if let std::collections::btree_map::Entry::Vacant(e) = self.survivors.entry(chunk.0) {
            e.insert(path.to_owned());
            self.todo.push((chunk, usable));
        }
    }

    /// Redirects every aligned word of a range that nothing was written over.
    pub fn range(
        &mut self,
        start: Addr,
        end: Addr,
        holder: &Holder,
        path: impl Fn(Addr) -> String,
        state: &mut State<'_>,
    ) -> Result<(), Refusal> {
        const STEP: u64 = 1 << 16;
        let mut at = Addr((start.0 + 7) & !7);
        let end = Addr(end.0 & !7);
        while at < end {
            let len = STEP.min(end.since(at));
            let Ok(bytes) = self.host.bytes(at, len as usize) else {
                // A hole: page by page.
                let next = Addr(((at.0 >> 12) + 1) << 12).min(end);
                if next < at.add(len)
                    && let Ok(b) = self.host.bytes(at, next.since(at) as usize)
                {
                    self.bytes(at, &b, holder, &path, state)?;
                }
                at = next;
                continue;
            };
            self.bytes(at, &bytes, holder, &path, state)?;
            at = at.add(len);
        }
        Ok(())
    }

    fn bytes(
        &mut self,
        at: Addr,
        bytes: &[u8],
        holder: &Holder,
        path: &impl Fn(Addr) -> String,
        state: &mut State<'_>,
    ) -> Result<(), Refusal> {
        for (i, w) in bytes.chunks_exact(8).enumerate() {
            let w = u64::from_le_bytes(w.try_into().unwrap_or_default());
            if w < 4096 || self.native.find(Addr(w)).is_none() {
                continue;
            }
            let place = at.add(8 * i as u64);
            if state.out.touched(place, 8) {
                continue;
            }
            if let Some(to) = self.word(w, holder, &path(place), state)? {
                state.out.write_u64(place, to);
                state.stats.redirected_words += 1;
            }
        }
        Ok(())
    }

    /// Follows the start-up objects that survive until none is new.
    pub fn follow(&mut self, state: &mut State<'_>) -> Result<(), Refusal> {
        while let Some((chunk, usable)) = self.todo.pop() {
            let from = self.survivors.get(&chunk.0).cloned().unwrap_or_default();
            let from = if from.len() > 200 { "...".to_owned() } else { from };
            self.range(
                chunk,
                chunk.add(usable),
                &Holder::Heap,
                |a| format!("{from}->+{:#x}", a.since(chunk)),
                state,
            )?;
        }
        state.stats.native_survivors = self.survivors.len();
        Ok(())
    }
}

fn unpaired(word: u64, path: &str, why: &str) -> Refusal {
    Refusal::new(
        "I4",
        format!("{path} holds {word:#x}, which {why}"),
        "the new version keeps state that the old one does not have here; name its owner in a rules file, or restart",
    )
    .at(path)
}

fn contradiction(path: &str, a: &Candidate, b: &Candidate) -> Refusal {
    Refusal::new(
        "I5",
        format!(
            "{path} points at a start-up object that the evidence pairs with two old objects: {} by {}, {} by {}",
            a.old, a.path, b.old, b.path
        ),
        "the two versions build this structure in another order; a rule must say which object is which",
    )
    .at(a.path.clone())
}
