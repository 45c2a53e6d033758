//! `struct malloc_state` (glibc malloc/malloc.c, 2.31 to 2.41: the layout below did not change).
//!
//! `main_arena` is a static of libc and has no dynamic symbol. It is found by what it must contain: 127
//! circular list heads in a row, each either pointing at itself or at chunks that point back.

use super::HeapError;
use mcr_image::{Addr, Memory, proto};

const MUTEX: u64 = 0;
const FLAGS: u64 = 4;
pub(super) const FASTBINS: u64 = 0x10;
pub(super) const NFASTBINS: u64 = 10;
const TOP: u64 = 0x60;
/// `bins[]`; the list head of bin i starts 16 bytes earlier, as if it were a chunk.
const BINS: u64 = 0x70;
pub(super) const NBINS: u64 = 127;
const NEXT: u64 = 0x870;
const ATTACHED: u64 = 0x880;
const SYSTEM_MEM: u64 = 0x888;
/// `sizeof(struct malloc_state)`.
pub const ARENA_SIZE: u64 = 0x898;
/// `HEAP_MAX_SIZE`: thread arenas live in heaps that are aligned to it.
pub(super) const HEAP_ALIGN: u64 = 64 << 20;
const NONCONTIGUOUS: u32 = 2;
const PROT_RW: u32 = 3;

/// One arena of glibc's malloc.
#[derive(Clone, Debug)]
pub struct Arena {
    /// Address of its `struct malloc_state`.
    pub addr: Addr,
    /// The top chunk's header; 0 before the first allocation.
    pub top: Addr,
    /// `NONCONTIGUOUS`: memory may come from places other than brk.
    pub noncontiguous: bool,
    /// Bytes obtained from the system, as the arena counts them.
    pub system_mem: u64,
    /// Threads that use it.
    pub attached_threads: u64,
    /// The chunks at the head of each fastbin (0: empty).
    pub(super) fastbins: Vec<u64>,
    /// First chunk of each bin (forward link), by bin number from 1.
    pub(super) bins: Vec<(u64, u64)>,
}

impl Arena {
    /// Address of the list head of bin `i` (1..=127) seen as a chunk.
    pub(super) fn bin_head(&self, i: u64) -> u64 {
        self.addr.0 + BINS + (i - 1) * 16 - 16
    }

    /// Something was ever allocated from it: `top` points at a chunk and no longer at the list heads.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.top.0 != 0 && self.top.0 != self.bin_head(1)
    }

    /// The 64 MiB aligned heap around an address of a thread's arena.
    #[must_use]
    pub fn heap_of(addr: Addr) -> Addr {
        Addr(addr.0 & !(HEAP_ALIGN - 1))
    }

    fn read(mem: &dyn Memory, addr: Addr) -> Result<Self, HeapError> {
        let raw = mem.bytes(addr, ARENA_SIZE as usize)?;
        let w = |o: u64| word(&raw, o as usize);
        let lock = w(MUTEX) as u32;
        if lock != 0 {
            return Err(HeapError::InMalloc { arena: addr, value: lock });
        }
        let flags = (w(MUTEX) >> (8 * FLAGS)) as u32;
        Ok(Self {
            addr,
            top: Addr(w(TOP)),
            noncontiguous: flags & NONCONTIGUOUS != 0,
            system_mem: w(SYSTEM_MEM),
            attached_threads: w(ATTACHED),
            fastbins: (0..NFASTBINS).map(|i| w(FASTBINS + 8 * i)).collect(),
            bins: (0..NBINS).map(|i| (w(BINS + 16 * i), w(BINS + 16 * i + 8))).collect(),
        })
    }
}

pub(super) fn word(raw: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(raw[at..at + 8].try_into().expect("eight bytes"))
}

