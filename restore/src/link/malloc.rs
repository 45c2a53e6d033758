//! Two generations of glibc malloc become one: the old version's state wins.
//!
//! libc sits at the same base in both, so old's `main_arena` is laid over new's. Everything the new
//! version's start-up allocated stays where it is, as chunks in use: its free chunks are marked in use, its
//! top is closed with fenceposts, so that freeing one of its chunks later finds sane neighbours and hands it
//! to the old bins. Thread arenas of both sides share one ring, and every thread gets its predecessor's
//! tcache and arena. Each step is needed; see the tests, which leave out one at a time.

use super::input::{Booted, Span};
use super::malloc_check;
use super::output::Refusal;
use super::overlay::Overlay;
use mcr_image::{Addr, Memory, Tid, proto};

/// `NONCONTIGUOUS_BIT` of `malloc_state.flags`.
const NONCONTIGUOUS: u32 = 2;
const PREV_INUSE: u64 = 1;
/// More free chunks than this in one arena: a loop.
pub(super) const MAX_CHUNKS: usize = 50_000_000;

/// Where the fields of `struct malloc_state` lie. Only the place of the bins differs between the versions
/// known (0x70 up to 2.42, 0x18 without fast bins since 2.43); the rest follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArenaLayout {
    bins: u64,
}

impl ArenaLayout {
    /// Recognised by its 127 circular bins, of which at least the empty ones point at themselves.
    pub fn detect(mem: &dyn Memory, arena: Addr) -> Option<Self> {
        [0x70, 0x18].into_iter().map(|bins| Self { bins }).find(|l| {
            (0..127).all(|i| {
                let head = l.bin(arena, i);
                let (Ok(fd), Ok(bk)) = (mem.u64(head.add(0x10)), mem.u64(head.add(0x18))) else {
                    return false;
                };
                mem.u64(Addr(fd).add(0x18)).is_ok_and(|v| v == head.0)
                    && mem.u64(Addr(bk).add(0x10)).is_ok_and(|v| v == head.0)
            })
        })
    }
    /// The pseudo chunk that heads bin `i` (0: unsorted).
    pub fn bin(self, arena: Addr, i: u64) -> Addr {
        arena.add(self.bins + 16 * i - 0x10)
    }
    /// `fastbinsY`, where there are any.
    pub fn fastbins(self, arena: Addr) -> Option<Addr> {
        (self.bins == 0x70).then(|| arena.add(0x10))
    }
    /// `top`.
    pub fn top(self) -> u64 {
        self.bins - 0x10
    }
    /// `next`: the ring of arenas.
    pub fn next(self) -> u64 {
        self.bins + 0x800
    }
    /// `attached_threads`.
    pub fn attached(self) -> u64 {
        self.next() + 0x10
    }
    /// `system_mem`; `max_system_mem` follows it.
    pub fn system_mem(self) -> u64 {
        self.next() + 0x18
    }
    /// Bytes of the whole structure.
    pub fn size(self) -> usize {
        (self.next() + 0x28) as usize
    }
}

/// What `merge` needs beside the memories.
pub struct MallocInput<'a> {
    /// glibc's allocator as found in the old image.
    pub heap: &'a proto::HeapInfo,
    /// Memory of old that goes, with the arenas in it: no thread uses them, and nothing points into them.
    pub dropped: &'a [Span],
    /// The booted host.
    pub booted: &'a Booted,
    /// Old's memory, unpatched.
    pub old: &'a dyn Memory,
    /// The host's memory as booted.
    pub host: &'a dyn Memory,
    /// Writable data of libc (same place in both).
    pub libc_data: Vec<Span>,
    /// `__curbrk`, where libc exports it.
    pub curbrk: Option<Addr>,
    /// Bytes in `Patch.regions` that are laid out as chunks.
    pub region_bytes: u64,
    /// Where `tcache` and `thread_arena` lie from a new thread's pointer; another place than in old's
    /// threads if the programs' thread-locals differ in size.
    pub tls: TlsOffsets,
}

/// Offsets of libc's own thread-locals from a thread pointer, as two's complement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsOffsets {
    /// Of `tcache`.
    pub tcache: u64,
    /// Of `thread_arena`.
    pub arena: u64,
}

impl TlsOffsets {
    /// As recorded with a heap.
    #[must_use]
    pub fn of(heap: &proto::HeapInfo) -> Option<Self> {
        let t = heap.tcaches.first()?;
        Some(Self { tcache: t.tcache_tls_offset, arena: t.arena_tls_offset })
    }
}

