use crate::support::{Workshop, load};
use mcr_image::elf::{DebugDirs, ElfFile};
use mcr_transform::types::{SyncKind, Type, TypeModel, VarPlace};
use std::process::Command;

const ZOO: &str = r#"
#include <stddef.h>
#include <stdio.h>
#include <stdint.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/types.h>
enum color { RED, GREEN = 5, BLUE = -1 };
enum big { HUGE_ONE = 0xffffffffu };
typedef enum { OFF, ON } onoff;
struct later;
typedef struct { int x, y; } point;
struct zoo {
    char c;
    unsigned a : 3, b : 7;
    int : 0;
    signed s : 5;
    unsigned long long wide : 40;
    struct { int in1; union { int u1; double u2; }; };
    union { long l; char bytes[12]; } named;
    int (*fn)(struct zoo *, const char *, ...);
    void (*table[4])(void);
    const char *const *names;
    volatile int v;
    _Atomic int at;
    enum color color;
    enum big big;
    onoff o;
    point pts[3][2];
    pthread_mutex_t lock;
    pthread_t thread;
    sem_t sem;
    pid_t pid;
    _Bool flag;
    float f; double d; long double ld;
    struct later *later;
    struct zoo *self;
    char tail[];
};
static __thread int tls_static = 7;
__thread long tls_ext;
__attribute__((used)) static struct zoo zoo_static;
__attribute__((used)) struct zoo *zoo_ptr = &zoo_static;
static int counter(void) { static int hits; { static int hits = 3; hits++; } tls_static += hits; return ++hits + tls_static; }
#define O(f) printf(#f " %zu %zu\n", offsetof(struct zoo, f), sizeof(((struct zoo *)0)->f))
int main(void) {
    O(c); O(named); O(fn); O(table); O(names); O(v); O(at); O(color); O(big); O(o); O(pts); O(lock); O(thread);
    O(sem); O(pid); O(flag); O(f); O(d); O(ld); O(later); O(self); O(in1); O(u1); O(u2);
    printf("sizeof %zu\n", sizeof(struct zoo));
    tls_ext = counter();
    struct zoo z; unsigned char *p = (void *)&z;
    for (size_t i = 0; i < sizeof z; i++) p[i] = 0;
    z.a = 7; z.b = 0x7f; z.s = -1; z.wide = (1ull << 40) - 1;
    for (size_t i = 0; i < sizeof z; i++) if (p[i]) printf("bits %zu %u\n", i, p[i]);
    return 0;
}
"#;

/// Offsets by name, anonymous members seen through.
fn offsets(m: &TypeModel, id: mcr_transform::types::TypeId, base: u64, out: &mut Vec<(String, u64, u64)>) {
    for f in &m.record(id).unwrap().members {
        match &f.name {
            Some(n) if f.bits.is_none() => out.push((n.to_string(), base + f.offset, m.size_of(f.ty))),
            Some(_) => {}
            None => offsets(m, f.ty, base + f.offset, out),
        }
    }
}

