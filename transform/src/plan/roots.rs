//! Roots: globals, thread-locals and locals of quiescent frames. Where tracing starts, and what is carried by
//! name.

use super::fix::{Fixer, StackVar};
use super::globals::{Carried, Carrier, Item, changed, is_copy};
use super::{Work, read};
use crate::carry_fix::place_fixes;
use crate::layout::{Layouts, SlotKind};
use crate::relayout::Converted;
use crate::resolve::{Elements, Resolver};
use crate::trace::Tracer;
use crate::types::{LocalPlace, Type, TypeId, VarPlace, Variable};
use mcr_image::elf::{Initial, SectionKind};
use mcr_image::proto::place;
use mcr_image::{Addr, LinkAddr, Regs, proto, tls_block, unwind};
use mcr_plugin::Keep;
use std::collections::HashSet;
use std::ops::Range;

/// A variable of old whose value goes to new.
struct Pair<'a> {
    old: &'a Variable,
    new: &'a Variable,
    bytes: Vec<u8>,
    initial: Option<Vec<u8>>,
    addr: u64,
    /// For thread-locals.
    tid: u32,
}

struct LocalVar {
    tid: u32,
    frame: u32,
    function: String,
    name: String,
    ty: TypeId,
    bytes: Vec<u8>,
    addr: u64,
}

/// What the roots turned out to be.
#[derive(Default)]
pub(super) struct Roots<'a> {
    globals: Vec<Pair<'a>>,
    tls: Vec<Pair<'a>>,
    locals: Vec<LocalVar>,
    pub stack_vars: Vec<StackVar>,
    pub tls_vars: Vec<(Range<u64>, Option<u64>, String)>,
}

pub(super) fn find<'a>(w: &mut Work<'a>, resolver: &Resolver<'a>, tracer: &mut Tracer<'_>) -> Roots<'a> {
    let mut out = Roots::default();
    globals(w, resolver, tracer, &mut out);
    thread_locals(w, resolver, tracer, &mut out);
    locals(w, tracer, &mut out);
    out
}

fn globals<'a>(w: &mut Work<'a>, resolver: &Resolver<'a>, tracer: &mut Tracer<'_>, out: &mut Roots<'a>) {
    let mut seen = std::collections::HashSet::new();
    for v in w.old.types.globals() {
        let Some(link) = v.place.link() else { continue };
        let writable = matches!(w.old.elf.section_kind(link), SectionKind::Data | SectionKind::Bss);
        if !writable || v.size == 0 || !seen.insert(link) {
            continue;
        }
        let addr = link.at(Addr(w.bias)).0;
        let Some(bytes) = read(w.old.memory, addr, v.size) else { continue };
        let initial = w.old.elf.initial_bytes(link, v.size as usize, Addr(w.bias));
        if is_copy(initial.as_ref()) {
            continue; // libc's, not the program's
        }
        tracer.root(addr, v.ty, &v.display(), &bytes, false);
        if let (Some(name), Some(p)) = (w.rules.variable_slot_type(&v.name), crate::trace::word_at(&bytes, 0))
            && let SlotKind::Pointer(to) = tracer.layouts.pointer(TypeId::VOID, Some(name))
        {
            tracer.claim(p, to, &v.display());
        }
        let new = resolver.new_variable(v);
        let is_changed = changed(initial.as_ref(), &bytes);
        let keep = w.rules.keep(new.map_or(&v.name, |n| &n.name)).or_else(|| w.rules.keep(&v.name));
        let Some(new) = new else {
            if is_changed {
                w.stats().globals_dropped += 1;
                w.findings.info(
                    "global-dropped",
                    format!("{} ({}) is not in the new version; its value is dropped", v.display(), v.unit),
                    v.display(),
                    &format!("if it was renamed: [rename.globals] {} = \"…\"", v.name),
                    addr,
                );
            }
            continue;
        };
        if keep == Some(Keep::New) || (!is_changed && keep != Some(Keep::Old)) {
            w.stats().globals_native += 1;
            continue;
        }
        if new.place.link().is_none() {
            continue;
        }
        let initial = initial.map(|i| i.bytes);
        out.globals.push(Pair { old: v, new, bytes, initial, addr, tid: 0 });
    }
    unnamed(w, &seen);
}

