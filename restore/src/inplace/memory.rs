//! The address space of the old process becomes the new version's: what is mapped in addition, what is
//! filled in before anybody sees it, what is written at the commit, and what goes afterwards.

use super::Stale;
use crate::boot::Fate;
use crate::link::{KernelCall, MemWrite, Span, WriteList};
use mcr_image::{Addr, Memory, MemoryError, proto};
use std::collections::BTreeSet;

const PAGE: u64 = 4096;
const PROT_WRITE: u32 = 2;
/// Equal bytes between two changed runs that are cheaper to write than to leave out.
const BRIDGE: usize = 16;
/// Below the stack pointer: the red zone, and what is cheap.
const BELOW: u64 = 512;

/// A mapping that the old process does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewMap {
    /// Where.
    pub span: Span,
    /// PROT_* in the end.
    pub prot: u32,
    /// A private mapping of a file, by the mapping of the host that has it, at this offset.
    pub file: Option<(Span, u64)>,
}

/// What becomes of the old process's memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryPlan {
    /// Mapped before the commit: nothing of the old process points there.
    pub maps: Vec<NewMap>,
    /// Contents of these, before the commit.
    pub fills: Vec<MemWrite>,
    /// Written at the commit, ascending and disjoint.
    pub writes: Vec<MemWrite>,
    /// Written to at the commit, but read-only: with PROT_* as it is and stays.
    pub locked: Vec<(Span, u32)>,
    /// Constants of the old program: to become anonymous memory, so that its file is let go.
    pub constants: Vec<Span>,
    /// The old program and its threads' stacks.
    pub gone: Vec<Span>,
}

