//! The rehearsal: everything that can go wrong goes wrong on a copy, while the old version serves.

use super::clock::Clock;
use super::make::{Files, Guard, Old, at_rest, check_all, join, start};
use super::programs::{Programs, plan};
use super::{History, UpdateError, UpdateOptions};
use crate::boot::{BootOutcome, Fate, Host, fates};
use crate::inplace::{leftovers, refreshed};
use crate::link::malloc::ArenaLayout;
use crate::link::{Span, WriteList};
use mcr_criu_lite::{FreezeOptions, Frozen, ProcessMemory};
use mcr_image::{Addr, Blocks, ElfFile, Memory, MemoryError, ModuleMap, Pid, ReadBlocks, Region, proto};
use mcr_transform::Prepared;
use mcr_transform::heap::GlibcHeap;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A booted copy of the old process, and what was found with it.
pub(super) struct Rehearsal {
    /// Kills the copy when it is dropped.
    pub(super) guard: Guard,
    /// The boot.
    pub(super) outcome: BootOutcome,
    /// The plan on the copy.
    pub(super) patch: proto::Patch,
    /// What link wanted on the copy.
    pub(super) list: WriteList,
    /// The old process at that time.
    pub(super) process: proto::Process,
    /// What was done to it before.
    pub(super) history: History,
    /// Memory that earlier updates left and that nothing points into.
    pub(super) unreferenced: Unreferenced,
    /// What was read of the old process's memory as it was copied.
    pub(super) read: ReadBlocks,
}

/// The old process's memory as it was when the copy was made: the boot takes some of it out of the copy, so
/// that is kept here.
struct AsCopied {
    taken_out: BTreeMap<u64, Vec<u8>>,
    copy: ProcessMemory,
}

impl AsCopied {
    /// Reads what the boot will take out.
    fn new(process: &proto::Process, fates: &[Fate], copy: Pid) -> Result<Self, UpdateError> {
        let open = || ProcessMemory::open(copy).map_err(|source| UpdateError::Memory { pid: copy, source });
        let memory = open()?;
        let mut taken_out = BTreeMap::new();
        for (v, fate) in process.vmas.iter().zip(fates) {
            if matches!(fate, Fate::Keep | Fate::CopyReadOnly | Fate::Kernel) || v.prot & 1 == 0 {
                continue;
            }
            // Of a stack what is in use.
            let sp = process
                .threads
                .iter()
                .filter_map(|t| t.regs.get(19))
                .find(|sp| v.start <= **sp && **sp < v.end)
                .map_or(v.start, |sp| sp.saturating_sub(4096).max(v.start));
            let bytes = memory.bytes(Addr(sp), (v.end - sp) as usize);
            taken_out.insert(sp, bytes.map_err(|e| UpdateError::Copy { pid: copy, source: e })?);
        }
        Ok(Self { taken_out, copy: open()? })
    }
}

impl Memory for AsCopied {
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let end = addr.0.saturating_add(buf.len() as u64);
        let mut at = addr.0;
        while at < end {
            let piece = |to: u64| (at - addr.0) as usize..(to.min(end) - addr.0) as usize;
            let inside = self.taken_out.range(..=at).next_back().filter(|(s, b)| at < *s + b.len() as u64);
            if let Some((start, bytes)) = inside {
                let range = piece(start + bytes.len() as u64);
                let from = (at - start) as usize;
                buf[range.clone()].copy_from_slice(&bytes[from..from + range.len()]);
                at += range.len() as u64;
            } else {
                let next = self.taken_out.range(at..).next().map_or(u64::MAX, |(s, _)| *s);
                let range = piece(next);
                self.copy.read(Addr(at), &mut buf[range.clone()])?;
                at += range.len() as u64;
            }
        }
        Ok(())
    }
    fn regions(&self) -> Vec<Region> {
        self.copy.regions()
    }
}

