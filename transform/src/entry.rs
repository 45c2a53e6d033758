//! The way in: an image, or a process standing still, and the new program.

use crate::heap::{self, GlibcHeap};
use crate::layout::Layouts;
use crate::plan::{NewProgram, OldState, plan_with_findings};
use crate::resolve::Known;
use crate::types::TypeModel;
use crate::verify::{KnownSlots, Unbooted, Verifier};
use crate::{PatchedMemory, TransformError, diff};
use mcr_image::{DebugDirs, ElfFile, Image, Memory, ModuleMap, proto};
use mcr_plugin::Rules;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// What a transform may use beside the two programs.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Directories with debug files, searched first.
    pub debug_dirs: Vec<PathBuf>,
    /// What the builds alone do not say.
    pub rules: Rules,
}

impl Options {
    /// Where debug files are looked for.
    #[must_use]
    pub fn debug_search(&self) -> DebugDirs {
        DebugDirs::with_user(self.debug_dirs.iter().cloned())
    }
}

/// Plans the update of an image's process to `new`: a pure function of the image, the two programs and the
/// rules. Nothing is written. What stands in the way is [`TransformError::Refused`].
pub fn transform(image: &Image, new: &Path, options: &Options) -> Result<proto::Patch, TransformError> {
    refuse(transform_with_findings(image, new, options)?)
}

/// As [`transform`], but refusals stay among the patch's findings: what `plan` prints.
pub fn transform_with_findings(
    image: &Image,
    new: &Path,
    options: &Options,
) -> Result<proto::Patch, TransformError> {
    let process = image.process();
    let memory = image.memory();
    let modules = image_modules(image, process, &memory, options);
    plan_process(process, &memory, &modules, new, options)
}

/// The modules of an image's process: embedded files first, then files of the same build-id on disk.
#[must_use]
pub fn image_modules(
    image: &Image,
    process: &proto::Process,
    memory: &dyn Memory,
    options: &Options,
) -> ModuleMap {
    let auxv = process.mm.as_ref().map_or(&[][..], |m| &m.auxv);
    let dirs = options.debug_search();
    ModuleMap::read(&process.vmas, auxv, memory, |vma| load_module(image, process, vma, &dirs))
}

fn load_module(
    image: &Image,
    process: &proto::Process,
    vma: &proto::Vma,
    dirs: &DebugDirs,
) -> Option<Arc<ElfFile>> {
    let known = process.modules.iter().find(|m| {
        (!vma.module_key.is_empty() && m.key == vma.module_key)
            || (m.dev == vma.dev && m.ino == vma.ino && m.path == vma.name)
    });
    let key = known.map_or(vma.module_key.as_str(), |m| m.key.as_str());
    let embedded = image.file(key).ok().flatten();
    let elf = match embedded {
        Some(bytes) => ElfFile::from_bytes(&vma.name, bytes).ok()?,
        None => {
            let elf = ElfFile::open(&vma.name).ok()?;
            let same = known.is_none_or(|k| k.build_id.is_empty() || elf.build_id() == Some(&k.build_id[..]));
            same.then_some(elf)?
        }
    };
    Some(Arc::new(elf.with_debug(dirs)))
}

/// Plans the update of a process whose memory stands still, wherever it is: the live path and the offline
/// path are this one function.
pub fn transform_process(
    process: &proto::Process,
    memory: &dyn Memory,
    modules: &ModuleMap,
    new: &Path,
    options: &Options,
) -> Result<proto::Patch, TransformError> {
    refuse(plan_process(process, memory, modules, new, options)?)
}

/// As [`transform_process`], but refusals stay among the patch's findings.
pub fn plan_process(
    process: &proto::Process,
    memory: &dyn Memory,
    modules: &ModuleMap,
    new: &Path,
    options: &Options,
) -> Result<proto::Patch, TransformError> {
    let dirs = options.debug_search();
    let exe = modules.exe().ok_or_else(|| TransformError::NoProgram {
        path: process.exe_path.clone(),
        key: process.modules.iter().find(|m| m.is_exe).map_or(String::new(), |m| m.key.clone()),
    })?;
    let started = Instant::now();
    exe.elf.check_updatable()?;
    let new_elf = ElfFile::open_with_debug(new, &dirs)?;
    new_elf.check_updatable()?;
    let old_types = TypeModel::load(&exe.elf, &dirs)?;
    let new_types = TypeModel::load(&new_elf, &dirs)?;
    let read_us = started.elapsed().as_micros() as u64;
    let path = std::fs::canonicalize(new).unwrap_or_else(|_| new.to_owned()).display().to_string();
    let loaded = Loaded { path, elf: &new_elf, types: &new_types, old_types: &old_types };
    let mut patch = plan_loaded(process, memory, modules, &loaded, options)?;
    patch.findings.extend(diff::rule_mistakes(&old_types, &new_types, &options.rules));
    let stats = patch.stats.get_or_insert_default();
    for p in &mut stats.phases {
        p.start_us += read_us;
    }
    stats
        .phases
        .insert(0, proto::Phase { name: "types".into(), start_us: 0, duration_us: read_us, frozen: false });
    Ok(patch)
}