/// Writable data that only the symbol table names.
fn unnamed(w: &mut Work<'_>, seen: &std::collections::HashSet<LinkAddr>) {
    let elf = w.old.elf;
    for s in elf.symbols() {
        let data = matches!(elf.section_kind(s.addr), SectionKind::Data | SectionKind::Bss);
        let object = s.kind == mcr_image::elf::SymbolKind::Object;
        if !data
            || !object
            || s.size == 0
            || seen.contains(&s.addr)
            || w.old.types.global_at(s.addr).is_some()
        {
            continue;
        }
        let addr = s.addr.at(Addr(w.bias)).0;
        let initial = elf.initial_bytes(s.addr, s.size as usize, Addr(w.bias));
        let Some(bytes) = read(w.old.memory, addr, s.size) else { continue };
        if is_copy(initial.as_ref()) || !changed(initial.as_ref(), &bytes) {
            continue;
        }
        w.findings.warn(
            "untyped-global",
            format!(
                "{} ({} bytes) changed, but has no debug information: its value is not carried",
                s.name, s.size
            ),
            s.name.into(),
            "build that part of the program with -g, too",
            addr,
        );
    }
}

fn thread_locals<'a>(
    w: &mut Work<'a>,
    resolver: &Resolver<'a>,
    tracer: &mut Tracer<'_>,
    out: &mut Roots<'a>,
) {
    let (Some(exe), Some(segment)) = (w.old.modules.exe(), w.old.elf.tls()) else { return };
    for v in w.old.types.globals() {
        let VarPlace::Tls(offset) = v.place else { continue };
        let new = resolver.new_variable(v);
        let new_offset = new.and_then(|n| n.place.tls());
        out.tls_vars.push((offset..offset + v.size.max(1), new_offset, v.display()));
        let initial = tls_initial(w, segment, offset, v.size);
        for t in &w.old.process.threads {
            let Some(block) = tls_block(w.old.memory, Addr(t.fs_base), exe) else { continue };
            let addr = block.0 + offset;
            let Some(bytes) = read(w.old.memory, addr, v.size) else { continue };
            tracer.root(addr, v.ty, &format!("{} of thread {}", v.display(), t.tid), &bytes, false);
            if !changed(initial.as_ref(), &bytes) {
                continue;
            }
            match new {
                Some(new) if new_offset.is_some() => {
                    out.tls.push(Pair { old: v, new, bytes, initial: None, addr, tid: t.tid });
                }
                _ => w.findings.info(
                    "global-dropped",
                    format!(
                        "thread-local variable {} is not in the new version; its value is dropped",
                        v.display()
                    ),
                    v.display(),
                    &format!("if it was renamed: [rename.globals] {} = \"…\"", v.name),
                    addr,
                ),
            }
        }
    }
}

fn tls_initial(
    w: &Work<'_>,
    segment: &mcr_image::elf::TlsSegment,
    offset: u64,
    size: u64,
) -> Option<Initial> {
    let from_file = segment.file_size.saturating_sub(offset).min(size);
    let mut init = match from_file {
        0 => Initial { bytes: Vec::new(), unknown: Vec::new() },
        n => w.old.elf.initial_bytes(LinkAddr(segment.vaddr.0 + offset), n as usize, Addr(w.bias))?,
    };
    init.bytes.resize(size as usize, 0);
    Some(init)
}

