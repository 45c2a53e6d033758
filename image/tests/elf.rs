//! ELF files: real ones, wrong ones, and damaged ones.

mod support;

use mcr_image::elf::{Bind, SectionKind, SymbolKind, Unknown};
use mcr_image::{Addr, DebugDirs, ElfError, ElfFile, LinkAddr, Memory};
use proptest::prelude::*;
use std::process::Command;
use std::sync::LazyLock;
use support::{Target, compile};

fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn a_program_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let f = ElfFile::open(compile(dir.path(), "threads.c", &["-O1"])).unwrap();
    assert!(f.is_pie() && f.has_dwarf());
    f.check_updatable().unwrap();
    assert_eq!(f.build_id().unwrap().len(), 20);
    assert!(f.interp().unwrap().contains("ld-linux"));
    assert!(f.needed().iter().any(|n| n == "libc.so.6"));
    let main = f.symbol("main").unwrap();
    assert_eq!((main.kind, main.bind), (SymbolKind::Func, Bind::Global));
    assert_eq!(f.function_at(LinkAddr(main.addr.0 + 1)).unwrap().name, "main");
    assert_eq!(f.section_kind(main.addr), SectionKind::Text);
    let serve = f.symbol("serve").unwrap();
    assert_eq!((serve.bind, serve.file), (Bind::Local, Some("threads.c")));
    let tls = f.symbol("per_thread").unwrap();
    assert_eq!(tls.kind, SymbolKind::Tls);
    assert!(tls.addr.0 < f.tls().unwrap().mem_size);
    assert_eq!(f.section_kind(f.symbol("counter").unwrap().addr), SectionKind::Data);
    assert_eq!(f.section_kind(f.symbol("zeroed").unwrap().addr), SectionKind::Bss);
    assert_eq!(f.section_kind(f.symbol("names").unwrap().addr), SectionKind::RelRo);
    assert_eq!(f.object_at(LinkAddr(f.symbol("zeroed").unwrap().addr.0 + 8)).unwrap().name, "zeroed");
    assert_eq!(f.section_kind(LinkAddr(1 << 40)), SectionKind::Outside);
    assert!(f.symbols_named("no such symbol").is_empty());
}

#[test]
fn initial_bytes_are_what_the_loader_made() {
    for flags in [&["-O1"][..], &["-O1", "-Wl,-z,now", "-Wl,-z,pack-relative-relocs"]] {
        let dir = tempfile::tempdir().unwrap();
        let program = compile(dir.path(), "threads.c", flags);
        let mut target = Target::start(&program, &[]);
        target.attach();
        let (modules, memory) = (target.modules(), target.memory());
        let exe = modules.exe().unwrap();
        for name in ["names", "chosen", "pointer_to_global", "zeroed", "_IO_stdin_used"] {
            let s = exe.elf.symbol(name).unwrap();
            let i = exe.elf.initial_bytes(s.addr, s.size as usize, exe.bias).unwrap();
            assert_eq!(i.unknown, [], "{name}");
            assert_eq!(
                i.bytes,
                memory.bytes(exe.addr(s.addr), s.size as usize).unwrap(),
                "{name} with {flags:?}"
            );
        }
        let s = exe.elf.symbol("to_libc").unwrap();
        let i = exe.elf.initial_bytes(s.addr, 8, exe.bias).unwrap();
        assert!(
            matches!(&i.unknown[0].why, Unknown::Symbol { name, addend: 0 } if name == "getenv"),
            "{i:?}"
        );
        assert!(i.same_but_unknown(&memory.bytes(exe.addr(s.addr), 8).unwrap()));
        let s = exe.elf.symbol("counter").unwrap();
        let i = exe.elf.initial_bytes(s.addr, 8, exe.bias).unwrap();
        assert_eq!(i.bytes, 7u64.to_le_bytes());
        assert!(!i.same_but_unknown(&8u64.to_le_bytes()));
        // A part of a relocated word.
        let s = exe.elf.symbol("pointer_to_global").unwrap();
        let part = exe.elf.initial_bytes(LinkAddr(s.addr.0 + 3), 4, exe.bias).unwrap();
        assert_eq!(part.bytes, memory.bytes(exe.addr(s.addr).add(3), 4).unwrap());
        assert!(exe.elf.initial_bytes(LinkAddr(s.addr.0), 1 << 20, exe.bias).is_none());
        // Read-only memory of libc after relocation: everything but what other modules decide.
        let libc = modules.libc().unwrap();
        for s in libc.elf.sections().iter().filter(|s| s.name == ".data.rel.ro" || s.name == ".rodata") {
            let i = libc.elf.initial_bytes(s.addr, s.size as usize, libc.bias).unwrap();
            let now = memory.bytes(libc.addr(s.addr), s.size as usize).unwrap();
            let same = i.bytes.iter().zip(&now).filter(|(a, b)| a == b).count();
            assert!(same * 100 >= now.len() * 95, "{}: {same} of {}", s.name, now.len());
            if s.name == ".rodata" {
                assert!(i.same_but_unknown(&now));
            }
        }
    }
}

