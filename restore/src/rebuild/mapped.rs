//! The files behind mappings, opened in the engine before the new process exists: it inherits them by number.

use super::{Content, RebuildError, file};
use crate::sys;
use mcr_image::elf::ElfFile;
use mcr_image::proto;
use proto::{Vma, VmaKind};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::rc::Rc;

/// A file of the engine that mappings use.
#[derive(Clone, Debug)]
pub(super) struct Source {
    fd: Rc<OwnedFd>,
    /// Made here, so that pages of shared mappings have to be written into it.
    recreated: bool,
}

impl Source {
    pub(super) fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Shared anonymous memory that is mapped whole, in one piece.
#[derive(Debug)]
pub(super) struct AnonGroup {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) holes: Vec<(u64, u64)>,
}

/// What `vma` needs to map.
#[derive(Debug, Default)]
pub(super) struct MappedFiles {
    /// By the mapping's start.
    pub(super) by_start: BTreeMap<u64, Source>,
    pub(super) anon_groups: Vec<AnonGroup>,
    /// Mappings that a group covers.
    pub(super) placed: HashSet<u64>,
    pub(super) exe: Option<Source>,
}

impl MappedFiles {
    /// Shared memory of ours that the image's pages have to be written into although it is mapped read-only.
    pub(super) fn needs_write(&self, v: &Vma) -> bool {
        self.recreated(v) && v.prot & libc::PROT_WRITE as u32 == 0
    }

    /// Shared memory that was made here.
    pub(super) fn recreated(&self, v: &Vma) -> bool {
        let shared = matches!(v.kind(), VmaKind::VmaAnonShared | VmaKind::VmaFileShared);
        shared && self.by_start.get(&v.start).is_none_or(|s| s.recreated)
    }
}

/// Opens everything. `shared` are files that descriptors have already recreated.
pub(super) fn open_mapped(
    process: &proto::Process,
    content: &Content<'_>,
    shared: &mut HashMap<(u64, u64), OwnedFd>,
) -> Result<MappedFiles, RebuildError> {
    let mut out = MappedFiles::default();
    let modules: HashMap<&str, &proto::EmbeddedFile> =
        process.modules.iter().map(|m| (m.key.as_str(), m)).collect();
    let mut opened: HashMap<String, Source> = HashMap::new();
    groups(process, &mut out);
    for v in &process.vmas {
        if out.placed.contains(&v.start) {
            continue;
        }
        let source = match v.kind() {
            VmaKind::VmaFilePrivate => private(v, &modules, content, shared, process, &mut opened)?,
            VmaKind::VmaFileShared | VmaKind::VmaAnonShared => {
                shared_source(v, content, shared, process, &mut opened)?
            }
            _ => continue,
        };
        out.by_start.insert(v.start, source);
    }
    out.exe = exe(process, &modules, content, &mut opened)?;
    Ok(out)
}

fn object(v: &Vma) -> String {
    format!("mapped file {}", v.name)
}

/// Shared anonymous memory: one mapping can be cut where the pieces lie as in the object.
fn groups(process: &proto::Process, out: &mut MappedFiles) {
    let mut by_id: BTreeMap<u64, Vec<&Vma>> = BTreeMap::new();
    for v in process.vmas.iter().filter(|v| v.kind() == VmaKind::VmaAnonShared && !v.memfd) {
        by_id.entry(if v.shared_id == 0 { v.start | 1 } else { v.shared_id }).or_default().push(v);
    }
    for list in by_id.into_values() {
        let origin = |v: &Vma| v.start.wrapping_sub(v.file_offset);
        let (first, last) = (list[0], list[list.len() - 1]);
        let start = origin(first);
        let inside =
            |v: &proto::Vma| v.start < last.end && v.end > start && !list.iter().any(|l| l.start == v.start);
        if list.iter().any(|v| origin(v) != start) || start > first.start || process.vmas.iter().any(inside) {
            continue;
        }
        let mut holes = Vec::new();
        let mut at = start;
        for v in &list {
            if v.start > at {
                holes.push((at, v.start));
            }
            at = v.end;
        }
        out.placed.extend(list.iter().map(|v| v.start));
        out.anon_groups.push(AnonGroup { start, end: last.end, holes });
    }
}

