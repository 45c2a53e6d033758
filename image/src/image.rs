//! Reading an image: what is asked for, no more.

use crate::cache::{Content, FrameCache};
use crate::format::{
    self, PAGE, RAW, RecordHead, RecordKind, Trailer, ZSTD, corrupt, kind_name, max_raw, record_len,
};
use crate::map::Map;
use crate::proto::{EmbeddedFile, FrameDesc, Index, IndexEntry, Meta, Patch, Process};
use crate::{ImageError, ImageMemory, Pid, wire};
use prost::Message;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Decompressed frames are kept up to this many bytes, unless [`Image::set_cache_limit`] says otherwise.
const CACHE: usize = 1 << 30;
/// A file in an image is not larger.
const MAX_FILE: u64 = 16 << 30;

/// An open image. Cheap to clone; frames are read, checked and decompressed when they are used.
#[derive(Clone)]
pub struct Image {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    map: Map,
    pub entries: Vec<IndexEntry>,
    index_offset: u64,
    meta: Meta,
    processes: Vec<Process>,
    /// Index of the last patch record.
    patch_entry: Option<usize>,
    patch: OnceLock<Patch>,
    /// Page runs of each process, sorted.
    pub pages: BTreeMap<u32, Vec<PageRun>>,
    /// Frames of each embedded file.
    files: BTreeMap<String, StoredFile>,
    cache: FrameCache,
    checked: Vec<OnceLock<()>>,
}

#[derive(Default)]
struct StoredFile {
    info: Option<EmbeddedFile>,
    /// (offset in the file, length, entry), ascending.
    parts: Vec<(u64, u64, usize)>,
}

/// A run of pages in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageRun {
    pub start: u64,
    pub end: u64,
    /// Entry and offset in its content; `None`: zero.
    pub at: Option<(usize, usize)>,
}

/// A frame's bytes: in the mapped file, or decompressed.
pub(crate) enum Bytes<'a> {
    Mapped(&'a [u8]),
    Cached(Content),
}

impl std::ops::Deref for Bytes<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(b) => b,
            Self::Cached(c) => c,
        }
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image")
            .field("bytes", &self.len())
            .field("records", &self.inner.entries.len())
            .finish()
    }
}

