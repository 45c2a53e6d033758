//! Pairing and redirection between two real processes of one program, stopped after their start-up: what is
//! paired by which evidence, and what is refused.
#![allow(missing_docs)]

use mcr_criu_lite::ProcessMemory;
use mcr_criu_lite::procfs::maps;
use mcr_image::elf::DebugDirs;
use mcr_image::{Addr, ElfFile, Memory, MemoryError, Pid, Region, proto};
use mcr_restore::link::overlay::Overlay;
use mcr_restore::link::pairs::{Evidence, Pairs, Side, Verdict};
use mcr_restore::link::redirect::{Holder, Redirect};
use mcr_restore::link::state::State;
use mcr_restore::link::{LinkStats, Refusal};
use mcr_transform::heap::GlibcHeap;
use mcr_transform::types::TypeModel;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

fn program() -> &'static (PathBuf, TypeModel) {
    static BUILT: OnceLock<(PathBuf, TypeModel)> = OnceLock::new();
    BUILT.get_or_init(|| {
        let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("pairs-{}", std::process::id()));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/pairs.c");
        let status = Command::new("cc")
            .args(["-g", "-O1", "-o"])
            .args([&out, &source])
            .status()
            .expect("a C compiler (cc)");
        assert!(status.success());
        let elf = ElfFile::open(&out).unwrap();
        let types = TypeModel::load(&elf, &DebugDirs::default()).unwrap();
        (out, types)
    })
}

struct Side2 {
    child: Child,
    mem: ProcessMemory,
    base: u64,
    heap: GlibcHeap,
}

impl Side2 {
    fn start(mode: &str) -> Self {
        let mut child = Command::new(&program().0)
            .arg(mode)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut b = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut b).unwrap();
        let pid = Pid(child.id() as i32);
        let mem = ProcessMemory::open(pid).unwrap();
        let lines = maps::read(pid).unwrap();
        let path = program().0.to_string_lossy().into_owned();
        let base = lines.iter().find(|m| m.name == path.as_bytes()).unwrap().start.0;
        let vma = |m: &maps::MapsLine| proto::Vma {
            start: m.start.0,
            end: m.end.0,
            prot: m.prot,
            kind: if m.ino != 0 { proto::VmaKind::VmaFilePrivate } else { proto::VmaKind::VmaAnonPrivate }
                as i32,
            name: String::from_utf8_lossy(&m.name).into_owned(),
            ..Default::default()
        };
        let vmas: Vec<_> = lines.iter().filter(|m| !m.name.starts_with(b"[v")).map(vma).collect();
        // Thread caches do not matter here.
        let heap = GlibcHeap::read(&mem, &[], &vmas).unwrap();
        Self { child, mem, base, heap }
    }
    fn global(&self, name: &str) -> Addr {
        Addr(self.base + program().1.global(name).unwrap().place.link().unwrap().0)
    }
    fn word(&self, at: Addr) -> u64 {
        self.mem.u64(at).unwrap()
    }
    fn value(&self, name: &str) -> u64 {
        self.word(self.global(name))
    }
}

impl Drop for Side2 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both memories in one, as a booted host has them.
struct Both<'a>(&'a Side2, &'a Side2);

impl Memory for Both<'_> {
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let native = self.1.heap.segment(addr).is_some() || addr.0.wrapping_sub(self.1.base) < 1 << 20;
        if native { self.1.mem.read(addr, buf) } else { self.0.mem.read(addr, buf) }
    }
    fn regions(&self) -> Vec<Region> {
        Vec::new()
    }
}