/// Locals of the program's frames on every thread's stack.
fn locals(w: &mut Work<'_>, tracer: &mut Tracer<'_>, out: &mut Roots<'_>) {
    for t in &w.old.process.threads {
        let Some(regs) = Regs::from_words(&t.regs) else { continue };
        let unwound = unwind(w.old.modules, w.old.memory, &regs);
        for (i, frame) in unwound.frames.iter().enumerate() {
            if !frame.in_program() {
                continue;
            }
            let Some(function) = w.old.types.function_of(frame) else { continue };
            for local in w.old.types.locals_at(frame, w.old.memory, Addr(w.bias)) {
                let Some(bytes) = local.bytes(w.old.types, w.old.memory) else { continue };
                let addr = match &local.place {
                    LocalPlace::Memory(a) => a.0,
                    LocalPlace::Register { saved_at, .. } => saved_at.map_or(0, |a| a.0),
                    _ => 0,
                };
                let path = format!("{}::{} of thread {}", function.name, local.name, t.tid);
                tracer.root(addr, local.ty, &path, &bytes, true);
                let var = LocalVar {
                    tid: t.tid,
                    frame: i as u32,
                    function: function.name.to_string(),
                    name: local.name.clone(),
                    ty: local.ty,
                    bytes,
                    addr,
                };
                if let LocalPlace::Memory(a) = local.place {
                    out.stack_vars.push(StackVar {
                        range: a.0..a.0 + w.old.types.size_of(local.ty).max(1),
                        addr: proto::LocalAddr {
                            old_tid: var.tid,
                            frame: var.frame,
                            function: var.function.clone(),
                            variable: var.name.clone(),
                            offset: 0,
                        },
                    });
                }
                out.locals.push(var);
            }
        }
    }
}

/// Fills the patch's globals, thread-locals and locals.
pub(super) fn carry(w: &mut Work<'_>, fixer: &Fixer<'_>, layouts: &Layouts<'_>, roots: &Roots<'_>) {
    let carrier = Carrier { fixer, layouts, rl: w.rl };
    let mut syncs = Vec::new();
    for p in &roots.globals {
        if let Some(done) = w.rl.global_rule(p.old, p.new, &p.bytes) {
            by_rule(w, p.new, p.addr, done);
            continue;
        }
        let elements = fixer.resolver.elements(p.old, p.new);
        let name = p.old.display();
        if let Elements::Unknown(why) = &*elements {
            w.findings.refuse(
                "table-order",
                why.clone(),
                name.clone(),
                &format!("[keep] {} = \"new\"", p.new.name),
                p.addr,
            );
            continue;
        }
        let item = Item {
            name: &name,
            old_ty: p.old.ty,
            new_ty: p.new.ty,
            new_size: p.new.size,
            bytes: &p.bytes,
            initial: p.initial.as_deref(),
            addr: p.addr,
            elements: &elements,
            weak: false,
        };
        let done = carrier.carry(&item, &mut w.findings, &mut syncs);
        hidden(w, fixer, &name, &p.bytes, p.addr);
        let index = w.patch.globals.len() as u32;
        w.patch.globals.push(proto::GlobalValue {
            name: p.new.name.to_string(),
            unit: p.new.unit.to_string(),
            function: p.new.function.as_deref().unwrap_or_default().to_owned(),
            new_link_addr: p.new.place.link().unwrap_or_default().0,
            size: p.new.size,
            content: done.content,
            keep_native: done.native,
            old_addr: p.addr,
            type_name: w.new.types.display(p.new.ty),
        });
        w.stats().globals_carried += 1;
        place_fixes(&mut w.patch, done.fixes, &|at| (place::In::Global(index), at));
    }
    let matched: HashSet<_> = roots.globals.iter().map(|p| p.new.place).collect();
    let new_types = w.new.types;
    for v in new_types.globals().iter().filter(|v| v.place.link().is_some() && !matched.contains(&v.place)) {
        if let Some(done) = w.rl.global_default(v) {
            by_rule(w, v, 0, done);
        }
    }
    for p in &roots.tls {
        let name = format!("{} of thread {}", p.old.display(), p.tid);
        let Carried { content, native, fixes } = carrier.carry(
            &Item {
                name: &name,
                old_ty: p.old.ty,
                new_ty: p.new.ty,
                new_size: p.new.size,
                bytes: &p.bytes,
                initial: None,
                addr: p.addr,
                elements: &Elements::Same,
                weak: false,
            },
            &mut w.findings,
            &mut syncs,
        );
        let index = w.patch.tls.len() as u32;
        w.patch.tls.push(proto::TlsValue {
            old_tid: p.tid,
            name: p.new.name.to_string(),
            new_tls_offset: p.new.place.tls().unwrap_or_default(),
            content,
            keep_native: native,
            type_name: w.new.types.display(p.new.ty),
        });
        place_fixes(&mut w.patch, fixes, &|at| (place::In::Tls(index), at));
    }
    for v in &roots.locals {
        // A local is matched by its name at link time; its type by the name of the type.
        let scalar = matches!(w.old.types.strip(v.ty), Type::Base { .. } | Type::Pointer(_) | Type::Enum(_));
        let (new_ty, new_size) = match w.rl.pair(v.ty) {
            Some(n) => (n, w.rl.size_new(n)),
            None if scalar => (TypeId::VOID, w.old.types.size_of(v.ty)),
            None => continue,
        };
        let name = format!("{}::{} of thread {}", v.function, v.name, v.tid);
        let item = Item {
            name: &name,
            old_ty: v.ty,
            new_ty,
            new_size,
            bytes: &v.bytes,
            initial: None,
            addr: v.addr,
            elements: &Elements::Same,
            weak: true,
        };
        let Carried { content, native, fixes } = carrier.carry(&item, &mut w.findings, &mut syncs);
        let index = w.patch.locals.len() as u32;
        w.patch.locals.push(proto::LocalValue {
            old_tid: v.tid,
            frame: v.frame,
            function: v.function.clone(),
            variable: v.name.clone(),
            type_name: if new_ty == TypeId::VOID {
                w.old.types.display(v.ty)
            } else {
                w.new.types.display(new_ty)
            },
            content,
            keep_native: native,
        });
        place_fixes(&mut w.patch, fixes, &|at| (place::In::Local(index), at));
    }
    w.patch.syncs.extend(syncs);
}