impl Image {
    /// Opens an image file; `-` is standard input. Reads the index and the process records, no page.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        Self::from_map(Map::open(path)?)
    }

    /// Opens an image in memory.
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Result<Self, ImageError> {
        Self::from_map(Map::Owned(bytes.into()))
    }

    fn from_map(map: Map) -> Result<Self, ImageError> {
        let file = map.bytes();
        format::check_header(file)?;
        let Some(trailer) = Trailer::of(file) else {
            return Err(diagnose(file));
        };
        let end = (file.len() - format::TRAILER_LEN) as u64;
        let head = RecordHead::at(file, trailer.index_offset, end)?;
        let at = trailer.index_offset;
        if head.kind != RecordKind::Index as u32 || head.total() != Some(end - at) {
            return Err(corrupt("the index", at, "the trailer does not point at it"));
        }
        let index: Index =
            wire::decode(&load(file, &head, at)?.0).map_err(|e| corrupt("the index", at, e))?;
        let entries = index.entries;
        if trailer.records as usize != entries.len() + 1 {
            return Err(corrupt("the index", at, "it does not list as many records as the trailer counts"));
        }
        check_coverage(&entries, at)?;

        let mut meta = None;
        let mut processes: Vec<Process> = Vec::new();
        let mut patch_entry = None;
        let mut frames = Frames::default();
        for (n, e) in entries.iter().enumerate() {
            match e.kind {
                k if k == RecordKind::Meta as u32 => meta = Some(message(file, e)?),
                k if k == RecordKind::Process as u32 => processes.push(message(file, e)?),
                k if k == RecordKind::Patch as u32 => patch_entry = Some(n),
                k if k == RecordKind::Pages as u32 => frames.pages(n, e)?,
                k if k == RecordKind::File as u32 => frames.file(n, e)?,
                _ => {}
            }
        }
        let meta = meta.ok_or(ImageError::Missing { record: "meta" })?;
        let root = processes.first().ok_or(ImageError::Missing { record: "process" })?.pid;
        let (pages, files) = frames.finish(root, at)?;
        let inner = Inner {
            index_offset: at,
            meta,
            processes,
            patch_entry,
            patch: OnceLock::new(),
            pages,
            files,
            cache: FrameCache::new(entries.len(), CACHE),
            checked: std::iter::repeat_with(OnceLock::new).take(entries.len()).collect(),
            entries,
            map,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Length of the file.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.inner.map.bytes().len() as u64
    }

    /// About the dump.
    #[must_use]
    pub fn meta(&self) -> &Meta {
        &self.inner.meta
    }

    /// The process that the dump was asked for.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.inner.processes[0]
    }

    /// All processes, the root first.
    #[must_use]
    pub fn processes(&self) -> &[Process] {
        &self.inner.processes
    }

    /// Whether this is an update image.
    #[must_use]
    pub fn has_patch(&self) -> bool {
        self.inner.patch_entry.is_some()
    }

    /// What an update image adds; `None` for a plain dump.
    pub fn patch(&self) -> Result<Option<&Patch>, ImageError> {
        let Some(n) = self.inner.patch_entry else {
            return Ok(None);
        };
        if self.inner.patch.get().is_none() {
            let p = message(self.inner.map.bytes(), &self.inner.entries[n])?;
            let _ = self.inner.patch.set(p);
        }
        Ok(self.inner.patch.get())
    }

    /// Memory of the root process.
    #[must_use]
    pub fn memory(&self) -> ImageMemory {
        ImageMemory::new(self, self.process())
    }

    /// Memory of a process.
    #[must_use]
    pub fn memory_of(&self, pid: Pid) -> Option<ImageMemory> {
        let p = self.processes().iter().find(|p| p.pid == pid.0.unsigned_abs())?;
        Some(ImageMemory::new(self, p))
    }

    /// Keys and descriptions of the embedded files.
    pub fn files(&self) -> impl Iterator<Item = &EmbeddedFile> {
        self.inner.files.values().filter_map(|f| f.info.as_ref())
    }

    /// The content of an embedded file. `Ok(None)`: not in this image.
    pub fn file(&self, key: &str) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(f) = self.inner.files.get(key) else {
            return Ok(None);
        };
        let mut out = Vec::new();
        for (_, _, n) in &f.parts {
            out.extend_from_slice(&self.content(*n)?);
        }
        Ok(Some(out))
    }

    /// Reads a piece of an embedded file into `buf`; what lies past its end is zero. `Ok(false)`: not here.
    pub(crate) fn file_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<bool, ImageError> {
        let Some(f) = self.inner.files.get(key) else {
            return Ok(false);
        };
        buf.fill(0);
        let end = offset.saturating_add(buf.len() as u64);
        let first = f.parts.partition_point(|(o, len, _)| o + len <= offset);
        for (o, len, n) in f.parts[first..].iter().take_while(|p| p.0 < end) {
            let (from, to) = (offset.max(*o), end.min(o + len));
            let content = self.content(*n)?;
            buf[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&content[(from - o) as usize..(to - o) as usize]);
        }
        Ok(true)
    }

    /// Size of an embedded file.
    pub(crate) fn file_size(&self, key: &str) -> Option<u64> {
        let f = self.inner.files.get(key)?;
        Some(f.parts.last().map_or(0, |(o, len, _)| o + len))
    }

    /// How many bytes of decompressed frames to keep.
    pub fn set_cache_limit(&self, bytes: usize) {
        self.inner.cache.set_limit(bytes);
    }

    /// Checks every byte of the file: the digest, and that every record decodes.
    pub fn verify(&self) -> Result<(), ImageError> {
        let file = self.inner.map.bytes();
        for e in &self.inner.entries {
            let head = self.head(e)?;
            let known = [
                RecordKind::Meta,
                RecordKind::Process,
                RecordKind::Patch,
                RecordKind::Pages,
                RecordKind::File,
            ];
            if known.iter().any(|k| *k as u32 == e.kind) {
                load(file, &head, e.offset)?;
            } else {
                check_body(file, &head, e.offset)?;
            }
        }
        self.patch()?;
        let (body, _) = file.split_at(file.len() - format::TRAILER_LEN);
        let digest = Trailer::of(file).map(|t| t.digest);
        if digest != Some(crc32fast::hash(body)) {
            return Err(corrupt("the file", 0, "its digest is wrong"));
        }
        Ok(())
    }

    fn head(&self, e: &IndexEntry) -> Result<RecordHead, ImageError> {
        entry_head(self.inner.map.bytes(), e)
    }

    /// The content of a frame, from the cache or the file.
    pub(crate) fn content(&self, n: usize) -> Result<Bytes<'_>, ImageError> {
        let e = &self.inner.entries[n];
        let file = self.inner.map.bytes();
        // Already checked, and stored as it is.
        if self.inner.checked[n].get().is_some() {
            let at = e.offset as usize + format::RECORD_LEN + e.desc.len();
            return Ok(Bytes::Mapped(&file[at..at + e.stored as usize]));
        }
        if let Some(c) = self.inner.cache.get(n) {
            return Ok(Bytes::Cached(c));
        }
        let head = self.head(e)?;
        let (content, copied) = load(file, &head, e.offset)?;
        if !copied {
            let _ = self.inner.checked[n].set(());
            return Ok(Bytes::Mapped(stored(file, &head, e.offset)));
        }
        let content: Content = Arc::new(content.into_owned());
        self.inner.cache.put(n, &content);
        Ok(Bytes::Cached(content))
    }

    /// The content of a frame where nothing has to be decompressed for it.
    pub(crate) fn content_at_hand(&self, n: usize) -> Result<Option<Bytes<'_>>, ImageError> {
        if self.inner.checked[n].get().is_some() {
            return self.content(n).map(Some);
        }
        if let Some(c) = self.inner.cache.get(n) {
            return Ok(Some(Bytes::Cached(c)));
        }
        let head = self.head(&self.inner.entries[n])?;
        if head.encoding == ZSTD { Ok(None) } else { self.content(n).map(Some) }
    }

    /// Decompresses a frame into `buf`, past the cache.
    pub(crate) fn content_into(&self, n: usize, buf: &mut Vec<u8>) -> Result<(), ImageError> {
        let e = &self.inner.entries[n];
        let head = self.head(e)?;
        let file = self.inner.map.bytes();
        check_body(file, &head, e.offset)?;
        inflate(file, &head, e.offset, buf)
    }

    /// Index entries with the bytes of their records.
    pub(crate) fn raw_records(&self) -> impl Iterator<Item = (&IndexEntry, &[u8])> {
        let file = self.inner.map.bytes();
        let ends = self.inner.entries.iter().skip(1).map(|e| e.offset).chain([self.inner.index_offset]);
        self.inner.entries.iter().zip(ends).map(move |(e, end)| (e, &file[e.offset as usize..end as usize]))
    }
}

