//! Where words of surviving native memory are: threads, the new program's data, libraries, mappings.

use super::input::{Booted, NewThread, Span};
use super::locals::{Site, Sites};
use super::output::Refusal;
use super::pairs::Pairs;
use super::redirect::{Holder, Redirect};
use super::state::{State, Target, register};
use super::{Frame, LinkInput};
use mcr_image::unwind::unwind;
use mcr_image::{Addr, LinkAddr, Regs, Tid, proto};
use mcr_transform::heap::GlibcHeap;
use mcr_transform::types::LocalPlace;
use std::collections::{BTreeMap, BTreeSet, HashSet};

const PROT_WRITE: u32 = 2;
/// Bytes below the stack pointer that a leaf function may use (System V ABI).
const RED_ZONE: u64 = 128;
/// More than `struct pthread` of any glibc known.
const PTHREAD: u64 = 0xa00;
/// The thread control block's first words: itself, libc's table of thread-local blocks, itself again.
const CONTROL: u64 = 0x18;
/// Callee-saved registers by DWARF number.
const SAVED: [u16; 6] = [3, 6, 12, 13, 14, 15];
/// Registers of the six arguments, by DWARF number: rdi, rsi, rdx, r10, r8, r9.
const ARGS: [u16; 6] = [5, 4, 1, 10, 8, 9];
/// Mappings above this size are not searched for stray words.
const MAX_MAPPING: u64 = 64 << 20;

/// Offsets of the words of `struct pthread` that may point at the program's objects: not the thread control
/// block's own pointers, of which the second is libc's table of thread-local blocks.
pub(super) fn pthread_words() -> impl Iterator<Item = u64> {
    (CONTROL..0x700).step_by(8)
}

/// How many arguments a blocking call takes.
pub(super) fn arguments(nr: i64) -> usize {
    match mcr_image::syscalls::name(nr) {
        Some("pause" | "getpid" | "sched_yield") => 0,
        Some("nanosleep" | "rt_sigsuspend") => 2,
        Some("read" | "write" | "readv" | "writev" | "accept" | "poll" | "recvmsg" | "sendmsg" | "flock") => {
            3
        }
        Some("epoll_wait" | "clock_nanosleep" | "wait4" | "rt_sigtimedwait" | "accept4" | "pread64") => 4,
        Some("select" | "ppoll" | "waitid" | "semtimedop") => 5,
        _ => 6,
    }
}

fn arguments_of(t: &NewThread) -> usize {
    // FUTEX_WAIT and FUTEX_WAIT_BITSET take no second address.
    match mcr_image::syscalls::name(t.syscall) {
        Some("futex") => 4,
        Some("epoll_pwait") => 5,
        _ => arguments(t.syscall),
    }
}

/// Names of variables that the old frames have, by old thread, function and name.
pub(super) fn old_variables(input: &LinkInput<'_>) -> HashSet<(Tid, String, String)> {
    let mut out = HashSet::new();
    let Some(types) = input.old_types else {
        return out;
    };
    for t in &input.process.threads {
        let Some(regs) = Regs::from_words(&t.regs) else {
            continue;
        };
        for f in unwind(input.old_modules, input.old, &regs).frames.iter().filter(|f| f.in_program()) {
            let function = f.base_name().unwrap_or_default().to_owned();
            let bias = f.module.as_ref().map_or(Addr(0), |m| m.bias);
            for l in types.locals_at(f, input.old, bias) {
                if !matches!(l.place, LocalPlace::Gone(_)) {
                    out.insert((Tid(t.tid as i32), function.clone(), l.name));
                }
            }
        }
    }
    out
}

/// Values of a frame's callee-saved registers.
fn saved_values(f: &Frame) -> Vec<u64> {
    SAVED.iter().filter_map(|r| f.regs[*r as usize]).collect()
}

