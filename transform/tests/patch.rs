//! Patches of one small program in two versions, checked word by word.

mod support;

use mcr_image::proto::{self, place, reloc};
use mcr_image::{Addr, ElfFile, Memory};
use mcr_plugin::Rules;
use mcr_transform::{Options, PatchedMemory, Refusal, TransformError, transform_process};
use std::path::{Path, PathBuf};
use support::{Target, compile, hex};

struct Pair {
    t: Target,
    new: PathBuf,
    elf: ElfFile,
    _dir: tempfile::TempDir,
}

fn pair(mode: &str) -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c/pair.c");
    let old = compile(dir.path(), "v1", &source, &[]);
    let new = compile(dir.path(), "v2", &source, &["-DV2"]);
    let t = Target::spawn(&old, &[mode]);
    let elf = ElfFile::open(&new).unwrap();
    Pair { t, new, elf, _dir: dir }
}

fn rules(text: &str) -> Options {
    let rules = Rules::parse(text, Path::new("test.toml")).unwrap();
    Options { rules, ..Options::default() }
}

impl Pair {
    fn run(&self, toml: &str) -> Result<proto::Patch, TransformError> {
        transform_process(&self.t.process(), &self.t, &self.t.modules(), &self.new, &rules(toml))
    }
    fn refused(&self, toml: &str) -> Refusal {
        match self.run(toml) {
            Err(TransformError::Refused(r)) => *r,
            Err(e) => panic!("{e}"),
            Ok(p) => panic!("not refused: {:#?}", p.findings),
        }
    }
    fn symbol(&self, name: &str) -> u64 {
        self.elf.symbol(name).unwrap_or_else(|| panic!("no {name}")).addr.0
    }
    fn addr(&self, name: &str) -> u64 {
        hex(&self.t.tagged("A").iter().find(|w| w[0] == name).unwrap()[1])
    }
}

fn global<'p>(p: &'p proto::Patch, name: &str) -> (u32, &'p proto::GlobalValue) {
    let i = p.globals.iter().position(|g| g.name == name).unwrap_or_else(|| panic!("{name} is not carried"));
    (i as u32, &p.globals[i])
}

fn reloc_at(p: &proto::Patch, at: place::In, offset: u64) -> Option<&proto::Reloc> {
    p.relocs.iter().find(|r| {
        let place = r.place.as_ref().unwrap();
        place.offset == offset && place.r#in.as_ref() == Some(&at)
    })
}

fn link(r: Option<&proto::Reloc>) -> u64 {
    match r.expect("a relocation").target {
        Some(reloc::Target::NewLinkAddr(a)) => a,
        ref other => panic!("{other:?}"),
    }
}

fn word(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().unwrap())
}

