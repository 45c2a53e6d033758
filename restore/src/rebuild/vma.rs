//! Mappings: everything of the new process's own is unmapped, everything of the image is mapped at its address
//! and filled. Sources: mmap(2), madvise(2), mlock2(2), arch_prctl(2) ARCH_MAP_VDSO_64 (Linux 4.9).

use super::batch::Batch;
use super::mapped::MappedFiles;
use super::remote::{AGENT, AGENT_SYSCALL, Inject, Island, Remote};
use super::{RebuildError, fill};
use mcr_image::{Image, Memory, proto};
use proto::{Vma, VmaKind};

/// End of user addresses with four-level page tables.
const TASK_END: u64 = 0x7fff_ffff_f000;
/// Size of the island: one page of code, then room for calls and their arguments.
const ISLAND: u64 = 1 << 20;
/// Distance kept from every mapping, for stacks that grow.
const MARGIN: u64 = 16 << 20;
const ARCH_MAP_VDSO_64: u64 = 0x2003;

/// Name of a mapping in messages.
fn name_of(v: &Vma) -> String {
    let name = if v.name.is_empty() { "anonymous" } else { &v.name };
    format!("mapping {:#x}-{:#x} ({name})", v.start, v.end)
}

fn has(v: &Vma, flag: &str) -> bool {
    v.vm_flags.iter().any(|f| f == flag)
}

/// Whether the kernel and not mmap(2) makes it.
fn special(v: &Vma) -> bool {
    matches!(v.kind(), VmaKind::VmaVdso | VmaKind::VmaVvar | VmaKind::VmaVsyscall)
}

/// Moves the new process onto an island and unmaps all the rest of it.
pub(super) fn clear(leader: &mut Remote, process: &proto::Process) -> Result<(), RebuildError> {
    let start = free_range(process, &own_maps(leader)?)?;
    // From here on PTRACE_O_EXITKILL ties it to the engine.
    inside(leader, "prctl PR_SET_PDEATHSIG", libc::SYS_prctl, &[1, 0, 0, 0, 0])?;
    // The engine's libc has registered a struct rseq in memory that goes away now.
    let (addr, size, sig) =
        leader.rseq().map_err(RebuildError::call("the new process", "reading its rseq"))?;
    if addr != 0 {
        inside(leader, "rseq", libc::SYS_rseq, &[addr, u64::from(size), 1, u64::from(sig)])?;
    }
    let prot = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
    inside(leader, "mmap", libc::SYS_mmap, &[start, ISLAND, prot, flags, u64::MAX, 0])?;
    leader
        .poke(mcr_image::Addr(start), AGENT)
        .map_err(RebuildError::call("the new process", "writing its agent"))?;
    leader.island = Island { start, len: ISLAND, syscall: start + AGENT_SYSCALL, agent: false };
    inside(leader, "munmap", libc::SYS_munmap, &[0, start])?;
    inside(leader, "munmap", libc::SYS_munmap, &[start + ISLAND, TASK_END - start - ISLAND])?;
    leader
        .set_sigmask(super::remote::BUILD_MASK)
        .map_err(RebuildError::call("the new process", "PTRACE_SETSIGMASK"))?;
    leader.island.agent = true;
    Ok(())
}

fn inside(leader: &mut Remote, call: &'static str, nr: i64, args: &[u64]) -> Result<u64, RebuildError> {
    leader.call(nr, args).map_err(|source| RebuildError::Inside {
        object: "the new process's own memory".to_owned(),
        call,
        source,
        next: "",
    })
}

/// Ranges that the copy of the engine has mapped now.
fn own_maps(leader: &Remote) -> Result<Vec<(u64, u64)>, RebuildError> {
    let text = std::fs::read(format!("/proc/{}/maps", leader.tid()))
        .map_err(RebuildError::call("the new process", "reading /proc/PID/maps"))?;
    let range = |line: &[u8]| {
        let word = line.split(|&b| b == b' ').next()?;
        let (a, b) = std::str::from_utf8(word).ok()?.split_once('-')?;
        Some((u64::from_str_radix(a, 16).ok()?, u64::from_str_radix(b, 16).ok()?))
    };
    Ok(text.split(|&b| b == b'\n').filter_map(range).collect())
}

/// An address for the island: far from everything that is or will be mapped.
fn free_range(process: &proto::Process, own: &[(u64, u64)]) -> Result<u64, RebuildError> {
    let mut taken: Vec<(u64, u64)> = process.vmas.iter().map(|v| (v.start, v.end)).collect();
    taken.extend_from_slice(own);
    taken.sort_unstable();
    let mut at = 0x1000_0000;
    for (start, end) in taken {
        if start >= at + MARGIN + ISLAND {
            return Ok(at);
        }
        at = at.max(end.saturating_add(MARGIN).next_multiple_of(1 << 21));
    }
    if at + ISLAND < TASK_END {
        return Ok(at);
    }
    Err(RebuildError::refused(
        "address space",
        "no free 48 MiB between the mappings for the builder's code",
        "",
    ))
}