/// Both programs, read before the process was stopped.
pub struct Loaded<'a> {
    /// Path of the new program, for the patch.
    pub path: String,
    /// The new program.
    pub elf: &'a ElfFile,
    /// Its types.
    pub types: &'a TypeModel,
    /// Types of the old program.
    pub old_types: &'a TypeModel,
}

/// As [`plan_process`], with everything read that does not depend on the process's state.
pub fn plan_loaded(
    process: &proto::Process,
    memory: &dyn Memory,
    modules: &ModuleMap,
    loaded: &Loaded<'_>,
    options: &Options,
) -> Result<proto::Patch, TransformError> {
    let prepared = Prepared::new(loaded, &options.rules);
    let (mut patch, heap) = prepared.plan(process, memory, modules)?;
    prepared.verify(process, memory, modules, &heap, &mut patch);
    Ok(patch)
}

/// What an update's plan needs of the two programs, worked out once: a plan made with it again (in the pause,
/// after a rehearsal) has only the process to look at.
pub struct Prepared<'a> {
    path: String,
    pub(crate) new: &'a ElfFile,
    pub(crate) types: &'a TypeModel,
    pub(crate) old_types: &'a TypeModel,
    pub(crate) rules: &'a Rules,
    pub(crate) diff: diff::Diff<'a>,
    pub(crate) changes: Vec<proto::TypeChange>,
    pub(crate) layouts: Layouts<'a>,
    pub(crate) known: Known,
    pub(crate) slots: KnownSlots,
    /// The allocator's place in the last process that was planned for, with that libc's place and build-id.
    heap: Mutex<Option<(LibcAt, heap::Known)>>,
}

/// Where a libc is mapped, and which one it is.
type LibcAt = (mcr_image::Addr, Vec<u8>);

fn libc_at(modules: &ModuleMap) -> Option<LibcAt> {
    let libc = modules.libc()?;
    Some((libc.bias, libc.build_id()?.to_vec()))
}

impl<'a> Prepared<'a> {
    /// What an earlier plan found out about the allocator, if libc is the same at the same place.
    pub(crate) fn known_heap(&self, modules: &ModuleMap) -> Option<heap::Known> {
        let at = libc_at(modules)?;
        let last = self.heap.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().filter(|l| l.0 == at).map(|l| l.1.clone())
    }

    pub(crate) fn learn_heap(&self, modules: &ModuleMap, heap: &GlibcHeap) {
        let next = libc_at(modules).zip(heap.known());
        *self.heap.lock().unwrap_or_else(PoisonError::into_inner) = next;
    }

    /// Compares the two programs.
    #[must_use]
    pub fn new(loaded: &Loaded<'a>, rules: &'a Rules) -> Self {
        let (diff, changes) = diff::of(loaded.old_types, loaded.types, rules);
        Self {
            path: loaded.path.clone(),
            new: loaded.elf,
            types: loaded.types,
            old_types: loaded.old_types,
            rules,
            diff,
            changes,
            layouts: Layouts::new(loaded.old_types, rules),
            known: Known::default(),
            slots: KnownSlots::default(),
            heap: Mutex::new(None),
        }
    }

    /// Plans the update of a process whose program is the old one. Refusals are among the patch's findings.
    /// The heap that was read for it comes with the patch.
    pub fn plan(
        &self,
        process: &proto::Process,
        memory: &dyn Memory,
        modules: &ModuleMap,
    ) -> Result<(proto::Patch, GlibcHeap), TransformError> {
        let exe = modules.exe().ok_or_else(|| TransformError::NoProgram {
            path: process.exe_path.clone(),
            key: process.modules.iter().find(|m| m.is_exe).map_or(String::new(), |m| m.key.clone()),
        })?;
        let old = OldState { process, memory, modules, elf: &exe.elf, types: self.old_types };
        let new = NewProgram { path: self.path.clone(), elf: self.new, types: self.types };
        plan_with_findings(&old, &new, self)
    }
}

impl Prepared<'_> {
    /// I10 and I11 on the patch alone, before any boot: what does not hold is a refusal among its findings.
    pub fn verify(
        &self,
        process: &proto::Process,
        memory: &dyn Memory,
        modules: &ModuleMap,
        heap: &GlibcHeap,
        patch: &mut proto::Patch,
    ) {
        let started = Instant::now();
        let found = {
            let view = PatchedMemory::new(memory, patch);
            let at = Unbooted(patch);
            let Some(v) = Verifier::new(self, process, memory, modules, heap, patch) else { return };
            let relations = v.relations(&view, &at).err().map(|b| b.finding());
            let trip = v.round_trip(&view, &at).map_or_else(|b| Some(b.finding()), |t| t.finding());
            [relations, trip]
        };
        patch.findings.extend(found.into_iter().flatten());
        patch.findings.sort_by_key(|f| std::cmp::Reverse(f.severity));
        let stats = patch.stats.get_or_insert_default();
        let start_us = stats.phases.last().map_or(0, |p| p.start_us + p.duration_us);
        let duration_us = started.elapsed().as_micros() as u64;
        stats.phases.push(proto::Phase { name: "verify".into(), start_us, duration_us, frozen: false });
    }
}

/// A patch whose findings hold a refusal is none.
pub fn refuse(patch: proto::Patch) -> Result<proto::Patch, TransformError> {
    match crate::plan::refusal(&patch) {
        Some(r) => Err(TransformError::Refused(Box::new(r))),
        None => Ok(patch),
    }
}