/// Pairs what only registers of frames hold. Returns the new frames whose old counterpart has more.
pub(super) fn frame_registers(
    input: &LinkInput<'_>,
    frames: &[(Tid, Vec<Frame>)],
    translate_old: &impl Fn(u64) -> u64,
    pairs: &mut Pairs<'_>,
) -> BTreeSet<(Tid, usize)> {
    let mut open = BTreeSet::new();
    for t in &input.process.threads {
        let (Some(regs), Some(new)) = (Regs::from_words(&t.regs), input.booted.thread_for(Tid(t.tid as i32)))
        else {
            continue;
        };
        let olds = unwind(input.old_modules, input.old, &regs).frames;
        let Some((_, news)) = frames.iter().find(|f| f.0 == new.tid) else { continue };
        for (i, (n, o)) in news.iter().zip(&olds).enumerate() {
            if !n.in_program() || !o.in_program() || n.base_name() != o.base_name() {
                continue;
            }
            let old: Vec<u64> = saved_values(o).into_iter().map(translate_old).collect();
            let path = format!("registers of {}", n.base_name().unwrap_or_default());
            if pairs.frame_registers(&saved_values(n), &old, &path) {
                open.insert((new.tid, i));
            }
        }
    }
    open
}

/// The program frame whose variable a saved (`Some`) or live (`None`) register is.
fn owner(frames: &[Frame], r: u16, slot: Option<Addr>) -> Option<usize> {
    frames
        .iter()
        .position(|f| f.in_program() && f.regs[r as usize].is_some() && f.saved_at[r as usize] == slot)
}

/// What the new frames hold, and what is known about the old ones.
pub(super) struct Frames<'a> {
    /// Frames of each new thread, innermost first.
    pub new: &'a [(Tid, Vec<Frame>)],
    /// Those whose old counterpart holds objects in registers that nothing pairs.
    pub open: &'a BTreeSet<(Tid, usize)>,
}

/// Stacks, registers, call arguments and thread blocks.
pub(super) fn threads(
    input: &LinkInput<'_>,
    frames: &Frames<'_>,
    sites: &Sites,
    in_old: &HashSet<(Tid, String, String)>,
    redirect: &mut Redirect<'_>,
    state: &mut State<'_>,
) -> Result<(), Refusal> {
    for t in &input.booted.threads {
        let mut owned: BTreeSet<Target> = BTreeSet::new();
        for site in sites.of(t.tid) {
            variable(input, t, site, in_old, &mut owned, redirect, state)?;
        }
        let empty = Vec::new();
        let unwound = frames.new.iter().find(|f| f.0 == t.tid).map_or(&empty, |f| &f.1);
        let open = |r: u16, slot: Option<Addr>| {
            owner(unwound, r, slot).is_some_and(|i| frames.open.contains(&(t.tid, i)))
        };
        registers(t, &owned, |r| open(r, None), redirect, state)?;
        for (i, f) in unwound.iter().enumerate() {
            for r in SAVED {
                let Some(at) = f.saved_at[r as usize] else {
                    continue;
                };
                if !owned.insert(Target::Memory(at)) || state.out.touched(at, 8) {
                    continue;
                }
                let Ok(w) = input.host.u64(at) else { continue };
                let path = format!(
                    "thread {}: register {} of frame {i} ({f})",
                    t.tid,
                    Regs::DWARF_NAMES[r as usize]
                );
                if let Some(to) =
                    redirect.word(w, &Holder::Register { open: open(r, Some(at)) }, &path, state)?
                {
                    state.out.write_u64(at, to);
                    state.stats.redirected_words += 1;
                }
            }
        }
        let [stack, below, above] = live_parts(input, t);
        let tid = t.tid;
        let name = |a: Addr| format!("thread {tid}: stack word at {a}");
        redirect.range(stack.start, stack.end, &Holder::Stack, name, state)?;
        for s in [below, above] {
            let base = t.fs_base.0;
            let name = |a: Addr| {
                format!("thread {tid}: word {:+#x} from its thread pointer", a.0.wrapping_sub(base) as i64)
            };
            redirect.range(s.start, s.end, &Holder::Thread, name, state)?;
        }
    }
    Ok(())
}

/// What a thread has of its own: its stack in use, its thread-locals, its `struct pthread`. For a pthread all are
/// one mapping.
pub(super) fn live_parts(input: &LinkInput<'_>, t: &NewThread) -> [Span; 3] {
    let rsp = Addr(t.regs.rsp - RED_ZONE);
    let stack = t
        .stack
        .filter(|s| s.contains(Addr(t.regs.rsp)))
        .or_else(|| vma_of(input.booted, Addr(t.regs.rsp)))
        .unwrap_or(Span::new(rsp, rsp));
    let block = Span::new(Addr(t.fs_base.0 - tls_bytes(input)), t.fs_base.add(PTHREAD));
    let entry = input.booted.entry_stack;
    let end = if stack.contains(t.fs_base) {
        block.start
    } else if entry != Addr(0) && stack.contains(entry) {
        // What execve(2) put above is new's own: the vectors' strings must not become old's, which the
        // program may free.
        entry
    } else {
        stack.end
    };
    [Span::new(rsp, end), Span::new(block.start, t.fs_base), Span::new(t.fs_base.add(CONTROL), block.end)]
}