/// Why a file has no (right) trailer: the record where it breaks off, or what is damaged.
fn diagnose(file: &[u8]) -> ImageError {
    let len = file.len() as u64;
    let mut at = format::HEADER_LEN as u64;
    let mut seen_index = false;
    while at < len && !seen_index {
        match RecordHead::at(file, at, len) {
            Ok(h) => {
                seen_index = h.kind == RecordKind::Index as u32;
                at += h.total().unwrap_or(len);
            }
            Err(e) => return e,
        }
    }
    if seen_index && len - at >= format::TRAILER_LEN as u64 {
        return corrupt("the trailer", at, "it is damaged, or bytes follow it");
    }
    ImageError::Truncated {
        record: if seen_index { "the trailer" } else { "the next record" }.into(),
        offset: at,
        len,
    }
}

/// The records must follow one another without gap or overlap.
fn check_coverage(entries: &[IndexEntry], end: u64) -> Result<(), ImageError> {
    let mut at = format::HEADER_LEN as u64;
    for e in entries {
        let next = record_len(e.desc.len() as u64, e.stored).and_then(|l| at.checked_add(l));
        match next {
            Some(next) if e.offset == at && next <= end => at = next,
            _ => {
                return Err(corrupt(
                    format!("the index entry of a {} record", kind_name(e.kind)),
                    e.offset,
                    format!("its place is wrong; the record before ends at {at:#x}"),
                ));
            }
        }
    }
    if at != end {
        return Err(corrupt("the index", end, format!("the last record that it lists ends at {at:#x}")));
    }
    Ok(())
}

