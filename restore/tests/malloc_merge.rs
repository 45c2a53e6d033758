//! glibc's malloc of two generations, joined by writes alone, then worked hard: two real processes of one
//! program make a heap each; the first one's heap is put into the second, merged, and the second frees,
//! reallocates and allocates over both until nothing is left. glibc's own checks and the contents decide.
#![allow(missing_docs)]

use mcr_criu_lite::ProcessMemory;
use mcr_criu_lite::procfs::maps::{self, MapsLine};
use mcr_image::{Addr, Memory, Pid, Tid, proto};
use mcr_restore::link::malloc::{MallocInput, MergeReport, TlsOffsets, merge};
use mcr_restore::link::overlay::Overlay;
use mcr_restore::link::{Booted, NewThread, Refusal, Span};
use mcr_transform::heap::{ChunkState, GlibcHeap};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

const THREADS: usize = 3;
const TAB: usize = THREADS * 600 * 24;

fn program() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let out =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("malloc_merge-{}", std::process::id()));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/malloc_merge.c");
        let status = Command::new("cc")
            .args(["-g", "-O1", "-pthread", "-o"])
            .args([&out, &source])
            .status()
            .expect("a C compiler (cc)");
        assert!(status.success());
        out
    })
}

struct Side {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
    mem: ProcessMemory,
    maps: Vec<MapsLine>,
    tab: u64,
    threads: Vec<proto::Thread>,
}

impl Side {
    fn start(mode: &str, seed: u32, ranges: &[Span], tunables: &str) -> Self {
        let mut c = Command::new(program());
        c.arg(mode).arg(seed.to_string());
        c.args(ranges.iter().map(|r| format!("{:x}-{:x}", r.start.0, r.end.0)));
        c.env("GLIBC_TUNABLES", tunables).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: personality(2) and setsid(2) are async-signal-safe.
        unsafe {
            c.pre_exec(|| {
                nix::sys::personality::set(nix::sys::personality::Persona::ADDR_NO_RANDOMIZE)?;
                nix::unistd::setsid()?;
                Ok(())
            });
        }
        let mut child = c.spawn().expect("the program starts");
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let hex = |s: &str| u64::from_str_radix(s.trim_start_matches("0x"), 16).unwrap();
        let mut words = line.split_whitespace();
        let (Some(tab), Some(info)) = (words.next().map(hex), words.next().map(hex)) else {
            let mut err = String::new();
            child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
            panic!("{mode} did not get ready: {err}");
        };
        let pid = Pid(child.id() as i32);
        let mem = ProcessMemory::open(pid).unwrap();
        let threads = (0..THREADS as u64)
            .map(|i| proto::Thread {
                fs_base: mem.u64(Addr(info + 16 * i)).unwrap(),
                tid: mem.u64(Addr(info + 16 * i + 8)).unwrap() as u32,
                ..Default::default()
            })
            .collect();
        Self { maps: maps::read(pid).unwrap(), child, out, mem, tab, threads }
    }

    fn vmas(&self, keep: impl Fn(&MapsLine) -> bool) -> Vec<proto::Vma> {
        let vma = |m: &MapsLine| {
            let name = String::from_utf8_lossy(&m.name).into_owned();
            let kind =
                if m.ino != 0 { proto::VmaKind::VmaFilePrivate } else { proto::VmaKind::VmaAnonPrivate };
            proto::Vma {
                start: m.start.0,
                end: m.end.0,
                prot: m.prot,
                kind: kind as i32,
                name,
                ..Default::default()
            }
        };
        self.maps
            .iter()
            .filter(|m| keep(m))
            .filter(|m| m.name != b"[vvar]" && m.name != b"[vsyscall]")
            .map(vma)
            .collect()
    }

    /// Lets it go on; its exit status and what it said.
    fn finish(mut self) -> (Option<i32>, String) {
        self.child.stdin.take().unwrap().write_all(b"\n").unwrap();
        let mut text = String::new();
        self.out.read_to_string(&mut text).unwrap();
        let mut err = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        let status = self.child.wait().unwrap();
        (status.code(), format!("{text}{err} ({status})"))
    }
}

/// What keeps an old heap: whole 64 MiB heaps of thread arenas, the break, mapped chunks.
fn ranges(old: &Side, heap: &GlibcHeap) -> Vec<Span> {
    const HEAP: u64 = 64 << 20;
    let mut v: Vec<Span> = Vec::new();
    for m in old.maps.iter().filter(|m| m.name == b"[heap]") {
        v.push(Span::new(m.start, m.end));
    }
    for a in heap.arenas.iter().skip(1) {
        let start = a.addr.0 & !(HEAP - 1);
        v.push(Span::new(Addr(start), Addr(start + HEAP)));
    }
    for s in &heap.segments {
        if !v.iter().any(|r| r.contains(s.start)) {
            v.push(Span::new(Addr(s.start.0 & !4095), Addr((s.end.0 + 4095) & !4095)));
        }
    }
    v.sort();
    v.dedup();
    v
}

