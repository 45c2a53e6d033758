//! Any bytes as an ELF file: no panic, no unbounded allocation.
#![no_main]
use libfuzzer_sys::fuzz_target;
use mcr_image::{Addr, ElfFile};

fuzz_target!(|data: &[u8]| {
    let Ok(f) = ElfFile::from_bytes("fuzz", data) else { return };
    let _ = (f.check_updatable(), f.needed(), f.soname());
    for s in f.sections().iter().take(64) {
        let _ = f.section_data(&s.name);
        let _ = f.initial_bytes(s.addr, (s.size as usize).min(1 << 16), Addr(0x5555_5555_4000));
    }
    for s in f.symbols().take(500) {
        let _ = (f.function_at(s.addr), f.object_at(s.addr), f.symbols_named(s.name).len());
    }
});
