//! Writing an image, front to back.

use crate::format::{self, FRAME, MAX_FRAME, MAX_MESSAGE, PAGE, RecordHead, RecordKind, Trailer, kind_name};
use crate::output::Output;
use crate::pool::{Job, Packed, Pool};
use crate::proto::{EmbeddedFile, FrameDesc, Index, IndexEntry};
use crate::{Addr, ImageError, Pid};
use prost::Message;
use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

/// How to write.
#[derive(Clone, Copy, Debug)]
pub struct WriterOptions {
    /// zstd level; 0 stores everything as it is.
    pub level: i32,
    /// Threads that compress.
    pub threads: usize,
    /// Uncompressed size of a frame, a multiple of the page size.
    pub frame_size: usize,
    /// Whether `finish` waits until the file is on disk.
    pub sync: bool,
}

impl Default for WriterOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(16));
        Self { level: 1, threads, frame_size: FRAME, sync: true }
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Written {
    /// Length of the file.
    pub file_bytes: u64,
    /// Records, with the index.
    pub records: u32,
    /// Pages stored.
    pub pages: u64,
    /// Pages that were all zero.
    pub zero_pages: u64,
    /// Bytes of memory and files before compression.
    pub content_bytes: u64,
}

/// Writes an image. Nothing appears under the final name before [`ImageWriter::finish`]; a writer that is
/// dropped leaves nothing behind.
pub struct ImageWriter {
    out: Output,
    pool: Pool,
    options: WriterOptions,
    pid: u32,
    frame: Frame,
    keys: HashSet<String>,
    entries: Vec<IndexEntry>,
    written: Written,
    spare: Vec<Vec<u8>>,
}

/// The frame of pages that is being filled.
#[derive(Default)]
struct Frame {
    content: Vec<u8>,
    runs: Runs,
    zero: Runs,
}

/// Runs of pages as absolute (first page, pages).
#[derive(Default)]
struct Runs(Vec<(u64, u64)>);

impl Runs {
    fn push(&mut self, page: u64) {
        match self.0.last_mut() {
            Some((start, n)) if *start + *n == page => *n += 1,
            _ => self.0.push((page, 1)),
        }
    }
    /// As gap, length, gap, length.
    fn encode(&self) -> Vec<u64> {
        let mut end = 0;
        let mut v = Vec::with_capacity(self.0.len() * 2);
        for (start, n) in &self.0 {
            v.extend([start.wrapping_sub(end), *n]);
            end = start + n;
        }
        v
    }
}

/// A frame's description may hold so many runs.
const MAX_RUNS: usize = 8192;

impl ImageWriter {
    /// Starts an image; `-` is standard output. Mode 0600, under a temporary name until it is finished.
    pub fn create(path: &Path) -> Result<Self, ImageError> {
        Self::create_with(path, WriterOptions::default())
    }

    /// Starts an image with options.
    pub fn create_with(path: &Path, options: WriterOptions) -> Result<Self, ImageError> {
        Self::start(Output::create(path)?, options)
    }

    /// Starts an image on any stream.
    pub fn to_writer(sink: Box<dyn Write + Send>, options: WriterOptions) -> Result<Self, ImageError> {
        Self::start(Output::stream(sink, &PathBuf::from("<stream>")), options)
    }

    fn start(mut out: Output, options: WriterOptions) -> Result<Self, ImageError> {
        if options.frame_size == 0
            || !options.frame_size.is_multiple_of(PAGE)
            || options.frame_size as u64 > MAX_FRAME
        {
            return Err(ImageError::Input { what: format!("frames of {} bytes", options.frame_size) });
        }
        out.write(&format::header())?;
        Ok(Self {
            out,
            pool: Pool::new(options.level, options.threads),
            options,
            pid: 0,
            frame: Frame::default(),
            keys: HashSet::new(),
            entries: Vec::new(),
            written: Written::default(),
            spare: Vec::new(),
        })
    }

    /// Whose memory the following [`Self::pages`] are. Without it they belong to the first process of the
    /// image.
    pub fn set_process(&mut self, pid: Pid) -> Result<(), ImageError> {
        self.flush_pages()?;
        self.pid = pid.0.unsigned_abs();
        Ok(())
    }

    /// Writes a message record.
    pub fn put<M: Message>(&mut self, kind: RecordKind, message: &M) -> Result<(), ImageError> {
        self.flush_pages()?;
        let content = message.encode_to_vec();
        if content.len() as u64 > MAX_MESSAGE {
            return Err(ImageError::Input {
                what: format!(
                    "a {} record of {} bytes: {MAX_MESSAGE} are allowed",
                    kind_name(kind as u32),
                    content.len()
                ),
            });
        }
        self.submit(kind as u32, Vec::new(), content)
    }

    /// Adds whole pages of the current process: `addr` and the length are multiples of the page size. Pages
    /// that are all zero are noted, not stored. Pages may be added in any order, each once.
    pub fn pages(&mut self, addr: Addr, bytes: &[u8]) -> Result<(), ImageError> {
        if !addr.0.is_multiple_of(PAGE as u64) || !bytes.len().is_multiple_of(PAGE) {
            return Err(ImageError::Input {
                what: format!("{} bytes at {addr}: memory is stored in whole pages of {PAGE}", bytes.len()),
            });
        }
        let first = addr.0 / PAGE as u64;
        for (page, n) in bytes.chunks_exact(PAGE).zip(first..) {
            if is_zero(page) {
                self.written.zero_pages += 1;
                self.frame.zero.push(n);
            } else {
                self.written.pages += 1;
                self.frame.runs.push(n);
                if self.frame.content.capacity() == 0 {
                    let mut buf = self.spare.pop().unwrap_or_default();
                    buf.clear();
                    buf.reserve(self.options.frame_size);
                    self.frame.content = buf;
                }
                self.frame.content.extend_from_slice(page);
            }
            if self.frame.content.len() >= self.options.frame_size
                || self.frame.runs.0.len() + self.frame.zero.0.len() >= MAX_RUNS
            {
                self.flush_pages()?;
            }
        }
        Ok(())
    }