/// Copies the old process, lets it serve on, and makes the new version of the copy.
pub(super) fn rehearse(
    pid: Pid,
    program: &ElfFile,
    (programs, prepared): (&Programs, &Prepared<'_>),
    options: &UpdateOptions,
    clock: &mut Clock,
) -> Result<Rehearsal, UpdateError> {
    await_dying_copies(pid);
    let mut frozen = Frozen::seize(pid, &FreezeOptions::default())?;
    clock.lap_until("look", false, frozen.since());
    mcr_criu_lite::tracee::commit::sweep(&mut frozen)?;
    reap_dead_copies(&mut frozen)?;
    let mut collected = at_rest(&mut frozen, program, options, &[], clock)?;
    super::hand::refuse_unforkable(&collected.process)?;
    clock.lap("collect", true);
    // Whoever holds on to an open file of a running server keeps its epoll registration alive beyond the
    // server's close: neither the copy nor we may.
    collected.fds.clear();
    let mut tracee = frozen.fork_hidden()?;
    let closed = tracee.syscall(libc::SYS_close_range, &[3, u64::from(u32::MAX), 0]);
    let child = tracee.pid();
    tracee.leak();
    let mut guard = Guard { host: None, hidden: Some((pid, child)) };
    let host = closed.map_err(UpdateError::from).and_then(|_| Ok(Host::attach(child)?));
    let modules: Arc<ModuleMap> = Arc::clone(&collected.modules);
    let process = collected.process;
    frozen.thaw()?;
    // Only a process that runs can collect a copy that has died.
    guard.host = Some(host?);
    clock.lap("fork", true);

    let host = guard.host()?;
    let fates = fates(&process.vmas, &process, &modules, host.memory());
    let memory = AsCopied::new(&process, &fates, child)?;
    let memory = Blocks::new(&memory);
    let history = History::load(pid);
    options.tell("planning");
    let (patch, heap) = plan(prepared, &process, &memory, &modules)?;
    let unreferenced = Unreferenced::find(&history, &process, &memory, &heap, child)?;
    clock.lap("plan", false);
    let none = Files::new();
    let old = Old {
        process: &process,
        modules: &modules,
        memory: &memory,
        patch: &patch,
        files: &none,
        dropped: &unreferenced.spans,
    };
    options.tell("starting the new version on a copy");
    let (outcome, heap) = start(host, &old, programs, options, Some(pid))?;
    clock.parts(&outcome.phases, false);
    let booted = refreshed(&outcome, &process, &fates);
    options.tell("joining it with the old state");
    host.memory().refresh();
    let view = Blocks::new(host.memory());
    let mut list = join(&view, &booted, &outcome.modules, &old, heap.as_ref(), programs)?;
    clock.lap("link", false);
    let both = (programs, prepared);
    check_all(&view, (&booted, &outcome.modules), &old, heap.as_ref(), both, &mut list, options)?;
    clock.lap("relations", false);
    drop(view);
    let read = memory.into_read();
    Ok(Rehearsal { guard, outcome, patch, list, process, history, unreferenced, read })
}

/// Copies of engines that were killed are collected in the old process, which knows nothing of them.
fn reap_dead_copies(frozen: &mut Frozen) -> Result<(), UpdateError> {
    for child in copies(frozen.pid()).filter(|c| c.dead) {
        let flags = (libc::__WALL | libc::WNOHANG) as u64;
        frozen.leader().syscall(libc::SYS_wait4, &[child.pid.0 as u64, 0, flags, 0])?;
    }
    Ok(())
}

/// The copy dies with its engine, and needs a moment for it.
fn await_dying_copies(pid: Pid) {
    for child in copies(pid).filter(|c| c.dying) {
        // One that lives on is refused later on.
        let _ = mcr_criu_lite::await_end(child.pid, Duration::from_secs(2));
    }
}

/// A child that was forked without a signal at its end, as servers do not and we do.
struct Copy {
    pid: Pid,
    dead: bool,
    dying: bool,
}

fn copies(pid: Pid) -> impl Iterator<Item = Copy> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let pids: Vec<i32> = children.split_whitespace().filter_map(|c| c.parse().ok()).collect();
    pids.into_iter().filter_map(|child| {
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).ok()?;
        // proc_pid_stat(5): 3 is the state, 9 the flags, 38 the signal.
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split_whitespace().collect();
        let field = |n: usize| fields.get(n - 3).copied().unwrap_or_default();
        if field(38) != "0" {
            return None;
        }
        let zombie = field(3) == "Z";
        let status = std::fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
        let pending = |name: &str| {
            let set = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix(name)?.trim(), 16).ok());
            set.is_some_and(|s| s & (1 << (libc::SIGKILL - 1)) != 0)
        };
        let exiting = field(9).parse::<u64>().is_ok_and(|f| f & 4 != 0);
        let dying = !zombie && (exiting || pending("SigPnd:") || pending("ShdPnd:"));
        Some(Copy { pid: Pid(child), dead: zombie, dying })
    })
}

