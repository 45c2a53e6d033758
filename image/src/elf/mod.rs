//! ELF files: headers, segments, sections, symbols, and the bytes that a freshly loaded file has in memory.
//!
//! A reader for files that may be damaged or hostile: everything is bounds-checked and wrong files are
//! errors, never panics.

mod debug;
mod error;
mod initial;
mod section;
mod symbol;

pub use debug::DebugDirs;
pub use error::ElfError;
pub use initial::{Initial, Unknown, UnknownWord};
pub use section::{Section, SectionKind};
pub use symbol::{Bind, Symbol, SymbolKind};

use crate::map::Map;
use crate::{Addr, LinkAddr};
use goblin::elf::{dynamic, header, program_header, section_header};
use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Bytes of a file, however they are held (read, mapped, taken from an image).
pub type ElfBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A PT_LOAD program header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// `p_vaddr`.
    pub vaddr: LinkAddr,
    /// `p_memsz`.
    pub mem_size: u64,
    /// `p_offset`.
    pub file_offset: u64,
    /// `p_filesz`.
    pub file_size: u64,
    /// `PF_X` 1, `PF_W` 2, `PF_R` 4.
    pub flags: u32,
    /// `p_align`.
    pub align: u64,
}

impl Segment {
    /// One past the last address.
    #[must_use]
    pub fn end(&self) -> LinkAddr {
        LinkAddr(self.vaddr.0.saturating_add(self.mem_size))
    }
    /// `PROT_*` bits that the loader gives it.
    #[must_use]
    pub fn prot(&self) -> u32 {
        (self.flags & 4) >> 2 | (self.flags & 2) | (self.flags & 1) << 2
    }
    /// Whether the address is inside.
    #[must_use]
    pub fn contains(&self, a: LinkAddr) -> bool {
        a >= self.vaddr && a < self.end()
    }
}

/// The PT_TLS program header: the initial image of a thread's variables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsSegment {
    /// `p_vaddr`.
    pub vaddr: LinkAddr,
    /// `p_memsz`.
    pub mem_size: u64,
    /// `p_offset`.
    pub file_offset: u64,
    /// `p_filesz`: the rest is zero.
    pub file_size: u64,
    /// `p_align`, at least 1.
    pub align: u64,
}

impl TlsSegment {
    /// Distance from the thread pointer down to this block when it is the first one (the program's):
    /// the block is at `fs_base - offset` (glibc's `_dl_determine_tlsoffset`, TLS variant II).
    #[must_use]
    pub fn exe_offset(&self) -> u64 {
        let align = self.align.max(1);
        let first = self.vaddr.0.wrapping_neg() & (align - 1);
        self.mem_size.saturating_sub(first).next_multiple_of(align).saturating_add(first)
    }
}

/// One parsed ELF file for x86-64. Cheap to share (`Arc`); symbols and relocations are read when first asked for.
pub struct ElfFile {
    path: PathBuf,
    data: ElfBytes,
    e_type: u16,
    entry: LinkAddr,
    phoff: u64,
    program_headers: Vec<program_header::ProgramHeader>,
    segments: Vec<Segment>,
    tls: Option<TlsSegment>,
    interp: Option<String>,
    sections: Vec<Section>,
    dynamic: Vec<(u64, u64)>,
    build_id: Option<Vec<u8>>,
    companion: Option<Arc<ElfFile>>,
    symbols: OnceLock<symbol::SymbolTable>,
    relocations: OnceLock<initial::Relocations>,
    cfi: OnceLock<crate::unwind::CfiIndex>,
}

impl fmt::Debug for ElfFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ElfFile({}, build-id {})", self.path.display(), self.build_id_hex())
    }
}

pub(crate) fn range(data: &[u8], offset: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    data.get(start..start.checked_add(usize::try_from(len).ok()?)?)
}