/// The sides of the plan.
pub struct Sides<'a> {
    /// The old process's mappings now, and what becomes of each.
    pub old: &'a [(&'a proto::Vma, Fate)],
    /// Its memory.
    pub old_memory: &'a dyn Memory,
    /// Pages of it that are not just a file's.
    pub old_pages: &'a dyn Fn(Span) -> std::io::Result<Vec<Span>>,
    /// The host's mappings, cut to what the start-up made.
    pub native: &'a [proto::Vma],
    /// The host's memory, as booted.
    pub host_memory: &'a dyn Memory,
    /// Pages of it that are not just a file's.
    pub host_pages: &'a dyn Fn(Span) -> std::io::Result<Vec<Span>>,
    /// The main thread's new stack pointer: what is below is dead.
    pub stack_pointer: Addr,
    /// What link wants written over the booted host.
    pub list: &'a WriteList,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum MemoryPlanError {
    /// The old process is not what it was at the rehearsal.
    #[error(transparent)]
    Stale(#[from] Stale),
    /// The start-up made memory that it shares.
    #[error("the new version maps shared memory at {span:?} at its start-up; use --new-pid")]
    Shared {
        /// The mapping.
        span: Span,
    },
    /// Memory could not be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its pages could not be listed.
    #[error("listing the pages of {span:?}: {source}")]
    Pages {
        /// The range.
        span: Span,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Makes the plan. Nothing is touched.
pub fn plan(s: &Sides<'_>) -> Result<MemoryPlan, MemoryPlanError> {
    let mut p = MemoryPlan::default();
    for v in s.native {
        native(s, v, &mut p)?;
    }
    for c in &s.list.calls {
        if let KernelCall::Map { start, len } = c {
            let span = Span::new(*start, start.add(*len));
            if let Some((v, _)) = s.old.iter().find(|(v, _)| overlaps(v, span)) {
                return Err(Stale::Place { span, holder: describe(v) }.into());
            }
            p.maps.push(NewMap { span, prot: 3, file: None });
        }
    }
    // What link writes outside the start-up's own memory.
    let mut fresh: Vec<Span> = p.maps.iter().map(|m| m.span).collect();
    fresh.sort_unstable();
    for w in &s.list.memory {
        let span = Span::new(w.addr, w.addr.add(w.bytes.len() as u64));
        if overlapped(&fresh, |m| (m.start.0, m.end.0), Span::new(w.addr, w.addr.add(1))) {
            p.fills.push(w.clone());
        } else if !overlapped(s.native, |v| (v.start, v.end), span) {
            p.writes.push(w.clone());
        }
    }
    p.writes.sort_by_key(|w| w.addr);
    for (v, _) in s.old.iter().filter(|(v, _)| v.prot & PROT_WRITE == 0) {
        let whole = Span::new(Addr(v.start), Addr(v.end));
        let ends = |w: &MemWrite| (w.addr.0, w.addr.0 + w.bytes.len() as u64);
        if overlapped(&p.writes, ends, whole) {
            p.locked.push((whole, v.prot));
        }
    }
    for (v, fate) in s.old {
        let span = Span::new(Addr(v.start), Addr(v.end));
        match fate {
            Fate::Unmap => p.gone.push(span),
            Fate::CopyReadOnly => p.constants.push(span),
            Fate::Keep | Fate::Reserve | Fate::Stack | Fate::Kernel => {}
        }
    }
    Ok(p)
}

/// Whether one of `sorted`, which are disjoint and ascending, overlaps the range.
fn overlapped<T>(sorted: &[T], ends: impl Fn(&T) -> (u64, u64), s: Span) -> bool {
    let i = sorted.partition_point(|t| ends(t).1 <= s.start.0);
    sorted.get(i).is_some_and(|t| ends(t).0 < s.end.0)
}

fn overlaps(v: &proto::Vma, s: Span) -> bool {
    v.start < s.end.0 && s.start.0 < v.end
}

fn describe(v: &proto::Vma) -> String {
    if v.name.is_empty() { "anonymous memory".into() } else { v.name.clone() }
}

/// One mapping that the start-up made.
fn native(s: &Sides<'_>, v: &proto::Vma, p: &mut MemoryPlan) -> Result<(), MemoryPlanError> {
    let whole = Span::new(Addr(v.start), Addr(v.end));
    if matches!(v.kind(), proto::VmaKind::VmaAnonShared | proto::VmaKind::VmaFileShared) {
        return Err(MemoryPlanError::Shared { span: whole });
    }
    let mut at = whole.start;
    for (o, fate) in s.old.iter().filter(|(o, _)| overlaps(o, whole)) {
        let span = Span::new(at.max(Addr(o.start)), whole.end.min(Addr(o.end)));
        if at < span.start {
            fresh(s, v, Span::new(at, span.start), p)?;
        }
        same(s, v, o, *fate, span, p)?;
        at = span.end;
    }
    if at < whole.end {
        fresh(s, v, Span::new(at, whole.end), p)?;
    }
    Ok(())
}

fn pages(
    span: Span,
    list: &dyn Fn(Span) -> std::io::Result<Vec<Span>>,
) -> Result<Vec<Span>, MemoryPlanError> {
    list(span).map_err(|source| MemoryPlanError::Pages { span, source })
}

/// Where the old process has nothing.
fn fresh(s: &Sides<'_>, v: &proto::Vma, span: Span, p: &mut MemoryPlan) -> Result<(), MemoryPlanError> {
    // The main thread's stack grows by itself.
    if span.end <= s.stack_pointer && v.name == "[stack]" {
        return Ok(());
    }
    let file =
        (v.ino != 0).then(|| (Span::new(Addr(v.start), Addr(v.end)), v.file_offset + span.start.0 - v.start));
    p.maps.push(NewMap { span, prot: v.prot, file });
    for part in pages(span, s.host_pages)? {
        let bytes = s.host_memory.bytes(part.start, part.len() as usize)?;
        if file.is_some() || bytes.iter().any(|b| *b != 0) {
            p.fills.push(MemWrite { addr: part.start, bytes });
        }
    }
    Ok(())
}

/// Where the old process has the same: a library at its place, the main thread's stack.
fn same(
    s: &Sides<'_>,
    v: &proto::Vma,
    o: &proto::Vma,
    fate: Fate,
    span: Span,
    p: &mut MemoryPlan,
) -> Result<(), MemoryPlanError> {
    let place =
        |m: &proto::Vma| (m.dev, m.ino, if m.ino == 0 { 0 } else { m.file_offset + span.start.0 - m.start });
    if !matches!(fate, Fate::Reserve | Fate::Stack) || place(v) != place(o) {
        return Err(Stale::Place { span, holder: describe(o) }.into());
    }
    let live = if fate == Fate::Stack {
        let from = Addr(s.stack_pointer.0.saturating_sub(BELOW) & !(PAGE - 1));
        Span::new(span.start.max(from).min(span.end), span.end)
    } else {
        span
    };
    if live.is_empty() {
        return Ok(());
    }
    // Pages that one of the two has changed, or that link writes to.
    let mut changed: BTreeSet<u64> = BTreeSet::new();
    let both = [pages(live, s.host_pages)?, pages(live, s.old_pages)?].concat();
    let listed = s.list.memory.iter().map(|w| Span::new(w.addr, w.addr.add(w.bytes.len() as u64)));
    for r in both.into_iter().chain(listed) {
        let (from, to) = (r.start.max(live.start), r.end.min(live.end));
        if from < to {
            changed.extend((from.0 & !(PAGE - 1)..to.0).step_by(PAGE as usize));
        }
    }
    for page in changed {
        let at = Addr(page);
        let wanted = wanted(s, at)?;
        let now = s.old_memory.bytes(at, PAGE as usize)?;
        differences(at, &now, &wanted, &mut p.writes);
    }
    Ok(())
}

/// A page of the host with link's writes laid over it.
fn wanted(s: &Sides<'_>, at: Addr) -> Result<Vec<u8>, MemoryError> {
    let mut bytes = s.host_memory.bytes(at, PAGE as usize)?;
    let end = at.add(PAGE);
    let first = s.list.memory.partition_point(|w| w.addr.add(w.bytes.len() as u64) <= at);
    for w in s.list.memory[first..].iter().take_while(|w| w.addr < end) {
        let (from, to) = (w.addr.max(at), w.addr.add(w.bytes.len() as u64).min(end));
        bytes[from.since(at) as usize..to.since(at) as usize]
            .copy_from_slice(&w.bytes[from.since(w.addr) as usize..to.since(w.addr) as usize]);
    }
    Ok(bytes)
}

/// The runs in which `wanted` differs from `now`.
fn differences(at: Addr, now: &[u8], wanted: &[u8], out: &mut Vec<MemWrite>) {
    let mut run: Option<(usize, usize)> = None;
    let mut put = |(from, to): (usize, usize)| {
        out.push(MemWrite { addr: at.add(from as u64), bytes: wanted[from..to].to_vec() });
    };
    for i in 0..now.len().min(wanted.len()) {
        if now[i] == wanted[i] {
            continue;
        }
        run = match run {
            Some((from, to)) if i - to <= BRIDGE => Some((from, i + 1)),
            Some(r) => {
                put(r);
                Some((i, i + 1))
            }
            None => Some((i, i + 1)),
        };
    }
    if let Some(r) = run {
        put(r);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_runs() {
        let now = vec![0u8; 64];
        let mut wanted = now.clone();
        for i in [3, 4, 9, 40] {
            wanted[i] = 7;
        }
        let mut out = Vec::new();
        differences(Addr(0x1000), &now, &wanted, &mut out);
        let got: Vec<_> = out.iter().map(|w| (w.addr.0, w.bytes.len())).collect();
        assert_eq!(got, [(0x1003, 7), (0x1028, 1)]);
        let mut after = now;
        for w in &out {
            let from = (w.addr.0 - 0x1000) as usize;
            after[from..from + w.bytes.len()].copy_from_slice(&w.bytes);
        }
        assert_eq!(after, wanted);
    }

    struct Flat(u64, Vec<u8>);
    impl Memory for Flat {
        fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
            let from =
                addr.0.checked_sub(self.0).ok_or(MemoryError::Unmapped { addr, len: buf.len() })? as usize;
            let piece = self.1.get(from..from + buf.len());
            buf.copy_from_slice(piece.ok_or(MemoryError::Unmapped { addr, len: buf.len() })?);
            Ok(())
        }
        fn regions(&self) -> Vec<mcr_image::Region> {
            Vec::new()
        }
    }

    fn vma(start: u64, end: u64, prot: u32, ino: u64) -> proto::Vma {
        proto::Vma { start, end, prot, ino, dev: u64::from(ino != 0), ..Default::default() }
    }

    /// Host: a library page at 0x2000 (old has it, read-only), own memory at 0x4000..0x6000.
    fn check(old: &[(&proto::Vma, Fate)]) -> Result<MemoryPlan, MemoryPlanError> {
        let native = [vma(0x2000, 0x3000, 1, 5), vma(0x4000, 0x6000, 3, 0)];
        let mut host = vec![0u8; 0x6000];
        host[0x1000] = 9; // 0x2000
        host[0x3008] = 8; // 0x4008
        let host = Flat(0x1000, host);
        let old_memory = Flat(0x1000, vec![0; 0x2000]);
        let whole = |s: Span| Ok(vec![s]);
        let list = WriteList {
            memory: vec![
                MemWrite { addr: Addr(0x1010), bytes: vec![1] },
                MemWrite { addr: Addr(0x2004), bytes: vec![2] },
                MemWrite { addr: Addr(0x4010), bytes: vec![3] },
                MemWrite { addr: Addr(0x9000), bytes: vec![4] },
            ],
            calls: vec![KernelCall::Map { start: Addr(0x9000), len: 0x1000 }],
            ..WriteList::default()
        };
        plan(&Sides {
            old,
            old_memory: &old_memory,
            old_pages: &whole,
            native: &native,
            host_memory: &host,
            host_pages: &whole,
            stack_pointer: Addr(0),
            list: &list,
        })
    }

    #[test]
    fn every_kind_of_memory_has_its_place() {
        let (heap, lib, program, rodata) = (
            vma(0x1000, 0x2000, 3, 0),
            vma(0x2000, 0x3000, 1, 5),
            vma(0x7000, 0x8000, 5, 6),
            vma(0x8000, 0x9000, 1, 6),
        );
        let old = [
            (&heap, Fate::Keep),
            (&lib, Fate::Reserve),
            (&program, Fate::Unmap),
            (&rodata, Fate::CopyReadOnly),
        ];
        let p = check(&old).unwrap();
        let span = |a, b| Span::new(Addr(a), Addr(b));
        assert_eq!(
            p.maps.iter().map(|m| m.span).collect::<Vec<_>>(),
            [span(0x4000, 0x6000), span(0x9000, 0xa000)]
        );
        // The library's page: the start-up's byte and link's, as one run, behind a lock.
        assert_eq!(
            p.writes,
            [
                MemWrite { addr: Addr(0x1010), bytes: vec![1] },
                MemWrite { addr: Addr(0x2000), bytes: vec![9, 0, 0, 0, 2] }
            ]
        );
        assert_eq!(p.locked, [(span(0x2000, 0x3000), 1)]);
        // Link's word comes after the page that it is in.
        assert_eq!(p.fills.iter().map(|f| f.addr.0).collect::<Vec<_>>(), [0x4000, 0x4010, 0x9000]);
        assert_eq!((p.gone, p.constants), (vec![span(0x7000, 0x8000)], vec![span(0x8000, 0x9000)]));
    }

    #[test]
    fn a_place_that_was_taken_since_is_noticed() {
        let heap = vma(0x1000, 0x2000, 3, 0);
        let lib = vma(0x2000, 0x3000, 1, 5);
        let other = vma(0x5000, 0x7000, 3, 0);
        let taken = [(&heap, Fate::Keep), (&lib, Fate::Reserve), (&other, Fate::Keep)];
        assert!(matches!(check(&taken), Err(MemoryPlanError::Stale(Stale::Place { .. }))));
        let replaced = vma(0x2000, 0x3000, 1, 77);
        let foreign = [(&heap, Fate::Keep), (&replaced, Fate::Reserve)];
        assert!(matches!(check(&foreign), Err(MemoryPlanError::Stale(_))));
        let region = vma(0x9800, 0xa000, 3, 0);
        let moved = [(&heap, Fate::Keep), (&lib, Fate::Reserve), (&region, Fate::Keep)];
        assert!(check(&moved).is_err());
    }
}
