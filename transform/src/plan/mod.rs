//! From the old process and the two programs to a patch.

mod carry;
mod findings;
mod fix;
mod globals;
mod objects;
mod region;
mod roots;
mod sync;
mod untyped;
mod words;

use crate::heap::GlibcHeap;
use crate::reach::Reach;
use crate::relayout::Relayout;
use crate::resolve::Resolver;
use crate::space::Space;
use crate::trace::Tracer;
use crate::types::TypeModel;
use crate::{Prepared, Refusal, TransformError};
pub(crate) use carry::Fix;
use findings::Findings;
use fix::Fixer;
pub(crate) use globals::is_copy;
use mcr_image::{Addr, ElfFile, Memory, ModuleMap, proto};
use mcr_plugin::Rules;
pub(crate) use objects::{Conv, Convs};
use std::time::Instant;

/// The old process, wherever its memory is: an image, a frozen process, a COW child.
pub struct OldState<'a> {
    /// Mappings, threads, descriptors.
    pub process: &'a proto::Process,
    /// Its memory.
    pub memory: &'a dyn Memory,
    /// Its ELF modules (made with [`ModuleMap::read`]).
    pub modules: &'a ModuleMap,
    /// The program's file.
    pub elf: &'a ElfFile,
    /// The program's types.
    pub types: &'a TypeModel,
}

/// The program to update to.
pub struct NewProgram<'a> {
    /// Its path.
    pub path: String,
    /// Its file.
    pub elf: &'a ElfFile,
    /// Its types.
    pub types: &'a TypeModel,
}

/// What the parts of the plan share.
struct Work<'a> {
    old: &'a OldState<'a>,
    new: &'a NewProgram<'a>,
    rules: &'a Rules,
    rl: &'a dyn Relayout,
    bias: u64,
    patch: proto::Patch,
    findings: Findings,
    started: Instant,
}

impl Work<'_> {
    /// Records how long a phase took that began at `since`.
    fn phase(&mut self, name: &str, since: Instant) {
        let stats = self.patch.stats.get_or_insert_default();
        stats.phases.push(proto::Phase {
            name: name.into(),
            start_us: since.duration_since(self.started).as_micros() as u64,
            duration_us: since.elapsed().as_micros() as u64,
            frozen: false,
        });
    }
    fn stats(&mut self) -> &mut proto::PlanStats {
        self.patch.stats.get_or_insert_default()
    }
}

/// The refusal that a patch's findings amount to.
#[must_use]
pub fn refusal(patch: &proto::Patch) -> Option<Refusal> {
    findings::refusal(&patch.findings)
}

/// Plans the update; refusals are among the patch's findings. Also the old heap.
pub(crate) fn plan_with_findings(
    old: &OldState<'_>,
    new: &NewProgram<'_>,
    prepared: &Prepared<'_>,
) -> Result<(proto::Patch, GlibcHeap), TransformError> {
    let (rules, rl, layouts) = (prepared.rules, &prepared.diff as &dyn Relayout, &prepared.layouts);
    let exe = old.modules.exe().ok_or_else(|| TransformError::NoProgram {
        path: old.process.exe_path.clone(),
        key: String::new(),
    })?;
    let started = Instant::now();
    let mut w = Work {
        old,
        new,
        rules,
        rl,
        bias: exe.bias.0,
        patch: proto::Patch {
            old_path: exe.path.clone(),
            old_build_id: old.elf.build_id().unwrap_or_default().to_vec(),
            new_path: new.path.clone(),
            new_build_id: new.elf.build_id().unwrap_or_default().to_vec(),
            old_base: exe.bias.0,
            changes: prepared.changes.clone(),
            ..proto::Patch::default()
        },
        findings: Findings::default(),
        started,
    };

    let t = Instant::now();
    let heap = {
        let (threads, vmas) = (&old.process.threads, &old.process.vmas);
        let known = prepared.known_heap(old.modules);
        GlibcHeap::read_checked(old.memory, old.modules, threads, vmas, known.as_ref())?
    };
    prepared.learn_heap(old.modules, &heap);
    let space = Space::new(old.process, old.memory, old.modules, &heap);
    w.patch.heap = Some(heap.info());
    w.phase("heap", t);

    let t = Instant::now();
    let resolver =
        Resolver::new(old.elf, new.elf, (old.types, new.types), w.bias, rules, rl, &prepared.known);
    let mut tracer = Tracer::new(old.memory, &space, layouts);
    let roots = roots::find(&mut w, &resolver, &mut tracer);
    tracer.run();
    w.phase("trace", t);

    let t = Instant::now();
    let (mut convs, region) = objects::convert_all(&tracer, rl, old.memory, &mut w.findings);
    let region_start = if region.is_empty() { None } else { space.free_range(region.len()) };
    if let Some(start) = region_start {
        objects::rebase(&mut convs, start);
    }
    let reach = Reach::new(old.memory, old.process, &space);
    untyped::report(&mut w, &tracer, &convs, &reach);
    w.phase("layout", t);

    let t = Instant::now();
    let fixer = Fixer {
        space: &space,
        resolver: &resolver,
        rl,
        convs: &convs,
        threads: &old.process.threads,
        pid: old.process.pid,
        stack_vars: &roots.stack_vars,
        arguments: old.process.mm.as_ref().map_or(0, |m| m.start_stack),
        tls_vars: &roots.tls_vars,
    };
    roots::carry(&mut w, &fixer, layouts, &roots);
    let done = words::heap_objects(&mut w, &fixer, &tracer);
    w.phase("pointers", t);

    let t = Instant::now();
    let (rest, pointing) = words::opaque(&mut w, &fixer, &tracer, &done, &reach);
    words::epoll(&mut w, &fixer);
    words::timers(&mut w, &fixer);
    w.phase("scan", t);

    let t = Instant::now();
    words::finish(&mut w, &convs, [done, rest], region, region_start, &tracer);
    if !convs.list.is_empty() {
        words::rescan(&mut w, &space, &convs, &pointing);
    }
    w.phase("check", t);

    w.stats().objects_opaque = heap.in_use().count().saturating_sub(tracer.heap_objects().len()) as u64;
    let findings = std::mem::take(&mut w.findings);
    w.patch.findings = findings.finish();
    let patch = w.patch;
    Ok((patch, heap))
}

/// Reads bytes of the old process, `None` where they are not mapped.
fn read(memory: &dyn Memory, addr: u64, len: u64) -> Option<Vec<u8>> {
    memory.bytes(Addr(addr), usize::try_from(len).ok()?).ok()
}