fn entry_head(file: &[u8], e: &IndexEntry) -> Result<RecordHead, ImageError> {
    let name = || format!("the {} record", kind_name(e.kind));
    let end = record_len(e.desc.len() as u64, e.stored).map_or(0, |l| e.offset + l);
    let head = RecordHead::at(file, e.offset, end)?;
    if (head.kind, head.stored, head.raw, head.desc as usize) != (e.kind, e.stored, e.raw, e.desc.len()) {
        return Err(corrupt(name(), e.offset, "its head and the index disagree"));
    }
    let desc_at = e.offset as usize + format::RECORD_LEN;
    if file[desc_at..desc_at + e.desc.len()] != e.desc[..] {
        return Err(corrupt(name(), e.offset, "its description and the index disagree"));
    }
    Ok(head)
}

/// The payload as stored. The head has been checked against the file's length.
fn stored<'a>(file: &'a [u8], head: &RecordHead, offset: u64) -> &'a [u8] {
    let at = offset as usize + format::RECORD_LEN + head.desc as usize;
    &file[at..at + head.stored as usize]
}

fn check_body(file: &[u8], head: &RecordHead, offset: u64) -> Result<(), ImageError> {
    let at = offset as usize + format::RECORD_LEN;
    let body = &file[at..at + head.desc as usize + head.stored as usize];
    if crc32fast::hash(body) != head.body_crc {
        return Err(corrupt(format!("the {} record", kind_name(head.kind)), offset, "its checksum is wrong"));
    }
    let end = at + body.len();
    let padding = &file[end..offset as usize + head.total().unwrap_or(0) as usize];
    if padding.iter().any(|b| *b != 0) {
        return Err(corrupt(
            format!("the {} record", kind_name(head.kind)),
            offset,
            "its padding is not zero",
        ));
    }
    Ok(())
}

fn inflate(file: &[u8], head: &RecordHead, offset: u64, out: &mut Vec<u8>) -> Result<(), ImageError> {
    let name = || format!("the {} record", kind_name(head.kind));
    if head.raw > max_raw(head.kind, head.stored) {
        return Err(corrupt(
            name(),
            offset,
            format!("it claims {} bytes from {} stored", head.raw, head.stored),
        ));
    }
    out.clear();
    out.reserve(head.raw as usize);
    let body = stored(file, head, offset);
    let n = zstd::bulk::Decompressor::new()
        .and_then(|mut d| d.decompress_to_buffer(body, out))
        .map_err(|e| corrupt(name(), offset, format!("it cannot be decompressed: {e}")))?;
    if n as u64 != head.raw {
        return Err(corrupt(name(), offset, format!("it holds {n} bytes instead of {}", head.raw)));
    }
    Ok(())
}

/// Checked content, and whether it is a copy.
fn load<'a>(
    file: &'a [u8],
    head: &RecordHead,
    offset: u64,
) -> Result<(std::borrow::Cow<'a, [u8]>, bool), ImageError> {
    check_body(file, head, offset)?;
    match head.encoding {
        RAW if head.stored == head.raw => Ok((stored(file, head, offset).into(), false)),
        ZSTD => {
            let mut out = Vec::new();
            inflate(file, head, offset, &mut out)?;
            Ok((out.into(), true))
        }
        n => Err(corrupt(
            format!("the {} record", kind_name(head.kind)),
            offset,
            format!("encoding {n} is wrong or unknown"),
        )),
    }
}