/// Bytes below a thread pointer that hold thread-locals of all modules, generously.
fn tls_bytes(input: &LinkInput<'_>) -> u64 {
    let sum: u64 = input
        .modules
        .modules()
        .iter()
        .filter_map(|m| m.elf.tls())
        .map(|t| t.mem_size + t.align.max(16))
        .sum();
    (sum + 63) & !63
}

fn vma_of(booted: &Booted, a: Addr) -> Option<Span> {
    booted.vmas.iter().find(|v| v.start <= a.0 && a.0 < v.end).map(|v| Span::new(Addr(v.start), Addr(v.end)))
}

fn variable(
    input: &LinkInput<'_>,
    t: &NewThread,
    site: &Site,
    in_old: &HashSet<(Tid, String, String)>,
    owned: &mut BTreeSet<Target>,
    redirect: &mut Redirect<'_>,
    state: &mut State<'_>,
) -> Result<(), Refusal> {
    let Some(target) = site.target else {
        return Ok(());
    };
    let path = format!("{}::{}", site.function, site.local.name);
    let known = |old: Tid| in_old.contains(&(old, site.function.clone(), site.local.name.clone()));
    let holder = Holder::Local { in_old: t.old_tid.is_some_and(known) };
    match target {
        Target::Memory(at) => {
            let in_register = matches!(site.local.place, LocalPlace::Register { .. });
            let size = if in_register { 8 } else { input.types.size_of(site.local.ty) };
            for i in 0..size / 8 {
                owned.insert(Target::Memory(at.add(8 * i)));
            }
            redirect.range(at, at.add(size), &holder, |a| at_offset(&path, a.since(at)), state)
        }
        Target::Register(tid, r) => {
            owned.insert(target);
            if state.set.contains(&(tid, r)) {
                return Ok(());
            }
            let Some(w) = state.regs.get_mut(&tid).and_then(|g| register(g, r)).map(|w| *w) else {
                return Ok(());
            };
            if let Some(to) = redirect.word(w, &holder, &path, state)? {
                put_register(tid, r, to, state);
            }
            Ok(())
        }
    }
}

fn at_offset(path: &str, offset: u64) -> String {
    if offset == 0 { path.to_owned() } else { format!("{path}+{offset:#x}") }
}

fn put_register(tid: Tid, r: u16, value: u64, state: &mut State<'_>) {
    if let Some(w) = state.regs.get_mut(&tid).and_then(|g| register(g, r)) {
        *w = value;
        state.stats.redirected_registers += 1;
    }
}

fn registers(
    t: &NewThread,
    owned: &BTreeSet<Target>,
    open: impl Fn(u16) -> bool,
    redirect: &mut Redirect<'_>,
    state: &mut State<'_>,
) -> Result<(), Refusal> {
    let call = mcr_image::syscalls::name(t.syscall).unwrap_or("a system call");
    let args = ARGS.iter().take(arguments_of(t)).map(|r| (*r, Holder::Argument));
    for (r, holder) in args.chain(SAVED.iter().map(|r| (*r, Holder::Register { open: open(*r) }))) {
        if state.set.contains(&(t.tid, r))
            || (!matches!(holder, Holder::Argument) && owned.contains(&Target::Register(t.tid, r)))
        {
            continue;
        }
        let Some(w) = state.regs.get_mut(&t.tid).and_then(|g| register(g, r)).map(|w| *w) else {
            continue;
        };
        let name = Regs::DWARF_NAMES[r as usize];
        let path = match holder {
            Holder::Argument => format!("thread {}: argument {name} of {call}", t.tid),
            _ => format!("thread {}: register {name}", t.tid),
        };
        if let Some(to) = redirect.word(w, &holder, &path, state)? {
            put_register(t.tid, r, to, state);
        }
    }
    Ok(())
}

