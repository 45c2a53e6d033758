//! The ELF files that a living process has mapped.

use mcr_image::proto::Vma;
use mcr_image::{ElfFile, Memory, ModuleMap, Pid};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

/// A file as it was when it was read: device, inode, size, time of change.
type Key = (u64, u64, u64, i64, i64);

fn cache() -> &'static Mutex<HashMap<Key, Option<Arc<ElfFile>>>> {
    static CACHE: OnceLock<Mutex<HashMap<Key, Option<Arc<ElfFile>>>>> = OnceLock::new();
    CACHE.get_or_init(Mutex::default)
}

/// Where the file behind a mapping can be opened, deleted or not.
#[must_use]
pub fn path_of(pid: Pid, v: &Vma) -> PathBuf {
    let link = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", v.start, v.end));
    // map_files needs CAP_CHECKPOINT_RESTORE (proc(5)); a file that is still there can be opened by name.
    if std::fs::metadata(&link).is_ok() { link } else { PathBuf::from(format!("/proc/{pid}/root{}", v.name)) }
}

fn open(pid: Pid, v: &Vma) -> Option<Arc<ElfFile>> {
    let path = path_of(pid, v);
    let m = std::fs::metadata(&path).ok()?;
    if !m.is_file() {
        return None;
    }
    let key = (m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec());
    let known = cache().lock().ok()?.get(&key).cloned();
    if let Some(e) = known {
        return e;
    }
    let elf = ElfFile::open_as(&path, v.name.clone()).ok().map(Arc::new);
    cache().lock().ok()?.insert(key, elf.clone());
    elf
}

/// The modules of a process, through a cache of parsed files.
pub fn load(pid: Pid, vmas: &[Vma], memory: &dyn Memory) -> std::io::Result<ModuleMap> {
    let auxv = std::fs::read(format!("/proc/{pid}/auxv"))?;
    Ok(ModuleMap::read(vmas, &auxv, memory, |v| open(pid, v)))
}

/// Reads the files of a running process, so that the freeze need not wait for it. Failures show up later.
pub fn preload(pid: Pid) {
    if let (Ok(vmas), Ok(mem)) = (crate::collect::vmas(pid), crate::ProcessMemory::open(pid)) {
        drop(load(pid, &vmas, &mem));
        drop(crate::tracee::Site::find(&mem, true));
    }
}
