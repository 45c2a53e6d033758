//! Free lists, checked against the chunks that the walk found.

use super::walk::FreeChunk;
use super::{Arena, Chunk, ChunkState, HeapError, arena};
use mcr_image::{Addr, Memory};

/// How `fd` of fastbin and thread cache entries is stored: plain before glibc 2.32, then xored with its own
/// place ("safe-linking", malloc.c PROTECT_PTR).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Linking {
    pub known: Option<bool>,
}

impl Linking {
    /// Follows a singly linked list of at most `max` entries whose first is `first` (user or header
    /// addresses, `link` bytes before the next pointer). `ok` says whether an address can be an entry.
    pub fn follow(
        &mut self,
        mem: &dyn Memory,
        first: u64,
        link: u64,
        max: usize,
        ok: &dyn Fn(u64) -> bool,
    ) -> Option<Vec<u64>> {
        let modes: &[bool] = match self.known {
            Some(true) => &[true],
            Some(false) => &[false],
            None => &[true, false],
        };
        for &safe in modes {
            if let Some(list) = follow_one(mem, first, link, max, safe, ok) {
                if !list.is_empty() {
                    self.known = Some(safe);
                }
                return Some(list);
            }
        }
        None
    }
}

fn follow_one(
    mem: &dyn Memory,
    first: u64,
    link: u64,
    max: usize,
    safe: bool,
    ok: &dyn Fn(u64) -> bool,
) -> Option<Vec<u64>> {
    let mut out = Vec::new();
    let mut at = first;
    while at != 0 {
        if out.len() >= max || !ok(at) {
            return None;
        }
        out.push(at);
        let place = at + link;
        let raw = mem.u64(Addr(place)).ok()?;
        at = if safe { raw ^ (place >> 12) } else { raw };
    }
    Some(out)
}

/// Index of the chunk whose user address is `user`.
pub(super) fn index(chunks: &[Chunk], user: u64) -> Option<usize> {
    chunks.binary_search_by_key(&user, |c| c.addr.0).ok()
}

/// Marks the chunks in the fastbins of arena `a`.
pub(super) fn fastbins(
    mem: &dyn Memory,
    a: &Arena,
    arena_index: u16,
    chunks: &mut [Chunk],
    linking: &mut Linking,
) -> Result<(), HeapError> {
    for (i, &first) in a.fastbins.iter().enumerate() {
        let size = 0x20 + 16 * i as u64;
        let ok = |header: u64| {
            index(chunks, header + 16).is_some_and(|n| {
                let c = &chunks[n];
                c.usable + 8 == size && c.arena == arena_index && c.state == ChunkState::InUse
            })
        };
        let list = linking.follow(mem, first, 16, chunks.len(), &ok).ok_or_else(|| HeapError::List {
            list: format!("fastbin {i}"),
            arena: a.addr,
            entry: Addr(first),
            why: format!("the list does not lead through chunks of {size:#x} bytes"),
        })?;
        for header in list {
            let n = index(chunks, header + 16).expect("checked");
            chunks[n].state = ChunkState::Fastbin;
        }
    }
    Ok(())
}

/// Every chunk that its neighbour says is free must be in exactly one bin, and the other way round.
pub(super) fn bins(a: &Arena, free: &mut [FreeChunk]) -> Result<(), HeapError> {
    free.sort_unstable_by_key(|f| f.header);
    let mut seen = vec![false; free.len()];
    for i in 1..=arena::NBINS {
        let head = a.bin_head(i);
        let bad = |entry: u64, why: String| HeapError::List {
            list: format!("bin {i}"),
            arena: a.addr,
            entry: Addr(entry),
            why,
        };
        let (first, last) = a.bins[(i - 1) as usize];
        let (mut at, mut before) = (first, head);
        while at != head {
            let Ok(n) = free.binary_search_by_key(&at, |f| f.header) else {
                return Err(bad(at, "is not a free chunk".into()));
            };
            if std::mem::replace(&mut seen[n], true) {
                return Err(bad(at, "is in a list twice".into()));
            }
            if free[n].bk != before {
                return Err(bad(at, format!("its back link is {:#x}, not {before:#x}", free[n].bk)));
            }
            // Small bins hold one size each.
            if (2..64).contains(&i) && free[n].size != 16 * i {
                return Err(bad(at, format!("{:#x} bytes in the bin for {:#x}", free[n].size, 16 * i)));
            }
            before = at;
            at = free[n].fd;
        }
        if last != before {
            return Err(bad(last, format!("the list ends at {before:#x}")));
        }
    }
    match seen.iter().position(|s| !s) {
        None => Ok(()),
        Some(n) => Err(HeapError::List {
            list: "the bins".into(),
            arena: a.addr,
            entry: Addr(free[n].header),
            why: "a free chunk that is in no bin".into(),
        }),
    }
}
