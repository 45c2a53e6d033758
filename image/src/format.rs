//! The framing of an image file. All integers are little-endian.
//!
//! ```text
//! file    = header record* index-record trailer
//! header  = "MCRIMG\x1a\n" major:u16 minor:u16 machine:u32 reserved:12 crc:u32            (32 bytes)
//! record  = "MREC" kind:u32 encoding:u32 desc:u32 stored:u64 raw:u64 body-crc:u32 crc:u32  (40 bytes)
//!           desc-bytes stored-bytes padding to a multiple of 8
//! trailer = "MCREND\x1a\n" index-offset:u64 file-length:u64 digest:u32 records:u32 zero:u32 crc:u32 (40 bytes)
//! ```
//! `crc` covers the bytes of the same structure in front of it, `body-crc` description and payload as stored,
//! `digest` every byte of the file in front of the trailer. All are CRC-32 (IEEE). A minor version adds record
//! kinds or fields that an older reader may ignore; a major version changes what is written above.

use crate::ImageError;

pub(crate) const MAGIC: &[u8; 8] = b"MCRIMG\x1a\n";
const RECORD_MAGIC: &[u8; 4] = b"MREC";
const END_MAGIC: &[u8; 8] = b"MCREND\x1a\n";
pub(crate) const MAJOR: u16 = 1;
const MINOR: u16 = 0;
const EM_X86_64: u32 = 62;
pub(crate) const HEADER_LEN: usize = 32;
pub(crate) const RECORD_LEN: usize = 40;
pub(crate) const TRAILER_LEN: usize = 40;

/// Size of a page in an image.
pub const PAGE: usize = 4096;
/// Frames are cut at this size unless the writer is told otherwise.
pub(crate) const FRAME: usize = 256 << 10;
/// No frame of pages or of a file is larger, uncompressed.
pub(crate) const MAX_FRAME: u64 = 4 << 20;
/// No message is larger, uncompressed.
pub(crate) const MAX_MESSAGE: u64 = 2 << 30;
pub(crate) const MAX_DESC: u64 = 1 << 20;

pub(crate) const RAW: u32 = 0;
pub(crate) const ZSTD: u32 = 1;

/// Kinds of records. Numbers are for good; a reader skips, and a rewrite copies, kinds it does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum RecordKind {
    /// `proto::Meta`, first in the file.
    Meta = 1,
    /// `proto::Process`, one per process, the root first.
    Process = 2,
    /// `proto::Patch`: what makes an update image of a dump.
    Patch = 3,
    /// Pages of memory.
    Pages = 16,
    /// A piece of an embedded file.
    File = 17,
    /// `proto::Index`, last in the file.
    Index = 255,
}

/// The name of a record kind, for messages.
pub(crate) fn kind_name(kind: u32) -> String {
    match kind {
        1 => "meta".into(),
        2 => "process".into(),
        3 => "patch".into(),
        16 => "pages".into(),
        17 => "file".into(),
        255 => "index".into(),
        n => format!("unknown-{n}"),
    }
}

/// The largest content that `stored` compressed bytes of a kind may claim. Frames are bounded by their size,
/// messages and files by a ratio that the writer keeps to, so that a small hostile file cannot ask for much.
pub(crate) fn max_raw(kind: u32, stored: u64) -> u64 {
    let ratio = (64 << 10) + stored.saturating_mul(32);
    match kind {
        k if k == RecordKind::Pages as u32 => MAX_FRAME,
        k if k == RecordKind::File as u32 => MAX_FRAME.min(ratio),
        _ => MAX_MESSAGE.min(ratio),
    }
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}
fn u32_at(b: &[u8], at: usize) -> u32 {
    let mut v = [0; 4];
    v.copy_from_slice(&b[at..at + 4]);
    u32::from_le_bytes(v)
}
fn u64_at(b: &[u8], at: usize) -> u64 {
    let mut v = [0; 8];
    v.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(v)
}
fn seal(mut b: Vec<u8>) -> Vec<u8> {
    let crc = crc32fast::hash(&b);
    b.extend_from_slice(&crc.to_le_bytes());
    b
}
fn sealed(b: &[u8]) -> bool {
    let (body, crc) = b.split_at(b.len() - 4);
    crc32fast::hash(body) == u32_at(crc, 0)
}

pub(crate) fn header() -> Vec<u8> {
    let mut b = MAGIC.to_vec();
    b.extend_from_slice(&MAJOR.to_le_bytes());
    b.extend_from_slice(&MINOR.to_le_bytes());
    b.extend_from_slice(&EM_X86_64.to_le_bytes());
    b.resize(HEADER_LEN - 4, 0);
    seal(b)
}

