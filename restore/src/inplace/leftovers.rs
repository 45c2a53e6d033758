//! What earlier updates left behind: constants of dead programs, heaps of dead start-ups. Dropped when nothing
//! in the process points there any more: then nothing can come to point there again.

use crate::boot::{BootOutcome, Fate};
use crate::link::Span;
use mcr_image::{Addr, Memory, MemoryError, proto};

/// Memory that the new version made for itself at its start-up and that a later version may have no use for.
#[must_use]
pub fn native(outcome: &BootOutcome) -> Vec<Span> {
    let b = &outcome.booted;
    b.native_vmas()
        .iter()
        .filter(|v| v.kind() == proto::VmaKind::VmaAnonPrivate && v.name.is_empty())
        .map(|v| Span::new(Addr(v.start), Addr(v.end)))
        .filter(|s| !b.modules.iter().any(|m| m.start < s.end && s.start < m.end))
        .filter(|s| !b.threads.iter().any(|t| t.stack.is_some_and(|k| k.start < s.end && s.start < k.end)))
        .collect()
}

/// Constants of the old program that become anonymous memory.
#[must_use]
pub fn constants(old: &proto::Process, fates: &[Fate]) -> Vec<Span> {
    let copied = old.vmas.iter().zip(fates).filter(|(_, f)| **f == Fate::CopyReadOnly);
    copied.map(|(v, _)| Span::new(Addr(v.start), Addr(v.end))).collect()
}

/// The parts of `spans` that are plain anonymous memory, by mapping.
#[must_use]
pub fn present(spans: &[Span], vmas: &[proto::Vma]) -> Vec<Span> {
    let mut out = Vec::new();
    for v in vmas.iter().filter(|v| v.kind() == proto::VmaKind::VmaAnonPrivate && v.name.is_empty()) {
        for s in spans {
            let part = Span::new(s.start.max(Addr(v.start)), s.end.min(Addr(v.end)));
            if !part.is_empty() && !out.contains(&part) {
                out.push(part);
            }
        }
    }
    out
}

/// HEAP_MAX_SIZE of glibc's malloc (malloc/arena.c): a thread's arena lies at the start of so many bytes, which are its
/// own however few of them it uses.
const ARENA: u64 = 64 << 20;

/// Neighbours in one such range together: none of them goes alone.
#[must_use]
pub fn whole(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_unstable();
    let mut out: Vec<Span> = Vec::new();
    for s in spans {
        match out.last_mut() {
            Some(l) if l.end >= s.start && s.start.0 / ARENA == l.start.0 / ARENA => l.end = l.end.max(s.end),
            _ => out.push(s),
        }
    }
    out
}

/// Those of `candidates` that no word of `pages` or `registers` points into, at any byte offset and whatever
/// its upper 16 bits; nor, in turn, a candidate that something points into. The words at the places `links` say
/// nothing.
pub fn unreferenced(
    candidates: &[Span],
    memory: &dyn Memory,
    pages: &[Span],
    registers: &[u64],
    links: &[Addr],
) -> Result<Vec<Span>, MemoryError> {
    let mut open = candidates.to_vec();
    open.sort_unstable();
    let mut todo: Vec<Span> = pages.iter().flat_map(|p| without(*p, &open)).collect();
    let hit = |word: u64, open: &[Span]| -> Option<usize> {
        let a = Addr(word & 0xffff_ffff_ffff);
        let i = open.partition_point(|s| s.end <= a);
        open.get(i).filter(|s| s.contains(a)).map(|_| i)
    };
    for r in registers {
        if let Some(i) = hit(*r, &open) {
            todo.push(open.remove(i));
        }
    }
    while let Some(span) = todo.pop() {
        let (Some(first), Some(last)) = (open.first(), open.last()) else { break };
        let (low, high) = (first.start.0, last.end.0);
        let bytes = memory.bytes(span.start, span.len() as usize)?;
        for (w, at) in bytes.windows(8).zip(span.start.0..) {
            let word = u64::from_le_bytes([w[0], w[1], w[2], w[3], w[4], w[5], 0, 0]);
            if word >= low
                && word < high
                && let Some(i) = hit(word, &open)
                && !links.contains(&Addr(at))
            {
                todo.push(open.remove(i));
                if open.is_empty() {
                    return Ok(open);
                }
            }
        }
    }
    Ok(open)
}