#[test]
fn everything_is_carried() {
    let x = pair("");
    let p = x.run("[rename.globals]\nold_name = \"new_name\"\n").unwrap_or_else(|e| panic!("{e}"));
    let m = PatchedMemory::new(&x.t, &p);
    let new_of =
        |old: u64| p.objects.iter().find(|o| o.old_addr == old).unwrap_or_else(|| panic!("{old:#x}")).addr;
    let at = |a: u64| m.u64(Addr(a)).unwrap();

    // Three nodes, the array and the flexible one outgrew their chunks; `small` did not.
    let stats = p.stats.as_ref().unwrap();
    assert_eq!((stats.moved, stats.relaid), (5, 6), "{:#?}", p.objects);
    let nodes: Vec<(u64, u64)> = x.t.tagged("N").iter().map(|w| (hex(&w[0]), hex(&w[1]))).collect();
    for (i, (old, name)) in nodes.iter().enumerate() {
        let n = new_of(*old);
        assert_ne!(n, *old);
        assert_eq!(at(n), nodes.get(i + 1).map_or(0, |next| new_of(next.0)), "next");
        assert_eq!(m.u32(Addr(n + 8)).unwrap(), 102 - i as u32, "id");
        assert_eq!(at(n + 16), 0, "extra");
        assert_eq!(at(n + 24), *name, "name");
        let function = if (2 - i) % 2 == 1 { "one" } else { "two" };
        assert_eq!(link(reloc_at(&p, place::In::Addr(n + 32), 0)), x.symbol(function));
        assert_eq!(m.u32(Addr(n + 40)).unwrap(), 2, "KIND_B");
    }
    let (head, second) = (new_of(nodes[0].0), new_of(nodes[1].0));
    let small = x.addr("small");
    assert_eq!((at(small), at(small + 8), at(small + 16)), (7, 0, second));
    let steady = x.addr("steady");
    assert_eq!((at(steady), at(steady + 16)), (head, second + 8));
    assert_eq!(at(steady + 8), x.addr("text"), "literals stay");
    let flex = new_of(x.addr("flex"));
    assert_eq!(m.u32(Addr(flex)).unwrap(), 100);
    assert_eq!(m.cstr(Addr(flex + 16), 20).unwrap(), b"flexible");
    let opaque = x.addr("opaque");
    assert_eq!((at(opaque), at(opaque + 24)), (head, head + 24));
    assert_eq!(link(reloc_at(&p, place::In::Addr(opaque + 8), 0)), x.symbol("two"));
    assert_eq!(link(reloc_at(&p, place::In::Addr(opaque + 16), 0)), x.symbol("counter"));
    assert!(reloc_at(&p, place::In::Addr(opaque + 8), 0).unwrap().conservative);
    let array = x.addr("array");
    for (i, n) in nodes.iter().rev().enumerate() {
        assert_eq!(at(array + 8 * i as u64), new_of(n.0));
    }

    let items = new_of(x.addr("items"));
    assert_eq!(p.objects.iter().find(|o| o.addr == items).unwrap().count, 5);
    for i in 0..5 {
        assert_eq!((at(items + 24 * i), at(items + 24 * i + 8)), (i, 0));
        let function = if i % 2 == 1 { "one" } else { "two" };
        assert_eq!(link(reloc_at(&p, place::In::Addr(items + 24 * i + 16), 0)), x.symbol(function));
    }
    assert_eq!(word(&global(&p, "third").1.content, 0), items + 2 * 24);

    // Globals.
    assert_eq!(word(&global(&p, "counter").1.content, 0), 12345);
    assert_eq!(global(&p, "counter").1.size, 8);
    assert_eq!(global(&p, "new_name").1.content, 77u32.to_le_bytes());
    assert!(p.globals.iter().all(|g| g.name != "unchanged" && g.name != "packed" && g.name != "lock"));
    assert_eq!(word(&global(&p, "list").1.content, 0), head);
    let (hidden, g) = global(&p, "hidden");
    assert_eq!(word(&g.content, 0), head);
    assert_eq!(link(reloc_at(&p, place::In::Global(hidden), 8)), x.symbol("one"));
    let (last, _) = global(&p, "last");
    assert_eq!(link(reloc_at(&p, place::In::Global(last), 0)), x.symbol("fixed") + 2 * 24);
    let (hot, _) = global(&p, "hot");
    assert_eq!(link(reloc_at(&p, place::In::Global(hot), 0)), x.symbol("table") + 2 * 24);
    let (_, table) = global(&p, "table");
    assert_eq!(table.content[2 * 24 + 16], 5, "calls of TWO");
    let native = |at: u64| table.keep_native.iter().any(|r| r.start <= at && at < r.end);
    assert!(native(0) && native(24) && native(48) && !native(48 + 16), "{:?}", table.keep_native);
    let (me, _) = global(&p, "me");
    let tid = x.t.pid();
    assert_eq!(reloc_at(&p, place::In::Global(me), 0).unwrap().target, Some(reloc::Target::ThreadOf(tid)));
    let (pid, _) = global(&p, "my_pid");
    let want = reloc::Target::Pid(proto::PidOf { old_tid: tid });
    assert_eq!(reloc_at(&p, place::In::Global(pid), 0).unwrap().target, Some(want));
    let (inline, g) = global(&p, "inline_node");
    assert_eq!((g.content[8], g.size), (9, 56));
    assert_eq!(link(reloc_at(&p, place::In::Global(inline), 32)), x.symbol("two"));
    assert!(g.keep_native.iter().any(|r| r.start == 16 && r.end == 24));
    let (to, _) = global(&p, "to_inline");
    assert_eq!(link(reloc_at(&p, place::In::Global(to), 0)), x.symbol("inline_node"));

    // Thread-locals.
    let tls = |name: &str| p.tls.iter().find(|t| t.name == name).unwrap();
    assert_eq!(tls("tls_count").content, 3u32.to_le_bytes());
    assert_eq!(word(&tls("tls_node").content, 0), head);

    // The new region is nothing but chunks.
    let r = &p.regions[0];
    assert!(r.start.is_multiple_of(4096) && r.content.len().is_multiple_of(4096) && r.malloc_chunks);
    assert!(x.t.vmas().iter().all(|v| v.end <= r.start || r.start + r.content.len() as u64 <= v.start));
    let mut at = 0;
    while word(&r.content, at + 8) != 0x11 {
        at += (word(&r.content, at + 8) & !7) as usize;
    }
    assert_eq!(at + 32, r.content.len());
    assert_eq!(p.retired.len(), 5);
    let change =
        |n: &str| p.changes.iter().find(|c| c.type_name == n).unwrap_or_else(|| panic!("{:#?}", p.changes));
    assert_eq!(change("struct node").live_objects, 3);
}