pub(crate) fn check_header(file: &[u8]) -> Result<(), ImageError> {
    let Some(b) = file.get(..HEADER_LEN).filter(|b| b.starts_with(MAGIC)) else {
        let start = &file[..file.len().min(MAGIC.len())];
        if !start.is_empty() && MAGIC.starts_with(start) || file.starts_with(MAGIC) {
            return Err(ImageError::Truncated {
                record: "the header".into(),
                offset: 0,
                len: file.len() as u64,
            });
        }
        let found = if start.is_empty() {
            "nothing (the file is empty)".into()
        } else {
            format!("\"{}\"", start.escape_ascii())
        };
        return Err(ImageError::NotAnImage { found });
    };
    let (major, minor, machine) = (u16_at(b, 8), u16_at(b, 10), u32_at(b, 12));
    if !sealed(b) {
        return Err(corrupt("the header", 0, "its checksum is wrong"));
    }
    if major != MAJOR {
        return Err(ImageError::OtherVersion { major, minor, ours: MAJOR });
    }
    if machine != EM_X86_64 {
        return Err(ImageError::OtherArch { machine });
    }
    Ok(())
}

pub(crate) fn corrupt(record: impl Into<String>, offset: u64, what: impl Into<String>) -> ImageError {
    ImageError::Corrupt { record: record.into(), offset, what: what.into() }
}

/// The fixed part of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RecordHead {
    pub kind: u32,
    pub encoding: u32,
    pub desc: u32,
    pub stored: u64,
    pub raw: u64,
    pub body_crc: u32,
}

impl RecordHead {
    pub fn encode(&self) -> Vec<u8> {
        let mut b = RECORD_MAGIC.to_vec();
        for v in [self.kind, self.encoding, self.desc] {
            b.extend_from_slice(&v.to_le_bytes());
        }
        b.extend_from_slice(&self.stored.to_le_bytes());
        b.extend_from_slice(&self.raw.to_le_bytes());
        b.extend_from_slice(&self.body_crc.to_le_bytes());
        seal(b)
    }

    /// Reads and checks the record head at an offset; `end` bounds the whole record.
    pub fn at(file: &[u8], offset: u64, end: u64) -> Result<Self, ImageError> {
        let len = file.len() as u64;
        let bytes = usize::try_from(offset).ok().and_then(|o| file.get(o..o.checked_add(RECORD_LEN)?));
        let Some(b) = bytes else {
            return Err(ImageError::Truncated { record: "a record".into(), offset, len });
        };
        if !b.starts_with(RECORD_MAGIC) || !sealed(b) {
            return Err(corrupt("a record", offset, "its head is damaged"));
        }
        let h = Self {
            kind: u32_at(b, 4),
            encoding: u32_at(b, 8),
            desc: u32_at(b, 12),
            stored: u64_at(b, 16),
            raw: u64_at(b, 24),
            body_crc: u32_at(b, 32),
        };
        let name = || format!("the {} record", kind_name(h.kind));
        if u64::from(h.desc) > MAX_DESC {
            return Err(corrupt(name(), offset, "its description is too long"));
        }
        match h.total().and_then(|t| offset.checked_add(t)) {
            Some(e) if e <= end => Ok(h),
            _ if end == len => Err(ImageError::Truncated { record: name(), offset, len }),
            _ => Err(corrupt(name(), offset, "it reaches into the next record")),
        }
    }

    /// Length of the whole record with its padding.
    pub fn total(&self) -> Option<u64> {
        record_len(self.desc.into(), self.stored)
    }
}

/// Length of a whole record with its padding.
pub(crate) fn record_len(desc: u64, stored: u64) -> Option<u64> {
    (RECORD_LEN as u64).checked_add(desc)?.checked_add(stored)?.checked_next_multiple_of(8)
}

/// The last bytes of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub index_offset: u64,
    pub file_len: u64,
    pub digest: u32,
    pub records: u32,
}

impl Trailer {
    pub fn encode(&self) -> Vec<u8> {
        let mut b = END_MAGIC.to_vec();
        b.extend_from_slice(&self.index_offset.to_le_bytes());
        b.extend_from_slice(&self.file_len.to_le_bytes());
        b.extend_from_slice(&self.digest.to_le_bytes());
        b.extend_from_slice(&self.records.to_le_bytes());
        b.resize(TRAILER_LEN - 4, 0);
        seal(b)
    }

    /// The trailer of a file, where it has a whole one.
    pub fn of(file: &[u8]) -> Option<Self> {
        let at = file.len().checked_sub(TRAILER_LEN).filter(|at| *at >= HEADER_LEN)?;
        let b = &file[at..];
        let t = Self {
            index_offset: u64_at(b, 8),
            file_len: u64_at(b, 16),
            digest: u32_at(b, 24),
            records: u32_at(b, 28),
        };
        (b.starts_with(END_MAGIC)
            && sealed(b)
            && t.file_len == file.len() as u64
            && t.index_offset >= HEADER_LEN as u64
            && t.index_offset <= at as u64)
            .then_some(t)
    }
}