/// Walks the given globals of an old and a new process.
fn with<R>(
    mode: &str,
    globals: &[&str],
    check: impl FnOnce(&Side2, &Side2, &Pairs<'_>, &dyn Memory) -> R,
) -> R {
    let (old, new) = (Side2::start("old"), Side2::start(mode));
    let both = Both(&old, &new);
    let mut pairs = Pairs::new(&program().1, &both, &new.heap, &old.heap, Vec::new());
    for name in globals {
        let ty = program().1.global(name).unwrap().ty;
        let content = old.mem.bytes(old.global(name), 8).unwrap();
        pairs.root(ty, Side::At(new.global(name)), Side::In(&content, 0), name, false);
    }
    check(&old, &new, &pairs, &both)
}

fn paired(pairs: &Pairs<'_>, native: u64, old: u64, evidence: Evidence) {
    match pairs.verdict(Addr(native)) {
        Verdict::Paired(p) => {
            assert_eq!(native.wrapping_add(p.delta), old, "{p:?}");
            assert_eq!(p.evidence, evidence, "{p:?}");
        }
        v => panic!("{native:#x}: {v:?}"),
    }
}

#[test]
fn objects_pair_by_path_and_the_strongest_evidence_is_kept() {
    with("new", &["config", "list", "opaque"], |old, new, pairs, _| {
        let (oc, nc) = (old.value("config"), new.value("config"));
        // struct config points to its own kind (backup): the order of such objects may be a race.
        paired(pairs, nc, oc, Evidence::List);
        for i in 0..3 {
            let w = |s: &Side2, c: u64| s.word(Addr(c + 8 + 8 * i));
            let (o, n) = (w(old, oc), w(new, nc));
            paired(pairs, n, o, Evidence::List);
            paired(pairs, new.word(Addr(n + 16)), old.word(Addr(o + 16)), Evidence::List);
        }
        let block = |s: &Side2| s.value("opaque");
        paired(pairs, block(new), block(old), Evidence::Direct);
        paired(pairs, new.word(Addr(block(new) + 24)), old.word(Addr(block(old) + 24)), Evidence::Opaque);
    });
}

#[test]
fn a_list_in_another_order_is_a_contradiction_not_a_choice() {
    with("reversed", &["config", "list"], |_, new, pairs, _| {
        let first = new.word(Addr(new.value("config") + 8));
        let v = pairs.verdict(Addr(first));
        assert!(matches!(v, Verdict::Contradiction(..)), "{v:?}");
    });
}

fn redirect<R>(
    mode: &str,
    globals: &[&str],
    check: impl FnOnce(&Side2, &Side2, &mut Redirect<'_>, &mut State<'_>) -> R,
) -> R {
    with(mode, globals, |old, new, pairs, both| {
        let mut r = Redirect::new(pairs, &new.heap, &old.heap, both, &[]);
        let mut state = State {
            out: Overlay::new(both),
            regs: BTreeMap::new(),
            set: BTreeSet::new(),
            findings: Vec::new(),
            stats: LinkStats::default(),
        };
        check(old, new, &mut r, &mut state)
    })
}

fn refused(r: Result<Option<u64>, Refusal>, invariant: &str, text: &str) {
    let e = r.unwrap_err();
    assert!(e.invariant == invariant && e.message.contains(text), "{e}");
}

#[test]
fn i5_two_start_up_objects_for_one_old_one_are_refused() {
    // Old's `first` and `second` are one object, the new version makes two.
    redirect("new", &["first", "second"], |_, new, r, state| {
        let word = new.value("first");
        refused(r.word(word, &Holder::Global, "first", state), "I5", "two old objects");
        assert_eq!(r.word(word, &Holder::Stack, "stack", state), Ok(None), "a stale word does no harm");
        assert_eq!(state.stats.stale_words, 1);
    });
}

#[test]
fn i5_the_order_of_a_list_does_not_say_which_object_a_thread_has() {
    redirect("new", &["list"], |_, new, r, state| {
        let word = new.value("list");
        refused(r.word(word, &Holder::Thread, "thread-specific data", state), "I5", "its place in a list");
        assert!(
            matches!(r.word(word, &Holder::Global, "list", state), Ok(Some(_))),
            "as a set they are the same"
        );
    });
}

#[test]
fn i4_a_needed_object_without_a_counterpart_is_refused() {
    redirect("new", &["config", "lonely"], |_, new, r, state| {
        let word = new.value("lonely");
        refused(r.word(word, &Holder::Argument, "argument rsi of read", state), "I4", "no counterpart");
        refused(
            r.word(word, &Holder::Local { in_old: true }, "main::p", state),
            "I4",
            "could not be carried",
        );
        refused(
            r.word(word, &Holder::Register { open: true }, "register rbx", state),
            "I4",
            "nothing says which",
        );
        assert_eq!(
            r.word(word, &Holder::Local { in_old: false }, "main::q", state),
            Ok(None),
            "new's own variable"
        );
        assert_eq!(r.word(word, &Holder::Register { open: false }, "register rbp", state), Ok(None));
        assert_eq!(state.findings.iter().filter(|f| f.code == "native-register").count(), 1);
    });
}

#[test]
fn an_object_of_new_alone_survives_and_its_pointers_are_redirected() {
    redirect("extra", &["config"], |old, new, r, state| {
        let fresh = new.value("fresh");
        assert_eq!(r.word(fresh, &Holder::Global, "fresh", state), Ok(None), "it stays");
        r.follow(state).unwrap();
        assert_eq!(state.stats.native_survivors, 1);
        let owner = state.out.u64(Addr(fresh + 8)).unwrap();
        assert_eq!(owner, old.word(Addr(old.value("config") + 16)), "its owner is old's second worker");
        assert_ne!(owner, new.word(Addr(fresh + 8)));
    });
}

#[test]
fn pointers_into_a_paired_object_keep_their_offset_and_too_far_ones_are_refused() {
    redirect("new", &["opaque", "config"], |old, new, r, state| {
        let (o, n) = (old.value("opaque"), new.value("opaque"));
        assert_eq!(r.word(n + 16, &Holder::Register { open: false }, "rbx", state), Ok(Some(o + 16)));
        assert_eq!(r.word(4096, &Holder::Global, "x", state), Ok(None));
        assert_eq!(
            r.word(o, &Holder::Global, "x", state),
            Ok(None),
            "old memory is nobody's start-up object"
        );
    });
}

#[test]
fn objects_that_only_registers_hold_pair_by_size_and_shape() {
    let (old, new) = (Side2::start("old"), Side2::start("new"));
    let both = Both(&old, &new);
    let scratch = |s: &Side2, i: u64| s.word(Addr(s.word(Addr(s.value("config") + 8 + 8 * i)) + 16));
    let mut pairs = Pairs::new(&program().1, &both, &new.heap, &old.heap, Vec::new());
    let (n, o) = (new.value("config"), old.value("config"));
    // config is the only object of its size in the frame; `lonely` has no counterpart.
    let open = pairs.frame_registers(&[n, new.value("lonely"), 7], &[o, 9], "registers of main");
    assert!(!open, "nothing of old's is left over");
    paired(&pairs, n, o, Evidence::Register);
    // Two of one size on one side: nobody can tell.
    let mut pairs = Pairs::new(&program().1, &both, &new.heap, &old.heap, Vec::new());
    let open = pairs.frame_registers(
        &[scratch(&new, 0)],
        &[scratch(&old, 0), scratch(&old, 1)],
        "registers of main",
    );
    assert!(open);
    assert_eq!(pairs.verdict(Addr(scratch(&new, 0))), Verdict::Unknown);
}