#[test]
fn the_zoo_is_as_the_compiler_lays_it_out() {
    let w = Workshop::new();
    for (i, flags) in [
        &["-g", "-gdwarf-5"][..],
        &["-g", "-gdwarf-4"],
        &["-g", "-gdwarf-4", "-gstrict-dwarf"],
        &["-g", "-gdwarf-5", "-gz"],
        &["-g", "-gdwarf-5", "-O2"],
        &["-g", "-gdwarf-4", "-O2", "-fdebug-types-section"],
        &["-g", "-gdwarf-5", "-O2", "-fdebug-types-section", "-gz=zlib"],
        &["-g", "-O2", "-flto"],
    ]
    .iter()
    .enumerate()
    {
        let p = w.build(&format!("zoo{i}"), &[("zoo.c", ZOO)], flags);
        let m = load(&p);
        let zoo = m.find_type("struct zoo").unwrap();
        let mut have = Vec::new();
        offsets(&m, zoo, 0, &mut have);
        let said = String::from_utf8(Command::new(&p).output().unwrap().stdout).unwrap();
        let mut bits = vec![0u8; m.size_of(zoo) as usize];
        let mut real_bits = bits.clone();
        for line in said.lines() {
            let f: Vec<&str> = line.split(' ').collect();
            match f[0] {
                "sizeof" => assert_eq!(m.size_of(zoo).to_string(), f[1], "{flags:?}"),
                "bits" => real_bits[f[1].parse::<usize>().unwrap()] = f[2].parse().unwrap(),
                name => {
                    let known =
                        have.iter().find(|h| h.0 == name).unwrap_or_else(|| panic!("{name} {flags:?}"));
                    assert_eq!(format!("{} {} {}", known.0, known.1, known.2), line, "{flags:?}");
                }
            }
        }
        for b in m.record(zoo).unwrap().members.iter().filter_map(|f| f.bits) {
            (b.start..b.start + u64::from(b.width)).for_each(|n| bits[n as usize / 8] |= 1 << (n % 8));
        }
        assert_eq!(bits, real_bits, "{flags:?}");

        let shown = m.describe(zoo);
        for s in [
            "int (*fn)(struct zoo *, const char *, ...);",
            "void (*table[4])(void);",
            "const char *const *names;",
            "volatile int v;",
            "_Atomic int at;",
            "point pts[3][2];",
            "pthread_mutex_t lock;",
            "char tail[];",
        ] {
            // DW_TAG_atomic_type is DWARF 5.
            let not_there = s.starts_with("_Atomic") && flags.contains(&"-gdwarf-4");
            assert!(not_there || shown.contains(s), "{s} {flags:?}\n{shown}");
        }
        let member = |n: &str| {
            m.record(zoo).unwrap().members.iter().find(|f| f.name.as_deref() == Some(n)).unwrap().ty
        };
        assert_eq!(m.sync_kind(member("lock")), Some(SyncKind::Mutex));
        assert_eq!(m.sync_kind(member("sem")), Some(SyncKind::Semaphore));
        assert!(m.is_pthread_t(member("thread")) && m.is_pid_t(member("pid")) && !m.is_pid_t(member("v")));
        assert!(m.is_function_pointer(member("fn")) && m.is_incomplete(m.pointee(member("later")).unwrap()));
        assert!(matches!(m.strip(member("tail")), Type::Array { count: None, .. }));
        let Type::Enum(color) = m.strip(member("color")) else { panic!() };
        assert_eq!((color.value_of("BLUE"), color.signed), (Some(-1), true));
        let Type::Enum(big) = m.strip(member("big")) else { panic!() };
        assert_eq!(big.value_of("HUGE_ONE"), Some(0xffff_ffff));

        // Places are those of the symbol table.
        let elf = ElfFile::open(&p).unwrap();
        let at = |n: &str| m.global(n).unwrap_or_else(|| panic!("{n} {flags:?}")).place;
        assert_eq!(at("zoo_ptr"), VarPlace::Link(elf.symbol("zoo_ptr").unwrap().addr), "{flags:?}");
        assert_eq!(at("zoo_static"), VarPlace::Link(elf.symbol("zoo_static").unwrap().addr), "{flags:?}");
        assert!(matches!(at("tls_static"), VarPlace::Tls(_)) && matches!(at("tls_ext"), VarPlace::Tls(_)));
        assert!(m.global("zoo_ptr").unwrap().external && !m.global("zoo_static").unwrap().external);
        let mut hits: Vec<_> = m.globals_named("hits").collect();
        hits.sort_by_key(|v| v.ordinal);
        assert_eq!(hits.len(), 2, "{flags:?}");
        assert!(hits.iter().all(|h| h.function.as_deref() == Some("counter")), "{flags:?} {hits:?}");
        assert_eq!((hits[0].ordinal, hits[1].ordinal), (0, 1));
        assert!(hits[0].decl_file.as_deref() == Some("zoo.c") && hits[0].line > 40, "{:?}", hits[0]);
        let main = m.functions_named("main").next().unwrap();
        assert_eq!(main.ranges[0].0, elf.symbol("main").unwrap().addr, "{flags:?}");
        assert_eq!(&*m.function_at(main.ranges[0].0).unwrap().name, "main");
        assert!(m.functions_named("counter").next().is_some());
        assert_eq!(&*m.global_at(elf.symbol("zoo_ptr").unwrap().addr).unwrap().name, "zoo_ptr");
    }
}