/// What the merge did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeReport {
    /// Free start-up chunks that were marked in use.
    pub marked: usize,
    /// Arenas in the joined ring.
    pub arenas: usize,
    /// Threads that got a predecessor's tcache.
    pub threads: usize,
    /// `mp_` was found and adjusted.
    pub params: bool,
    /// Free chunks seen when the result was checked.
    pub checked_chunks: usize,
}

fn refuse(message: String) -> Refusal {
    Refusal::new(
        "malloc",
        message,
        "the two heaps cannot be joined safely; report this with the image (mcr dump --leave-running)",
    )
}

fn read(mem: &dyn Memory, addr: Addr, what: &str) -> Result<u64, Refusal> {
    mem.u64(addr).map_err(|e| refuse(format!("{what}: {e}")))
}

/// Lays the merge over `out`, then checks every list of the result.
pub fn merge(
    input: &MallocInput<'_>,
    out: &mut Overlay<'_>,
    findings: &mut Vec<proto::Finding>,
) -> Result<MergeReport, Refusal> {
    let (report, layout, ring) = merge_unchecked(input, out, findings)?;
    let tcaches = tcache_words(input, out)?;
    let checked_chunks = malloc_check::check(out, layout, &ring, &tcaches)
        .map_err(|m| refuse(format!("the joined heap is inconsistent: {m}")))?;
    Ok(MergeReport { checked_chunks, ..report })
}

/// The tcache of every thread, as it will be.
fn tcache_words(input: &MallocInput<'_>, view: &dyn Memory) -> Result<Vec<Addr>, Refusal> {
    let mut v = Vec::new();
    for t in &input.booted.threads {
        v.push(Addr(read(view, t.fs_base.add(input.tls.tcache), "a thread's tcache pointer")?));
    }
    Ok(v)
}

fn merge_unchecked(
    input: &MallocInput<'_>,
    out: &mut Overlay<'_>,
    findings: &mut Vec<proto::Finding>,
) -> Result<(MergeReport, ArenaLayout, Vec<Addr>), Refusal> {
    let arena = Addr(input.heap.main_arena);
    if arena.0 == 0 {
        return Err(refuse(format!(
            "no glibc main_arena in the image (allocator {:?})",
            input.heap.allocator
        )));
    }
    let layout = ArenaLayout::detect(input.old, arena)
        .ok_or_else(|| refuse(format!("main_arena at {arena} of the old process has no known layout")))?;
    if ArenaLayout::detect(input.host, arena) != Some(layout) {
        // `top` is set by the first malloc of a process.
        if input.host.u64(arena.add(layout.top())).is_ok_and(|top| top == 0) {
            return Err(Refusal::new(
                "malloc",
                "the new version allocates no memory before it comes to rest, so its malloc is not set up to take over \
                 old's heap",
                "let its start-up call malloc once",
            ));
        }
        return Err(refuse(format!("main_arena at {arena} of the new version is not where old's was")));
    }
    let mut report = MergeReport::default();
    close_boot_heap(input, layout, arena, out, &mut report)?;

    let mut old_ring = ring(input.old, layout, arena, "old")?;
    old_ring.retain(|a| !input.dropped.iter().any(|d| d.contains(*a)));
    let new_ring = ring(input.host, layout, arena, "new")?;
    let extra_on_main = threads(input, layout, &old_ring, out, findings, &mut report)?;

    // Old's arena over new's.
    let sum = |off: u64| -> Result<(u64, u64), Refusal> {
        Ok((
            read(input.old, arena.add(off), "old main_arena")?,
            read(input.host, arena.add(off), "new main_arena")?,
        ))
    };
    let (old_mem, new_mem) = sum(layout.system_mem())?;
    let (old_max, _) = sum(layout.system_mem() + 8)?;
    let (old_attached, _) = sum(layout.attached())?;
    let mut bytes =
        input.old.bytes(arena, layout.size()).map_err(|e| refuse(format!("old main_arena: {e}")))?;
    let mut put = |off: u64, v: &[u8]| bytes[off as usize..off as usize + v.len()].copy_from_slice(v);
    let lock = input.old.u32(arena).map_err(|e| refuse(format!("old main_arena: {e}")))?;
    if lock != 0 {
        findings.push(super::finding(
            proto::Severity::Warning,
            "malloc-locked",
            format!("main_arena's lock was held in the old process (value {lock}); it is released"),
            "",
        ));
    }
    put(0, &0u32.to_le_bytes());
    let flags = input.old.u32(arena.add(4)).map_err(|e| refuse(format!("old main_arena: {e}")))?;
    put(4, &(flags | NONCONTIGUOUS).to_le_bytes());
    let system = old_mem + new_mem + input.region_bytes;
    put(layout.system_mem(), &system.to_le_bytes());
    put(layout.system_mem() + 8, &old_max.max(system).to_le_bytes());
    put(layout.attached(), &(old_attached + extra_on_main).to_le_bytes());
    out.write(arena, &bytes);

    // One ring: main, old's thread arenas, new's thread arenas, back to main.
    let mut joined = old_ring.clone();
    joined.extend(new_ring.iter().skip(1));
    for (i, a) in joined.iter().enumerate() {
        let next = joined.get(i + 1).unwrap_or(&arena);
        if out.u64(a.add(layout.next())).ok() != Some(next.0) {
            out.write_u64(a.add(layout.next()), next.0);
        }
        if i > 0 && i < old_ring.len() && out.u32(*a).is_ok_and(|m| m != 0) {
            out.write(*a, &0u32.to_le_bytes());
        }
    }
    report.arenas = joined.len();
    report.params = params(input, out, findings);

    if let Some(at) = input.curbrk
        && let Ok(v) = input.host.u64(at)
        && v != 0
        && v != input.booted.brk.0
    {
        out.write_u64(at, input.booted.brk.0);
    }
    Ok((report, layout, joined))
}

