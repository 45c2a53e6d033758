//! Walks every list of the joined heap as it will be, before anything is written.

use super::malloc::{ArenaLayout, MAX_CHUNKS};
use mcr_image::{Addr, Memory};

const PREV_INUSE: u64 = 1;

fn word(mem: &dyn Memory, at: Addr, what: &str) -> Result<u64, String> {
    mem.u64(at).map_err(|e| format!("{what}: {e}"))
}

/// Checks bins, fast bins, tops and tcaches; returns the number of free chunks seen.
pub(super) fn check(
    mem: &dyn Memory,
    layout: ArenaLayout,
    arenas: &[Addr],
    tcaches: &[Addr],
) -> Result<usize, String> {
    let mut seen = 0;
    for &arena in arenas {
        for i in 0..127 {
            seen += bin(mem, layout.bin(arena, i), &format!("bin {i} of arena {arena}"))?;
        }
        if let Some(fast) = layout.fastbins(arena) {
            for i in 0..10 {
                let what = format!("fast bin {i} of arena {arena}");
                let first = word(mem, fast.add(8 * i), &what)?;
                seen += chain(mem, first, 0x10, &what, MAX_CHUNKS)?;
            }
        }
        top(mem, layout, arena)?;
    }
    for (i, &t) in tcaches.iter().enumerate() {
        if t.0 == 0 {
            continue;
        }
        if tcaches[..i].contains(&t) {
            return Err(format!("two threads share the tcache at {t}"));
        }
        seen += tcache(mem, t)?;
    }
    Ok(seen)
}

fn bin(mem: &dyn Memory, head: Addr, what: &str) -> Result<usize, String> {
    let (mut prev, mut seen) = (head, 0);
    loop {
        let p = Addr(word(mem, prev.add(0x10), what)?);
        if word(mem, p.add(0x18), what)? != prev.0 {
            return Err(format!("{what}: chunk {p} does not point back at {prev}"));
        }
        if p == head {
            return Ok(seen);
        }
        let own = word(mem, p.add(8), what)?;
        let size = own & !7;
        if size < 0x20 || size & 15 != 0 {
            return Err(format!("{what}: chunk {p} has size {size:#x}"));
        }
        if own & PREV_INUSE == 0 {
            return Err(format!("{what}: chunk {p} is free behind a free chunk"));
        }
        let next = p.add(size);
        if word(mem, next, what)? != size {
            return Err(format!("{what}: the chunk after {p} does not know its size {size:#x}"));
        }
        if word(mem, next.add(8), what)? & PREV_INUSE != 0 {
            return Err(format!("{what}: chunk {p} is in a bin and marked in use"));
        }
        seen += 1;
        if seen > MAX_CHUNKS {
            return Err(format!("{what} does not end"));
        }
        prev = p;
    }
}

fn top(mem: &dyn Memory, layout: ArenaLayout, arena: Addr) -> Result<(), String> {
    let top = Addr(word(mem, arena.add(layout.top()), "top")?);
    if top == layout.bin(arena, 0) {
        return Ok(());
    }
    let head = word(mem, top.add(8), "top")?;
    let size = head & !7;
    if head & PREV_INUSE == 0 {
        return Err(format!("the top {top} of arena {arena} lies behind a free chunk"));
    }
    if size < 0x20 || (top.0 + size) & 0xfff != 0 {
        return Err(format!("the top {top} of arena {arena} has size {size:#x} and ends off a page border"));
    }
    word(mem, top.add(size - 8), "end of top").map(|_| ())
}

/// A singly linked list of free memory; `head` is subtracted from an entry to get its chunk. Links are
/// mangled since 2.32 (`(&link >> 12) ^ pointer`).
fn chain(mem: &dyn Memory, first: u64, link: u64, what: &str, max: usize) -> Result<usize, String> {
    let (mut p, mut seen) = (first, 0);
    while p != 0 {
        if p & 15 != 0 {
            return Err(format!("{what}: entry {p:#x} is not aligned"));
        }
        seen += 1;
        if seen > max {
            return Err(format!("{what} has more than {max} entries"));
        }
        let at = p + link;
        let raw = word(mem, Addr(at), what)?;
        let clear = raw ^ (at >> 12);
        // An unmangled list ends in 0 and has aligned words; a mangled one never looks like that, save when
        // both readings are aligned: then the one that is readable is right.
        p = if clear == 0 {
            0
        } else if clear & 15 == 0 && mem.u64(Addr(clear)).is_ok() {
            clear
        } else if raw & 15 == 0 && (raw == 0 || mem.u64(Addr(raw)).is_ok()) {
            raw
        } else {
            return Err(format!("{what}: the link of {p:#x} is {raw:#x}, which is no address"));
        };
    }
    Ok(seen)
}

/// `tcache_perthread_struct` of 2.30–2.41: 64 counts of 16 bits, 64 entries.
fn tcache(mem: &dyn Memory, at: Addr) -> Result<usize, String> {
    let head = mem.u64(Addr(at.0.wrapping_sub(8))).map_err(|e| format!("tcache {at}: {e}"))? & !7;
    // The larger one: what is left of a free chunk is too little to split off.
    if !matches!(head, 0x290 | 0x2a0) {
        return Ok(0); // another version's structure: left to the heap walk
    }
    let mut seen = 0;
    for i in 0..64u64 {
        let b = mem.bytes(at.add(2 * i), 2).map_err(|e| format!("tcache {at}: {e}"))?;
        let count = usize::from(u16::from_le_bytes([b[0], b[1]]));
        let what = format!("tcache {at} bin {i}");
        let first = word(mem, at.add(128 + 8 * i), &what)?;
        let n = chain(mem, if count == 0 { 0 } else { first }, 0, &what, 65_536)?;
        if n != count {
            return Err(format!("{what} says {count} entries and has {n}"));
        }
        seen += n;
    }
    Ok(seen)
}
