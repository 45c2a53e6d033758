//! The program state that an image holds, with the types to read it by.

use crate::exit::Failure;
use mcr_image::{Addr, DebugDirs, ElfFile, Image, ImageMemory, ModuleMap, Regs};
use mcr_transform::types::TypeModel;
use mcr_transform::types::expr::Bases;
use std::path::PathBuf;
use std::sync::Arc;

/// An image's memory, modules and the program's types.
pub struct State {
    /// Memory of the process.
    pub memory: ImageMemory,
    /// ELF files it had mapped.
    pub modules: ModuleMap,
    /// Types of the program.
    pub model: TypeModel,
    tls: Option<Addr>,
}

/// The ELF modules of an image: embedded files first, then the disk.
pub fn modules(image: &Image, memory: &ImageMemory, dirs: &DebugDirs) -> ModuleMap {
    let p = image.process();
    let auxv = p.mm.as_ref().map(|m| m.auxv.as_slice()).unwrap_or_default();
    ModuleMap::read(&p.vmas, auxv, memory, |v| {
        let embedded = p
            .modules
            .iter()
            .find(|m| m.path == v.name && m.embedded)
            .and_then(|m| image.file(&m.key).ok().flatten())
            .and_then(|bytes| ElfFile::from_bytes(v.name.clone(), bytes).ok());
        let elf = embedded.or_else(|| ElfFile::open(&v.name).ok())?;
        Some(Arc::new(elf.with_debug(dirs)))
    })
}

impl State {
    /// Reads modules and types of an image's process.
    pub fn of(image: &Image, debug_dirs: &[PathBuf]) -> Result<Self, Failure> {
        let dirs = DebugDirs::with_user(debug_dirs.iter().cloned());
        let memory = image.memory();
        let modules = modules(image, &memory, &dirs);
        let Some(exe) = modules.exe() else {
            return Err(Failure::refused(format!(
                "the image of process {} does not show its program ({}): it was not embedded and is gone from disk",
                image.process().pid,
                image.process().exe_path
            )));
        };
        let model = TypeModel::load(&exe.elf, &dirs)?;
        let fs =
            image.process().threads.first().and_then(|t| Regs::from_words(&t.regs)).map(|r| Addr(r.fs_base));
        let tls = fs.and_then(|fs| mcr_image::tls_block(&memory, fs, exe));
        Ok(Self { memory, modules, model, tls })
    }

    /// Where its variables are.
    pub fn bases(&self) -> Bases {
        Bases { bias: self.modules.exe().map_or(Addr(0), |m| m.bias), tls: self.tls }
    }

    /// `function+0x10` or `library:symbol`.
    pub fn symbol(&self, at: Addr) -> Option<String> {
        let m = self.modules.find(at)?;
        let link = m.link(at);
        let s = m.elf.function_at(link).or_else(|| m.elf.object_at(link))?;
        let offset = link.0 - s.addr.0;
        let name = if m.is_exe() { s.name.to_owned() } else { format!("{}:{}", m.name(), s.name) };
        Some(if offset == 0 { name } else { format!("{name}+{offset:#x}") })
    }
}