#[test]
fn a_dropped_global_is_told() {
    let p = pair("").run("").unwrap();
    let f = p.findings.iter().find(|f| f.code == "global-dropped").expect("a finding");
    assert!(f.message.contains("old_name") && f.next_step.contains("[rename.globals]"), "{f:?}");
}

#[test]
fn keep_rules() {
    let x = pair("");
    let p = x.run("[keep]\ncounter = \"new\"\nunchanged = \"old\"\n").unwrap();
    assert!(p.globals.iter().all(|g| g.name != "counter"));
    let _ = global(&p, "unchanged");
}

fn expect(mode: &str, code: &str, exit: u8) -> Refusal {
    let r = pair(mode).refused("");
    assert!(r.reasons.iter().any(|f| f.code == code), "{mode}: {r}");
    assert_eq!(r.exit_code(), exit, "{mode}: {r}");
    assert!(r.reasons.iter().all(|f| !f.next_step.is_empty()), "{r}");
    r
}

#[test]
fn a_pointer_into_the_middle_of_a_function() {
    let r = expect("middle", "I6-text-pointer", 1);
    assert!(r.reasons[0].message.contains("function one+0x4"), "{r}");
    assert_eq!(r.reasons[0].path, "list.fn");
}

#[test]
fn a_pointer_at_an_odd_place() {
    expect("unaligned", "I7-hidden-pointer", 1);
}

#[test]
fn a_lock_that_is_held() {
    let r = expect("locked", "I8-lock-held", 1);
    assert_eq!(r.reasons[0].path, "lock");
}

#[test]
fn two_types_for_one_object() {
    expect("conflict", "type-conflict", 5);
}

#[test]
fn a_pointer_to_a_stack() {
    expect("stack", "stack-reference", 1);
}

#[test]
fn an_object_that_no_type_reaches() {
    let r = expect("untyped", "untyped-object", 5);
    assert!(r.reasons[0].next_step.contains("struct node"), "{r}");
}

#[test]
fn an_object_shorter_than_its_type() {
    expect("short", "object-too-small", 5);
}

#[test]
fn a_rule_names_the_type_behind_a_void_pointer() {
    let x = pair("any");
    let r = x.refused("");
    assert!(r.reasons.iter().all(|f| f.code == "untyped-object"), "{r}");
    let p = x.run("[types]\nany = \"struct node\"\n").unwrap_or_else(|e| panic!("{e}"));
    let at = word(&global(&p, "any").1.content, 0);
    let m = PatchedMemory::new(&x.t, &p);
    assert_eq!(m.u32(Addr(at + 8)).unwrap(), 55);
    assert_eq!(link(reloc_at(&p, place::In::Addr(at + 32), 0)), x.symbol("one"));
}

#[test]
fn a_leaked_object_does_not_stand_in_the_way() {
    pair("dead").run("").unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn a_changed_table_whose_elements_cannot_be_told_apart() {
    let r = expect("twins", "table-order", 5);
    assert!(r.reasons[0].next_step.contains("[keep]"), "{r}");
    pair("twins").run("[keep]\ntwins = \"new\"\n").unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn an_object_with_more_behind_it() {
    expect("tail", "unknown-tail", 5);
}

#[test]
fn an_object_in_the_programs_own_mapping() {
    expect("mapping", "I7-cannot-move", 1);
}

#[test]
fn a_reference_to_a_member_that_is_gone() {
    expect("gone", "I7-opaque-reference", 1);
    let r = expect("gone-typed", "I7-interior", 1);
    assert_eq!(r.reasons[0].path, "steady.id_of");
}
