//! From a booted host and a patch to the list of writes that joins them. Everything in here is a pure
//! function over memory views: no process is touched.
//!
//! Order: the patch is laid over the host's memory; the start-up objects of the new version are paired with
//! old objects by a parallel walk; globals, thread-locals, locals and relocations take their values; words
//! of surviving native memory are redirected; libc's streams and malloc are joined; the invariants are
//! checked over the result.

pub mod globals;
pub mod input;
pub mod invariants;
pub mod kernel;
pub mod libc;
pub mod locals;
pub mod malloc;
mod malloc_check;
mod output;
pub mod overlay;
pub mod pairs;
mod path;
pub mod places;
pub mod redirect;
pub mod relations;
mod scan;
pub mod state;
mod timers;

pub use input::{BootEpoll, BootFrame, BootModule, BootTimer, Booted, FdMatch, NewThread, Span};
pub use output::{KernelCall, LinkStats, MemWrite, Refusal, RegWrite, WriteList};
pub(crate) use timers::calls_back;

use mcr_image::unwind::{Frame, unwind};
use mcr_image::{Addr, ElfFile, Memory, ModuleMap, Tid, proto};
use mcr_transform::heap::GlibcHeap;
use mcr_transform::types::TypeModel;
use overlay::Overlay;
use pairs::{Evidence, Pairs, Side};
use places::Places;
use redirect::Redirect;
use state::{State, Target};
use std::collections::{BTreeMap, BTreeSet};

/// Everything that `link` looks at.
pub struct LinkInput<'a> {
    /// What the update changes.
    pub patch: &'a proto::Patch,
    /// The old process.
    pub process: &'a proto::Process,
    /// Its memory, unpatched, with libc's data as old left it.
    pub old: &'a dyn Memory,
    /// Its modules.
    pub old_modules: &'a ModuleMap,
    /// Types of the old program; without them a lost local is not noticed.
    pub old_types: Option<&'a TypeModel>,
    /// The booted host.
    pub booted: &'a Booted,
    /// The host's memory as booted.
    pub host: &'a dyn Memory,
    /// The host's modules.
    pub modules: &'a ModuleMap,
    /// Types of the new program.
    pub types: &'a TypeModel,
    /// The new program.
    pub new_elf: &'a ElfFile,
    /// Old's heap, where it has been read already.
    pub old_heap: Option<&'a GlibcHeap>,
    /// Memory of old that goes: an arena of malloc in it is no longer one of the ring.
    pub dropped: &'a [Span],
}

