//! What must be true of a finished update, checked from the old state alone: what the plan thought is not asked.
//!
//! - **I10, relations** ([`Verifier::relations`]): old memory in old's types and new memory in new's types are
//!   walked in parallel from the same roots. What a pointer led to in the old version, it leads to in the new one:
//!   the same object, at its place in the new layout.
//! - **I11, round trip** ([`Verifier::round_trip`]): what got a new layout is converted back and compared. What
//!   differs is lost state; what cannot come back (a dropped member, a computed one) is listed by name.
//!
//! "New memory" is a view: the patch laid over the image (offline), or the booted host with link's write list laid
//! over it.

mod expect;
mod relations;
mod round_trip;
mod walk;

pub use expect::Verdict;
pub use relations::Relations;
pub use round_trip::RoundTrip;
pub(crate) use walk::KnownSlots;

use crate::Prepared;
use crate::heap::GlibcHeap;
use crate::plan::Convs;
use crate::relayout::Relayout;
use crate::resolve::Resolver;
use crate::space::Space;
use mcr_image::{Addr, Memory, ModuleMap, Regs, proto, unwind};
use std::sync::OnceLock;

/// A value of the patch that lies outside of retained memory: the index in its list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Root {
    /// Of `Patch.globals`.
    Global(usize),
    /// Of `Patch.tls`.
    Tls(usize),
    /// Of `Patch.locals`.
    Local(usize),
}

/// Where things of the new version are. What is not known yet (before a boot) is `None`, and not judged.
pub trait Placing {
    /// Load base of the new program.
    fn program(&self) -> Option<Addr>;
    /// Thread pointer of the thread that takes over an old one.
    fn thread(&self, old_tid: u32) -> Option<u64>;
    /// Address of a thread-local of the program in that thread, by its offset in the TLS segment.
    fn tls(&self, old_tid: u32, offset: u64) -> Option<u64>;
    /// Address of a local of a quiescent frame.
    fn local(&self, at: &proto::LocalAddr) -> Option<u64>;
    /// The new number of an old process or thread.
    fn pid(&self, old: u32) -> Option<u32>;
    /// The bytes of a root as they will be; `None`: it has no place.
    fn root(&self, root: Root) -> Option<Vec<u8>>;
}

/// Before a boot: values are those of the patch, and nothing of the new program has an address.
pub struct Unbooted<'a>(pub &'a proto::Patch);

impl Placing for Unbooted<'_> {
    fn program(&self) -> Option<Addr> {
        None
    }
    fn thread(&self, _: u32) -> Option<u64> {
        None
    }
    fn tls(&self, _: u32, _: u64) -> Option<u64> {
        None
    }
    fn local(&self, _: &proto::LocalAddr) -> Option<u64> {
        None
    }
    fn pid(&self, _: u32) -> Option<u32> {
        None
    }
    fn root(&self, root: Root) -> Option<Vec<u8>> {
        match root {
            Root::Global(i) => self.0.globals.get(i).map(|g| g.content.clone()),
            Root::Tls(i) => self.0.tls.get(i).map(|t| t.content.clone()),
            Root::Local(i) => self.0.locals.get(i).map(|l| l.content.clone()),
        }
    }
}

/// An invariant that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// "I10" or "I11".
    pub invariant: &'static str,
    /// Names the object and what is wrong with it.
    pub message: String,
    /// From a root.
    pub path: String,
    /// What the user can do.
    pub next_step: &'static str,
    /// In the old process.
    pub addr: u64,
}

impl Broken {
    fn relation(message: String, path: String, addr: u64) -> Self {
        let next_step = "the old server goes on; report this with the image and both programs, \
                         a rule `[keep] GLOBAL = \"new\"` for the holder avoids it";
        Self { invariant: "I10", message, path, next_step, addr }
    }

    /// As a finding that refuses.
    #[must_use]
    pub fn finding(&self) -> proto::Finding {
        proto::Finding {
            severity: proto::Severity::Refusal.into(),
            code: if self.invariant == "I10" { "I10-relation" } else { "I11-round-trip" }.into(),
            message: self.message.clone(),
            path: self.path.clone(),
            next_step: self.next_step.into(),
            addr: self.addr,
        }
    }
}

/// The old state and the patch, ready to be compared with what becomes of them.
pub struct Verifier<'a> {
    pub(crate) prepared: &'a Prepared<'a>,
    pub(crate) process: &'a proto::Process,
    pub(crate) memory: &'a dyn Memory,
    pub(crate) modules: &'a ModuleMap,
    pub(crate) patch: &'a proto::Patch,
    pub(crate) space: Space<'a>,
    pub(crate) resolver: Resolver<'a>,
    /// Objects with a new layout, as the patch lists them.
    pub(crate) convs: Convs,
    pub(crate) bias: u64,
    /// Values of old locals: thread, frame, variable.
    locals: OnceLock<Vec<OldLocal>>,
}

