//! The new program's mappings in the old process, and afterwards the old program out of it.

use super::{Input, MemoryPlan, PlanError, Stale, unsupported};
use crate::link::Span;
use mcr_criu_lite::tracee::commit::{Call, CommitPlan, result_of};
use mcr_image::Addr;
use std::collections::BTreeMap;
use std::path::PathBuf;

const PAGE: u64 = 4096;
const RW: u32 = 3;
/// Between what is there and what is mapped for the commit only.
const GAP: u64 = 64 << 20;

fn mmap(span: Span, prot: u32, flags: i32, fd: u64, offset: u64) -> Call {
    let flags = (libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE | flags) as u64;
    Call::new(libc::SYS_mmap, &[span.start.0, span.len(), prot.into(), flags, fd, offset])
        .undo(libc::SYS_munmap, &[span.start.0, span.len()])
}

fn anonymous(span: Span, prot: u32) -> Call {
    mmap(span, prot, libc::MAP_ANONYMOUS, u64::MAX, 0)
}

fn protect(span: Span, prot: u32) -> Call {
    Call::new(libc::SYS_mprotect, &[span.start.0, span.len(), prot.into()])
}

/// Adds the calls; `fd` is the number that the first of them to open a file will get. Returns the index of the `after`
/// call that sets /proc/PID/exe.
pub(super) fn lay(
    input: &Input<'_>,
    memory: &MemoryPlan,
    fd: u64,
    plan: &mut CommitPlan,
) -> Result<usize, PlanError> {
    let filled = |s: Span| memory.fills.iter().any(|f| s.contains(f.addr));
    // Files by path; each is opened by the process itself, as the start-up did.
    let mut files: BTreeMap<PathBuf, Vec<(Span, u32, u64)>> = BTreeMap::new();
    let mut spans = Vec::new();
    let mut after_protect = Vec::new();
    for m in &memory.maps {
        spans.push(m.span);
        let prot = if filled(m.span) { m.prot | RW } else { m.prot };
        if prot != m.prot {
            after_protect.push((m.span, m.prot));
        }
        match m.file {
            Some((host, offset)) => {
                let v = input
                    .outcome
                    .booted
                    .vmas
                    .iter()
                    .find(|v| v.start <= host.start.0 && host.start.0 < v.end);
                let path = v.filter(|v| !v.deleted).map(|v| PathBuf::from(&v.name));
                let path = path.ok_or_else(|| unsupported("the new version maps a file that is deleted"))?;
                files.entry(path).or_default().push((m.span, prot, offset));
            }
            None => plan.calls.push(anonymous(m.span, prot)),
        }
    }
    let exe = input.outcome.booted.modules.iter().find(|m| m.is_exe).map(|m| m.path.clone());
    let exe = exe
        .filter(|p| files.contains_key(p))
        .ok_or_else(|| unsupported("the new program's file is not mapped"))?;
    // The program's own file last: it stays open until the link /proc/PID/exe is set.
    let mut files: Vec<_> = files.into_iter().collect();
    files.sort_by_key(|f| f.0 == exe);
    for (path, maps) in &files {
        let name = plan.put(&[path.as_os_str().as_encoded_bytes(), &[0]].concat());
        let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;
        plan.calls.push(
            Call::new(libc::SYS_openat, &[libc::AT_FDCWD as u64, name, flags, 0])
                .undo(libc::SYS_close, &[fd]),
        );
        for (i, (span, prot, offset)) in maps.iter().enumerate() {
            plan.calls.push(mmap(*span, *prot, 0, result_of(i as u32 + 1), *offset));
        }
        if *path != exe {
            plan.calls.push(Call::new(libc::SYS_close, &[result_of(maps.len() as u32 + 1)]));
        }
    }
    for (span, prot) in &memory.locked {
        plan.calls.push(
            protect(*span, prot | RW).undo(libc::SYS_mprotect, &[span.start.0, span.len(), (*prot).into()]),
        );
        after_protect.push((*span, *prot));
    }

    // Room for what only the commit needs: copies of constants, the auxiliary vector.
    let copies: u64 = memory.constants.iter().map(Span::len).sum();
    let mm = &input.outcome.mm;
    let vector = (mm.auxv.len() as u64).next_multiple_of(PAGE);
    let room = free_room(input, &spans, copies + vector)?;
    plan.calls.push(anonymous(room, RW));
    let mut at = room.start;
    let mut moves = Vec::new();
    for c in &memory.constants {
        let bytes =
            input.old_memory.bytes(c.start, c.len() as usize).map_err(super::MemoryPlanError::from)?;
        plan.writes.push((at, bytes));
        moves.push((Span::new(at, at.add(c.len())), *c));
        at = at.add(c.len());
    }
    let vector_at = at;
    plan.writes.push((vector_at, mm.auxv.clone()));
    plan.keep_clear.extend(spans.iter().chain([&room]).map(|s| (s.start, s.end)));

    let after = &mut plan.after;
    for s in &memory.gone {
        after.push(Call::new(libc::SYS_munmap, &[s.start.0, s.len()]));
    }
    for (from, to) in &moves {
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        after.push(protect(*from, libc::PROT_READ as u32));
        after.push(Call::new(libc::SYS_mremap, &[from.start.0, from.len(), to.len(), flags, to.start.0]));
    }
    after.extend(after_protect.iter().map(|(s, p)| protect(*s, *p)));
    // First what needs no privilege, then the link.
    let old = input.old.mm.clone().unwrap_or_default();
    let mm = crate::boot::MmMap { brk: [old.start_brk, old.brk], ..mm.clone() };
    let mut exe_call = 0;
    for exe in [u32::MAX, fd as u32] {
        let bytes = mm.encode(vector_at, exe);
        let len = bytes.len() as u64;
        let at = plan.put(&bytes);
        exe_call = plan.after.len();
        plan.after.push(Call::new(
            libc::SYS_prctl,
            &[libc::PR_SET_MM as u64, libc::PR_SET_MM_MAP as u64, at, len, 0],
        ));
    }
    let name = input.outcome.booted.new_path.file_name().map(|n| n.as_encoded_bytes().to_vec());
    let name = name.unwrap_or_default();
    let name = plan.put(&[&name[..name.len().min(15)], &[0]].concat());
    plan.after.push(Call::new(libc::SYS_prctl, &[libc::PR_SET_NAME as u64, name]));
    plan.after.push(Call::new(libc::SYS_close, &[fd]));
    plan.after.push(Call::new(libc::SYS_munmap, &[vector_at.0, vector]));
    Ok(exe_call)
}

/// A free range behind the new version's own memory.
fn free_room(input: &Input<'_>, spans: &[Span], len: u64) -> Result<Span, PlanError> {
    let mut at =
        input.outcome.booted.modules.iter().filter(|m| m.is_exe).map(|m| m.end.0).next().unwrap_or(0);
    at = (at + GAP).next_multiple_of(PAGE);
    loop {
        let s = Span::new(Addr(at), Addr(at + len));
        let taken = input
            .old
            .vmas
            .iter()
            .map(|v| Span::new(Addr(v.start), Addr(v.end)))
            .chain(spans.iter().copied())
            .filter(|t| t.start < s.end && s.start < t.end)
            .map(|t| t.end.0)
            .max();
        match taken {
            None => return Ok(s),
            Some(end) if end < 0x7000_0000_0000 => at = (end + GAP).next_multiple_of(PAGE),
            Some(_) => {
                return Err(Stale::Place { span: s, holder: "the old process's memory".into() }.into());
            }
        }
    }
}