/// The write list that makes the booted host old's successor, or why there is none.
pub fn link(input: &LinkInput<'_>) -> Result<WriteList, Refusal> {
    let (patch, process, booted) = (input.patch, input.process, input.booted);
    let mut findings = Vec::new();
    invariants::patch_is_closed(patch)?;
    invariants::threads(process, booted)?;
    invariants::modules(input.old_modules, booted, &mut findings)?;

    let mut calls = Vec::new();
    let regions = map_regions(patch, booted, &mut calls)?;
    let mut view = Overlay::new(input.host);
    lay_patch(patch, &mut view);
    let mut out = Overlay::new(input.host);
    lay_patch(patch, &mut out);

    let read_now;
    let old_heap = match input.old_heap {
        Some(h) => h,
        None => {
            read_now = GlibcHeap::read(input.old, &process.threads, &process.vmas)
                .map_err(|e| heap_refusal("old", &e.to_string()))?;
            &read_now
        }
    };
    headers_are_whole(patch, old_heap)?;
    let native_threads = heap_threads(booted);
    let native_heap =
        GlibcHeap::read_again(input.host, &native_threads, &booted.native_vmas(), old_heap.known().as_ref())
            .map_err(|e| heap_refusal("new", &e.to_string()))?;

    let frames: Vec<(Tid, Vec<Frame>)> =
        booted.threads.iter().map(|t| (t.tid, unwind(input.modules, input.host, &t.regs).frames)).collect();
    let sites = locals::Sites::read(input.types, input.host, booted.new_base, &frames);
    let layout = globals::Layout {
        booted,
        tls_offset: input.new_elf.tls().map_or(0, |t| t.exe_offset()),
        sites: &sites,
        old_pid: process.pid,
    };
    let places = Places::of(patch);
    let translate_old = |a: u64| places.find(a).unwrap_or(a);
    let streams = input.old_modules.libc().and_then(|m| libc::StreamSymbols::find(|n| m.symbol(n)));

    let mut pairs = Pairs::new(input.types, &view, &native_heap, old_heap, regions.clone());
    walk(input, &layout, &sites, &places, streams.as_ref(), &mut pairs)?;
    let open = scan::frame_registers(input, &frames, &translate_old, &mut pairs);

    let mut state = State {
        out,
        regs: booted.threads.iter().map(|t| (t.tid, t.regs)).collect::<BTreeMap<_, _>>(),
        set: BTreeSet::new(),
        findings,
        stats: LinkStats::default(),
    };
    (state.stats.pairs, state.stats.strong_pairs) = pairs.count();

    scan::library_data(input, &mut state);
    let tls = globals::write(patch, &layout, &mut state)?;
    let thread_for = |old: u32| booted.thread_for(Tid(old as i32)).map(|t| t.tid);
    let is_heap = |a: u64| old_heap.find(Addr(a)).is_some_and(|c| c.state.in_use());
    let local_targets = locals::write(patch, &sites, input.types, thread_for, is_heap, &mut state);
    globals::relocate(patch, &layout, &local_targets, &tls, &mut state)?;
    syncs(input, &pairs, &mut state);

    // malloc first: the words it sets in thread blocks must not be taken for start-up objects.
    let heap_info = match &patch.heap {
        Some(h) if h.main_arena != 0 && !h.tcaches.is_empty() => h.clone(),
        _ => old_heap.info(),
    };
    let libc_module = input.old_modules.libc();
    let heap_used = heap_info.main_arena != 0 && !old_heap.arenas.is_empty();
    let tls_offsets = malloc_offsets(input, &native_heap, &heap_info, layout.tls_offset);
    let merge = malloc::MallocInput {
        heap: &heap_info,
        dropped: input.dropped,
        booted,
        old: input.old,
        host: input.host,
        libc_data: libc_module.map_or_else(Vec::new, |m| scan::writable(booted, m.start, m.end)),
        curbrk: libc_module.and_then(|m| m.symbol("__curbrk")),
        tls: match tls_offsets {
            Some(t) => t,
            None if !heap_used => malloc::TlsOffsets { tcache: 0, arena: 0 },
            None => {
                return Err(heap_refusal("new", "its threads' tcache and arena were not found"));
            }
        },
        region_bytes: patch.regions.iter().filter(|r| r.malloc_chunks).map(|r| r.content.len() as u64).sum(),
    };
    if heap_used {
        malloc::merge(&merge, &mut state.out, &mut state.findings)?;
    }

    let mut redirect = Redirect::new(&pairs, &native_heap, old_heap, input.host, &regions);
    if let Some(syms) = &streams {
        let s = libc::adopt(
            syms,
            input.old,
            input.host,
            booted,
            |f| redirect.translate(f.0).map(Addr),
            |f| Addr(translate_old(f.0)),
            &mut state.out,
            &mut state.findings,
        )?;
        state.stats.files = s.adopted.len();
    } else {
        state.find(
            proto::Severity::Warning,
            "libc-streams",
            "libc's stream list was not found: open FILEs of the old version are not flushed at exit".into(),
            "",
        );
    }
    let in_old = scan::old_variables(input);
    let in_frames = scan::Frames { new: &frames, open: &open };
    scan::threads(input, &in_frames, &sites, &in_old, &mut redirect, &mut state)?;
    scan::program_data(input, &mut redirect, &mut state)?;
    scan::other_data(input, &native_heap, &mut redirect, &mut state)?;
    redirect.follow(&mut state)?;

    kernel::epolls(
        process,
        patch,
        booted,
        |r| layout.value(r).map(|v| v.0),
        |w| redirect.translate(w),
        &mut calls,
        &mut state.findings,
    )?;
    kernel::itimers(process, &mut calls);
    timers::carry(process, patch, booted, |r| layout.value(r).map(|v| v.0), &mut calls, &mut state.findings)?;
    let libc_data = libc_module.map_or_else(Vec::new, |m| scan::writable(booted, m.start, m.end));
    timers::adopt_callbacks(process, input.old, booted, &libc_data, translate_old, &mut state.out)?;
    kernel::differences(process, booted, &mut state.findings);

    let written = written_ranges(patch, &layout, &tls, &local_targets);
    if let Some(exe) = input.old_modules.exe() {
        let returns_to = |a| invariants::after_call(input.old, a);
        invariants::no_old_program((exe.start, exe.end), booted, &state.out, &written, returns_to)?;
    }
    invariants::moved_set_is_closed(patch, &state.out, &written)?;
    // Old's chunks were walked when they were read, and nothing was written over their headers; malloc's
    // lists are checked after the merge. The walk of everything is for what nobody has thought of.
    if heap_used && (cfg!(debug_assertions) || old_heap.chunks.len() < FULL_WALK) {
        let mut vmas = booted.vmas.clone();
        scan::add_regions(&mut vmas, &regions);
        GlibcHeap::read_again(&state.out, &native_threads, &vmas, old_heap.known().as_ref())
            .map_err(|e| heap_refusal("joined", &e.to_string()))?;
    }
    Ok(finish(input, state, calls))
}

