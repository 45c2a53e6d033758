//! Any bytes as an ELF file with DWARF: an error or a model, and the model can be used.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mcr_image::elf::{DebugDirs, ElfFile};
use mcr_plugin::Rules;
use mcr_transform::types::{LayoutDiff, TypeModel};

fuzz_target!(|data: &[u8]| {
    let Ok(elf) = ElfFile::from_bytes("fuzz", data) else { return };
    let Ok(m) = TypeModel::load(&elf, &DebugDirs { dirs: Vec::new() }) else { return };
    for id in m.ids() {
        let _ = (m.display(id), m.describe(id), m.pointer_map(id));
    }
    let rules = Rules::default();
    let _ = LayoutDiff::new(&m, &m, &rules).report().text();
});
