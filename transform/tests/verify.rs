//! I10 and I11 over a patch that is spoilt on purpose: what a mistake of the plan would look like.

mod support;

use mcr_image::proto::{self, place, reloc};
use mcr_image::{Addr, ElfFile, Memory};
use mcr_plugin::Rules;
use mcr_transform::heap::GlibcHeap;
use mcr_transform::types::TypeModel;
use mcr_transform::verify::{Broken, Placing, Root, Unbooted, Verifier};
use mcr_transform::{Loaded, PatchedMemory, Prepared};
use std::collections::BTreeMap;
use std::path::Path;
use support::{Target, compile};

/// Somewhere nothing else is.
const BASE: u64 = 0x6000_0000_0000;

/// As if booted: the new program has a place, and so have its relocations.
struct Fake<'a>(&'a proto::Patch);

impl Placing for Fake<'_> {
    fn program(&self) -> Option<Addr> {
        Some(Addr(BASE))
    }
    fn thread(&self, _: u32) -> Option<u64> {
        None
    }
    fn tls(&self, _: u32, _: u64) -> Option<u64> {
        None
    }
    fn local(&self, _: &proto::LocalAddr) -> Option<u64> {
        None
    }
    fn pid(&self, old: u32) -> Option<u32> {
        Some(old)
    }
    fn root(&self, root: Root) -> Option<Vec<u8>> {
        let mut bytes = Unbooted(self.0).root(root)?;
        for r in &self.0.relocs {
            let (Some(place), Some(reloc::Target::NewLinkAddr(l))) = (&r.place, &r.target) else { continue };
            let here = match (place.r#in.as_ref(), root) {
                (Some(place::In::Global(i)), Root::Global(g)) => *i as usize == g,
                (Some(place::In::Tls(i)), Root::Tls(t)) => *i as usize == t,
                _ => false,
            };
            if here {
                let at = place.offset as usize;
                bytes[at..at + 8].copy_from_slice(&(BASE + l).to_le_bytes());
            }
        }
        Some(bytes)
    }
}

/// The patch with its relocations as writes.
fn resolved(p: &proto::Patch) -> proto::Patch {
    let mut p = p.clone();
    for r in p.relocs.clone() {
        let (Some(place), Some(reloc::Target::NewLinkAddr(l))) = (&r.place, &r.target) else { continue };
        if let Some(place::In::Addr(a)) = place.r#in {
            let content = (BASE + l).to_le_bytes().to_vec();
            p.writes.push(proto::Write { addr: a + place.offset, content, object: 0 });
        }
    }
    p
}

struct Case<'a> {
    prepared: &'a Prepared<'a>,
    process: &'a proto::Process,
    t: &'a Target,
    modules: &'a mcr_image::ModuleMap,
    heap: &'a GlibcHeap,
}

impl Case<'_> {
    fn verify(&self, p: &proto::Patch) -> Result<(usize, usize), Broken> {
        let laid = resolved(p);
        let view = PatchedMemory::new(self.t, &laid);
        let v = Verifier::new(self.prepared, self.process, self.t, self.modules, self.heap, p).unwrap();
        let r = v.relations(&view, &Fake(p))?;
        let t = v.round_trip(&view, &Fake(p))?;
        Ok((r.edges, t.objects))
    }
}

fn word(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().unwrap())
}

type Table = BTreeMap<(&'static str, &'static str), (usize, usize)>;