fn finish(input: &LinkInput<'_>, state: State<'_>, calls: Vec<KernelCall>) -> WriteList {
    let State { out, regs, mut findings, mut stats, .. } = state;
    let memory = out.into_writes();
    stats.bytes = memory.iter().map(|w| w.bytes.len()).sum();
    let registers = input
        .booted
        .threads
        .iter()
        .filter_map(|t| regs.get(&t.tid).filter(|r| **r != t.regs).map(|r| RegWrite { tid: t.tid, regs: *r }))
        .collect();
    if stats.stale_words > 0 {
        findings.push(finding(
            proto::Severity::Info,
            "stale-words",
            format!(
                "{} stack words that no variable owns point at unpaired start-up objects",
                stats.stale_words
            ),
            "",
        ));
    }
    WriteList { memory, registers, calls, findings, stats }
}

/// Up to this many old chunks the joined heap is walked as a whole before the release.
const FULL_WALK: usize = 50_000;

/// No write of the patch touches malloc's own words.
fn headers_are_whole(patch: &proto::Patch, heap: &GlibcHeap) -> Result<(), Refusal> {
    for w in &patch.writes {
        let (start, end) = (Addr(w.addr), Addr(w.addr + w.content.len() as u64));
        let inside = heap.find(start).is_some_and(|c| c.state.in_use() && end <= c.end());
        if !inside && heap.segment(start).or(heap.segment(Addr(end.0 - 1))).is_some() {
            return Err(Refusal::new(
                "malloc",
                format!("a re-laid-out object at {start}..{end} does not fit into a chunk in use"),
                "make the update image again; report this if it stays",
            ));
        }
    }
    Ok(())
}

/// Where new's threads keep tcache and arena: as found in new, or as in old if the programs' thread-locals
/// are of one size.
fn malloc_offsets(
    input: &LinkInput<'_>,
    native: &GlibcHeap,
    old: &proto::HeapInfo,
    new_tls: u64,
) -> Option<malloc::TlsOffsets> {
    malloc::TlsOffsets::of(&native.info()).or_else(|| {
        let old_tls = input.old_modules.exe()?.elf.tls().map_or(0, |t| t.exe_offset());
        malloc::TlsOffsets::of(old).filter(|_| old_tls == new_tls)
    })
}

fn heap_refusal(whose: &str, why: &str) -> Refusal {
    Refusal::new(
        "malloc",
        format!("the {whose} version's heap cannot be read: {why}"),
        "only glibc's malloc is understood; run the server with it, or report this with the image",
    )
}

