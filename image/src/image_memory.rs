//! Memory of one process of an image: stored pages, zero pages, and private pages that equal their file.

use crate::image::PageRun;
use crate::proto::{EmbeddedFile, Process, Vma, VmaKind};
use crate::{Addr, Image, Memory, MemoryError, Region};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

const O_NONBLOCK: i32 = 0o4000;

/// A view of one process's memory. Cheap to clone, `Sync`; disjoint ranges can be scanned by many threads.
#[derive(Clone)]
pub struct ImageMemory {
    image: Image,
    extents: Arc<Vec<Extent>>,
    regions: Arc<Vec<Region>>,
    files: Arc<Vec<Backing>>,
}

/// A part of memory that an image holds, see [`ImageMemory::for_each_stored`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored<'a> {
    /// Whole pages with this content.
    Data(&'a [u8]),
    /// So many bytes of zero pages. They need work only in private file mappings, where the file would show.
    Zero(u64),
}

/// Address, extent, content (`None`: zero).
type Visitor<'a> = dyn FnMut(u64, &Extent, Option<&[u8]>) + 'a;

#[derive(Clone, Copy, Debug)]
struct Extent {
    start: u64,
    end: u64,
    source: Source,
}

#[derive(Clone, Copy, Debug)]
enum Source {
    Frame {
        entry: usize,
        offset: usize,
    },
    Zero {
        stored: bool,
    },
    /// Index into `files`, offset in the file.
    File(usize, u64),
    /// Mapped, but not in the image: vvar, guard pages.
    Nothing,
}

/// The file behind a private mapping.
struct Backing {
    /// Key of the embedded copy.
    embedded: Option<String>,
    path: PathBuf,
    dev: u64,
    ino: u64,
    size: u64,
    mtime_ns: i64,
    build_id: Vec<u8>,
    open: OnceLock<Result<File, String>>,
}

impl ImageMemory {
    pub(crate) fn new(image: &Image, process: &Process) -> Self {
        let mut vmas: Vec<&Vma> = process.vmas.iter().filter(|v| v.start < v.end).collect();
        vmas.sort_by_key(|v| v.start);
        let modules: HashMap<&str, &EmbeddedFile> =
            process.modules.iter().map(|m| (m.key.as_str(), m)).collect();
        let empty = Vec::new();
        let runs = image.inner.pages.get(&process.pid).unwrap_or(&empty);
        let mut build = Build { image, extents: Vec::new(), files: Vec::new(), by_name: HashMap::new() };
        let mut regions = Vec::new();
        let mut last = 0;
        for v in vmas {
            // Overlaps cannot be in a good image; in a damaged one the lower mapping wins.
            let (start, end) = (v.start.max(last), v.end);
            if start >= end {
                continue;
            }
            last = end;
            let default = build.default_source(v, &modules);
            let before = build.extents.len();
            build.vma(v, start, end, default, runs);
            let readable = build.extents[before..].iter().any(|e| !matches!(e.source, Source::Nothing));
            if v.prot != 0 && readable {
                regions.push(Region {
                    start: Addr(start),
                    end: Addr(end),
                    prot: v.prot,
                    name: v.name.clone(),
                });
            }
        }
        Self {
            image: image.clone(),
            extents: Arc::new(build.extents),
            regions: Arc::new(regions),
            files: Arc::new(build.files),
        }
    }

