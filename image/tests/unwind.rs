//! Unwinding of a live program, compared with gdb.

mod support;

use mcr_image::{Addr, End, Memory, base_name, proto_signature, signature, tls_block, unwind};
use std::collections::BTreeMap;
use std::process::Command;
use support::{Target, compile};

/// gdb's backtraces: tid → function names ("??" where it has none), and pcs.
fn gdb(pid: i32) -> BTreeMap<i32, Vec<(u64, String)>> {
    let commands = ["set pagination off", "set print address on", "set print frame-arguments none"];
    let mut gdb = Command::new("gdb");
    gdb.args(["-q", "-nx", "-batch", "-p", &pid.to_string()]);
    for c in commands {
        gdb.args(["-ex", c]);
    }
    // Python prints exact program counters of physical frames.
    let script = "python\nfor t in gdb.selected_inferior().threads():\n  t.switch()\n  f = gdb.newest_frame()\n  while f:\n    if f.type() not in (gdb.INLINE_FRAME, gdb.TAILCALL_FRAME): print('FRAME', t.ptid[1], hex(f.pc()), f.function() or f.name() or '??')\n    f = f.older()\nend\n";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("bt.gdb");
    std::fs::write(&file, script).unwrap();
    let out = gdb.arg("-x").arg(&file).output().expect("gdb is needed");
    let mut map: BTreeMap<i32, Vec<(u64, String)>> = BTreeMap::new();
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        let f: Vec<&str> = line.split(' ').collect();
        if f.first() == Some(&"FRAME") {
            let pc = u64::from_str_radix(f[2].trim_start_matches("0x"), 16).unwrap();
            map.entry(f[1].parse().unwrap()).or_default().push((pc, f[3].to_owned()));
        }
    }
    assert!(!map.is_empty(), "gdb: {}", String::from_utf8_lossy(&out.stderr));
    map
}

fn compare(flags: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "threads.c", flags);
    let mut target = Target::start(&program, &[]);
    target.settle();
    let theirs = gdb(target.pid());
    target.attach();
    let (modules, memory) = (target.modules(), target.memory());
    assert!(modules.missing().is_empty());
    for tid in target.tids() {
        let ours = unwind(&modules, &memory, &target.regs(tid));
        assert!(ours.end.is_complete(), "{}: {:#?}", ours.end, ours.frames);
        let want = &theirs[&tid];
        let pcs: Vec<u64> = ours.frames.iter().map(|f| f.pc.0).collect();
        // gdb stops at main (and, in a thread, where we do).
        let at = |n: usize| pcs.get(n).map_or(0, |p| *p);
        assert!(want.iter().enumerate().all(|(n, w)| at(n) == w.0), "{tid}: {:#?}\n{want:#x?}", ours.frames);
        for (f, (_, name)) in ours.frames.iter().zip(want).filter(|(f, _)| f.in_program()) {
            assert_eq!(f.base_name(), Some(base_name(name)));
        }
        for f in &ours.frames {
            for (value, at) in f.regs.iter().zip(f.saved_at).filter_map(|(v, a)| Some((*v, a?))) {
                assert_eq!(memory.u64(at).ok(), value, "saved register of {f}");
            }
        }
        assert_eq!(proto_signature(&ours.to_proto()), signature(&ours.frames));
    }
}

#[test]
fn agrees_with_gdb_without_optimisation() {
    compare(&["-O0"]);
}

#[test]
fn agrees_with_gdb_with_optimisation() {
    compare(&["-O2"]);
}

#[test]
fn agrees_with_gdb_with_only_debug_frame() {
    compare(&["-O2", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"]);
}

#[test]
fn signatures_name_the_program_and_place_the_library() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "threads.c", &["-O2"]);
    let mut target = Target::start(&program, &[]);
    target.attach();
    let (modules, memory) = (target.modules(), target.memory());
    let of = |tid: i32| unwind(&modules, &memory, &target.regs(tid)).signature();
    let program_part = |tid| of(tid).into_iter().filter(|s| !s.contains('+')).collect::<Vec<_>>();
    let tids = target.tids();
    assert_eq!(program_part(tids[0]), ["serve", "main", "_start"]);
    // poller() calls deep() last, so its frame may be gone.
    let mut deep = program_part(tids[1]);
    deep.retain(|n| n != "poller");
    assert!(!deep.is_empty() && deep.iter().all(|n| n == "deep"), "{deep:?}");
    assert_eq!(program_part(tids[2]), ["waiter"]);
    assert_eq!(program_part(tids[3]), ["compare", "sorter"]);
    assert_eq!(program_part(tids[4]), ["on_signal", "signalled"]);
    assert!(of(tids[0])[0].starts_with("libc.so.6+0x"), "{:?}", of(tids[0]));

    // The same stack in a second run, at other addresses.
    let mut again = Target::start(&program, &[]);
    again.attach();
    let (modules, memory) = (again.modules(), again.memory());
    for (a, b) in tids.iter().zip(again.tids()) {
        assert_eq!(of(*a), unwind(&modules, &memory, &again.regs(b)).signature());
    }
}