/// Checks that the patch's fresh memory is there, or asks for it.
fn map_regions(
    patch: &proto::Patch,
    booted: &Booted,
    calls: &mut Vec<KernelCall>,
) -> Result<Vec<Span>, Refusal> {
    let mut spans = Vec::new();
    for r in &patch.regions {
        let span = Span::new(Addr(r.start), Addr((r.start + r.content.len() as u64 + 4095) & !4095));
        let hit: u64 =
            booted.vmas.iter().map(|v| v.end.min(span.end.0).saturating_sub(v.start.max(span.start.0))).sum();
        if hit == 0 {
            calls.push(KernelCall::Map { start: span.start, len: span.len() });
        } else if hit < span.len() || booted.is_retained(span.start) {
            return Err(Refusal::new(
                "region",
                format!("the place for moved objects at {} is taken in the new version", span.start),
                "make the update image again; it will choose another place",
            ));
        }
        spans.push(span);
    }
    Ok(spans)
}

fn lay_patch(patch: &proto::Patch, to: &mut Overlay<'_>) {
    for r in &patch.regions {
        to.write(Addr(r.start), &r.content);
    }
    for w in &patch.writes {
        to.write(Addr(w.addr), &w.content);
    }
}

/// The new threads as the heap reader wants them.
fn heap_threads(booted: &Booted) -> Vec<proto::Thread> {
    let thread = |t: &NewThread| proto::Thread {
        tid: t.tid.0 as u32,
        fs_base: t.fs_base.0,
        regs: t.regs.to_words(),
        ..proto::Thread::default()
    };
    booted.threads.iter().map(thread).collect()
}

/// Feeds every root to the walk.
fn walk(
    input: &LinkInput<'_>,
    layout: &globals::Layout<'_>,
    sites: &locals::Sites,
    places: &Places,
    streams: Option<&libc::StreamSymbols>,
    pairs: &mut Pairs<'_>,
) -> Result<(), Refusal> {
    let (patch, booted) = (input.patch, input.booted);
    // An old word whose place only types can tell is no evidence.
    let translate_old = |a: u64| places.find(a).unwrap_or(0);
    for v in &patch.locals {
        let Some(t) = booted.thread_for(Tid(v.old_tid as i32)) else {
            continue;
        };
        let Some(site) = sites.find(t.tid, v.frame, &v.function, &v.variable) else {
            continue;
        };
        let path = format!("{}::{}", v.function, v.variable);
        let live = match site.target {
            Some(Target::Memory(_)) => None,
            _ => site.local.bytes(input.types, input.host),
        };
        let native = match (&site.target, &live) {
            (Some(Target::Memory(a)), _) => Side::At(*a),
            (_, Some(b)) => Side::In(b, 0),
            _ => continue,
        };
        pairs.root(site.local.ty, native, Side::In(&v.content, 0), &path, true);
    }
    for v in &patch.tls {
        let at = layout.tls(v.old_tid, v.new_tls_offset, &v.name)?;
        let Some(var) = input.types.globals_named(&v.name).find(|g| g.place.tls() == Some(v.new_tls_offset))
        else {
            continue;
        };
        pairs.root(var.ty, Side::At(at), Side::In(&v.content, 0), &v.name, true);
    }
    for g in &patch.globals {
        let link = Some(mcr_image::LinkAddr(g.new_link_addr));
        let Some(var) = input.types.globals_named(&g.name).find(|v| v.place.link() == link) else {
            continue;
        };
        let name = if g.function.is_empty() { g.name.clone() } else { format!("{}::{}", g.function, g.name) };
        pairs.root(var.ty, Side::At(layout.global(g.new_link_addr)), Side::In(&g.content, 0), &name, false);
    }
    for e in &booted.epolls {
        let Some(old_fd) = e.old_fd else { continue };
        let old = kernel::old_watches(input.process, old_fd);
        for w in &e.watches {
            let number =
                booted.fds.iter().find(|m| m.new_fd.0 as u32 == w.fd).map_or(w.fd, |m| m.old_fd.0 as u32);
            let Some(o) = old.iter().find(|o| o.fd == number) else {
                continue;
            };
            let change = patch
                .epoll
                .iter()
                .find(|c| c.epoll_fd == old_fd.0 as u32 && c.fd == o.fd && c.old_data == o.data);
            let data =
                change.map_or(translate_old(o.data), |c| if c.reloc.is_some() { 0 } else { c.new_data });
            let path = format!("epoll {}: data of fd {}", e.fd, w.fd);
            pairs.words(w.data, data, &path, Evidence::Direct);
        }
    }
    for t in &booted.threads {
        let Some(old) = t.old_tid else { continue };
        let Some(call) =
            input.process.threads.iter().find(|o| o.tid == old.0 as u32).and_then(|o| o.syscall.as_ref())
        else {
            continue;
        };
        for (i, (n, o)) in t.args.iter().zip(&call.args).take(scan::arguments(t.syscall)).enumerate() {
            let name = mcr_image::syscalls::name(t.syscall).unwrap_or("call");
            pairs.words(
                *n,
                translate_old(*o),
                &format!("thread {}: argument {i} of {name}", t.tid),
                Evidence::Direct,
            );
        }
    }
    // struct pthread has the same layout on both sides: thread-specific data, the start routine's argument.
    for t in &booted.threads {
        let Some(old) = t.old_tid.and_then(|o| input.process.threads.iter().find(|p| p.tid == o.0 as u32))
        else {
            continue;
        };
        for off in scan::pthread_words() {
            let (n, o) = (input.host.u64(t.fs_base.add(off)), input.old.u64(Addr(old.fs_base).add(off)));
            if let (Ok(n), Ok(o)) = (n, o) {
                let path = format!("thread {}: word {off:#x} of struct pthread", t.tid);
                pairs.words(n, translate_old(o), &path, Evidence::Direct);
            }
        }
    }
    if let Some(syms) = streams {
        for (n, o, fd) in libc::by_descriptor(input.old, input.host, syms) {
            pairs.words(n.0, translate_old(o.0), &format!("FILE on fd {fd}"), Evidence::Array);
        }
    }
    Ok(())
}