    /// Calls `f` with every page run that is stored in `start..end`, ascending: what a restore has to write.
    pub fn for_each_stored(
        &self,
        start: Addr,
        end: Addr,
        f: &mut dyn FnMut(Addr, Stored<'_>),
    ) -> Result<(), MemoryError> {
        self.walk(
            start.0,
            end.0,
            &mut |addr, e, bytes| match (e.source, bytes) {
                (Source::Frame { .. }, Some(b)) => f(Addr(addr), Stored::Data(b)),
                (Source::Zero { stored: true }, None) => f(Addr(addr), Stored::Zero(e.end.min(end.0) - addr)),
                _ => {}
            },
            false,
        )
    }

    /// The image behind it.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Walks extents; `None` for zero ones. File-backed ones are read only with `files`.
    fn walk(&self, start: u64, end: u64, f: &mut Visitor<'_>, files: bool) -> Result<(), MemoryError> {
        let mut buf = Vec::new();
        let mut held = None;
        let first = self.extents.partition_point(|e| e.end <= start);
        for e in self.extents[first..].iter().take_while(|e| e.start < end) {
            let (from, to) = (e.start.max(start), e.end.min(end));
            let len = (to - from) as usize;
            let io = |source| MemoryError::Io { addr: Addr(from), len, source };
            match e.source {
                Source::Frame { entry, offset } => {
                    let range = offset + (from - e.start) as usize..offset + (to - e.start) as usize;
                    if held == Some(entry) {
                        f(from, e, Some(&buf[range]));
                    } else if let Some(b) =
                        self.image.content_at_hand(entry).map_err(|e| io(io::Error::other(e)))?
                    {
                        f(from, e, Some(&b[range]));
                    } else {
                        self.image.content_into(entry, &mut buf).map_err(|e| io(io::Error::other(e)))?;
                        held = Some(entry);
                        f(from, e, Some(&buf[range]));
                    }
                }
                Source::Zero { .. } => f(from, e, None),
                Source::File(n, offset) if files => {
                    held = None;
                    // Nothing but zeros lies past the file's end.
                    let left =
                        self.file_len(n).map_err(io)?.saturating_sub(offset.wrapping_add(from - e.start));
                    let to = to.min(from.saturating_add(left.checked_next_multiple_of(4096).unwrap_or(left)));
                    let mut at = from;
                    while at < to {
                        buf.resize((to - at).min(256 << 10) as usize, 0);
                        self.file(n, offset.wrapping_add(at - e.start), &mut buf).map_err(io)?;
                        f(at, e, Some(&buf));
                        at += buf.len() as u64;
                    }
                }
                Source::File(..) | Source::Nothing => {}
            }
        }
        Ok(())
    }

    /// Reads from the file behind a mapping; past its end there are zeros.
    fn file(&self, n: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let b = &self.files[n];
        if let Some(key) = &b.embedded
            && self.image.file_at(key, offset, buf).map_err(io::Error::other)?
        {
            return Ok(());
        }
        let file = b.on_disk()?;
        let mut done = 0;
        while done < buf.len() {
            match file.read_at(&mut buf[done..], offset.wrapping_add(done as u64)) {
                Ok(0) => break,
                Ok(k) => done += k,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        buf[done..].fill(0);
        Ok(())
    }

    fn file_len(&self, n: usize) -> io::Result<u64> {
        let b = &self.files[n];
        match b.embedded.as_deref().and_then(|k| self.image.file_size(k)) {
            Some(n) => Ok(n),
            None => Ok(b.on_disk()?.metadata()?.len()),
        }
    }
}

impl Memory for ImageMemory {
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let len = buf.len();
        let unmapped = || MemoryError::Unmapped { addr, len };
        let end = addr.0.checked_add(len as u64).ok_or_else(unmapped)?;
        let mut at = addr.0;
        let mut n = self.extents.partition_point(|e| e.end <= at);
        while at < end {
            let e = self.extents.get(n).filter(|e| e.start <= at).ok_or_else(unmapped)?;
            let to = e.end.min(end);
            let io = |source| MemoryError::Io { addr, len, source };
            let part = &mut buf[(at - addr.0) as usize..(to - addr.0) as usize];
            match e.source {
                Source::Frame { entry, offset } => {
                    let content = self.image.content(entry).map_err(|e| io(io::Error::other(e)))?;
                    let from = offset + (at - e.start) as usize;
                    part.copy_from_slice(&content[from..from + part.len()]);
                }
                Source::Zero { .. } => part.fill(0),
                Source::File(f, offset) => {
                    self.file(f, offset.wrapping_add(at - e.start), part).map_err(io)?
                }
                Source::Nothing => return Err(unmapped()),
            }
            at = to;
            n += 1;
        }
        Ok(())
    }

    fn regions(&self) -> Vec<Region> {
        self.regions.to_vec()
    }

    fn for_each_run(
        &self,
        start: Addr,
        end: Addr,
        f: &mut dyn FnMut(Addr, &[u8]),
    ) -> Result<(), MemoryError> {
        self.walk(
            start.0,
            end.0,
            &mut |addr, _, bytes| {
                if let Some(b) = bytes {
                    f(Addr(addr), b);
                }
            },
            true,
        )
    }
}

struct Build<'a> {
    image: &'a Image,
    extents: Vec<Extent>,
    files: Vec<Backing>,
    by_name: HashMap<(String, u64, u64), usize>,
}

impl Build<'_> {
    /// What a page of this mapping holds when the image has nothing for it.
    fn default_source(&mut self, v: &Vma, modules: &HashMap<&str, &EmbeddedFile>) -> Source {
        match v.kind() {
            _ if v.prot == 0 => Source::Nothing,
            VmaKind::VmaVdso | VmaKind::VmaVvar | VmaKind::VmaVsyscall => Source::Nothing,
            VmaKind::VmaAnonPrivate | VmaKind::VmaAnonShared => Source::Zero { stored: false },
            VmaKind::VmaFilePrivate | VmaKind::VmaFileShared if v.memfd || v.name == "/dev/zero" => {
                Source::Zero { stored: false }
            }
            VmaKind::VmaFilePrivate | VmaKind::VmaFileShared => {
                let name = (v.name.clone(), v.dev, v.ino);
                let next = self.files.len();
                let n = *self.by_name.entry(name).or_insert(next);
                if n == next {
                    let m = modules.get(v.module_key.as_str()).filter(|_| !v.module_key.is_empty());
                    let here = |k: &&str| self.image.file_size(k).is_some();
                    self.files.push(Backing {
                        embedded: Some(v.module_key.as_str()).filter(here).map(str::to_owned),
                        path: PathBuf::from(&v.name),
                        dev: v.dev,
                        ino: v.ino,
                        size: m.map_or(v.file_size, |m| m.size),
                        mtime_ns: m.map_or(v.file_mtime_ns, |m| m.mtime_ns),
                        build_id: m.map_or_else(Vec::new, |m| m.build_id.clone()),
                        open: OnceLock::new(),
                    });
                }
                Source::File(n, v.file_offset)
            }
        }
    }

