//! A start-up object of the new version is one object of old's, or none: every word of live native memory that led
//! to it leads to the same place. Equal pointers stay equal, whoever holds them.

use super::super::output::Refusal;
use super::super::overlay::Overlay;
use super::super::scan;
use super::super::state::register;
use super::{Final, relation};
use mcr_image::{Addr, Tid};
use mcr_transform::heap::GlibcHeap;
use std::collections::{BTreeMap, BTreeSet};

/// Callee-saved registers and those of the six arguments, by DWARF number.
const SAVED: [u16; 6] = [3, 6, 12, 13, 14, 15];
const ARGS: [u16; 6] = [5, 4, 1, 10, 8, 9];
/// Bytes read at a time.
const STEP: u64 = 1 << 16;

struct Twins<'n, 'a> {
    now: &'n Final<'a>,
    native: &'n GlibcHeap,
    /// By native object: what to add for the old one, and who says so.
    images: BTreeMap<u64, (u64, String)>,
    /// Words that lead to a native object still.
    kept: Vec<(u64, u64, String)>,
    words: usize,
}

/// `asked`: what comes from the patch; `set`: registers that hold old's locals.
pub(super) fn check(
    now: &Final<'_>,
    native: &GlibcHeap,
    asked: &Overlay<'_>,
    set: &BTreeSet<(Tid, u16)>,
) -> Result<usize, Refusal> {
    let mut twins = Twins { now, native, images: BTreeMap::new(), kept: Vec::new(), words: 0 };
    for t in &now.input.booted.threads {
        let (mut before, mut after) = (t.regs, now.regs(t));
        let args = ARGS.iter().take(scan::arguments(t.syscall));
        for &r in args.chain(&SAVED).filter(|r| !set.contains(&(t.tid, **r))) {
            if let (Some(h), Some(q)) = (register(&mut before, r), register(&mut after, r)) {
                twins.word(*h, *q, || format!("thread {}: register {r}", t.tid))?;
            }
        }
        for s in scan::live_parts(now.input, t) {
            twins.range(s, asked, &|a| format!("thread {}: word at {a}", t.tid))?;
        }
    }
    let booted = now.input.booted;
    if let Some(exe) = booted.modules.iter().find(|m| m.is_exe) {
        for s in scan::writable(booted, exe.start, exe.end) {
            twins.range(s, asked, &|a| format!("program data at {a}"))?;
        }
    }
    for (object, word, place) in std::mem::take(&mut twins.kept) {
        let Some((delta, by)) = twins.images.get(&object) else { continue };
        let to = word.wrapping_add(*delta);
        // An old object that is shorter has nothing there: a stale word.
        if now.is_old_object(to) {
            return Err(relation(
                format!(
                    "{place} still leads to the new version's start-up object at {object:#x}, which is old's at {:#x} by {by}",
                    object.wrapping_add(*delta)
                ),
                place,
            ));
        }
    }
    Ok(twins.words)
}

impl Twins<'_, '_> {
    fn range(
        &mut self,
        s: super::super::Span,
        asked: &Overlay<'_>,
        name: &dyn Fn(Addr) -> String,
    ) -> Result<(), Refusal> {
        let (mut at, end) = (Addr((s.start.0 + 7) & !7), Addr(s.end.0 & !7));
        while at < end {
            // To the end of the page where more cannot be read.
            let len = STEP.min(end.since(at)) as usize;
            let page = (4096 - at.0 % 4096).min(end.since(at)) as usize;
            let read = |len| self.now.input.host.bytes(at, len).ok().map(|b| (b, len));
            let Some((before, len)) = read(len).or_else(|| read(page)) else {
                at = at.add(page as u64);
                continue;
            };
            let after = self.now.view.bytes(at, len).unwrap_or_default();
            for (i, (h, q)) in before.chunks_exact(8).zip(after.chunks_exact(8)).enumerate() {
                let (h, q) = (word(h), word(q));
                if h < 4096 || self.native.segment(Addr(h)).is_none() {
                    continue;
                }
                let place = at.add(8 * i as u64);
                if !asked.touched(place, 8) {
                    self.word(h, q, || name(place))?;
                }
            }
            at = at.add(len as u64);
        }
        Ok(())
    }

    fn word(&mut self, host: u64, now: u64, place: impl FnOnce() -> String) -> Result<(), Refusal> {
        let Some(c) = self.native.find(Addr(host)).filter(|c| c.state.in_use()) else { return Ok(()) };
        self.words += 1;
        let object = c.addr.0;
        if host == now {
            self.kept.push((object, host, place()));
            return Ok(());
        }
        // One past the end is a valid pointer, too.
        if !self.now.is_old_object(now) && !self.now.is_old_object(now.wrapping_sub(1)) {
            let place = place();
            return Err(relation(
                format!(
                    "{place} led to the new version's start-up object at {object:#x}, and would lead to {now:#x}, \
                     which is no object of old's"
                ),
                place,
            ));
        }
        let delta = now.wrapping_sub(host);
        match self.images.get(&object) {
            None => {
                self.images.insert(object, (delta, place()));
                Ok(())
            }
            Some((d, _)) if *d == delta => Ok(()),
            Some((d, by)) => {
                let place = place();
                Err(relation(
                    format!(
                        "the new version's start-up object at {object:#x} would be old's at {:#x} by {place}, and at {:#x} by {by}",
                        object.wrapping_add(delta),
                        object.wrapping_add(*d)
                    ),
                    place,
                ))
            }
        }
    }
}

fn word(b: &[u8]) -> u64 {
    u64::from_le_bytes(b.try_into().unwrap_or_default())
}