pub(crate) fn word(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(data.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

pub(crate) fn half(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

pub(crate) fn c_string(data: &[u8], offset: u64) -> Option<&[u8]> {
    let tail = data.get(usize::try_from(offset).ok()?..)?;
    Some(std::ffi::CStr::from_bytes_until_nul(tail).ok()?.to_bytes())
}

impl ElfFile {
    /// Opens a file (a mapping, not a copy: keep a file that may be overwritten in place in memory yourself).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ElfError> {
        let path = path.as_ref();
        Self::open_as(path, path)
    }

    /// Opens a file by another way (/proc/PID/map_files/…, a temporary copy) than the name that messages and
    /// the search for companions use.
    pub fn open_as(path: impl AsRef<Path>, name: impl Into<PathBuf>) -> Result<Self, ElfError> {
        let path = path.as_ref();
        let data = Map::elf(path).map_err(|source| ElfError::Io { path: path.to_owned(), source })?;
        Self::from_shared(name, Arc::new(data))
    }

    /// Reads a file and attaches its debug companion (`debug` directories, `.gnu_debuglink`) if it needs one.
    pub fn open_with_debug(path: impl AsRef<Path>, dirs: &DebugDirs) -> Result<Self, ElfError> {
        Ok(Self::open(path)?.with_debug(dirs))
    }

    /// Parses the content of a file; `path` is for messages and for finding companions.
    pub fn from_bytes(path: impl Into<PathBuf>, bytes: impl Into<Vec<u8>>) -> Result<Self, ElfError> {
        Self::from_shared(path, Arc::new(bytes.into()))
    }

    /// Parses bytes held elsewhere (a mapping, a shared buffer).
    pub fn from_shared(path: impl Into<PathBuf>, data: ElfBytes) -> Result<Self, ElfError> {
        let path = path.into();
        let name = path.display().to_string();
        let bytes: &[u8] = (*data).as_ref();
        if !bytes.starts_with(header::ELFMAG) {
            return Err(ElfError::NotElf { path: name });
        }
        if bytes.get(header::EI_CLASS) == Some(&header::ELFCLASS32) {
            return Err(ElfError::Not64Bit { path: name });
        }
        let bad = |what: String| ElfError::Malformed { path: name.clone(), what };
        let head = goblin::elf::Elf::parse_header(bytes).map_err(|e| bad(format!("header: {e}")))?;
        if head.e_ident[header::EI_CLASS] != header::ELFCLASS64 {
            return Err(bad(format!("class {}", head.e_ident[header::EI_CLASS])));
        }
        if head.e_machine != header::EM_X86_64 || head.e_ident[header::EI_DATA] != header::ELFDATA2LSB {
            return Err(ElfError::NotX8664 { path: name, machine: head.e_machine });
        }
        let ctx =
            goblin::container::Ctx::new(goblin::container::Container::Big, goblin::container::Endian::Little);
        let program_headers = match head.e_phnum {
            0 => Vec::new(),
            n => program_header::ProgramHeader::parse(bytes, head.e_phoff as usize, n.into(), ctx)
                .map_err(|e| bad(format!("program headers at {:#x}: {e}", head.e_phoff)))?,
        };
        let sections = section::parse(bytes, &head, ctx).map_err(bad)?;

        let mut file = Self {
            path,
            data: Arc::clone(&data),
            e_type: head.e_type,
            entry: LinkAddr(head.e_entry),
            phoff: head.e_phoff,
            segments: Vec::new(),
            tls: None,
            interp: None,
            sections,
            dynamic: Vec::new(),
            build_id: None,
            companion: None,
            symbols: OnceLock::new(),
            relocations: OnceLock::new(),
            cfi: OnceLock::new(),
            program_headers: Vec::new(),
        };
        // A companion (`objcopy --only-keep-debug`) keeps the program headers but not the content.
        let debug_only = file.section(".text").is_some_and(|s| s.sh_type == section_header::SHT_NOBITS);
        for ph in &program_headers {
            let outside = range(bytes, ph.p_offset, ph.p_filesz).is_none();
            match ph.p_type {
                program_header::PT_LOAD => {
                    if !debug_only && outside {
                        return Err(bad(format!("segment at {:#x} lies outside of the file", ph.p_vaddr)));
                    }
                    if ph.p_memsz < ph.p_filesz
                        || ph.p_vaddr.checked_add(ph.p_memsz).is_none_or(|e| e >> 47 != 0)
                    {
                        return Err(bad(format!("segment at {:#x} has a wrong size", ph.p_vaddr)));
                    }
                    file.segments.push(Segment {
                        vaddr: LinkAddr(ph.p_vaddr),
                        mem_size: ph.p_memsz,
                        file_offset: ph.p_offset,
                        file_size: ph.p_filesz,
                        flags: ph.p_flags,
                        align: ph.p_align,
                    });
                }
                program_header::PT_TLS => {
                    if (!debug_only && outside) || ph.p_memsz < ph.p_filesz || ph.p_memsz >> 40 != 0 {
                        return Err(bad("TLS segment has a wrong size".into()));
                    }
                    let align = ph.p_align.max(1);
                    if !align.is_power_of_two() || align >> 30 != 0 {
                        return Err(bad(format!("TLS alignment {align}")));
                    }
                    file.tls = Some(TlsSegment {
                        vaddr: LinkAddr(ph.p_vaddr),
                        mem_size: ph.p_memsz,
                        file_offset: ph.p_offset,
                        file_size: ph.p_filesz,
                        align,
                    });
                }
                program_header::PT_INTERP if !debug_only => {
                    let s = c_string(range(bytes, ph.p_offset, ph.p_filesz).unwrap_or(&[]), 0);
                    let s = s.ok_or_else(|| bad("PT_INTERP is not a string".into()))?;
                    file.interp = Some(String::from_utf8_lossy(s).into_owned());
                }
                program_header::PT_DYNAMIC if !debug_only => {
                    let d = range(bytes, ph.p_offset, ph.p_filesz);
                    let d = d.ok_or_else(|| bad("PT_DYNAMIC lies outside of the file".into()))?;
                    file.dynamic = d
                        .chunks_exact(16)
                        .filter_map(|c| Some((word(c, 0)?, word(c, 8)?)))
                        .take_while(|&(tag, _)| tag != dynamic::DT_NULL)
                        .collect();
                }
                _ => {}
            }
        }
        if file.segments.windows(2).any(|w| w[1].vaddr < w[0].end()) {
            return Err(bad("segments overlap or are not ascending".into()));
        }
        file.build_id = file.find_build_id(&program_headers);
        file.program_headers = program_headers;
        Ok(file)
    }

    fn find_build_id(&self, program_headers: &[program_header::ProgramHeader]) -> Option<Vec<u8>> {
        let in_sections = self
            .sections
            .iter()
            .filter(|s| s.sh_type == section_header::SHT_NOTE)
            .map(|s| (s.offset, s.size, s.align));
        let in_segments = program_headers
            .iter()
            .filter(|p| p.p_type == program_header::PT_NOTE)
            .map(|p| (p.p_offset, p.p_filesz, p.p_align));
        in_sections.chain(in_segments).find_map(|(offset, size, align)| {
            let notes = range(self.bytes(), offset, size)?;
            let pad = if align == 8 { 8 } else { 4 };
            let mut at = 0usize;
            loop {
                let (name_len, desc_len) = (half(notes, at)? as usize, half(notes, at + 4)? as usize);
                let kind = half(notes, at + 8)?;
                let name = notes.get(at + 12..(at + 12).checked_add(name_len)?)?;
                let desc_at = (at + 12 + name_len).next_multiple_of(pad);
                let desc = notes.get(desc_at..desc_at.checked_add(desc_len)?)?;
                if kind == 3 && name == b"GNU\0" && !desc.is_empty() && desc.len() <= 64 {
                    return Some(desc.to_vec());
                }
                at = (desc_at + desc_len).next_multiple_of(pad);
            }
        })
    }

    /// Where the file was read from (for messages and companions).
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// The whole file.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        (*self.data).as_ref()
    }
    /// The whole file, shared.
    #[must_use]
    pub fn shared_bytes(&self) -> ElfBytes {
        Arc::clone(&self.data)
    }
    /// NT_GNU_BUILD_ID.
    #[must_use]
    pub fn build_id(&self) -> Option<&[u8]> {
        self.build_id.as_deref()
    }
    /// NT_GNU_BUILD_ID in hex, or "none".
    #[must_use]
    pub fn build_id_hex(&self) -> String {
        self.build_id
            .as_ref()
            .map_or_else(|| "none".into(), |id| id.iter().map(|b| format!("{b:02x}")).collect())
    }
    /// `e_entry`.
    #[must_use]
    pub fn entry(&self) -> LinkAddr {
        self.entry
    }
    /// `e_phoff`: where the program headers lie in the file (AT_PHDR is the address that this gets).
    #[must_use]
    pub fn program_header_offset(&self) -> u64 {
        self.phoff
    }
    /// All program headers as goblin reads them.
    #[must_use]
    pub fn program_headers(&self) -> &[program_header::ProgramHeader] {
        &self.program_headers
    }
    /// The link address of the program headers, if a segment loads them.
    #[must_use]
    pub fn program_header_addr(&self) -> Option<LinkAddr> {
        self.segments
            .iter()
            .find(|s| self.phoff >= s.file_offset && self.phoff - s.file_offset < s.file_size)
            .map(|s| LinkAddr(s.vaddr.0 + (self.phoff - s.file_offset)))
    }
    /// PT_LOAD segments, ascending and disjoint.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }
    /// The segment that holds an address.
    #[must_use]
    pub fn segment_at(&self, a: LinkAddr) -> Option<&Segment> {
        self.segments.iter().find(|s| s.contains(a))
    }
    /// From the first page to the end of the last page that the loader maps.
    #[must_use]
    pub fn load_range(&self) -> (LinkAddr, LinkAddr) {
        let start = self.segments.first().map_or(0, |s| s.vaddr.0 & !4095);
        let end = self.segments.last().map_or(0, |s| s.end().0.next_multiple_of(4096));
        (LinkAddr(start), LinkAddr(end))
    }
    /// PT_TLS.
    #[must_use]
    pub fn tls(&self) -> Option<&TlsSegment> {
        self.tls.as_ref()
    }
    /// PT_INTERP: path of the dynamic loader.
    #[must_use]
    pub fn interp(&self) -> Option<&str> {
        self.interp.as_deref()
    }
    /// Entries of PT_DYNAMIC (tag, value), without the terminator.
    #[must_use]
    pub fn dynamic(&self) -> &[(u64, u64)] {
        &self.dynamic
    }
    /// First value of a DT_* tag.
    #[must_use]
    pub fn dynamic_value(&self, tag: u64) -> Option<u64> {
        self.dynamic.iter().find(|d| d.0 == tag).map(|d| d.1)
    }
    /// Link address of the dynamic section.
    #[must_use]
    pub fn dynamic_addr(&self) -> Option<LinkAddr> {
        self.program_headers
            .iter()
            .find(|p| p.p_type == program_header::PT_DYNAMIC)
            .map(|p| LinkAddr(p.p_vaddr))
    }
    fn dynamic_string(&self, offset: u64) -> Option<String> {
        let table = self.dynamic_value(dynamic::DT_STRTAB)?;
        let at = self.file_offset(LinkAddr(table.checked_add(offset)?))?;
        Some(String::from_utf8_lossy(c_string(self.bytes(), at)?).into_owned())
    }
    /// DT_NEEDED, in order.
    #[must_use]
    pub fn needed(&self) -> Vec<String> {
        let tags = self.dynamic.iter().filter(|d| d.0 == dynamic::DT_NEEDED);
        tags.filter_map(|d| self.dynamic_string(d.1)).collect()
    }
    /// DT_SONAME.
    #[must_use]
    pub fn soname(&self) -> Option<String> {
        self.dynamic_string(self.dynamic_value(dynamic::DT_SONAME)?)
    }
    /// The file offset of a link address that has content in the file.
    #[must_use]
    pub fn file_offset(&self, a: LinkAddr) -> Option<u64> {
        let s = self.segment_at(a)?;
        let d = a.0 - s.vaddr.0;
        (d < s.file_size).then_some(s.file_offset + d)
    }
    /// A position-independent program (ET_DYN with a loader or DF_1_PIE).
    #[must_use]
    pub fn is_pie(&self) -> bool {
        const DF_1_PIE: u64 = 0x0800_0000;
        let flag = self.dynamic_value(dynamic::DT_FLAGS_1).is_some_and(|f| f & DF_1_PIE != 0);
        self.e_type == header::ET_DYN && (flag || (self.interp.is_some() && self.soname().is_none()))
    }
    /// All section headers.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }
    /// A section by name.
    #[must_use]
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|s| s.name == name)
    }
    /// What part of the program an address belongs to.
    #[must_use]
    pub fn section_kind(&self, a: LinkAddr) -> SectionKind {
        section::kind_at(self, a)
    }
    /// Content of a section (decompressed), or of its `.zdebug` form; from the debug companion for `.debug_*`
    /// sections that this file lacks. `Ok(None)`: there is none.
    pub fn section_data(&self, name: &str) -> Result<Option<Cow<'_, [u8]>>, ElfError> {
        match section::data(self, name)? {
            Some(d) => Ok(Some(d)),
            None => match &self.companion {
                Some(c) if name.starts_with(".debug_") || name == ".gnu_debugaltlink" => {
                    section::data(c, name)
                }
                _ => Ok(None),
            },
        }
    }
    /// The attached debug companion.
    #[must_use]
    pub fn companion(&self) -> Option<&Arc<ElfFile>> {
        self.companion.as_ref()
    }
    /// Whether there is DWARF, here or in the companion.
    #[must_use]
    pub fn has_dwarf(&self) -> bool {
        let own = |f: &Self| {
            let there =
                |s: &Section| (s.name == ".debug_info" || s.name == ".zdebug_info") && s.has_content();
            f.sections.iter().any(there)
        };
        own(self) || self.companion.as_deref().is_some_and(own)
    }

    /// Whether a running process of this program can be updated, or be updated to it: a dynamically linked
    /// x86-64 PIE program with DWARF 4 or 5.
    pub fn check_updatable(&self) -> Result<(), ElfError> {
        let path = self.path.display().to_string();
        match self.e_type {
            header::ET_EXEC if self.interp.is_none() => return Err(ElfError::Static { path }),
            header::ET_EXEC => return Err(ElfError::NotPie { path }),
            header::ET_DYN => {}
            header::ET_REL => {
                return Err(ElfError::NotAProgram { path, what: "an object file" });
            }
            header::ET_CORE => {
                return Err(ElfError::NotAProgram { path, what: "a core dump" });
            }
            _ => {
                return Err(ElfError::NotAProgram { path, what: "of an unknown ELF type" });
            }
        }
        if !self.is_pie() {
            return Err(ElfError::NotAProgram { path, what: "a shared library" });
        }
        if self.interp.is_none() {
            return Err(ElfError::Static { path });
        }
        if !self.has_dwarf() {
            return Err(ElfError::NoDwarf { path, build_id: self.build_id_hex() });
        }
        let info = self.section_data(".debug_info")?.unwrap_or_default();
        let at = if half(&info, 0) == Some(u32::MAX) { 12 } else { 4 };
        let version = info.get(at..at + 2).map_or(0, |v| u16::from_le_bytes([v[0], v[1]]));
        if !(4..=5).contains(&version) {
            return Err(ElfError::DwarfVersion { path, version });
        }
        Ok(())
    }

    /// Symbols (`.symtab`, else the companion's, else `.dynsym`), in file order.
    pub fn symbols(&self) -> impl Iterator<Item = Symbol<'_>> {
        let t = self.symbol_table();
        (0..t.len()).filter_map(move |i| t.get(self, i))
    }
    /// Every defined symbol of a name: several where statics share it.
    #[must_use]
    pub fn symbols_named(&self, name: &str) -> Vec<Symbol<'_>> {
        self.symbol_table().named(self, name)
    }
    /// The defined symbol of a name if there is only one address for it.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<Symbol<'_>> {
        let all = self.symbols_named(name);
        let first = *all.first()?;
        all.iter().all(|s| s.addr == first.addr).then_some(first)
    }
    /// The function that holds an address; among aliases always the same one.
    #[must_use]
    pub fn function_at(&self, a: LinkAddr) -> Option<Symbol<'_>> {
        self.symbol_table().function_at(self, a)
    }
    /// The data object that holds an address.
    #[must_use]
    pub fn object_at(&self, a: LinkAddr) -> Option<Symbol<'_>> {
        self.symbol_table().object_at(self, a)
    }
    fn symbol_table(&self) -> &symbol::SymbolTable {
        self.symbols.get_or_init(|| symbol::SymbolTable::read(self))
    }

    /// What `len` bytes at `link_addr` are right after loading at `bias`: file content, zeros for bss, and
    /// dynamic relocations. Words that depend on other modules are listed, with the unrelocated bytes in place.
    /// `None` when the range is not inside one segment.
    #[must_use]
    pub fn initial_bytes(&self, link_addr: LinkAddr, len: usize, bias: Addr) -> Option<Initial> {
        initial::initial_bytes(self, link_addr, len, bias)
    }
    fn relocation_table(&self) -> &initial::Relocations {
        self.relocations.get_or_init(|| initial::Relocations::read(self))
    }
    pub(crate) fn cfi(&self) -> &crate::unwind::CfiIndex {
        self.cfi.get_or_init(|| crate::unwind::CfiIndex::read(self))
    }
    /// Attaches the debug companion if this file has no `.debug_info` and one is found.
    #[must_use]
    pub fn with_debug(mut self, dirs: &DebugDirs) -> Self {
        if self.companion.is_none() && !self.has_dwarf() {
            self.companion = dirs.companion(&self).map(Arc::new);
            self.symbols = OnceLock::new();
        }
        self
    }
}
