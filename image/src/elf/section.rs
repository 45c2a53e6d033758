//! Section headers, decompression, and what an address is by its section.

use super::{ElfError, ElfFile, c_string, half, range, word};
use crate::LinkAddr;
use goblin::elf::{header, section_header};
use std::borrow::Cow;
use std::io::Read;

/// No section that we read is larger than this when decompressed.
const MAX_SECTION: u64 = 4 << 30;

/// A section header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its name.
    pub name: String,
    /// Index in the table.
    pub index: u32,
    /// `sh_type`.
    pub sh_type: u32,
    /// `sh_flags`.
    pub flags: u64,
    /// `sh_addr`.
    pub addr: LinkAddr,
    /// `sh_offset`.
    pub offset: u64,
    /// `sh_size`.
    pub size: u64,
    /// `sh_addralign`.
    pub align: u64,
    /// `sh_link`.
    pub link: u32,
    /// `sh_info`.
    pub info: u32,
    /// `sh_entsize`.
    pub entry_size: u64,
}

impl Section {
    /// Has bytes in the file.
    #[must_use]
    pub fn has_content(&self) -> bool {
        self.sh_type != section_header::SHT_NOBITS
            && self.sh_type != section_header::SHT_NULL
            && self.size > 0
    }
    fn flag(&self, bit: u32) -> bool {
        self.flags & u64::from(bit) != 0
    }
    /// Lies in memory and holds the address (TLS templates do not count).
    #[must_use]
    pub fn contains(&self, a: LinkAddr) -> bool {
        let tls_bss = self.flag(section_header::SHF_TLS) && self.sh_type == section_header::SHT_NOBITS;
        self.flag(section_header::SHF_ALLOC) && !tls_bss && a >= self.addr && a.0 - self.addr.0 < self.size
    }
    /// What its bytes are.
    #[must_use]
    pub fn kind(&self) -> SectionKind {
        let write = self.flag(section_header::SHF_WRITE);
        match self.name.as_str() {
            _ if !self.flag(section_header::SHF_ALLOC) => SectionKind::NotLoaded,
            _ if self.flag(section_header::SHF_TLS) => SectionKind::TlsTemplate,
            _ if self.flag(section_header::SHF_EXECINSTR) => {
                if self.name.starts_with(".plt") {
                    SectionKind::Plt
                } else {
                    SectionKind::Text
                }
            }
            n if !write && n.starts_with(".rodata") => SectionKind::Rodata,
            _ if !write => SectionKind::ReadOnlyOther,
            n if n.starts_with(".data.rel.ro") => SectionKind::RelRo,
            ".got" | ".got.plt" | ".dynamic" | ".init_array" | ".fini_array" | ".preinit_array"
            | ".ctors" | ".dtors" | ".jcr" => SectionKind::Loader,
            _ if self.sh_type == section_header::SHT_NOBITS => SectionKind::Bss,
            _ => SectionKind::Data,
        }
    }
}

/// What part of the program an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SectionKind {
    /// Code.
    Text,
    /// Call stubs of the procedure linkage table.
    Plt,
    /// String literals and constants.
    Rodata,
    /// Other read-only data: unwind tables, dynamic symbols, notes, ELF headers.
    ReadOnlyOther,
    /// Constant after relocation (`.data.rel.ro`).
    RelRo,
    /// Written by the dynamic loader only: GOT, dynamic section, constructor lists.
    Loader,
    /// Initialised variables.
    Data,
    /// Variables that start as zero.
    Bss,
    /// The initial image of thread-local variables.
    TlsTemplate,
    /// A section that is not loaded.
    NotLoaded,
    /// Inside a segment without a section that covers it (padding, or no section headers).
    Padding,
    /// Not in the program.
    Outside,
}