/// Pointers to moved objects at odd places of a global.
fn hidden(w: &mut Work<'_>, fixer: &Fixer<'_>, name: &str, bytes: &[u8], addr: u64) {
    if !fixer.convs.list.iter().any(|c| c.moved) {
        return;
    }
    for (i, b) in bytes.windows(8).enumerate().filter(|(i, _)| !(addr + *i as u64).is_multiple_of(8)) {
        let v = u64::from_le_bytes(b.try_into().expect("eight bytes"));
        if fixer.convs.at(v).is_some_and(|n| fixer.convs.list[n].moved && fixer.convs.list[n].old_addr == v) {
            super::words::hidden_pointer(w, v, addr + i as u64, format!("{name}+{i:#x}"));
        }
    }
}

/// A global whose value a rule gives.
fn by_rule(w: &mut Work<'_>, new: &Variable, old_addr: u64, done: Converted) {
    for p in done.problems {
        let severity = if p.refusal { proto::Severity::Refusal } else { proto::Severity::Info };
        w.findings.add(severity, p.code, p.message, new.display(), &p.next_step, old_addr);
    }
    w.patch.globals.push(proto::GlobalValue {
        name: new.name.to_string(),
        unit: new.unit.to_string(),
        function: new.function.as_deref().unwrap_or_default().to_owned(),
        new_link_addr: new.place.link().unwrap_or_default().0,
        size: done.bytes.len() as u64,
        content: done.bytes,
        keep_native: Vec::new(),
        old_addr,
        type_name: w.new.types.display(new.ty),
    });
    w.stats().globals_carried += 1;
}