/// Synchronisation objects keep new's bytes where there is a native one; a lock in old memory that has
/// none gets its owner translated.
fn syncs(input: &LinkInput<'_>, pairs: &Pairs<'_>, state: &mut State<'_>) {
    let mut done = BTreeSet::new();
    for s in pairs.syncs() {
        if let Ok(bytes) = input.host.bytes(s.native, s.size as usize) {
            state.out.write(s.old, &bytes);
            done.insert(s.old.0);
        }
    }
    for s in &input.patch.syncs {
        if !s.locked || done.contains(&s.addr) || input.host.bytes(Addr(s.addr), 16).is_err() {
            continue;
        }
        let owner = input.booted.thread_for(Tid(s.owner_tid as i32));
        if let (Some(t), true) = (owner, s.type_name.contains("mutex")) {
            state.out.write(Addr(s.addr + 8), &t.tid.0.to_le_bytes());
        }
        state.find(
            proto::Severity::Warning,
            "lock-held",
            format!("{} at {:#x} was held by thread {} and stays so", s.type_name, s.addr, s.owner_tid),
            &s.path,
        );
    }
}

/// What the invariants look at: everything that took bytes from the patch.
fn written_ranges(
    patch: &proto::Patch,
    layout: &globals::Layout<'_>,
    tls: &[Addr],
    locals: &[Option<Target>],
) -> Vec<(Addr, u64, String)> {
    let mut v = Vec::new();
    for g in &patch.globals {
        v.push((layout.global(g.new_link_addr), g.content.len() as u64, format!("global {}", g.name)));
    }
    for (t, at) in patch.tls.iter().zip(tls) {
        v.push((*at, t.content.len() as u64, format!("thread-local {}", t.name)));
    }
    for (l, at) in patch.locals.iter().zip(locals) {
        if let Some(Target::Memory(a)) = at {
            v.push((*a, l.content.len() as u64, format!("local {}::{}", l.function, l.variable)));
        }
    }
    for r in &patch.regions {
        v.push((Addr(r.start), r.content.len() as u64, "moved objects".to_owned()));
    }
    for w in &patch.writes {
        v.push((Addr(w.addr), w.content.len() as u64, "a re-laid-out object".to_owned()));
    }
    v
}

/// A finding of this step.
pub(crate) fn finding(severity: proto::Severity, code: &str, message: String, path: &str) -> proto::Finding {
    proto::Finding {
        severity: severity as i32,
        code: code.to_owned(),
        message,
        path: path.to_owned(),
        ..proto::Finding::default()
    }
}
