//! The program state that an image holds, with the types to read it by.

use crate::exit::Failure;
use mcr_image::{Addr, Image, ImageMemory, ModuleMap, Regs};
use mcr_transform::types::TypeModel;
use mcr_transform::types::expr::Bases;
use mcr_transform::{Options, image_modules};
use std::path::PathBuf;

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

impl State {
    /// Reads modules and types of an image's process.
    pub fn of(image: &Image, debug_dirs: &[PathBuf]) -> Result<Self, Failure> {
        let memory = image.memory();
        let options = Options { debug_dirs: debug_dirs.to_vec(), ..Options::default() };
        let modules = image_modules(image, image.process(), &memory, &options);
        let Some(exe) = modules.exe() else {
            return Err(Failure::refused(format!(
                "the image of process {} does not show its program ({}): it was not embedded and is gone from disk",
                image.process().pid,
                image.process().exe_path
            )));
        };
        let model = TypeModel::load(&exe.elf, &options.debug_search())?;
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