    /// Embeds a file's content under `file.key`; a key that is already in the image is not stored again.
    pub fn file(&mut self, file: &EmbeddedFile, content: &[u8]) -> Result<(), ImageError> {
        if file.key.is_empty() {
            return Err(ImageError::Input { what: format!("the embedded file {} without a key", file.path) });
        }
        if !self.keys.insert(file.key.clone()) {
            return Ok(());
        }
        self.flush_pages()?;
        let mut info = file.clone();
        info.embedded = true;
        info.size = content.len() as u64;
        let mut desc = FrameDesc { key: file.key.clone(), file: Some(info), ..Default::default() };
        if content.is_empty() {
            return self.submit(RecordKind::File as u32, desc.encode_to_vec(), Vec::new());
        }
        for part in content.chunks(self.options.frame_size) {
            self.submit(RecordKind::File as u32, desc.encode_to_vec(), part.to_vec())?;
            desc.file = None;
            desc.file_offset += part.len() as u64;
        }
        Ok(())
    }

    /// Whether a file is already embedded.
    #[must_use]
    pub fn has_file(&self, key: &str) -> bool {
        self.keys.contains(key)
    }

    /// Copies a record of another image byte for byte; `desc` is its description, `entry` its index entry.
    pub(crate) fn raw_record(
        &mut self,
        entry: &IndexEntry,
        bytes: &[u8],
        key: &str,
    ) -> Result<(), ImageError> {
        self.flush_pages()?;
        self.drain(true)?;
        if !key.is_empty() {
            self.keys.insert(key.to_owned());
        }
        let mut entry = entry.clone();
        entry.offset = self.out.written();
        self.entries.push(entry);
        self.out.write(bytes)
    }

    /// Writes the index and gives the file its name.
    pub fn finish(mut self) -> Result<Written, ImageError> {
        self.flush_pages()?;
        self.drain(true)?;
        let index_offset = self.out.written();
        let index = Index { entries: std::mem::take(&mut self.entries) };
        let job = Job { kind: RecordKind::Index as u32, desc: Vec::new(), content: index.encode_to_vec() };
        let records = u32::try_from(index.entries.len()).unwrap_or(u32::MAX).saturating_add(1);
        self.write_packed(crate::pool::pack(job, self.options.level, None))?;
        let trailer = Trailer {
            index_offset,
            file_len: self.out.written() + format::TRAILER_LEN as u64,
            digest: self.out.digest(),
            records,
        };
        self.out.write(&trailer.encode())?;
        self.written.file_bytes = self.out.written();
        self.written.records = records;
        self.out.commit(self.options.sync)?;
        Ok(self.written)
    }

    fn flush_pages(&mut self) -> Result<(), ImageError> {
        if self.frame.runs.0.is_empty() && self.frame.zero.0.is_empty() {
            return Ok(());
        }
        let frame = std::mem::take(&mut self.frame);
        let desc = FrameDesc {
            pid: self.pid,
            runs: frame.runs.encode(),
            zero_runs: frame.zero.encode(),
            ..Default::default()
        };
        self.submit(RecordKind::Pages as u32, desc.encode_to_vec(), frame.content)
    }

    fn submit(&mut self, kind: u32, desc: Vec<u8>, content: Vec<u8>) -> Result<(), ImageError> {
        self.written.content_bytes += content.len() as u64;
        self.pool.submit(Job { kind, desc, content });
        self.drain(false)
    }

    fn drain(&mut self, wait: bool) -> Result<(), ImageError> {
        while let Some(p) =
            self.pool.next(wait).map_err(|e| ImageError::Input { what: format!("the image: {e}") })?
        {
            self.write_packed(p)?;
        }
        Ok(())
    }

    fn write_packed(&mut self, p: Packed) -> Result<(), ImageError> {
        let desc_len = u32::try_from(p.desc.len()).ok().filter(|n| u64::from(*n) <= format::MAX_DESC);
        let Some(desc_len) = desc_len else {
            return Err(ImageError::Input {
                what: format!("a {} record: its description is too long", kind_name(p.kind)),
            });
        };
        let head = RecordHead {
            kind: p.kind,
            encoding: p.encoding,
            desc: desc_len,
            stored: p.body.len() as u64,
            raw: p.raw,
            body_crc: p.body_crc,
        };
        if p.kind != RecordKind::Index as u32 {
            self.entries.push(IndexEntry {
                offset: self.out.written(),
                kind: p.kind,
                stored: head.stored,
                raw: p.raw,
                desc: p.desc.clone(),
            });
        }
        let mut front = head.encode();
        front.extend_from_slice(&p.desc);
        self.out.write(&front)?;
        self.out.write(&p.body)?;
        let unaligned = (front.len() + p.body.len()) % 8;
        if unaligned != 0 {
            self.out.write(&[0; 8][unaligned..])?;
        }
        if p.kind == RecordKind::Pages as u32 && self.spare.len() < 64 {
            self.spare.extend(p.spare.or(Some(p.body)));
        }
        Ok(())
    }
}

/// Whether a page is all zero; a page that is not is usually known after its first 64 bytes.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    let mut blocks = page.chunks_exact(64);
    blocks.all(|b| b.iter().fold(0, |a, x| a | x) == 0) && blocks.remainder().iter().all(|b| *b == 0)
}