/// New's start-up heap in the main arena: its free chunks become chunks in use, its top gets fenceposts.
fn close_boot_heap(
    input: &MallocInput<'_>,
    layout: ArenaLayout,
    arena: Addr,
    out: &mut Overlay<'_>,
    report: &mut MergeReport,
) -> Result<(), Refusal> {
    let host = input.host;
    for i in 0..127 {
        let head = layout.bin(arena, i);
        let mut p = Addr(read(host, head.add(0x10), "a bin of the new version")?);
        let mut seen = 0;
        while p != head {
            if input.booted.is_retained(p) {
                return Err(refuse(format!("bin {i} of the new version holds {p}, which is old's memory")));
            }
            let size = read(host, p.add(8), "a free chunk of the new version")? & !7;
            let next = p.add(size);
            let word = read(out, next.add(8), "the chunk after a free one")?;
            out.write_u64(next.add(8), word | PREV_INUSE);
            report.marked += 1;
            seen += 1;
            if seen > MAX_CHUNKS {
                return Err(refuse(format!("bin {i} of the new version does not end")));
            }
            p = Addr(read(host, p.add(0x10), "a free chunk of the new version")?);
        }
    }
    let top = Addr(read(host, arena.add(layout.top()), "top of the new version")?);
    if top == layout.bin(arena, 0) {
        return Ok(()); // never allocated
    }
    if input.booted.is_retained(top) {
        return Err(refuse(format!("the new version's top chunk {top} is old's memory")));
    }
    let head = read(host, top.add(8), "the new version's top chunk")?;
    let size = head & !7;
    if size < 0x20 {
        return Err(refuse(format!("the new version's top chunk {top} has {size} bytes, too few to close")));
    }
    // As sysmalloc() does when a top is replaced: two fencepost chunks of header size, both in use.
    let rest = (size - 0x20) & !15;
    out.write_u64(top.add(8), rest | PREV_INUSE);
    out.write_u64(top.add(rest + 8), 0x10 | PREV_INUSE);
    out.write_u64(top.add(rest + 0x10 + 8), 0x10 | PREV_INUSE);
    Ok(())
}

/// The ring of arenas, main first.
fn ring(mem: &dyn Memory, layout: ArenaLayout, main: Addr, whose: &str) -> Result<Vec<Addr>, Refusal> {
    let mut v = vec![main];
    loop {
        let next = Addr(read(mem, v[v.len() - 1].add(layout.next()), "an arena's ring pointer")?);
        if next == main {
            return Ok(v);
        }
        if next.0 == 0 || v.contains(&next) || v.len() > 4096 {
            return Err(refuse(format!("the ring of arenas of the {whose} version is broken at {next}")));
        }
        v.push(next);
    }
}