#[test]
fn what_cannot_be_updated_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("m.c");
    std::fs::write(&source, "int main(void) { return 0; }\n").unwrap();
    let build = |name: &str, flags: &[&str]| {
        let out = dir.path().join(name);
        let mut args = vec![source.to_str().unwrap(), "-o", out.to_str().unwrap()];
        args.extend(flags);
        run("gcc", &args);
        ElfFile::open(out)
    };
    let refusal = |name: &str, flags: &[&str]| build(name, flags).unwrap().check_updatable().unwrap_err();
    build("good", &["-g"]).unwrap().check_updatable().unwrap();
    build("good4", &["-g", "-gdwarf-4"]).unwrap().check_updatable().unwrap();
    build("packed", &["-g", "-gz=zlib"]).unwrap().check_updatable().unwrap();
    assert!(matches!(refusal("nopie", &["-g", "-no-pie"]), ElfError::NotPie { .. }));
    assert!(matches!(refusal("static", &["-g", "-static", "-no-pie"]), ElfError::Static { .. }));
    assert!(matches!(refusal("staticpie", &["-g", "-static-pie"]), ElfError::Static { .. }));
    assert!(matches!(refusal("nodebug", &[]), ElfError::NoDwarf { .. }));
    assert!(matches!(refusal("old", &["-g", "-gdwarf-3"]), ElfError::DwarfVersion { version: 3, .. }));
    assert!(matches!(refusal("library", &["-g", "-shared", "-fPIC"]), ElfError::NotAProgram { .. }));
    assert!(matches!(refusal("object", &["-g", "-c"]), ElfError::NotAProgram { .. }));
    let text = ElfFile::open(&source).unwrap_err();
    assert!(matches!(text, ElfError::NotElf { .. }) && text.to_string().contains("m.c"));
    assert!(matches!(ElfFile::open(dir.path().join("absent")), Err(ElfError::Io { .. })));
    let mut b = std::fs::read(dir.path().join("good")).unwrap();
    b[4] = 1;
    assert!(matches!(ElfFile::from_bytes("x", b.clone()), Err(ElfError::Not64Bit { .. })));
    (b[4], b[18]) = (2, 183);
    assert!(matches!(ElfFile::from_bytes("x", b), Err(ElfError::NotX8664 { machine: 183, .. })));
}