fn private(
    v: &Vma,
    modules: &HashMap<&str, &proto::EmbeddedFile>,
    content: &Content<'_>,
    shared: &mut HashMap<(u64, u64), OwnedFd>,
    process: &proto::Process,
    opened: &mut HashMap<String, Source>,
) -> Result<Source, RebuildError> {
    if let Some(m) = modules.get(v.module_key.as_str()) {
        return module(m, content, opened);
    }
    if v.memfd || v.deleted {
        return shared_source(v, content, shared, process, opened);
    }
    let key = format!("path:{}", v.name);
    if let Some(s) = opened.get(&key) {
        return Ok(s.clone());
    }
    let file = File::open(&v.name).map_err(|e| missing(v, e))?;
    let md = file.metadata().map_err(RebuildError::call(object(v), "fstat"))?;
    if v.ino != 0 && md.ino() != v.ino {
        return Err(RebuildError::refused(
            object(v),
            "another file is at this path now, and the image does not hold the old one's content",
            "put the old file back at its path, then restore again",
        ));
    }
    Ok(keep(opened, key, file, false))
}

fn missing(v: &Vma, source: std::io::Error) -> RebuildError {
    RebuildError::Call {
        object: object(v),
        call: "open",
        source,
        next: "put the file back at its path, then restore again",
    }
}

fn keep(
    opened: &mut HashMap<String, Source>,
    key: String,
    file: impl Into<OwnedFd>,
    recreated: bool,
) -> Source {
    let source = Source { fd: Rc::new(file.into()), recreated };
    opened.insert(key, source.clone());
    source
}

/// An ELF file: the one on disk if it is still the same, else the embedded copy in a memfd.
fn module(
    m: &proto::EmbeddedFile,
    content: &Content<'_>,
    opened: &mut HashMap<String, Source>,
) -> Result<Source, RebuildError> {
    let key = format!("module:{}", m.key);
    if let Some(s) = opened.get(&key) {
        return Ok(s.clone());
    }
    if let Ok(file) = File::open(&m.path)
        && let Ok(md) = file.metadata()
        && md.len() == m.size
    {
        let mtime = md.mtime().wrapping_mul(1_000_000_000).wrapping_add(md.mtime_nsec());
        // A dump that did not note the time of change leaves 0.
        let same_inode = (md.dev(), md.ino()) == (m.dev, m.ino) && (m.mtime_ns == 0 || m.mtime_ns == mtime);
        if same_inode || same_build(m) || same_content(&file, m, content) {
            return Ok(keep(opened, key, file, false));
        }
    }
    let Some(bytes) = content(&m.key).filter(|_| m.embedded) else {
        return Err(RebuildError::refused(
            format!("program file {}", m.path),
            "it is not on disk any more as it was at the dump, and the image does not hold a copy",
            "put the same build back at its path, then restore again",
        ));
    };
    // Restored from its copy before, it is a memfd already.
    let stem = m.path.rsplit('/').next().unwrap_or("module").trim_start_matches("memfd:");
    let fd = sys::memfd(stem).map_err(RebuildError::call(m.path.clone(), "memfd_create"))?;
    let file = File::from(fd);
    file.write_all_at(&bytes, 0).map_err(RebuildError::call(m.path.clone(), "writing the embedded copy"))?;
    Ok(keep(opened, key, file, false))
}

/// The same build, installed again.
fn same_build(m: &proto::EmbeddedFile) -> bool {
    !m.build_id.is_empty()
        && ElfFile::open(&m.path).is_ok_and(|e| e.build_id() == Some(m.build_id.as_slice()))
}

/// A file that was written again with the same bytes (a reinstalled package).
fn same_content(file: &File, m: &proto::EmbeddedFile, content: &Content<'_>) -> bool {
    let Some(want) = content(&m.key).filter(|_| m.embedded) else {
        return false;
    };
    let mut have = vec![0; want.len()];
    file.read_exact_at(&mut have, 0).is_ok() && have == want
}