pub(super) fn parse(
    bytes: &[u8],
    head: &header::Header,
    ctx: goblin::container::Ctx,
) -> Result<Vec<Section>, String> {
    if head.e_shoff == 0 {
        return Ok(Vec::new());
    }
    let offset = usize::try_from(head.e_shoff).map_err(|_| "section headers lie outside of the file")?;
    let raw = section_header::SectionHeader::parse(bytes, offset, head.e_shnum.into(), ctx)
        .map_err(|e| format!("section headers at {offset:#x}: {e}"))?;
    let names = if u32::from(head.e_shstrndx) == section_header::SHN_XINDEX {
        raw.first().map_or(0, |s| s.sh_link as usize)
    } else {
        usize::from(head.e_shstrndx)
    };
    let names = raw.get(names).and_then(|s| range(bytes, s.sh_offset, s.sh_size)).unwrap_or(&[]);
    let mut out = Vec::with_capacity(raw.len());
    for (i, s) in raw.iter().enumerate() {
        let name = String::from_utf8_lossy(c_string(names, s.sh_name as u64).unwrap_or(&[])).into_owned();
        let section = Section {
            name,
            index: i as u32,
            sh_type: s.sh_type,
            flags: s.sh_flags,
            addr: LinkAddr(s.sh_addr),
            offset: s.sh_offset,
            size: s.sh_size,
            align: s.sh_addralign,
            link: s.sh_link,
            info: s.sh_info,
            entry_size: s.sh_entsize,
        };
        if i > 0 && section.has_content() && range(bytes, s.sh_offset, s.sh_size).is_none() {
            return Err(format!("section {} ({i}) lies outside of the file", section.name));
        }
        if section.addr.0.checked_add(section.size).is_none() {
            return Err(format!("section {} ({i}) has a wrong size", section.name));
        }
        out.push(section);
    }
    Ok(out)
}

pub(super) fn kind_at(file: &ElfFile, a: LinkAddr) -> SectionKind {
    if let Some(s) = file.sections.iter().find(|s| s.contains(a)) {
        return s.kind();
    }
    match file.segment_at(a) {
        Some(_) => SectionKind::Padding,
        None => SectionKind::Outside,
    }
}

pub(super) fn data<'a>(file: &'a ElfFile, name: &str) -> Result<Option<Cow<'a, [u8]>>, ElfError> {
    let bytes = file.bytes();
    let bad = |what: String| ElfError::Malformed { path: file.path.display().to_string(), what };
    if let Some(s) = file.section(name).filter(|s| s.has_content()) {
        let raw = range(bytes, s.offset, s.size).ok_or_else(|| bad(format!("section {name}")))?;
        if !s.flag(section_header::SHF_COMPRESSED) {
            return Ok(Some(Cow::Borrowed(raw)));
        }
        // Elf64_Chdr: type, reserved, size, alignment.
        let head = half(raw, 0).zip(word(raw, 8)).zip(raw.get(24..));
        let ((kind, size), body) = head.ok_or_else(|| bad(format!("compression header of {name}")))?;
        return match kind {
            1 => inflate(body, size)
                .map(|v| Some(Cow::Owned(v)))
                .map_err(|e| bad(format!("section {name}: {e}"))),
            2 => unzstd(body, size)
                .map(|v| Some(Cow::Owned(v)))
                .map_err(|e| bad(format!("section {name}: {e}"))),
            k => Err(bad(format!("section {name}: compression type {k} is unknown"))),
        };
    }
    let Some(rest) = name.strip_prefix(".debug_") else {
        return Ok(None);
    };
    let Some(s) = file.section(&format!(".zdebug_{rest}")).filter(|s| s.has_content()) else {
        return Ok(None);
    };
    let raw = range(bytes, s.offset, s.size).ok_or_else(|| bad(format!("section {}", s.name)))?;
    let size = raw.get(4..12).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes);
    match (raw.starts_with(b"ZLIB"), size) {
        (true, Some(size)) => {
            let v = inflate(&raw[12..], size).map_err(|e| bad(format!("section {}: {e}", s.name)))?;
            Ok(Some(Cow::Owned(v)))
        }
        _ => Err(bad(format!("compression header of {}", s.name))),
    }
}

/// Reads exactly `size` bytes; memory grows with what really comes out.
fn read_exactly(from: impl Read, size: u64) -> Result<Vec<u8>, String> {
    if size > MAX_SECTION {
        return Err(format!("claims {size} bytes when decompressed"));
    }
    let mut out = Vec::with_capacity(size.min(64 << 20) as usize);
    from.take(size).read_to_end(&mut out).map_err(|e| format!("does not decompress: {e}"))?;
    if out.len() as u64 != size {
        return Err(format!("decompresses to {} bytes, not {size}", out.len()));
    }
    Ok(out)
}

fn inflate(body: &[u8], size: u64) -> Result<Vec<u8>, String> {
    read_exactly(flate2::read::ZlibDecoder::new(body), size)
}

fn unzstd(body: &[u8], size: u64) -> Result<Vec<u8>, String> {
    let d = zstd::stream::read::Decoder::with_buffer(body).map_err(|e| e.to_string())?;
    read_exactly(d, size)
}