/// Memory that earlier updates left and that nothing in all of the process points into.
#[derive(Default)]
pub(super) struct Unreferenced {
    pub(super) spans: Vec<Span>,
    /// The arenas of malloc in it, as they were: their `struct malloc_state`.
    arenas: Vec<(Addr, Vec<u8>)>,
}

impl Unreferenced {
    fn find(
        history: &History,
        process: &proto::Process,
        memory: &dyn Memory,
        heap: &GlibcHeap,
        copy: Pid,
    ) -> Result<Self, UpdateError> {
        let candidates = leftovers::whole(leftovers::present(&history.leftovers(), &process.vmas));
        if candidates.is_empty() {
            return Ok(Self::default());
        }
        let mut pages = Vec::new();
        for v in process.vmas.iter().filter(|v| v.prot & 1 != 0 && !v.name.starts_with("[v")) {
            let shared = matches!(v.kind(), proto::VmaKind::VmaAnonShared | proto::VmaKind::VmaFileShared);
            if shared {
                pages.push(Span::new(Addr(v.start), Addr(v.end)));
                continue;
            }
            let own = mcr_criu_lite::own_pages(copy, Addr(v.start), Addr(v.end))
                .map_err(|source| UpdateError::Memory { pid: copy, source })?;
            pages.extend(own.into_iter().map(|(a, b)| Span::new(a, b)));
        }
        let registers: Vec<u64> = process.threads.iter().flat_map(|t| t.regs.iter().copied()).collect();
        let failed = |source| UpdateError::Copy { pid: copy, source };
        // That it is one of the ring makes no use of an arena that no thread has.
        let layout = heap.arenas.first().and_then(|main| ArenaLayout::detect(memory, main.addr));
        let links: Vec<Addr> =
            layout.iter().flat_map(|l| heap.arenas.iter().map(|a| a.addr.add(l.next()))).collect();
        let spans =
            leftovers::unreferenced(&candidates, memory, &pages, &registers, &links).map_err(failed)?;
        let mut arenas = Vec::new();
        for a in heap.arenas.iter().filter(|a| spans.iter().any(|s| s.contains(a.addr))) {
            let len = layout.map_or(0, ArenaLayout::size);
            arenas.push((a.addr, memory.bytes(a.addr, len).map_err(failed)?));
        }
        Ok(Self { spans, arenas })
    }

    /// What of it is so still: an arena may have been taken by a thread that wanted one.
    pub(super) fn now(&self, memory: &dyn Memory) -> Vec<Span> {
        let changed = |(at, was): &&(Addr, Vec<u8>)| memory.bytes(*at, was.len()).ok().as_ref() != Some(was);
        let taken: Vec<Addr> = self.arenas.iter().filter(changed).map(|a| a.0).collect();
        self.spans.iter().copied().filter(|s| !taken.iter().any(|a| s.contains(*a))).collect()
    }
}