/// `span` without the parts that `holes` (ascending) cover, in pieces that overlap by a word.
fn without(span: Span, holes: &[Span]) -> Vec<Span> {
    const PIECE: u64 = 1 << 20;
    let mut out = Vec::new();
    let mut at = span.start;
    let mut push = |from: Addr, to: Addr| {
        let mut at = from;
        while at < to {
            let end = at.add(PIECE).min(to);
            out.push(Span::new(at, end.add(8).min(to)));
            at = end;
        }
    };
    for h in holes.iter().filter(|h| h.start < span.end && span.start < h.end) {
        if at < h.start {
            push(at, h.start);
        }
        at = at.max(h.end);
    }
    if at < span.end {
        push(at, span.end);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use mcr_image::Region;

    struct Flat(u64, Vec<u8>);
    impl Memory for Flat {
        fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
            let from = (addr.0 - self.0) as usize;
            buf.copy_from_slice(&self.1[from..from + buf.len()]);
            Ok(())
        }
        fn regions(&self) -> Vec<Region> {
            Vec::new()
        }
    }
    fn span(a: u64, b: u64) -> Span {
        Span::new(Addr(a), Addr(b))
    }

    #[test]
    fn what_a_word_points_into_stays() {
        // Live memory 0x1000..0x2000; candidates a page each from 0x2000 to 0x7000.
        let mut bytes = vec![0u8; 0x6000];
        let mut put =
            |at: u64, v: u64| bytes[(at - 0x1000) as usize..][..8].copy_from_slice(&v.to_le_bytes());
        put(0x1003, 0x2010); // not aligned
        put(0x1100, 0xabcd_0000_0000_3fff); // tagged above
        put(0x3ff0, 0x4000); // from a candidate that stays
        put(0x5000, 0x6000); // from one that goes
        let memory = Flat(0x1000, bytes);
        let candidates: Vec<Span> = (2..7).map(|i| span(i << 12, (i + 1) << 12)).collect();
        let gone = unreferenced(&candidates, &memory, &[span(0x1000, 0x7000)], &[], &[]).unwrap();
        assert_eq!(gone, [span(0x5000, 0x6000), span(0x6000, 0x7000)]);
        let gone = unreferenced(&candidates, &memory, &[span(0x1000, 0x7000)], &[0x5008], &[]).unwrap();
        assert!(gone.is_empty(), "a register counts, and what it leads to: {gone:?}");
        let links = [Addr(0x1003), Addr(0x3ff0)];
        let gone = unreferenced(&candidates, &memory, &[span(0x1000, 0x7000)], &[], &links).unwrap();
        assert_eq!(
            gone,
            [span(0x2000, 0x3000), span(0x4000, 0x5000), span(0x5000, 0x6000), span(0x6000, 0x7000)]
        );
    }

    #[test]
    fn an_arena_goes_as_a_whole() {
        let m = ARENA;
        let spans = vec![
            span(m + 0x21000, 2 * m),
            span(m, m + 0x21000),
            span(2 * m, 2 * m + 0x1000),
            span(0x1000, 0x2000),
        ];
        assert_eq!(whole(spans), [span(0x1000, 0x2000), span(m, 2 * m), span(2 * m, 2 * m + 0x1000)]);
    }

    #[test]
    fn only_what_is_still_anonymous_memory_is_looked_at() {
        let vma = |start, end, ino| proto::Vma {
            start,
            end,
            ino,
            kind: if ino == 0 { proto::VmaKind::VmaAnonPrivate } else { proto::VmaKind::VmaFilePrivate }
                .into(),
            ..Default::default()
        };
        let vmas = [vma(0x1000, 0x3000, 0), vma(0x3000, 0x4000, 9)];
        assert_eq!(present(&[span(0x2000, 0x3800), span(0x8000, 0x9000)], &vmas), [span(0x2000, 0x3000)]);
    }
}