/// Writable mappings inside a module's range.
pub(super) fn writable(booted: &Booted, start: Addr, end: Addr) -> Vec<Span> {
    booted
        .vmas
        .iter()
        .filter(|v| v.prot & PROT_WRITE != 0)
        .map(|v| Span::new(Addr(v.start.max(start.0)), Addr(v.end.min(end.0))))
        .filter(|s| !s.is_empty())
        .collect()
}

/// Libraries whose data is process state of the new version.
fn is_libc_family(path: &std::path::Path) -> bool {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    ["libc.so", "libc-", "ld-", "libpthread", "librt", "libdl"].iter().any(|p| name.starts_with(p))
}

/// Unchanged libraries take old's data.
pub(super) fn library_data(input: &LinkInput<'_>, state: &mut State<'_>) {
    for m in &input.booted.modules {
        if !m.same_as_old || m.is_exe || m.is_interp || is_libc_family(&m.path) {
            continue;
        }
        for s in writable(input.booted, m.start, m.end) {
            match input.old.bytes(s.start, s.len() as usize) {
                Ok(b) => state.out.write(s.start, &b),
                Err(e) => state.find(
                    proto::Severity::Warning,
                    "library-data",
                    format!("{}: old data could not be read: {e}", m.path.display()),
                    "",
                ),
            }
        }
        if input.modules.modules().iter().any(|n| n.start == m.start && n.elf.tls().is_some()) {
            state.find(
                proto::Severity::Info,
                "library-tls",
                format!("{}: thread-local data stays the new version's", m.path.display()),
                "",
            );
        }
    }
}

/// Globals that keep their native value.
pub(super) fn program_data(
    input: &LinkInput<'_>,
    redirect: &mut Redirect<'_>,
    state: &mut State<'_>,
) -> Result<(), Refusal> {
    let Some(exe) = input.booted.modules.iter().find(|m| m.is_exe) else {
        return Ok(());
    };
    let base = input.booted.new_base;
    let name = |a: Addr| {
        let link = LinkAddr(a.since(base));
        match input.types.global_at(link) {
            Some(v) => at_offset(&v.display(), link.0 - v.place.link().unwrap_or_default().0),
            None => format!("program data at {a}"),
        }
    };
    for s in writable(input.booted, exe.start, exe.end) {
        redirect.range(s.start, s.end, &Holder::Global, name, state)?;
    }
    Ok(())
}

/// libc, ld.so, and mappings that the new version made for itself.
pub(super) fn other_data(
    input: &LinkInput<'_>,
    native: &GlibcHeap,
    redirect: &mut Redirect<'_>,
    state: &mut State<'_>,
) -> Result<(), Refusal> {
    let booted = input.booted;
    let stacks: Vec<Addr> = booted.threads.iter().map(|t| Addr(t.regs.rsp)).collect();
    let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
    for m in booted.modules.iter().filter(|m| !m.is_exe) {
        for s in writable(booted, m.start, m.end) {
            seen.insert(s.start.0, s.end.0);
            let what = m.path.display().to_string();
            redirect.range(s.start, s.end, &Holder::Library, |a| format!("{what} at {a}"), state)?;
        }
    }
    let exe = booted.modules.iter().find(|m| m.is_exe);
    for v in
        booted.vmas.iter().filter(|v| v.kind() == proto::VmaKind::VmaAnonPrivate && v.prot & PROT_WRITE != 0)
    {
        for n in &booted.native {
            let s = Span::new(Addr(v.start.max(n.start.0)), Addr(v.end.min(n.end.0)));
            let skip = s.is_empty()
                || s.len() > MAX_MAPPING
                || seen.contains_key(&s.start.0)
                || stacks.iter().any(|a| s.contains(*a))
                || native.segments.iter().any(|g| g.start < s.end && s.start < g.end)
                || exe.is_some_and(|e| e.start < s.end && s.start < e.end);
            if !skip {
                redirect.range(
                    s.start,
                    s.end,
                    &Holder::Library,
                    |a| format!("mapping word at {a}"),
                    state,
                )?;
            }
        }
    }
    Ok(())
}

/// Adds ranges that are not mapped yet.
pub(super) fn add_regions(vmas: &mut Vec<proto::Vma>, regions: &[Span]) {
    for r in regions {
        if !vmas.iter().any(|v| v.start < r.end.0 && r.start.0 < v.end) {
            vmas.push(proto::Vma { start: r.start.0, end: r.end.0, prot: 3, ..proto::Vma::default() });
        }
    }
    vmas.sort_by_key(|v| v.start);
}
