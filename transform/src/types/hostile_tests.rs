//! Damaged debug information: an error or a model, never a panic, and whatever was read can be used.

use super::sections::Sections;
use super::{LayoutDiff, TypeModel};
use mcr_image::elf::{DebugDirs, ElfFile};
use mcr_plugin::Rules;
use proptest::prelude::*;
use std::process::Command;
use std::sync::OnceLock;

const SOURCE: &str = "
struct later; enum e { A, B = 9 }; typedef struct { int x : 3, y : 9; } bits;
struct node { struct node *next; union { int i; char c[8]; }; enum e e; bits b[2][3]; int (*f)(struct node *, ...); struct later *l; const char *const *n; };
static struct node head; __thread int t; static int work(struct node *n) { static int hits; int k = n->i; return k + ++hits; }
int main(int argc, char **argv) { struct node local = head; t = argc; return work(&local) + t; }";

type Content = Vec<(gimli::SectionId, Vec<u8>)>;

/// Sections of the program, built once per flavour.
fn programs() -> &'static [Content] {
    static ALL: OnceLock<Vec<Content>> = OnceLock::new();
    ALL.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("p.c"), SOURCE).unwrap();
        [&["-gdwarf-5", "-O2"][..], &["-gdwarf-4", "-fdebug-types-section"]]
            .iter()
            .map(|flags| {
                let out = dir.path().join("p");
                let run = Command::new("gcc")
                    .current_dir(&dir)
                    .args(["-g", "-pie", "-fPIE", "-o", "p", "p.c"])
                    .args(*flags)
                    .status();
                assert!(run.unwrap().success());
                let elf = ElfFile::open(&out).unwrap();
                Sections::read(&elf, &DebugDirs::default()).unwrap().main().to_vec()
            })
            .collect()
    })
}

/// Uses everything that was read.
fn exercise(m: &TypeModel) {
    for id in m.ids() {
        let _ =
            (m.size_of(id), m.display(id), m.resolve(id), m.sync_kind(id), m.is_pid_t(id), m.type_name(id));
        if m.describe(id).len() < 100_000 {
            let _ = m.pointer_map(id);
        }
    }
    for v in m.globals() {
        let _ = (v.display(), m.global(&v.name), v.place.link().and_then(|a| m.global_at(a)));
    }
    for f in m.functions() {
        let _ = f.ranges.first().and_then(|r| m.function_at(r.0));
    }
    let rules = Rules::default();
    let twin = model(&programs()[0]).unwrap();
    for (a, b) in [(m, &twin), (&twin, m)] {
        let d = LayoutDiff::new(a, b, &rules);
        let _ = d.report().text();
        for id in a.ids() {
            if let Some(n) = d.pair(id).filter(|n| b.size_of(*n) < 1 << 16) {
                let bytes = vec![0x5a; a.size_of(id).min(1 << 16) as usize];
                let _ = (d.convert(id, n, &bytes), d.map_offset(id, n, 8, None), d.pointer_moves(id, n));
            }
        }
    }
}

fn model(c: &Content) -> Result<TypeModel, super::TypesError> {
    TypeModel::from_sections(Sections::of(c.clone()), "p")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn flipped_bytes(which in 0usize..2, section in 0usize..16, edits in prop::collection::vec((any::<u32>(), any::<u8>()), 1..24)) {
        let mut c = programs()[which].clone();
        let n = section % c.len();
        let data = &mut c[n].1;
        for (at, byte) in edits {
            if !data.is_empty() {
                let at = at as usize % data.len();
                data[at] = byte;
            }
        }
        if let Ok(m) = model(&c) {
            exercise(&m);
        }
    }

    #[test]
    fn cut_short(which in 0usize..2, section in 0usize..16, keep in any::<u32>()) {
        let mut c = programs()[which].clone();
        let n = section % c.len();
        let len = c[n].1.len();
        c[n].1.truncate(keep as usize % (len + 1));
        if let Ok(m) = model(&c) {
            exercise(&m);
        }
    }
}

#[test]
fn damage_is_named() {
    let mut c = programs()[0].clone();
    let info = c.iter_mut().find(|s| s.0 == gimli::SectionId::DebugInfo).unwrap();
    let len = info.1.len();
    info.1.truncate(len - 3);
    let e = model(&c).unwrap_err().to_string();
    assert!(e.contains(".debug_info") && e.contains('p'), "{e}");
}
