//! Both programs of an update: read before anything is stopped.

use super::{UpdateError, UpdateOptions};
use mcr_criu_lite::{ProcessMemory, modules};
use mcr_image::{ElfFile, Memory, ModuleMap, Pid, proto};
use mcr_transform::heap::GlibcHeap;
use mcr_transform::types::TypeModel;
use mcr_transform::{Loaded, Prepared};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Both sides of an update, read and checked.
pub(super) struct Programs {
    pub(super) new_path: PathBuf,
    pub(super) new: Arc<ElfFile>,
    pub(super) types: TypeModel,
    /// Types of the old program.
    pub(super) old_types: TypeModel,
}

impl Programs {
    pub(super) fn read(new: &Path, old: &ElfFile, options: &UpdateOptions) -> Result<Self, UpdateError> {
        let new_path = std::fs::canonicalize(new)
            .map_err(|source| UpdateError::NewProgram { path: new.to_owned(), source })?;
        let dirs = options.transform.debug_search();
        let elf = ElfFile::open_with_debug(&new_path, &dirs)?;
        elf.check_updatable()?;
        old.check_updatable()?;
        let types = TypeModel::load(&elf, &dirs)?;
        let old_types = TypeModel::load(old, &dirs)?;
        Ok(Self { new_path, new: Arc::new(elf), types, old_types })
    }

    /// What plans need of both programs, for more than one plan.
    pub(super) fn prepare<'a>(&'a self, options: &'a UpdateOptions) -> Prepared<'a> {
        let loaded = Loaded {
            path: self.new_path.display().to_string(),
            elf: &self.new,
            types: &self.types,
            old_types: &self.old_types,
        };
        Prepared::new(&loaded, &options.transform.rules)
    }
}

/// The plan, refused if anything stands in its way, and old's heap.
pub(super) fn plan(
    prepared: &Prepared<'_>,
    process: &proto::Process,
    memory: &dyn Memory,
    modules: &ModuleMap,
) -> Result<(proto::Patch, GlibcHeap), UpdateError> {
    let (patch, heap) = prepared.plan(process, memory, modules)?;
    Ok((mcr_transform::refuse(patch)?, heap))
}

/// The program of a running process, read (with all its libraries) before the process is stopped.
pub(super) fn old_program(pid: Pid) -> Result<Arc<ElfFile>, UpdateError> {
    let read = || {
        let vmas = mcr_criu_lite::collect::vmas(pid)?;
        let memory = ProcessMemory::open(pid)?;
        modules::load(pid, &vmas, &memory)
    };
    let map = read().map_err(|source| UpdateError::Memory { pid, source })?;
    let exe = map.exe().ok_or_else(|| UpdateError::OldProgram { pid })?;
    Ok(Arc::clone(&exe.elf))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
