//! The glibc reader against what the program itself knows about its heap.

mod support;

use mcr_image::Addr;
use mcr_transform::heap::{Chunk, ChunkState, GlibcHeap, HeapError, SegmentKind};
use std::path::Path;
use support::{Target, compile, hex};

fn spawn(args: &[&str]) -> (Target, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let exe = compile(dir.path(), "heap", &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c/heap.c"), &[]);
    (Target::spawn(&exe, args), dir)
}

fn check(args: &[&str]) -> GlibcHeap {
    let (t, _dir) = spawn(args);
    let heap = GlibcHeap::read(&t, &t.threads(), &t.vmas()).unwrap_or_else(|e| panic!("{args:?}: {e}"));
    let live = t.tagged("P");
    assert!(live.len() > 100);
    for p in &live {
        let addr = Addr(hex(&p[0]));
        let c = heap.find(addr).unwrap_or_else(|| panic!("{args:?}: no chunk at {addr}"));
        assert_eq!(c.addr, addr, "{args:?}");
        assert_eq!(c.usable, p[1].parse::<u64>().unwrap(), "{args:?}: {addr}");
        assert_eq!(c.state, ChunkState::InUse, "{args:?}: {addr}");
    }
    for f in t.tagged("F") {
        // Freed: in the thread's cache or a fastbin, or merged away.
        let state = heap.find(Addr(hex(&f[0]))).map(|c| c.state);
        assert_ne!(state, Some(ChunkState::InUse), "{args:?}: {} was freed", f[0]);
    }
    assert!(heap.chunks.iter().any(|c| c.state == ChunkState::Tcache));
    assert!(heap.chunks.iter().any(|c| c.state == ChunkState::Fastbin));
    // mallinfo2 was taken before the report was printed, which allocates nothing more.
    let m: Vec<u64> = t.tagged("M")[0].iter().map(|w| w.parse().unwrap()).collect();
    let in_main: u64 = heap.arenas.iter().map(|a| a.system_mem).sum();
    assert_eq!(m[0], in_main, "{args:?}: arena bytes");
    assert_eq!(
        m[3],
        heap.chunks.iter().filter(|c| c.arena == Chunk::MMAPPED).count() as u64,
        "{args:?}: hblks"
    );
    let free: u64 = heap
        .chunks
        .iter()
        .filter(|c| matches!(c.state, ChunkState::Bin | ChunkState::Fastbin))
        .map(|c| c.usable + 8)
        .chain(heap.chunks.iter().filter(|c| c.state == ChunkState::Top).map(|c| c.usable + 16))
        .sum();
    assert_eq!(m[2], free, "{args:?}: fordblks");
    // Nearly every chunk in use is one of the program's own (stdio, dl and TLS blocks are the rest).
    let in_use = heap.in_use().count();
    assert!(in_use >= live.len() && in_use < live.len() + 60, "{args:?}: {in_use} of {}", live.len());
    assert_eq!(heap.info().chunks_in_use, in_use as u64);
    assert_eq!(heap.safe_linking, Some(true));
    assert!(heap.version.starts_with("glibc-2."), "{}", heap.version);
    heap
}

#[test]
fn one_thread() {
    for seed in ["1", "2", "3"] {
        let heap = check(&["0", "40000", seed]);
        assert_eq!(heap.arenas.len(), 1);
        assert_eq!(heap.tcaches.len(), 1);
        assert_eq!(heap.tcaches[0].arena, heap.arenas[0].addr);
    }
}

#[test]
fn threads_with_arenas() {
    for n in ["1", "5"] {
        let heap = check(&[n, "40000", "7"]);
        assert!(heap.arenas.len() > 1);
        assert!(heap.tcaches.iter().skip(1).any(|t| t.arena != heap.arenas[0].addr));
        assert!(heap.segments.iter().any(|s| s.kind == SegmentKind::ThreadHeap));
    }
}

#[test]
fn thread_arena_of_several_heaps() {
    // More than 64 MiB below the mmap threshold: the arena needs a second heap.
    let heap = check(&["1", "40000", "9", "wide"]);
    let heaps = heap.segments.iter().filter(|s| s.kind == SegmentKind::ThreadHeap).count();
    assert!(heaps > 1, "{heaps}");
}

#[test]
fn break_that_cannot_grow() {
    let heap = check(&["1", "60000", "5", "nobrk"]);
    assert!(heap.arenas[0].noncontiguous);
    assert!(heap.segments.iter().any(|s| s.kind == SegmentKind::Mapped));
}

#[test]
fn a_held_lock_and_a_broken_chunk_are_errors() {
    let (t, _dir) = spawn(&["0", "20000", "4"]);
    let heap = GlibcHeap::read(&t, &t.threads(), &t.vmas()).unwrap();
    let poke = |addr: Addr, bytes: &[u8]| {
        use std::os::unix::fs::FileExt;
        let f = std::fs::File::options().write(true).open(format!("/proc/{}/mem", t.pid())).unwrap();
        f.write_all_at(bytes, addr.0).unwrap();
    };
    poke(heap.arenas[0].addr, &1u32.to_le_bytes());
    let e = GlibcHeap::read(&t, &t.threads(), &t.vmas()).unwrap_err();
    assert!(matches!(e, HeapError::InMalloc { value: 1, .. }), "{e}");
    poke(heap.arenas[0].addr, &0u32.to_le_bytes());
    let victim = heap.in_use().nth(500).unwrap().addr;
    poke(Addr(victim.0 - 8), &0x1233_u64.to_le_bytes());
    let e = GlibcHeap::read(&t, &t.threads(), &t.vmas()).unwrap_err();
    assert!(matches!(e, HeapError::Chunk { chunk, .. } if chunk.0 == victim.0 - 16), "{e}");
}
