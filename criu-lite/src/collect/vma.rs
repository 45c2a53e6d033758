//! The memory map: /proc/PID/maps with the VmFlags of smaps.

use crate::procfs::maps::MapsLine;
use crate::procfs::{maps, smaps};
use mcr_image::proto::{Vma, VmaKind};
use mcr_image::{Addr, Pid};
use std::collections::HashMap;

/// All mappings, ascending.
pub fn map(pid: Pid) -> std::io::Result<Vec<Vma>> {
    let lines = maps::read(pid)?;
    let flags = smaps::vm_flags(pid)?;
    Ok(lines.iter().map(|m| vma(m, &flags)).collect())
}

fn vma(m: &MapsLine, flags: &HashMap<Addr, Vec<String>>) -> Vma {
    let name = String::from_utf8_lossy(&m.name).into_owned();
    // Shared anonymous memory shows as a deleted /dev/zero, System V segments as /SYSV...
    let memfd = name.starts_with("/memfd:");
    let shared_anon = m.shared && (name == "/dev/zero" || name.starts_with("/SYSV"));
    let kind = match name.as_str() {
        "[vdso]" => VmaKind::VmaVdso,
        "[vvar]" | "[vvar_vclock]" => VmaKind::VmaVvar,
        "[vsyscall]" => VmaKind::VmaVsyscall,
        _ if shared_anon => VmaKind::VmaAnonShared,
        _ if m.ino == 0 && m.shared => VmaKind::VmaAnonShared,
        _ if m.ino == 0 => VmaKind::VmaAnonPrivate,
        _ if m.shared => VmaKind::VmaFileShared,
        _ => VmaKind::VmaFilePrivate,
    };
    let mut v = Vma {
        start: m.start.0,
        end: m.end.0,
        prot: m.prot,
        name,
        deleted: m.deleted,
        memfd,
        file_offset: m.offset,
        dev: m.dev,
        ino: m.ino,
        vm_flags: flags.get(&m.start).cloned().unwrap_or_default(),
        shared_id: if shared_anon || memfd { m.ino } else { 0 },
        ..Default::default()
    };
    v.set_kind(kind);
    v
}