#[test]
fn modules_and_thread_locals_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "threads.c", &["-O1"]);
    let mut target = Target::start(&program, &[]);
    target.attach();
    let (modules, memory) = (target.modules(), target.memory());
    let words: Vec<&str> = target.line.split_whitespace().collect();
    let address = |i: usize| Addr(u64::from_str_radix(words[i].trim_start_matches("0x"), 16).unwrap());
    let exe = modules.exe().unwrap();
    assert_eq!(exe.path, program.to_str().unwrap());
    assert_eq!(exe.symbol("counter"), Some(address(2)));
    assert_eq!(exe.symbol("main"), Some(address(3)));
    assert_eq!(modules.find(address(3)).unwrap().path, exe.path);
    assert!(modules.interp().unwrap().name().starts_with("ld-linux"));
    assert!(
        modules
            .vdso()
            .unwrap()
            .elf
            .function_at(modules.vdso().unwrap().elf.symbol("__vdso_time").unwrap().addr)
            .is_some()
    );
    assert!(modules.libc().unwrap().symbol("malloc").is_some());
    assert_eq!(exe.tls_modid, Some(1));
    assert!(modules.libc().unwrap().tls_modid.is_some());
    let offset = exe.elf.symbol("per_thread").unwrap().addr.0;
    for (i, tid) in target.tids().into_iter().enumerate() {
        let block = tls_block(&memory, Addr(target.regs(tid).fs_base), exe).unwrap();
        let by_abi = target.regs(tid).fs_base - exe.elf.tls().unwrap().exe_offset();
        assert_eq!(block.0, by_abi);
        // The poller and the sorter have counted up.
        let want = if i == 1 || i == 3 { 42 } else { 41 };
        assert_eq!(memory.u64(block.add(offset)).unwrap(), want, "thread {i}");
        if i == 0 {
            assert_eq!(block.add(offset), address(1));
        }
    }
}

#[test]
fn a_broken_stack_ends_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "threads.c", &["-O2"]);
    let mut target = Target::start(&program, &[]);
    target.attach();
    let (modules, memory) = (target.modules(), target.memory());
    let good = target.regs(target.pid());
    let end = |change: &dyn Fn(&mut mcr_image::Regs)| {
        let mut r = good;
        change(&mut r);
        unwind(&modules, &memory, &r).end
    };
    assert!(matches!(end(&|_| ()), End::Bottom));
    assert!(matches!(end(&|r| r.rsp = 8), End::BadMemory(_)));
    assert!(matches!(end(&|r| r.rip = 0x1000), End::NoModule(_)));
    let data = modules.exe().unwrap().symbol("counter").unwrap().0;
    assert!(matches!(end(&|r| r.rip = data), End::NoCfi { .. }));
    // A stack of garbage terminates.
    let _ = end(&|r| r.rsp = data & !7);
}

/// `cargo test --release -p mcr-image --test unwind -- --ignored --nocapture` prints what unwinding costs.
#[test]
#[ignore = "a measurement"]
fn measure() {
    use std::time::Instant;
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "threads.c", &["-O2"]);
    let mut target = Target::start(&program, &["60"]);
    target.attach();
    let memory = target.memory();
    let regs: Vec<_> = target.tids().into_iter().map(|t| target.regs(t)).collect();
    let t = Instant::now();
    let vmas = target.vmas();
    println!("maps {:?}", t.elapsed());
    let t = Instant::now();
    let modules = target.modules();
    println!("modules {:?} ({})", t.elapsed(), modules.modules().len());
    for m in modules.modules() {
        let t = Instant::now();
        let n = m.elf.symbols_named("main").len();
        println!("symbols of {} {:?} ({n})", m.name(), t.elapsed());
    }
    for round in ["first", "again", "third"] {
        let t = Instant::now();
        let n: usize = regs.iter().map(|r| unwind(&modules, &memory, r).frames.len()).sum();
        println!("{round}: {} threads, {n} frames {:?}", regs.len(), t.elapsed());
    }
    drop(vmas);
    if let Ok(big) = std::env::var("MCR_MEASURE_ELF") {
        let t = Instant::now();
        let f = mcr_image::ElfFile::open(&big).unwrap();
        println!("open {big} {:?} ({} bytes)", t.elapsed(), f.bytes().len());
        let t = Instant::now();
        let known = f.function_at(f.entry()).is_some();
        println!("addresses {:?} {known}", t.elapsed());
        let t = Instant::now();
        let n = f.symbols_named("main").len();
        println!("names {:?} {n}", t.elapsed());
        let t = Instant::now();
        let n: usize = f.symbols().filter(|s| f.function_at(s.addr).is_some()).count();
        println!("{n} lookups {:?}", t.elapsed());
        let (start, end) = f.load_range();
        let t = Instant::now();
        for s in f.segments() {
            let _ = f.initial_bytes(s.vaddr, s.mem_size as usize, Addr(0));
        }
        println!("initial bytes of {:#x} {:?}", end.0 - start.0, t.elapsed());
    }
}