fn message<M: Message + Default>(file: &[u8], e: &IndexEntry) -> Result<M, ImageError> {
    let head = entry_head(file, e)?;
    wire::decode(&load(file, &head, e.offset)?.0)
        .map_err(|what| corrupt(format!("the {} record", kind_name(e.kind)), e.offset, what))
}

/// Collects frames while the index is read.
#[derive(Default)]
struct Frames {
    pages: BTreeMap<u32, Vec<PageRun>>,
    files: BTreeMap<String, StoredFile>,
}

impl Frames {
    fn desc(e: &IndexEntry) -> Result<FrameDesc, ImageError> {
        if e.raw > format::MAX_FRAME {
            return Err(corrupt(
                format!("the {} record", kind_name(e.kind)),
                e.offset,
                format!("a frame of {} bytes", e.raw),
            ));
        }
        FrameDesc::decode(&*e.desc)
            .map_err(|err| corrupt(format!("the {} record", kind_name(e.kind)), e.offset, err.to_string()))
    }

    fn pages(&mut self, n: usize, e: &IndexEntry) -> Result<(), ImageError> {
        let bad = |what: &str| corrupt("the pages record", e.offset, what);
        let desc = Self::desc(e)?;
        let list = self.pages.entry(desc.pid).or_default();
        let mut content = 0u64;
        for (runs, zero) in [(&desc.runs, false), (&desc.zero_runs, true)] {
            let mut page = 0u64;
            for pair in runs.chunks(2) {
                let [gap, count] = pair else {
                    return Err(bad("a run without a length"));
                };
                // A run may lie below the one before it: the gap then wraps around.
                let start = page.wrapping_add(*gap);
                let end = start.checked_add(*count).filter(|e| *e <= u64::MAX / PAGE as u64);
                let Some(end) = end.filter(|_| *count > 0) else {
                    return Err(bad("a run outside the address space"));
                };
                let at = (!zero).then_some((n, content as usize));
                if !zero {
                    content = content.saturating_add(count.saturating_mul(PAGE as u64));
                }
                if content > e.raw {
                    return Err(bad("its runs are longer than its content"));
                }
                list.push(PageRun { start: start * PAGE as u64, end: end * PAGE as u64, at });
                page = end;
            }
        }
        if content != e.raw {
            return Err(bad("its runs are shorter than its content"));
        }
        Ok(())
    }

    fn file(&mut self, n: usize, e: &IndexEntry) -> Result<(), ImageError> {
        let desc = Self::desc(e)?;
        let f = self.files.entry(desc.key).or_default();
        let end = f.parts.last().map_or(0, |(o, len, _)| o + len);
        if desc.file_offset != end || end > MAX_FILE {
            return Err(corrupt(
                "the file record",
                e.offset,
                format!("it belongs at {:#x}, the piece before ends at {end:#x}", desc.file_offset),
            ));
        }
        f.info = f.info.take().or(desc.file);
        f.parts.push((desc.file_offset, e.raw, n));
        Ok(())
    }

    #[allow(clippy::type_complexity)]
    fn finish(
        mut self,
        root: u32,
        index: u64,
    ) -> Result<(BTreeMap<u32, Vec<PageRun>>, BTreeMap<String, StoredFile>), ImageError> {
        // Pages written before any `set_process` belong to the root.
        if let Some(list) = self.pages.remove(&0) {
            self.pages.entry(root).or_default().extend(list);
        }
        for list in self.pages.values_mut() {
            list.sort_by_key(|r| r.start);
            if let Some(w) = list.windows(2).find(|w| w[1].start < w[0].end) {
                return Err(corrupt(
                    "the index",
                    index,
                    format!("the page at {:#x} is stored twice", w[1].start),
                ));
            }
        }
        Ok((self.pages, self.files))
    }
}
