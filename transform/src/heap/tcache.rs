//! Per-thread caches (`tcache_perthread_struct`, glibc 2.31 to 2.41: 64 counters of 16 bits, 64 list heads).
//!
//! `tcache` and `thread_arena` are thread-local variables of libc without symbols. Their offset from the
//! thread pointer is the same in every thread, so one offset must fit all of them.

use super::lists::{Linking, index};
use super::{Arena, Chunk, ChunkState, HeapError};
use mcr_image::{Addr, Memory, Tid, proto};

const BINS: u64 = 64;
const SIZE: u64 = 2 * BINS + 8 * BINS;
/// How far below the thread pointer libc's own variables may lie.
const REACH: u64 = 64 << 10;

/// One thread's cache.
#[derive(Clone, Debug)]
pub struct Tcache {
    /// The thread.
    pub tid: Tid,
    /// Its `tcache_perthread_struct`; 0 when it has none (yet).
    pub addr: Addr,
    /// The arena that it allocates from; 0 when it never did.
    pub arena: Addr,
    /// Where `tcache` is, relative to the thread pointer.
    pub tcache_tls_offset: i64,
    /// Where `thread_arena` is, relative to the thread pointer.
    pub arena_tls_offset: i64,
    /// User addresses of the cached chunks.
    pub cached: Vec<Addr>,
}

/// Finds all caches and marks their chunks.
pub(super) fn find(
    mem: &dyn Memory,
    arenas: &[Arena],
    threads: &[proto::Thread],
    chunks: &mut [Chunk],
    linking: &mut Linking,
) -> Result<Vec<Tcache>, HeapError> {
    if !arenas.first().is_some_and(Arena::is_used) || threads.is_empty() {
        return Ok(Vec::new());
    }
    let blocks: Vec<(u64, Vec<u8>)> = threads.iter().map(|t| (t.fs_base, below(mem, t.fs_base))).collect();
    let longest = blocks.iter().map(|(_, b)| b.len()).min().unwrap_or(0) as u64;
    let value = |block: &[u8], off: u64| super::arena::word(block, block.len() - off as usize);

    let mut tcache_at = None;
    for off in (8..=longest).step_by(8) {
        let all = blocks.iter().all(|(_, b)| {
            let v = value(b, off);
            v == 0 || looks_like_tcache(chunks, v)
        });
        let some = blocks.iter().any(|(_, b)| value(b, off) != 0);
        if all && some && distinct(blocks.iter().map(|(_, b)| value(b, off))) {
            let mut lists = Vec::new();
            let mut trial = *linking;
            for (_, b) in &blocks {
                lists.push(entries(mem, chunks, &mut trial, value(b, off)));
            }
            if lists.iter().all(Option::is_some) {
                *linking = trial;
                tcache_at = Some((off, lists.into_iter().flatten().collect::<Vec<_>>()));
                break;
            }
        }
    }
    let (tcache_off, lists) = tcache_at.ok_or(HeapError::NoTcache { threads: threads.len() })?;

    // Nearest to `tcache` among the offsets that hold an arena (or nothing) in every thread.
    let is_arena = |v: u64| v == 0 || arenas.iter().any(|a| a.addr.0 == v);
    let arena_off = (8..=longest)
        .step_by(8)
        .filter(|&off| {
            blocks
                .iter()
                .all(|(_, b)| is_arena(value(b, off)) && (value(b, off) != 0 || value(b, tcache_off) == 0))
        })
        .min_by_key(|&off| off.abs_diff(tcache_off))
        .ok_or(HeapError::NoTcache { threads: threads.len() })?;

    let mut out = Vec::new();
    for ((thread, (_, block)), cached) in threads.iter().zip(&blocks).zip(lists) {
        let addr = value(block, tcache_off);
        if let Some(n) = index(chunks, addr) {
            chunks[n].state = ChunkState::Allocator;
        }
        for &user in &cached {
            let n = index(chunks, user).expect("checked");
            if std::mem::replace(&mut chunks[n].state, ChunkState::Tcache) != ChunkState::InUse {
                return Err(HeapError::List {
                    list: format!("cache of thread {}", thread.tid),
                    arena: Addr(addr),
                    entry: Addr(user),
                    why: "is in another free list, too".into(),
                });
            }
        }
        out.push(Tcache {
            tid: Tid(thread.tid as i32),
            addr: Addr(addr),
            arena: Addr(value(block, arena_off)),
            tcache_tls_offset: -(tcache_off as i64),
            arena_tls_offset: -(arena_off as i64),
            cached: cached.into_iter().map(Addr).collect(),
        });
    }
    Ok(out)
}

/// The bytes below a thread pointer, as far as they are readable (up to `REACH`).
fn below(mem: &dyn Memory, fs_base: u64) -> Vec<u8> {
    let mut len = (fs_base & 4095) + REACH;
    loop {
        if let Ok(b) = mem.bytes(Addr(fs_base - len), len as usize) {
            return b;
        }
        if len < 4096 {
            return Vec::new();
        }
        len -= 4096;
    }
}

fn distinct(values: impl Iterator<Item = u64>) -> bool {
    let mut seen = std::collections::HashSet::new();
    values.filter(|&v| v != 0).all(|v| seen.insert(v))
}

/// A chunk of its size, or 16 bytes more: what is less than a chunk is not split off (malloc.c, MINSIZE).
fn looks_like_tcache(chunks: &[Chunk], user: u64) -> bool {
    user.is_multiple_of(16)
        && index(chunks, user).is_some_and(|n| {
            let c = &chunks[n];
            c.state == ChunkState::InUse
                && c.arena != Chunk::MMAPPED
                && (SIZE..=SIZE + 24).contains(&c.usable)
        })
}

/// The chunks cached at `tcache`; `None` if that is not a cache.
fn entries(mem: &dyn Memory, chunks: &[Chunk], linking: &mut Linking, tcache: u64) -> Option<Vec<u64>> {
    if tcache == 0 {
        return Some(Vec::new());
    }
    let raw = mem.bytes(Addr(tcache), SIZE as usize).ok()?;
    let mut out = Vec::new();
    for i in 0..BINS {
        let count = u16::from_le_bytes([raw[2 * i as usize], raw[2 * i as usize + 1]]) as usize;
        let first = super::arena::word(&raw, (2 * BINS + 8 * i) as usize);
        if count == 0 && first == 0 {
            continue;
        }
        let size = 0x20 + 16 * i;
        let ok = |user: u64| {
            index(chunks, user).is_some_and(|n| {
                let c = &chunks[n];
                c.usable + 8 == size && c.state == ChunkState::InUse && c.arena != Chunk::MMAPPED
            })
        };
        let list = linking.follow(mem, first, 0, count, &ok)?;
        if list.len() != count {
            return None;
        }
        out.extend(list);
    }
    Some(out)
}
