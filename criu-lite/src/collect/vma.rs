//! The memory map: /proc/PID/maps with the VmFlags of smaps.

use crate::procfs::maps::MapsLine;
use crate::procfs::{maps, smaps};
use mcr_image::Pid;
use mcr_image::proto::{Vma, VmaKind};

/// All mappings, ascending.
pub fn map(pid: Pid) -> std::io::Result<Vec<Vma>> {
    Ok(smaps::read(pid)?.into_iter().map(|(m, flags)| vma(&m, flags)).collect())
}

/// The VmFlags of a running process: read before it is stopped, because that takes long where there is much memory.
#[derive(Debug, Default)]
pub(crate) struct Known(Vec<(MapsLine, Vec<String>)>);

impl Known {
    /// Looks at a running process.
    pub(crate) fn read(pid: Pid) -> std::io::Result<Self> {
        smaps::read(pid).map(Self)
    }

    /// All mappings now. One that is as it was, or has only grown at its end, keeps its flags; if there is any other,
    /// everything is looked at again. (What a madvise(2) of a whole mapping changed since then is missed.)
    pub(crate) fn map(&self, pid: Pid) -> std::io::Result<Vec<Vma>> {
        let mut known = self.0.iter().peekable();
        let mut out = Vec::new();
        for now in maps::read(pid)? {
            while known.next_if(|(then, _)| then.start < now.start).is_some() {}
            match known.peek() {
                Some((then, flags))
                    if now.end >= then.end && *then == (MapsLine { end: then.end, ..now.clone() }) =>
                {
                    out.push(vma(&now, flags.clone()));
                }
                _ => return map(pid),
            }
        }
        Ok(out)
    }
}

fn vma(m: &MapsLine, vm_flags: Vec<String>) -> Vma {
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
        vm_flags,
        shared_id: if shared_anon || memfd { m.ino } else { 0 },
        ..Default::default()
    };
    v.set_kind(kind);
    v
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_seen_before_hold_for_what_has_not_changed() {
        let pid = Pid(std::process::id() as i32);
        let (known, full) = (Known::read(pid).unwrap(), map(pid).unwrap());
        let quick = known.map(pid).unwrap();
        let same: Vec<_> = quick.iter().filter(|v| full.contains(v)).collect();
        assert!(same.len() > 5 && same.iter().all(|v| !v.vm_flags.is_empty()));
        // One that is not known.
        let mut less = Known(known.0);
        less.0.remove(1);
        assert!(less.map(pid).unwrap().iter().all(|v| !v.vm_flags.is_empty()));
    }
}
