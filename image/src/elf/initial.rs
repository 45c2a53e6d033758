//! The bytes of a freshly loaded file: content, bss, and dynamic relocations.

use super::{ElfFile, c_string, half, range, word};
use crate::{Addr, LinkAddr};
use goblin::elf::{dynamic, reloc, sym};

/// Bytes as they are right after loading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Initial {
    /// The bytes; those of unknown words are unrelocated.
    pub bytes: Vec<u8>,
    /// Words whose value depends on more than this file and its load bias, ascending.
    pub unknown: Vec<UnknownWord>,
}

impl Initial {
    /// Whether `now` equals the initial bytes everywhere but in unknown words.
    #[must_use]
    pub fn same_but_unknown(&self, now: &[u8]) -> bool {
        if now.len() != self.bytes.len() {
            return false;
        }
        let mut at = 0;
        for u in &self.unknown {
            let start = u.offset.clamp(at, now.len());
            if now[at..start] != self.bytes[at..start] {
                return false;
            }
            at = u.offset.saturating_add(u.size).clamp(start, now.len());
        }
        now[at..] == self.bytes[at..]
    }
}

/// A part of the asked range that the file alone does not determine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownWord {
    /// From the start of the range.
    pub offset: usize,
    /// In bytes, clipped to the range.
    pub size: usize,
    /// Why.
    pub why: Unknown,
}

/// Why a word is not determined by the file and its load bias.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// The address of another module's symbol.
    Symbol {
        /// Its name.
        name: String,
        /// `r_addend`.
        addend: i64,
    },
    /// A variable of a library that lives in the program (R_X86_64_COPY).
    Copy {
        /// Its name.
        name: String,
    },
    /// A slot of the PLT: the stub, or the function once it was called.
    PltSlot {
        /// The function's name.
        name: String,
    },
    /// The result of a resolver function.
    IFunc,
    /// A TLS module number or offset.
    Tls,
    /// A relocation type that is not known.
    Other(u32),
}

#[derive(Clone, Debug)]
enum Kind {
    /// Load bias + this.
    Relative(u64),
    /// This, whatever the bias.
    Absolute(u64),
    Unknown {
        why: u32,
        symbol: u32,
        addend: i64,
    },
}

/// Dynamic relocations by place.
pub(super) struct Relocations {
    /// (place, size, what), ascending by place.
    entries: Vec<(u64, u64, Kind)>,
    longest: u64,
}

struct DynSym {
    name: u32,
    kind: u8,
    section: u16,
    value: u64,
    size: u64,
}

fn dyn_symbol(file: &ElfFile, index: u32) -> Option<DynSym> {
    let table = file.dynamic_value(dynamic::DT_SYMTAB)?;
    let addr = table.checked_add(u64::from(index) * 24)?;
    let e = range(file.bytes(), file.file_offset(LinkAddr(addr))?, 24)?;
    Some(DynSym {
        name: half(e, 0)?,
        kind: e[4] & 15,
        section: u16::from_le_bytes([e[6], e[7]]),
        value: word(e, 8)?,
        size: word(e, 16)?,
    })
}

fn dyn_symbol_name(file: &ElfFile, index: u32) -> String {
    let name = || {
        let s = dyn_symbol(file, index)?;
        let at = file.dynamic_value(dynamic::DT_STRTAB)?.checked_add(s.name.into())?;
        Some(String::from_utf8_lossy(c_string(file.bytes(), file.file_offset(LinkAddr(at))?)?).into_owned())
    };
    name().unwrap_or_default()
}