/// Two processes, merged; `damage` may change old's heap where it lies in the new process.
fn joined(
    seed: u32,
    tunables: &str,
    damage: impl Fn(&Side, &Side, &GlibcHeap),
) -> (Result<MergeReport, Refusal>, Side) {
    let old = Side::start("old", seed, &[], tunables);
    let heap = GlibcHeap::read(&old.mem, &old.threads, &old.vmas(|_| true)).expect("old's heap");
    let ranges = ranges(&old, &heap);
    let table = old.mem.bytes(Addr(old.tab), TAB).unwrap();
    for slot in table.chunks_exact(24) {
        let word = |i: usize| u64::from_le_bytes(slot[i..i + 8].try_into().unwrap());
        let (p, n) = (word(0), word(8));
        assert!(
            p == 0 || ranges.iter().any(|r| r.contains(Addr(p))),
            "the heap reader missed {n} bytes at {p:#x}: {:#x?} header {:#x} {:#x}",
            old.maps.iter().find(|m| m.start.0 <= p && p < m.end.0),
            old.mem.u64(Addr(p - 16)).unwrap(),
            old.mem.u64(Addr(p - 8)).unwrap(),
        );
    }
    let new = Side::start("new", seed + 1000, &ranges, tunables);
    // What a rebuilt or forked host would hold already: old's heaps and the table of what is in them.
    for r in &ranges {
        for m in old.maps.iter().filter(|m| m.prot == 3 && m.start < r.end && r.start < m.end) {
            let (s, e) = (m.start.max(r.start), m.end.min(r.end));
            new.mem.write(s, &old.mem.bytes(s, e.since(s) as usize).unwrap()).unwrap();
        }
    }
    new.mem.write(Addr(new.tab), &table).unwrap();

    damage(&old, &new, &heap);
    let held = |m: &MapsLine| ranges.iter().any(|r| r.contains(m.start));
    let span = |m: &MapsLine| Span::new(m.start, m.end);
    let booted = Booted {
        pid: new.mem.pid(),
        native: new.maps.iter().filter(|m| !held(m)).map(span).collect(),
        retained: ranges.clone(),
        threads: new
            .threads
            .iter()
            .zip(&old.threads)
            .map(|(n, o)| NewThread {
                tid: Tid(n.tid as i32),
                old_tid: Some(Tid(o.tid as i32)),
                fs_base: Addr(n.fs_base),
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    };
    let libc = |m: &&MapsLine| m.prot & 2 != 0 && String::from_utf8_lossy(&m.name).contains("libc.so");
    let info = heap.info();
    let input = MallocInput {
        dropped: &[],
        heap: &info,
        booted: &booted,
        old: &old.mem,
        host: &new.mem,
        libc_data: new.maps.iter().filter(libc).map(span).collect(),
        curbrk: None,
        region_bytes: 0,
        tls: TlsOffsets::of(&info).unwrap(),
    };
    let mut out = Overlay::new(&new.mem);
    let mut findings = Vec::new();
    let report = merge(&input, &mut out, &mut findings);
    if report.is_ok() {
        // The whole heap, walked as the next update will walk it.
        let mut vmas = new.vmas(|m| !held(m));
        vmas.extend(old.vmas(|m| m.prot == 3 && ranges.iter().any(|r| r.contains(m.start))));
        vmas.sort_by_key(|v| v.start);
        let joined = GlibcHeap::read(&out, &new.threads, &vmas).expect("the joined heap can be walked");
        let old_live = heap.in_use().count();
        assert!(joined.in_use().count() > old_live, "both generations are in the joined heap");
        for w in out.into_writes() {
            new.mem.write(w.addr, &w.bytes).unwrap();
        }
    }
    let mut old = old;
    old.child.kill().unwrap();
    old.child.wait().unwrap();
    (report, new)
}

fn survives(seed: u32, tunables: &str) -> MergeReport {
    let (report, new) = joined(seed, tunables, |_, _, _| {});
    let report = report.expect("merged");
    let (code, text) = new.finish();
    assert!(code == Some(0) && text.contains("done"), "seed {seed} {tunables}: {text}");
    report
}

#[test]
fn both_generations_are_freed_and_reused() {
    for seed in 1..=6 {
        let r = survives(seed, "");
        assert!(r.marked > 0 && r.params && r.threads == THREADS, "{r:?}");
        assert!(r.arenas >= 3, "thread arenas of both sides are in one ring: {r:?}");
        assert!(r.checked_chunks > 0);
    }
}

#[test]
fn without_thread_caches() {
    for seed in 11..=13 {
        survives(seed, "glibc.malloc.tcache_count=0");
    }
}

#[test]
fn with_perturbed_memory_and_one_arena() {
    for seed in 21..=23 {
        survives(seed, "glibc.malloc.perturb=85:glibc.malloc.arena_max=1");
    }
}

#[test]
fn a_damaged_heap_is_refused_before_anything_is_written() {
    let (report, mut new) = joined(31, "", |_, new, heap| {
        let free =
            heap.chunks.iter().find(|c| c.state == ChunkState::Bin && c.arena == 0).expect("a free chunk");
        // The next chunk forgets how large the free one is.
        let size = free.usable + 8;
        new.mem.write_u64(free.end().add(0u64.wrapping_sub(8)), size + 16).unwrap();
    });
    let refusal = report.unwrap_err();
    assert_eq!(refusal.invariant, "malloc");
    assert!(refusal.message.contains("does not know its size"), "{refusal}");
    new.child.kill().unwrap();
    new.child.wait().unwrap();
}

#[test]
fn a_lock_held_at_the_snapshot_is_released() {
    let (report, new) = joined(41, "", |old, _, heap| {
        old.mem.write(heap.arenas[0].addr, &1u32.to_le_bytes()).unwrap();
    });
    report.expect("merged");
    let (code, text) = new.finish();
    assert!(code == Some(0) && text.contains("done"), "{text}");
}

/// What the random work may miss: each step of the merge, looked at one by one.
#[test]
fn every_step_of_the_merge_is_in_the_result() {
    const TOP: u64 = 0x60;
    const NEXT: u64 = 0x870;
    const SYSTEM_MEM: u64 = 0x888;
    let before = std::cell::RefCell::new(None);
    let (report, new) = joined(51, "", |old, new, heap| {
        let main = heap.arenas[0].addr;
        let word = |s: &Side, off: u64| s.mem.u64(main.add(off)).unwrap();
        // New's free chunks: the bins of its main arena, by their forward links.
        let mut free = Vec::new();
        for i in 0..127 {
            let head = main.0 + TOP + 16 * i;
            let mut p = new.mem.u64(Addr(head + 16)).unwrap();
            while p != head {
                free.push((p, new.mem.u64(Addr(p + 8)).unwrap() & !7));
                p = new.mem.u64(Addr(p + 16)).unwrap();
            }
        }
        let ring = |s: &Side| {
            let mut v = vec![];
            let mut at = word(s, NEXT);
            while at != main.0 {
                v.push(at);
                at = s.mem.u64(Addr(at + NEXT)).unwrap();
            }
            v
        };
        let top = word(new, TOP);
        let size = new.mem.u64(Addr(top + 8)).unwrap() & !7;
        let mem = word(old, SYSTEM_MEM) + word(new, SYSTEM_MEM);
        *before.borrow_mut() = Some((main, free, ring(old), ring(new), top, size, mem, word(old, TOP)));
    });
    report.expect("merged");
    let (main, free, old_ring, new_ring, top, size, mem, old_top) = before.into_inner().unwrap();
    let at = |a: u64| new.mem.u64(Addr(a)).unwrap();
    assert_eq!(new.mem.u32(main).unwrap(), 0, "unlocked");
    assert_eq!(new.mem.u32(main.add(4)).unwrap() & 2, 2, "NONCONTIGUOUS");
    assert_eq!(at(main.0 + TOP), old_top, "old's state wins");
    assert_eq!(at(main.0 + SYSTEM_MEM), mem, "both sides' memory is counted");
    assert!(!free.is_empty());
    for (p, size) in free {
        assert_eq!(at(p + size + 8) & 1, 1, "new's free chunk {p:#x} is marked in use");
    }
    let rest = at(top + 8) & !7;
    assert_eq!(rest + 0x20, size & !15, "new's top shrank by two fenceposts");
    assert_eq!((at(top + rest + 8), at(top + rest + 0x18)), (0x11, 0x11), "fenceposts in use");
    let mut ring = Vec::new();
    let mut a = at(main.0 + NEXT);
    while a != main.0 {
        ring.push(a);
        a = at(a + NEXT);
    }
    assert_eq!(ring, [old_ring, new_ring].concat(), "one ring");
    assert_eq!(new.finish().0, Some(0));
}