/// The ring of arenas, the main arena first; empty when malloc was never used. `known`: where the main arena
/// was found before; everything is searched only if it is not there.
pub(super) fn find_arenas(
    mem: &dyn Memory,
    vmas: &[proto::Vma],
    known: Option<Addr>,
) -> Result<Vec<Arena>, HeapError> {
    let still = |a: &Addr| {
        let inside = module_data(vmas).iter().any(|d| d.0 <= a.0 && a.0 + ARENA_SIZE <= d.1);
        inside && mem.bytes(*a, ARENA_SIZE as usize).is_ok_and(|raw| is_arena(mem, a.0, &raw))
    };
    let mut main: Option<Addr> = known.filter(still);
    let everywhere = if main.is_some() { Vec::new() } else { module_data(vmas) };
    for (start, end) in everywhere {
        let Ok(data) = mem.bytes(Addr(start), (end - start) as usize) else {
            continue;
        };
        for at in candidates(mem, start, &data) {
            match main {
                Some(first) if first != at => {
                    return Err(HeapError::TwoArenas { first, second: at });
                }
                _ => main = Some(at),
            }
        }
    }
    let Some(main) = main else {
        return match vmas.iter().find(|v| v.name == "[heap]") {
            Some(v) => Err(HeapError::NoArena { heap: Addr(v.start) }),
            None => Ok(Vec::new()),
        };
    };
    let mut out = Vec::new();
    let mut at = main;
    loop {
        out.push(Arena::read(mem, at)?);
        at = Addr(mem.u64(at.add(NEXT))?);
        if at == main {
            return Ok(out);
        }
        if out.len() > 4096 || out.iter().any(|a| a.addr == at) {
            return Err(HeapError::Arena { arena: at, why: "the ring of arenas does not close".into() });
        }
        let heap = Arena::heap_of(at);
        if mem.u64(heap).ok() != Some(at.0) {
            return Err(HeapError::Arena {
                arena: at,
                why: format!("the heap at {heap} does not name it as its owner"),
            });
        }
    }
}

/// Writable private file mappings and the anonymous memory right behind them (.bss).
fn module_data(vmas: &[proto::Vma]) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for v in vmas.iter().filter(|v| v.prot & PROT_RW == PROT_RW) {
        if v.kind() == proto::VmaKind::VmaFilePrivate {
            match out.last_mut() {
                Some(last) if last.1 == v.start => last.1 = v.end,
                _ => out.push((v.start, v.end)),
            }
        } else if v.kind() == proto::VmaKind::VmaAnonPrivate
            && !v.name.starts_with('[')
            && let Some(last) = out.last_mut()
            && last.1 == v.start
        {
            // A heap segment could lie right behind by chance: arenas are never that far in.
            last.1 = v.end.min(v.start + (1 << 20));
        }
    }
    out
}

/// Addresses in `data` (mapped at `start`) that hold an arena with a closed ring.
fn candidates(mem: &dyn Memory, start: u64, data: &[u8]) -> Vec<Addr> {
    let mut out = Vec::new();
    let mut at = 0;
    while at + ARENA_SIZE as usize <= data.len() {
        // `next` first: it is never 0, and rare enough to reject nearly everything at once.
        let next = word(data, at + NEXT as usize);
        if next != 0 && next.is_multiple_of(8) && is_arena(mem, start + at as u64, &data[at..]) {
            out.push(Addr(start + at as u64));
        }
        at += 8;
    }
    out
}

fn is_arena(mem: &dyn Memory, addr: u64, raw: &[u8]) -> bool {
    let mut linked = 0;
    for i in 0..NBINS {
        let head = addr + BINS + 16 * i - 16;
        let (fd, bk) = (word(raw, (BINS + 16 * i) as usize), word(raw, (BINS + 16 * i + 8) as usize));
        if fd == head && bk == head {
            continue;
        }
        if fd == 0 || bk == 0 || fd == head || bk == head {
            return false;
        }
        linked += 1;
        let back =
            mem.u64(Addr(fd).add(24)).ok() == Some(head) && mem.u64(Addr(bk).add(16)).ok() == Some(head);
        if !back {
            return false;
        }
    }
    // All bins linked is not how an arena looks; the ring decides the rest.
    linked < NBINS && ring_closes(mem, addr)
}

fn ring_closes(mem: &dyn Memory, main: u64) -> bool {
    let mut at = main;
    for _ in 0..4096 {
        match mem.u64(Addr(at).add(NEXT)) {
            Ok(next) if next == main => return true,
            Ok(next) if next != 0 && mem.u64(Arena::heap_of(Addr(next))).ok() == Some(next) => at = next,
            _ => return false,
        }
    }
    false
}