    fn vma(&mut self, v: &Vma, start: u64, end: u64, default: Source, runs: &[PageRun]) {
        let fill = |from: u64, to: u64| Extent {
            start: from,
            end: to,
            source: match default {
                Source::File(n, offset) => Source::File(n, offset.wrapping_add(from - v.start)),
                other => other,
            },
        };
        let mut at = start;
        let first = runs.partition_point(|r| r.end <= start);
        for r in runs[first..].iter().take_while(|r| r.start < end) {
            let (from, to) = (r.start.max(at), r.end.min(end));
            if at < from {
                self.extents.push(fill(at, from));
            }
            let source = match r.at {
                Some((entry, offset)) => Source::Frame { entry, offset: offset + (from - r.start) as usize },
                None => Source::Zero { stored: true },
            };
            self.extents.push(Extent { start: from, end: to, source });
            at = to;
        }
        if at < end {
            self.extents.push(fill(at, end));
        }
    }
}

impl Backing {
    fn on_disk(&self) -> io::Result<&File> {
        self.open.get_or_init(|| self.open()).as_ref().map_err(|e| io::Error::other(e.clone()))
    }

    /// Opens the file on disk, if it still is the one that was mapped.
    fn open(&self) -> Result<File, String> {
        let p = self.path.display();
        let hint = "dump again with the file in place, or embed it";
        // Not to hang on a pipe that a foreign image names.
        let file = File::options().read(true).custom_flags(O_NONBLOCK).open(&self.path).map_err(|e| {
            format!("{p}, which was mapped and is not in the image, cannot be opened: {e}; {hint}")
        })?;
        let m = file.metadata().map_err(|e| format!("fstat {p}: {e}"))?;
        let mtime = m.mtime().saturating_mul(1_000_000_000).saturating_add(m.mtime_nsec());
        if !m.is_file() {
            return Err(format!("{p} is not a regular file; {hint}"));
        }
        let same_inode = m.ino() == self.ino && (self.dev == 0 || m.dev() == self.dev);
        let same = if self.size == 0 && self.mtime_ns == 0 {
            same_inode
        } else {
            // Size and time of change; overlay file systems show other device numbers in maps than in stat.
            m.len() == self.size && (mtime == self.mtime_ns || self.mtime_ns == 0 && same_inode)
        };
        if same || self.same_build_id(&file) {
            return Ok(file);
        }
        Err(format!("{p} is not the file that was mapped (inode {} then, {} now); {hint}", self.ino, m.ino()))
    }

    fn same_build_id(&self, file: &File) -> bool {
        !self.build_id.is_empty() && build_id_of(file).as_deref() == Some(&self.build_id)
    }
}

/// The GNU build-id of a 64-bit little-endian ELF file, from its PT_NOTE segments.
fn build_id_of(file: &File) -> Option<Vec<u8>> {
    let get = |at: u64, len: usize| {
        let mut b = vec![0; len];
        file.read_exact_at(&mut b, at).ok().map(|()| b)
    };
    let u =
        |b: &[u8], at: usize, n: usize| b[at..at + n].iter().rev().fold(0u64, |a, x| a << 8 | u64::from(*x));
    let eh = get(0, 64).filter(|b| b.starts_with(b"\x7fELF\x02\x01"))?;
    let (phoff, phentsize, phnum) = (u(&eh, 32, 8), u(&eh, 54, 2), u(&eh, 56, 2));
    for i in 0..phnum.min(64) {
        let ph = get(phoff.checked_add(i * phentsize)?, 56)?;
        if u(&ph, 0, 4) != 4 {
            continue;
        }
        let note = get(u(&ph, 8, 8), u(&ph, 32, 8).min(64 << 10) as usize)?;
        let mut at = 0;
        while at + 12 <= note.len() {
            let (namesz, descsz) = (u(&note, at, 4) as usize, u(&note, at + 4, 4) as usize);
            let desc = at + 12 + namesz.next_multiple_of(4);
            let next = desc.checked_add(descsz.next_multiple_of(4))?;
            if u(&note, at + 8, 4) == 3 && note.get(at + 12..at + 16) == Some(b"GNU\0") {
                return note.get(desc..desc + descsz).map(<[u8]>::to_vec);
            }
            at = next;
        }
    }
    None
}