fn shared_source(
    v: &Vma,
    content: &Content<'_>,
    shared: &mut HashMap<(u64, u64), OwnedFd>,
    process: &proto::Process,
    opened: &mut HashMap<String, Source>,
) -> Result<Source, RebuildError> {
    let anon = v.kind() == VmaKind::VmaAnonShared;
    if !anon && !v.memfd && !v.deleted {
        // "mw" (may write): the file was open for writing when it was mapped.
        let write = v.vm_flags.iter().any(|f| f == "mw") || v.prot & libc::PROT_WRITE as u32 != 0;
        let key = format!("shared:{}:{write}", v.name);
        if let Some(s) = opened.get(&key) {
            return Ok(s.clone());
        }
        let file = OpenOptions::new().read(true).write(write).open(&v.name).map_err(|e| missing(v, e))?;
        let md = file.metadata().map_err(RebuildError::call(object(v), "fstat"))?;
        if md.file_type().is_file() && v.ino != 0 && md.ino() != v.ino {
            return Err(RebuildError::refused(
                object(v),
                "another file is at this path now, and the server shares memory with the old one",
                "put the old file back at its path, then restore again",
            ));
        }
        return Ok(keep(opened, key, file, false));
    }
    let key = format!("object:{}:{}:{}", v.shared_id, v.dev, v.ino);
    if let Some(s) = opened.get(&key) {
        return Ok(s.clone());
    }
    if !anon && !shared.contains_key(&(v.dev, v.ino)) {
        // A descriptor may describe the file better than the mapping does; it has been opened before us then.
        let same = |w: &&Vma| (w.shared_id, w.dev, w.ino) == (v.shared_id, v.dev, v.ino);
        let size =
            process.vmas.iter().filter(same).map(|w| w.file_offset + (w.end - w.start)).max().unwrap_or(0);
        let stem = v.name.rsplit('/').next().unwrap_or("").trim_start_matches("memfd:").to_owned();
        let f = proto::File {
            path: v.name.clone(),
            deleted: v.deleted,
            memfd: v.memfd,
            mode: 0o100_600,
            size,
            dev: v.dev,
            ino: v.ino,
            content_key: if content(&v.module_key).is_some() { v.module_key.clone() } else { String::new() },
            memfd_name: stem,
            ..Default::default()
        };
        file::shared_file(&f, content, shared, &object(v))?;
    }
    let fd = match shared.get(&(v.dev, v.ino)).filter(|_| !anon) {
        Some(fd) => fd.try_clone().map_err(RebuildError::call(object(v), "dup"))?,
        None => {
            let same = |w: &&Vma| w.shared_id == v.shared_id && w.kind() == v.kind();
            let size = process
                .vmas
                .iter()
                .filter(same)
                .map(|w| w.file_offset + (w.end - w.start))
                .max()
                .unwrap_or(0);
            let fd = sys::memfd("shared-anonymous").map_err(RebuildError::call(object(v), "memfd_create"))?;
            let file = File::from(fd);
            file.set_len(size).map_err(RebuildError::call(object(v), "ftruncate"))?;
            file.into()
        }
    };
    Ok(keep(opened, key, fd, true))
}

/// The program itself, for PR_SET_MM_MAP's exe_fd.
fn exe(
    process: &proto::Process,
    modules: &HashMap<&str, &proto::EmbeddedFile>,
    content: &Content<'_>,
    opened: &mut HashMap<String, Source>,
) -> Result<Option<Source>, RebuildError> {
    if let Some(m) = modules.values().find(|m| m.is_exe) {
        return module(m, content, opened).map(Some);
    }
    if process.exe_path.is_empty() {
        return Ok(None);
    }
    let file = File::open(&process.exe_path)
        .map_err(RebuildError::call(format!("program file {}", process.exe_path), "open"))?;
    Ok(Some(keep(opened, "exe".to_owned(), file, false)))
}