#[test]
fn debug_information_is_found_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "threads.c", &["-O1"]);
    let full = ElfFile::open(&program).unwrap();
    let at = |p: &std::path::Path| p.to_str().unwrap().to_owned();
    let (debug, stripped) = (dir.path().join("threads.debug"), dir.path().join("stripped"));
    run("objcopy", &["--only-keep-debug", "--compress-debug-sections=zlib", &at(&program), &at(&debug)]);
    run("objcopy", &["--strip-all", &at(&program), &at(&stripped)]);
    let bare = ElfFile::open_with_debug(&stripped, &DebugDirs::default()).unwrap();
    assert!(matches!(bare.check_updatable(), Err(ElfError::NoDwarf { .. })));
    assert!(bare.symbol("serve").is_none());
    // By build-id.
    let id = full.build_id_hex();
    let place = dir.path().join("dbg/.build-id").join(&id[..2]);
    std::fs::create_dir_all(&place).unwrap();
    std::fs::copy(&debug, place.join(format!("{}.debug", &id[2..]))).unwrap();
    let dirs = DebugDirs::with_user([dir.path().join("dbg")]);
    let found = ElfFile::open_with_debug(&stripped, &dirs).unwrap();
    found.check_updatable().unwrap();
    assert_eq!(found.symbol("serve").unwrap().addr, full.symbol("serve").unwrap().addr);
    let sections = |f: &ElfFile| f.section_data(".debug_info").unwrap().unwrap().into_owned();
    assert_eq!(sections(&found), sections(&full));
    // By .gnu_debuglink, in .debug beside the program.
    let linked = dir.path().join("linked");
    run("objcopy", &[&format!("--add-gnu-debuglink={}", at(&debug)), &at(&stripped), &at(&linked)]);
    std::fs::create_dir(dir.path().join(".debug")).unwrap();
    std::fs::rename(&debug, dir.path().join(".debug/threads.debug")).unwrap();
    ElfFile::open_with_debug(&linked, &DebugDirs { dirs: vec![] }).unwrap().check_updatable().unwrap();
    // A debug file of another build is not taken.
    let other = compile(dir.path(), "threads.c", &["-O2"]);
    std::fs::copy(other, dir.path().join(".debug/threads.debug")).unwrap();
    let f = ElfFile::open_with_debug(&linked, &DebugDirs { dirs: vec![] }).unwrap();
    assert!(matches!(f.check_updatable(), Err(ElfError::NoDwarf { .. })));
}

/// Everything that reads the file, for damaged input.
fn exercise(bytes: Vec<u8>) {
    let Ok(f) = ElfFile::from_bytes("damaged", bytes) else {
        return;
    };
    let _ = f.check_updatable();
    let _ = (f.needed(), f.soname(), f.load_range(), f.program_header_addr());
    for s in f.sections().iter().take(64) {
        let _ = f.section_data(&s.name);
        let _ = f.section_kind(s.addr);
        let _ = f.initial_bytes(s.addr, (s.size as usize).min(1 << 16), Addr(0x5555_5555_4000));
    }
    for s in f.symbols().take(500) {
        let _ = (f.function_at(s.addr), f.object_at(s.addr), f.symbols_named(s.name).len());
    }
    if let Some(t) = f.tls() {
        let _ = t.exe_offset();
    }
    support::unwind_offline(f);
}

static PROGRAM: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    std::fs::read(compile(dir.path(), "threads.c", &["-O1", "-gz=zlib", "-Wl,-z,pack-relative-relocs"]))
        .unwrap()
});

#[test]
fn the_c_library_can_be_read_whole() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = Target::start(&compile(dir.path(), "threads.c", &[]), &[]);
    target.attach();
    for m in target.modules().modules() {
        exercise(m.elf.bytes().to_vec());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn damaged_files_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..24),
        head in prop::collection::vec((0usize..0x400, any::<u8>()), 0..3),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let mut b = PROGRAM.clone();
        // Half of the edits where the tables are: headers at the start, section headers at the end.
        let n = b.len();
        for (i, (at, v)) in edits.into_iter().enumerate() {
            let at = if i % 2 == 0 { at.index(n) } else { n - 1 - at.index(0xa00) };
            b[at] = v;
        }
        for (at, v) in head {
            if at > 19 { b[at] = v }
        }
        if let Some(c) = cut {
            b.truncate(c.index(n));
        }
        exercise(b);
    }
}