#[test]
fn units_are_joined() {
    let w = Workshop::new();
    let header = "struct shared { struct shared *next; struct hidden *h; int n; };\n";
    let a = format!(
        "{header} struct shared *a; static int same = 1; static struct odd {{ int i; }} oa; int main() {{ return same + oa.i; }}"
    );
    let b = format!(
        "{header} struct hidden {{ long deep; }}; struct shared *b; static char same = 2; static struct odd {{ long i; }} ob; int f() {{ return same + ob.i; }}"
    );
    let p = w.build("two", &[("a.c", &a), ("b.c", &b)], &["-g"]);
    let m = load(&p);
    assert_eq!(m.find_types("struct shared").len(), 1);
    assert_eq!(m.find_types("struct odd").len(), 2, "two structs of one tag stay two");
    let hidden = &m.record(m.find_type("struct shared").unwrap()).unwrap().members[1];
    assert!(!m.is_incomplete(m.pointee(hidden.ty).unwrap()), "the declaration found its definition");
    assert_eq!(m.global("a").unwrap().ty, m.global("b").unwrap().ty);
    let mut same: Vec<_> = m.globals_named("same").map(|v| (v.unit.to_string(), m.display(v.ty))).collect();
    same.sort();
    assert_eq!(same, [("a.c".into(), "int".into()), ("b.c".into(), "char".into())]);
    assert!(m.global("same").is_none(), "two statics: no single answer");
}

#[test]
fn without_dwarf_it_says_how_to_get_it() {
    let w = Workshop::new();
    let p = w.build("plain", &[("p.c", "int main(void) { return 0; }")], &[]);
    let elf = ElfFile::open(&p).unwrap();
    let e = TypeModel::load(&elf, &DebugDirs::default()).unwrap_err().to_string();
    assert!(e.contains("-g") && e.contains("--debug-dir") && e.contains("plain"), "{e}");

    let p = w.build("split", &[("p.c", "int x; int main(void) { return x; }")], &["-g", "-gsplit-dwarf"]);
    let e = TypeModel::load(&ElfFile::open(&p).unwrap(), &DebugDirs::default()).unwrap_err().to_string();
    assert!(e.contains("-gsplit-dwarf"), "{e}");
}

#[test]
fn a_debug_file_elsewhere_is_found() {
    let w = Workshop::new();
    let p = w.build(
        "sep",
        &[("p.c", "struct s { int x; } v; int main(void) { return v.x; }")],
        &["-g", "-Wl,--build-id"],
    );
    let id = ElfFile::open(&p).unwrap().build_id_hex();
    let dir = w.path().join("debug/.build-id").join(&id[..2]);
    std::fs::create_dir_all(&dir).unwrap();
    let debug = dir.join(format!("{}.debug", &id[2..]));
    let run = |a: &[&std::ffi::OsStr]| assert!(Command::new("objcopy").args(a).status().unwrap().success());
    run(&["--only-keep-debug".as_ref(), p.as_os_str(), debug.as_os_str()]);
    run(&["--strip-debug".as_ref(), p.as_os_str()]);
    let dirs = DebugDirs::with_user([w.path().join("debug")]);
    let m = TypeModel::load(&ElfFile::open(&p).unwrap(), &dirs).unwrap();
    assert_eq!(m.size_of(m.global("v").unwrap().ty), 4);
}