/// A local of an old frame.
pub(crate) struct OldLocal {
    pub tid: u32,
    pub frame: u32,
    pub function: String,
    pub name: String,
    pub ty: crate::types::TypeId,
    pub bytes: Vec<u8>,
    /// 0: in a register.
    pub addr: u64,
    /// Bytes on the stack; 0: in a register.
    pub size: u64,
}

impl<'a> Verifier<'a> {
    /// `None`: the old process has no program among its modules.
    #[must_use]
    pub fn new(
        prepared: &'a Prepared<'a>,
        process: &'a proto::Process,
        memory: &'a dyn Memory,
        modules: &'a ModuleMap,
        heap: &'a GlibcHeap,
        patch: &'a proto::Patch,
    ) -> Option<Self> {
        let exe = modules.exe()?;
        let rl = &prepared.diff as &dyn Relayout;
        let resolver = Resolver::new(
            &exe.elf,
            prepared.new,
            (prepared.old_types, prepared.types),
            exe.bias.0,
            prepared.rules,
            rl,
            &prepared.known,
        );
        Some(Self {
            prepared,
            process,
            memory,
            modules,
            patch,
            space: Space::new(process, memory, modules, heap),
            resolver,
            convs: expect::converted(prepared, heap, patch),
            bias: exe.bias.0,
            locals: OnceLock::new(),
        })
    }

    /// Locals of old's quiescent frames.
    pub(crate) fn locals(&self) -> &[OldLocal] {
        self.locals
            .get_or_init(|| locals(self.prepared, self.process, self.memory, self.modules, Addr(self.bias)))
    }

    pub(crate) fn rl(&self) -> &dyn Relayout {
        &self.prepared.diff
    }

    /// The old variable whose value a carried global takes, and the new one.
    pub(crate) fn global(
        &self,
        g: &proto::GlobalValue,
    ) -> Option<(&'a crate::types::Variable, &'a crate::types::Variable)> {
        let (old, new) = (self.prepared.old_types, self.prepared.types);
        let link = mcr_image::LinkAddr(g.old_addr.checked_sub(self.bias)?);
        let o = old.global_at(link).filter(|v| v.place.link() == Some(link))?;
        let at = mcr_image::LinkAddr(g.new_link_addr);
        let n = new.global_at(at).filter(|v| v.place.link() == Some(at))?;
        Some((o, n))
    }

    /// The old thread-local behind a carried one, its address and the new one.
    pub(crate) fn thread_local(
        &self,
        t: &proto::TlsValue,
    ) -> Option<(&'a crate::types::Variable, u64, &'a crate::types::Variable)> {
        let new =
            self.prepared.types.globals_named(&t.name).find(|n| n.place.tls() == Some(t.new_tls_offset))?;
        let old = self.prepared.old_types.globals().iter().find(|o| {
            o.place.tls().is_some()
                && self.resolver.new_variable(o).is_some_and(|n| n.place == new.place && n.name == new.name)
        })?;
        let thread = self.process.threads.iter().find(|p| p.tid == t.old_tid)?;
        let block = mcr_image::tls_block(self.memory, Addr(thread.fs_base), self.modules.exe()?)?;
        Some((old, block.0 + old.place.tls()?, new))
    }

    /// The old local behind a carried one.
    pub(crate) fn local(&self, l: &proto::LocalValue) -> Option<&OldLocal> {
        self.locals().iter().find(|o| {
            o.tid == l.old_tid && o.frame == l.frame && o.function == l.function && o.name == l.variable
        })
    }
}

fn locals(
    prepared: &Prepared<'_>,
    process: &proto::Process,
    memory: &dyn Memory,
    modules: &ModuleMap,
    bias: Addr,
) -> Vec<OldLocal> {
    use crate::types::LocalPlace;
    let types = prepared.old_types;
    let mut out = Vec::new();
    for t in &process.threads {
        let Some(regs) = Regs::from_words(&t.regs) else { continue };
        for (i, frame) in unwind(modules, memory, &regs).frames.iter().enumerate() {
            let Some(function) = types.function_of(frame).filter(|_| frame.in_program()) else { continue };
            for local in types.locals_at(frame, memory, bias) {
                let Some(bytes) = local.bytes(types, memory) else { continue };
                let (addr, size) = match &local.place {
                    LocalPlace::Memory(a) => (a.0, types.size_of(local.ty)),
                    LocalPlace::Register { saved_at, .. } => (saved_at.map_or(0, |a| a.0), 0),
                    _ => (0, 0),
                };
                out.push(OldLocal {
                    tid: t.tid,
                    frame: i as u32,
                    function: function.name.to_string(),
                    name: local.name.clone(),
                    ty: local.ty,
                    bytes,
                    addr,
                    size,
                });
            }
        }
    }
    out
}