/// Hands tcache and arena of each old thread to its successor. Returns how many threads that only new has
/// use the main arena.
fn threads(
    input: &MallocInput<'_>,
    layout: ArenaLayout,
    old_ring: &[Addr],
    out: &mut Overlay<'_>,
    findings: &mut Vec<proto::Finding>,
    report: &mut MergeReport,
) -> Result<u64, Refusal> {
    let TlsOffsets { tcache: cache_off, arena: arena_off } = input.tls;
    let mut extra = 0;
    for t in &input.booted.threads {
        let old = t.old_tid.and_then(|o| input.heap.tcaches.iter().find(|c| c.old_tid == o.0 as u32));
        match old {
            Some(c) => {
                if c.thread_arena != 0 && !old_ring.contains(&Addr(c.thread_arena)) {
                    return Err(refuse(format!(
                        "thread {} of the old process used an arena at {:#x} that is not in the ring",
                        c.old_tid, c.thread_arena
                    )));
                }
                if cache_off != 0 {
                    out.write_u64(t.fs_base.add(cache_off), c.tcache);
                }
                if arena_off != 0 {
                    out.write_u64(t.fs_base.add(arena_off), c.thread_arena);
                }
                report.threads += 1;
            }
            None if t.old_tid.is_some() => {
                return Err(refuse(format!(
                    "no tcache record of old thread {}",
                    t.old_tid.unwrap_or(Tid(0))
                )));
            }
            None => {
                let a = read(input.host, t.fs_base.add(arena_off), "a thread's arena pointer")?;
                extra += u64::from(a == input.heap.main_arena);
            }
        }
    }
    // Threads that have no successor: their cached chunks would be lost and their arena counted as used.
    for c in &input.heap.tcaches {
        if input.booted.thread_for(Tid(c.old_tid as i32)).is_none() && c.tcache != 0 {
            findings.push(super::finding(
                proto::Severity::Warning,
                "malloc-tcache-lost",
                format!("old thread {} has no successor: the chunks in its tcache stay allocated", c.old_tid),
                "",
            ));
        }
    }
    let _ = layout;
    Ok(extra)
}

/// `mp_` (`struct malloc_par`): counters summed, limits the larger ones. Found by its tcache parameters
/// (bins, largest size, entries a bin, unsorted limit) behind `n_mmaps_max`; left alone when not certain.
fn params(input: &MallocInput<'_>, out: &mut Overlay<'_>, findings: &mut Vec<proto::Finding>) -> bool {
    let mut found = Vec::new();
    for span in &input.libc_data {
        let Ok(b) = input.host.bytes(span.start, span.len() as usize) else {
            continue;
        };
        let word = |i: usize| b.get(i..i + 8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default()));
        let half = |i: usize| b.get(i..i + 4).map(|w| u32::from_le_bytes(w.try_into().unwrap_or_default()));
        for i in (0x70..b.len().saturating_sub(0x20)).step_by(8) {
            if (word(i), word(i + 8), word(i + 16)) != (Some(64), Some(1032), Some(7)) {
                continue;
            }
            // 2.26–2.34: n_mmaps, n_mmaps_max, max_n_mmaps, no_dyn_threshold; since 2.35 hp_flags precedes.
            if half(i - 36) == Some(65536) && word(i - 56) == Some(8) {
                found.push((span.start.add(i as u64), 40u64, 80u64));
            } else if half(i - 40) == Some(65536) && word(i - 80) == Some(8) {
                found.push((span.start.add(i as u64), 44, 104));
            }
        }
    }
    let [(tcache, n_mmaps, start)] = found[..] else {
        findings.push(super::finding(
            proto::Severity::Info,
            "malloc-params",
            format!(
                "malloc's parameters were not found ({} places fit): its counters start afresh",
                found.len()
            ),
            "",
        ));
        return false;
    };
    let at = |back: u64| Addr(tcache.0 - back);
    let (old, host) = (input.old, input.host);
    let both64 = |a: Addr| (old.u64(a).unwrap_or(0), host.u64(a).unwrap_or(0));
    let both32 = |a: Addr| (old.u32(a).unwrap_or(0), host.u32(a).unwrap_or(0));
    let add32 = |a: Addr, out: &mut Overlay<'_>| {
        let (o, n) = both32(a);
        out.write(a, &(o + n).to_le_bytes());
    };
    add32(at(n_mmaps), out);
    add32(at(n_mmaps - 8), out); // max_n_mmaps
    for back in [24, 16] {
        let (o, n) = both64(at(back)); // mmapped_mem, max_mmapped_mem
        out.write_u64(at(back), o + n);
    }
    out.write_u64(at(8), both64(at(8)).0); // sbrk_base
    let (o, n) = both64(at(start)); // trim_threshold
    out.write_u64(at(start), o.max(n));
    let (o, n) = both64(at(start - 16)); // mmap_threshold
    out.write_u64(at(start - 16), o.max(n));
    true
}