/// Spoils the patch in many places, one at a time; returns what was refused of how many.
fn spoil(c: &Case<'_>, good: &proto::Patch) -> Table {
    let mut table = Table::new();
    let mut count = |class, kind, bad: &proto::Patch, what: String| {
        let row = table.entry((class, kind)).or_default();
        row.1 += 1;
        match c.verify(bad) {
            Err(b) => {
                row.0 += 1;
                assert!(!b.message.is_empty() && !b.next_step.is_empty(), "{b:?}");
            }
            Ok(_) => eprintln!("  missed: {class}, {kind}: {what}"),
        }
    };
    let moved: Vec<&proto::TypedObject> = good.objects.iter().filter(|o| o.moved).collect();
    let is_moved = |w: u64| moved.iter().any(|o| o.addr <= w && w < o.addr + o.size);
    let step = |n: usize| (n / 40).max(1);
    // Words of moved objects.
    for (ri, r) in good.regions.iter().enumerate() {
        let relocated = |a: u64| {
            good.relocs.iter().any(|r| {
                r.place.as_ref().is_some_and(
                    |p| matches!(p.r#in, Some(place::In::Addr(b)) if (b + p.offset).abs_diff(a) < 8),
                )
            })
        };
        let inside = |i: &usize| {
            !relocated(r.start + *i as u64) && is_moved(r.start + *i as u64) && word(&r.content, *i) != 0
        };
        let all: Vec<usize> = (0..r.content.len() - 7).step_by(8).filter(inside).collect();
        for &i in all.iter().step_by(step(all.len())) {
            let w = word(&r.content, i);
            let with = |value: u64| {
                let mut bad = good.clone();
                bad.regions[ri].content[i..i + 8].copy_from_slice(&value.to_le_bytes());
                bad
            };
            let what = format!("{:#x}: {w:#x}", r.start + i as u64);
            // A byte that holds something.
            let byte = w.to_le_bytes().iter().position(|b| *b != 0).unwrap();
            count("moved object", "bit flipped", &with(w ^ (1 << (8 * byte))), what.clone());
            if is_moved(w) {
                count("moved object", "pointer 8 off", &with(w + 8), what.clone());
                let other = moved.iter().find(|o| !(o.addr..o.addr + o.size).contains(&w)).unwrap();
                count("moved object", "other object", &with(other.addr), what.clone());
            }
        }
    }
    for (i, w) in good.writes.iter().enumerate().step_by(step(good.writes.len())) {
        let what = format!("{:#x}", w.addr);
        let mut bad = good.clone();
        bad.writes.remove(i);
        count("write in place", "dropped", &bad, what.clone());
        let mut bad = good.clone();
        bad.writes[i].addr += 8;
        count("write in place", "at another place", &bad, what.clone());
        let n = w.content.iter().position(|b| *b != 0).unwrap_or(0);
        let mut bad = good.clone();
        bad.writes[i].content[n] ^= 4;
        count("write in place", "bit flipped", &bad, what);
    }
    for (i, g) in good.globals.iter().enumerate() {
        let kept = |n: u64| g.keep_native.iter().any(|r| r.start <= n && n < r.end);
        let Some(n) = (0..g.content.len()).find(|&n| g.content[n] != 0 && !kept(n as u64)) else { continue };
        let mut bad = good.clone();
        bad.globals[i].content[n] ^= 1;
        // What a relocation covers is the relocation's.
        let covered = good.relocs.iter().any(|r| {
            r.place.as_ref().is_some_and(|p| {
                p.r#in == Some(place::In::Global(i as u32)) && (p.offset..p.offset + 8).contains(&(n as u64))
            })
        });
        if !covered {
            count("global", "bit flipped", &bad, g.name.clone());
        }
        for at in
            (0..g.content.len().saturating_sub(7)).step_by(8).filter(|&at| is_moved(word(&g.content, at)))
        {
            let w = word(&g.content, at);
            let mut bad = good.clone();
            bad.globals[i].content[at..at + 8].copy_from_slice(&(w + 8).to_le_bytes());
            count("global", "pointer 8 off", &bad, g.name.clone());
            // The indices of places are positions in the list: take its value away, not its entry.
            let mut bad = good.clone();
            bad.globals[i].old_addr = 0;
            count("global", "not carried", &bad, g.name.clone());
        }
    }
    let links: Vec<u64> = good
        .relocs
        .iter()
        .filter_map(|r| if let Some(reloc::Target::NewLinkAddr(l)) = r.target { Some(l) } else { None })
        .collect();
    for i in (0..good.relocs.len()).step_by(step(good.relocs.len())) {
        let Some(reloc::Target::NewLinkAddr(l)) = good.relocs[i].target else { continue };
        let Some(other) = links.iter().find(|o| o.abs_diff(l) > 4096) else { continue };
        let mut bad = good.clone();
        bad.relocs[i].target = Some(reloc::Target::NewLinkAddr(*other));
        count("relocation", "other symbol", &bad, good.relocs[i].symbol.clone());
        let mut bad = good.clone();
        bad.relocs.remove(i);
        count("relocation", "dropped", &bad, good.relocs[i].symbol.clone());
    }
    for i in 1..moved.len().min(20) {
        let (a, b) = (moved[i - 1].old_addr, moved[i].old_addr);
        let mut bad = good.clone();
        for o in &mut bad.objects {
            if o.old_addr == a {
                o.old_addr = b;
            } else if o.old_addr == b {
                o.old_addr = a;
            }
        }
        count("moved object", "two exchanged", &bad, format!("{a:#x} and {b:#x}"));
        let mut bad = good.clone();
        let at = bad.objects.iter().find(|o| o.old_addr == a).unwrap().addr;
        bad.objects.iter_mut().find(|o| o.old_addr == b).unwrap().addr = at;
        count("moved object", "two at one place", &bad, format!("{a:#x} and {b:#x}"));
    }
    table
}

fn show(name: &str, table: &Table) {
    eprintln!("{name}: refused, of all");
    for ((class, kind), (caught, n)) in table {
        eprintln!("{class:>16} {kind:<18} {caught:>4} {n:>4}");
    }
}

fn with_case<R>(
    old: &Path,
    new: &Path,
    t: &Target,
    rules: &Rules,
    run: impl FnOnce(&Case<'_>, proto::Patch) -> R,
) -> R {
    let _ = old;
    let (process, modules) = (t.process(), t.modules());
    let dirs = Default::default();
    let elf = ElfFile::open(new).unwrap();
    let (old_types, types) =
        (TypeModel::load(&modules.exe().unwrap().elf, &dirs).unwrap(), TypeModel::load(&elf, &dirs).unwrap());
    let loaded = Loaded { path: new.display().to_string(), elf: &elf, types: &types, old_types: &old_types };
    let prepared = Prepared::new(&loaded, rules);
    let (patch, heap) = prepared.plan(&process, t, &modules).unwrap();
    let case = Case { prepared: &prepared, process: &process, t, modules: &modules, heap: &heap };
    run(&case, mcr_transform::refuse(patch).unwrap_or_else(|e| panic!("{e}")))
}

#[test]
fn a_spoilt_patch_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c/pair.c");
    let old = compile(dir.path(), "v1", &source, &[]);
    let new = compile(dir.path(), "v2", &source, &["-DV2"]);
    let t = Target::spawn(&old, &[""]);
    let rules = Rules::parse("[rename.globals]\nold_name = \"new_name\"\n", Path::new("t.toml")).unwrap();
    with_case(&old, &new, &t, &rules, |c, good| {
        let (edges, objects) = c.verify(&good).unwrap_or_else(|b| panic!("unspoilt: {b:?}"));
        assert!(edges > 20 && objects >= 10, "{edges} {objects}");
        let table = spoil(c, &good);
        show("pair", &table);
        for ((class, kind), (caught, n)) in &table {
            // Typed memory is compared whole; a word that no type explains is no relation to check.
            let opaque = *class == "write in place" || *kind == "not carried" || *class == "relocation";
            assert!(if opaque { 2 * caught > *n } else { caught == n }, "{class}, {kind}: {caught} of {n}");
        }
    });
}

#[test]
fn what_is_dropped_is_named() {
    dropped_members("");
}

#[test]
fn what_is_dropped_is_named_where_objects_move() {
    dropped_members("char more[64];");
}

fn dropped_members(more: &str) {
    let dir = tempfile::tempdir().unwrap();
    let program = |name: &str, body: &str| {
        let file = dir.path().join(format!("{name}.c"));
        let text = format!(
            "#include <stdio.h>\n#include <stdlib.h>\n{body}\nstruct s *list;\nint main(void) {{\n\
             for (int i = 1; i < 4; i++) {{ struct s *p = calloc(1, sizeof *p); p->next = list; p->id = i; \
             fill(p); list = p; }}\nputs(\"ready\"); fflush(stdout); return getchar(); }}\n"
        );
        std::fs::write(&file, text).unwrap();
        compile(dir.path(), name, &file, &[])
    };
    let old = program(
        "old",
        "struct s { void (*run)(void); struct s *next; int id; long gone; short wide; float f; };\n\
         static void one(void) {}\n\
         static void fill(struct s *p) { p->gone = 7; p->wide = -3; p->f = 1.5f; p->run = one; }",
    );
    let new = program(
        "new",
        &format!(
            "struct s {{ long wide; double f; struct s *next; int id; void (*run)(void); {more} }};\n\
             static void one(void) {{}}\n\
             static void fill(struct s *p) {{ p->wide = 1; p->run = one; }}"
        ),
    );
    let t = Target::spawn(&old, &[]);
    let rules = Rules::default();
    with_case(&old, &new, &t, &rules, |c, good| {
        // The first member of the old struct is not the first of the new one.
        c.verify(&good).unwrap_or_else(|b| panic!("unspoilt: {b:?}"));
        assert_eq!(good.objects.iter().all(|o| o.moved), !more.is_empty());
        let v = Verifier::new(c.prepared, c.process, c.t, c.modules, c.heap, &good).unwrap();
        let trip = v.round_trip(&PatchedMemory::new(c.t, &good), &Unbooted(&good)).unwrap();
        assert_eq!((trip.objects, trip.types.get("struct s")), (3, Some(&3)));
        assert_eq!(trip.lost.iter().map(String::as_str).collect::<Vec<_>>(), ["struct s.gone"]);
        assert!(trip.finding().unwrap().message.contains("not struct s.gone"));
        // Any member of any object, with one bit wrong.
        for o in &good.objects {
            let r = good
                .regions
                .iter()
                .position(|r| r.start <= o.addr && o.addr < r.start + r.content.len() as u64);
            for (member, offset) in [("wide", 0), ("f", 15), ("next", 16), ("id", 24)] {
                let mut bad = good.clone();
                let (at, write) = match r {
                    Some(i) => ((o.addr - good.regions[i].start) as usize + offset, None),
                    None => (offset, good.writes.iter().position(|w| w.addr == o.addr)),
                };
                match (r, write) {
                    (Some(i), _) => bad.regions[i].content[at] ^= 1,
                    (None, Some(w)) => bad.writes[w].content[at] ^= 1,
                    _ => panic!("no bytes for {o:?}"),
                }
                let b = c.verify(&bad).unwrap_err();
                let expected = if member == "next" { "I10" } else { "I11" };
                assert_eq!(b.invariant, expected, "{member}: {b:?}");
                assert!(b.path.contains("list") && b.path.contains(member), "{member}: {b:?}");
            }
        }
        drop(c.t.u64(Addr(good.objects[0].old_addr)));
    });
}
