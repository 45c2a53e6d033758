//! What lies where in the old address space.

use crate::heap::{GlibcHeap, SegmentKind};
use mcr_image::{Addr, Memory, ModuleMap, proto, tls_block};
use std::ops::Range;

const PROT_READ: u32 = 1;
const PROT_WRITE: u32 = 2;
const RSP: usize = 19; // struct user_regs_struct

/// What an address of the old process belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spot {
    /// The old program's own mappings.
    Program,
    /// A chunk of the heap (index in `GlibcHeap::chunks`).
    Chunk(usize),
    /// The heap, but no chunk: headers, an arena.
    HeapGap,
    /// A thread's stack (index in `Process.threads`).
    Stack(usize),
    /// The program's thread-local variables of a thread.
    Tls(usize, u64),
    /// A shared library or the vdso.
    Library,
    /// Other mapped memory that stays.
    Other,
    /// Nothing.
    Unmapped,
}

impl Spot {
    /// Index of the chunk, in the heap.
    pub fn chunk(self) -> Option<usize> {
        match self {
            Self::Chunk(i) => Some(i),
            _ => None,
        }
    }
}

/// The old address space, classified.
pub(crate) struct Space<'a> {
    pub heap: &'a GlibcHeap,
    pub program: Range<u64>,
    maps: Vec<(Range<u64>, Spot)>,
    /// The largest mapping that is nothing in particular: where most pointers lead.
    largest: Range<u64>,
    tls: Vec<(Range<u64>, usize)>,
    /// Memory that stays and is written to, without heap segments; for scanning.
    pub retained: Vec<Range<u64>>,
}

impl<'a> Space<'a> {
    pub fn new(
        process: &proto::Process,
        memory: &dyn Memory,
        modules: &ModuleMap,
        heap: &'a GlibcHeap,
    ) -> Self {
        let program = modules.exe().map_or(0..0, |m| page_down(m.start.0)..page_up(m.end.0));
        let mut maps = Vec::new();
        let mut retained: Vec<Range<u64>> = Vec::new();
        for v in &process.vmas {
            let range = v.start..v.end;
            let stack =
                process.threads.iter().position(|t| t.regs.get(RSP).is_some_and(|sp| range.contains(sp)));
            let module = modules
                .modules()
                .iter()
                .find(|m| page_down(m.start.0) <= v.start && v.start < page_up(m.end.0));
            let spot = match (stack, module) {
                _ if program.contains(&v.start) => Spot::Program,
                (Some(i), _) => Spot::Stack(i),
                (_, Some(_)) => Spot::Library,
                _ if v.name == "[stack]" => Spot::Stack(0),
                _ if matches!(
                    v.kind(),
                    proto::VmaKind::VmaVdso | proto::VmaKind::VmaVvar | proto::VmaKind::VmaVsyscall
                ) || v.name.starts_with("[v") =>
                {
                    Spot::Library
                }
                _ => Spot::Other,
            };
            let writable = v.prot & (PROT_READ | PROT_WRITE) == PROT_READ | PROT_WRITE;
            let libc = module.is_some_and(|m| m.is_interp() || m.name().starts_with("libc.so"));
            if writable && (spot == Spot::Other || (spot == Spot::Library && !libc)) {
                subtract(&range, heap, &mut retained);
            }
            maps.push((range, spot));
        }
        maps.sort_by_key(|m| m.0.start);
        let mut tls = Vec::new();
        if let Some(exe) = modules.exe()
            && let Some(segment) = exe.elf.tls()
        {
            for (i, t) in process.threads.iter().enumerate() {
                if let Some(block) = tls_block(memory, Addr(t.fs_base), exe) {
                    tls.push((block.0..block.0 + segment.mem_size, i));
                }
            }
        }
        let apart = |r: &Range<u64>| {
            tls.iter().all(|t: &(Range<u64>, usize)| t.0.end <= r.start || r.end <= t.0.start)
        };
        let plain = maps.iter().filter(|m| m.1 == Spot::Other && apart(&m.0));
        let largest = plain.map(|m| m.0.clone()).max_by_key(|r| r.end - r.start).unwrap_or(0..0);
        Self { heap, program, maps, largest, tls, retained }
    }

    /// What an address belongs to.
    pub fn spot(&self, addr: u64) -> Spot {
        let spot = self.outside(addr);
        if spot == Spot::Other {
            if let Some(i) = self.heap.used_at(Addr(addr)) {
                return Spot::Chunk(i);
            }
            if let Some(i) = self.heap.index(Addr(addr)) {
                return Spot::Chunk(i);
            }
            if self.heap.segment(Addr(addr)).is_some() {
                return Spot::HeapGap;
            }
        }
        spot
    }

    /// The chunk in use that starts at an address: what most pointers lead to, and quickly told. `None` says nothing.
    pub fn object(&self, addr: u64) -> Option<usize> {
        self.heap.used_at(Addr(addr)).filter(|_| self.outside(addr) == Spot::Other)
    }

    /// As [`Self::spot`] for all but the heap, which is `Other` here: cheaper.
    pub fn outside(&self, addr: u64) -> Spot {
        if self.largest.contains(&addr) {
            return Spot::Other;
        }
        let n = self.maps.partition_point(|m| m.0.start <= addr);
        let Some((range, spot)) = n.checked_sub(1).map(|i| &self.maps[i]) else { return Spot::Unmapped };
        if !range.contains(&addr) {
            return Spot::Unmapped;
        }
        if let Some((r, i)) = self.tls.iter().find(|t| t.0.contains(&addr)) {
            return Spot::Tls(*i, addr - r.start);
        }
        *spot
    }

    /// The end of the mapping that holds `addr`.
    pub fn mapping_end(&self, addr: u64) -> u64 {
        let n = self.maps.partition_point(|m| m.0.start <= addr);
        n.checked_sub(1).map_or(addr, |i| self.maps[i].0.end)
    }

    /// A range of `len` bytes that is free in the old process and out of the way: below everything that was
    /// mapped top-down, and far above the break.
    pub fn free_range(&self, len: u64) -> Option<u64> {
        const GAP: u64 = 1 << 30;
        let lowest = self.maps.iter().map(|m| m.0.start).filter(|&s| s >= 0x7000_0000_0000).min();
        let mut end = lowest.unwrap_or(0x7f00_0000_0000).checked_sub(GAP)?;
        loop {
            let start = page_down(end.checked_sub(page_up(len))?);
            match self.maps.iter().find(|m| m.0.start < end && start < m.0.end) {
                Some(m) => end = m.0.start.checked_sub(GAP)?,
                None => return Some(start),
            }
        }
    }
}

pub(crate) fn page_down(a: u64) -> u64 {
    a & !4095
}
pub(crate) fn page_up(a: u64) -> u64 {
    a.next_multiple_of(4096)
}

/// `range` without heap segments and without thread heaps.
fn subtract(range: &Range<u64>, heap: &GlibcHeap, out: &mut Vec<Range<u64>>) {
    let mut at = range.start;
    for s in heap.segments.iter().filter(|s| s.start.0 < range.end && range.start < s.end.0) {
        let end = if s.kind == SegmentKind::ThreadHeap { page_up(s.end.0) } else { s.end.0 };
        if at < s.start.0 {
            out.push(at..s.start.0);
        }
        at = at.max(end);
    }
    if at < range.end {
        out.push(at..range.end);
    }
}