/// Maps everything and fills it.
pub(super) fn map_all(
    leader: &mut Remote,
    image: &Image,
    process: &proto::Process,
    files: &MappedFiles,
) -> Result<fill::Filled, RebuildError> {
    vdso(leader, image, process)?;
    let mut batch = Batch::new(leader)?;
    for v in process.vmas.iter().filter(|v| !special(v)) {
        if files.placed.contains(&v.start) {
            continue;
        }
        map_one(&mut batch, v, files)?;
    }
    for group in &files.anon_groups {
        // One object, mapped whole and cut to what is mapped.
        batch.add(
            format!("shared memory at {:#x}", group.start),
            "mmap",
            libc::SYS_mmap,
            &[
                group.start,
                group.end - group.start,
                (libc::PROT_READ | libc::PROT_WRITE) as u64,
                (libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64,
                u64::MAX,
                0,
            ],
            "",
        )?;
        for (start, end) in &group.holes {
            batch.add("a hole in shared memory", "munmap", libc::SYS_munmap, &[*start, end - start], "")?;
        }
    }
    for v in process.vmas.iter().filter(|v| !special(v)) {
        let advice = if has(v, "hg") {
            14
        } else if has(v, "nh") {
            15
        } else {
            continue;
        };
        batch.add(name_of(v), "madvise", libc::SYS_madvise, &[v.start, v.end - v.start, advice], "")?;
    }
    batch.run()?;
    let filled = fill::fill(leader, image, process, files)?;
    finish_flags(leader, process, files)?;
    Ok(filled)
}

fn map_one(batch: &mut Batch<'_, Remote>, v: &Vma, files: &MappedFiles) -> Result<(), RebuildError> {
    let mut prot = u64::from(v.prot);
    let mut flags = libc::MAP_FIXED_NOREPLACE;
    let shared = matches!(v.kind(), VmaKind::VmaAnonShared | VmaKind::VmaFileShared);
    flags |= if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    if has(v, "gd") {
        flags |= libc::MAP_GROWSDOWN;
    }
    if has(v, "nr") {
        flags |= libc::MAP_NORESERVE;
    }
    let mut fd = u64::MAX;
    let mut offset = 0;
    if let Some(f) = files.by_start.get(&v.start) {
        fd = f.raw() as u64;
        offset = v.file_offset;
    } else {
        flags |= libc::MAP_ANONYMOUS;
    }
    if files.needs_write(v) {
        prot |= libc::PROT_WRITE as u64;
    }
    batch.add(
        name_of(v),
        "mmap",
        libc::SYS_mmap,
        &[v.start, v.end - v.start, prot, flags as u64, fd, offset],
        "another kernel or vm.overcommit_memory setting can be the reason",
    )
}

/// Protections and advice that would have been in the way of filling.
fn finish_flags(
    leader: &mut Remote,
    process: &proto::Process,
    files: &MappedFiles,
) -> Result<(), RebuildError> {
    let mut batch = Batch::new(leader)?;
    for v in process.vmas.iter().filter(|v| !special(v)) {
        let (start, len) = (v.start, v.end - v.start);
        if files.needs_write(v) || files.placed.contains(&v.start) {
            batch.add(name_of(v), "mprotect", libc::SYS_mprotect, &[start, len, u64::from(v.prot)], "")?;
        }
        // DONTDUMP, DONTFORK, WIPEONFORK, MERGEABLE, RANDOM, SEQUENTIAL.
        for (flag, advice) in [("dd", 16), ("dc", 10), ("wf", 18), ("mg", 12), ("rr", 1), ("sr", 2)] {
            if has(v, flag) {
                batch.add(name_of(v), "madvise", libc::SYS_madvise, &[start, len, advice], "")?;
            }
        }
        if has(v, "lo") || has(v, "lf") {
            let onfault = u64::from(has(v, "lf"));
            batch.add(
                name_of(v),
                "mlock2",
                libc::SYS_mlock2,
                &[start, len, onfault],
                "the limit of locked memory (ulimit -l) must allow what the server had locked",
            )?;
        }
    }
    batch.run()
}

/// The vdso goes where the image's pointers expect it; its code must be the same.
fn vdso(leader: &mut Remote, image: &Image, process: &proto::Process) -> Result<(), RebuildError> {
    let Some(v) = process.vmas.iter().find(|v| v.kind() == VmaKind::VmaVdso) else {
        return Ok(());
    };
    let first = process
        .vmas
        .iter()
        .filter(|v| matches!(v.kind(), VmaKind::VmaVdso | VmaKind::VmaVvar))
        .map(|v| v.start)
        .min()
        .unwrap_or(v.start);
    inside(leader, "arch_prctl ARCH_MAP_VDSO_64", libc::SYS_arch_prctl, &[ARCH_MAP_VDSO_64, first])?;
    let len = (v.end - v.start) as usize;
    let mut here = vec![0; len];
    let placed = leader.peek(mcr_image::Addr(v.start), &mut here).is_ok() && here.starts_with(b"\x7fELF");
    let there = image.memory().bytes(mcr_image::Addr(v.start), len);
    let same = there.as_ref().map_or(true, |t| *t == here);
    if placed && same {
        return Ok(());
    }
    Err(RebuildError::refused(
        "vdso",
        format!(
            "the kernel that runs now has another vdso than the dumping one ({})",
            image.meta().kernel_release
        ),
        "restore under the kernel that the image was dumped under",
    ))
}