impl Relocations {
    pub(super) fn read(file: &ElfFile) -> Self {
        let table = |start: u64, size: u64| {
            let (start, size) = (file.dynamic_value(start)?, file.dynamic_value(size)?);
            range(file.bytes(), file.file_offset(LinkAddr(start))?, size)
        };
        let mut entries = Vec::new();
        let rela = table(dynamic::DT_RELA, dynamic::DT_RELASZ).unwrap_or(&[]);
        let plt = table(dynamic::DT_JMPREL, dynamic::DT_PLTRELSZ).unwrap_or(&[]);
        for e in rela.chunks_exact(24).chain(plt.chunks_exact(24)) {
            let (Some(place), Some(info), Some(addend)) = (word(e, 0), word(e, 8), word(e, 16)) else {
                continue;
            };
            let (kind, symbol) = (info as u32, (info >> 32) as u32);
            let unknown = || Kind::Unknown { why: kind, symbol, addend: addend as i64 };
            let defined = || {
                let s = dyn_symbol(file, symbol)?;
                // SHN_ABS symbols do not move with the file.
                let absolute = s.section == 0xfff1;
                let ok = s.section != 0 && s.kind != sym::STT_GNU_IFUNC && s.kind != sym::STT_TLS;
                ok.then(|| s.value.wrapping_add(addend))
                    .map(|v| if absolute { Kind::Absolute(v) } else { Kind::Relative(v) })
            };
            let (size, what) = match kind {
                reloc::R_X86_64_NONE => continue,
                reloc::R_X86_64_RELATIVE => (8, Kind::Relative(addend)),
                reloc::R_X86_64_64 | reloc::R_X86_64_GLOB_DAT => (8, defined().unwrap_or_else(unknown)),
                reloc::R_X86_64_COPY => (dyn_symbol(file, symbol).map_or(8, |s| s.size), unknown()),
                reloc::R_X86_64_32 | reloc::R_X86_64_PC32 | reloc::R_X86_64_32S => (4, unknown()),
                _ => (8, unknown()),
            };
            entries.push((place, size, what));
        }
        const DT_RELRSZ: u64 = 35;
        const DT_RELR: u64 = 36;
        relr(file, table(DT_RELR, DT_RELRSZ).unwrap_or(&[]), &mut entries);
        entries.sort_by_key(|e| e.0);
        let longest = entries.iter().map(|e| e.1).max().unwrap_or(0);
        Self { entries, longest }
    }
}

/// RELR: an address, then bitmaps of the 63 words after it; the addend is the word in place.
fn relr(file: &ElfFile, table: &[u8], entries: &mut Vec<(u64, u64, Kind)>) {
    let mut add = |place: u64| {
        let value =
            file.file_offset(LinkAddr(place)).and_then(|o| word(file.bytes(), usize::try_from(o).ok()?));
        if let Some(value) = value {
            entries.push((place, 8, Kind::Relative(value)));
        }
    };
    let mut next = 0u64;
    for e in table.chunks_exact(8) {
        let Some(e) = word(e, 0) else { continue };
        if e & 1 == 0 {
            add(e);
            next = e.wrapping_add(8);
        } else {
            (0..63).filter(|b| e >> (b + 1) & 1 == 1).for_each(|b| add(next.wrapping_add(b * 8)));
            next = next.wrapping_add(63 * 8);
        }
    }
}

pub(super) fn initial_bytes(file: &ElfFile, start: LinkAddr, len: usize, bias: Addr) -> Option<Initial> {
    let segment = file.segment_at(start)?;
    let end = start.0.checked_add(len as u64)?;
    if end > segment.end().0 {
        return None;
    }
    let mut bytes = vec![0; len];
    let from = start.0 - segment.vaddr.0;
    if from < segment.file_size {
        let n = (segment.file_size - from).min(len as u64);
        bytes[..n as usize].copy_from_slice(range(file.bytes(), segment.file_offset + from, n)?);
    }
    let table = file.relocation_table();
    let first = table.entries.partition_point(|e| e.0.saturating_add(table.longest) <= start.0);
    let mut unknown = Vec::new();
    for (place, size, what) in table.entries[first..].iter().take_while(|e| e.0 < end) {
        let to = place.saturating_add(*size).min(end);
        if to <= start.0 {
            continue;
        }
        let lo = (*place).max(start.0);
        let part = (lo - start.0) as usize..(to - start.0) as usize;
        let value = match what {
            Kind::Relative(v) => v.wrapping_add(bias.0),
            Kind::Absolute(v) => *v,
            Kind::Unknown { why, symbol, addend } => {
                let name = || dyn_symbol_name(file, *symbol);
                let why = match *why {
                    reloc::R_X86_64_64 | reloc::R_X86_64_GLOB_DAT => {
                        Unknown::Symbol { name: name(), addend: *addend }
                    }
                    reloc::R_X86_64_COPY => Unknown::Copy { name: name() },
                    reloc::R_X86_64_JUMP_SLOT => Unknown::PltSlot { name: name() },
                    reloc::R_X86_64_IRELATIVE => Unknown::IFunc,
                    reloc::R_X86_64_DTPMOD64
                    | reloc::R_X86_64_DTPOFF64
                    | reloc::R_X86_64_TPOFF64
                    | reloc::R_X86_64_TLSDESC => Unknown::Tls,
                    other => Unknown::Other(other),
                };
                unknown.push(UnknownWord { offset: part.start, size: part.len(), why });
                continue;
            }
        };
        let skip = (lo - place) as usize;
        let n = part.len();
        bytes[part].copy_from_slice(&value.to_le_bytes()[skip..skip + n]);
    }
    Some(Initial { bytes, unknown })
}
