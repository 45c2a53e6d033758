//! Symbols: by name, by address, and which source file a local one comes from.

use super::{ElfFile, c_string, half, range, word};
use crate::LinkAddr;
use goblin::elf::{section_header, sym};
use std::sync::{Arc, OnceLock};

/// `STT_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SymbolKind {
    /// No type: labels of assembly code.
    None,
    /// A variable.
    Object,
    /// A function.
    Func,
    /// A function that picks its implementation at start-up (STT_GNU_IFUNC).
    IFunc,
    /// A thread-local variable; its address is an offset in the TLS segment.
    Tls,
    /// A section, or something else.
    Other,
}

/// `STB_*`, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bind {
    /// Only this unit sees it (`static`).
    Local,
    /// Gives way to a global one.
    Weak,
    /// Global (also STB_GNU_UNIQUE).
    Global,
}

/// A symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbol<'a> {
    /// Its name ("" if it is not UTF-8).
    pub name: &'a str,
    /// `st_value`; an offset in the TLS segment for `Tls`.
    pub addr: LinkAddr,
    /// `st_size`.
    pub size: u64,
    /// What it names.
    pub kind: SymbolKind,
    /// Who sees it.
    pub bind: Bind,
    /// Section index; `None` for an undefined symbol.
    pub section: Option<u32>,
    /// For a local symbol: the STT_FILE symbol before it.
    pub file: Option<&'a str>,
}

impl Symbol<'_> {
    /// Defined in this file.
    #[must_use]
    pub fn is_defined(&self) -> bool {
        self.section.is_some()
    }
}

/// Sorted index over the raw table.
pub(super) struct SymbolTable {
    /// The table lies in the companion.
    companion: bool,
    table: (u64, u64),
    strings: (u64, u64),
    count: usize,
    /// (index of the first symbol that it covers, index of the STT_FILE symbol), ascending.
    files: Vec<(u32, u32)>,
    /// Defined symbols by the hash of their names, ascending.
    by_name: OnceLock<Vec<(u64, u32)>>,
    /// One function per start address: (start, end, index), ascending.
    functions: Vec<Extent>,
    /// One object per start address.
    objects: Vec<Extent>,
}

type Extent = (u64, u64, u32);

/// FNV-1a.
fn hash(name: &str) -> u64 {
    let step = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3);
    name.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

const ENTRY: u64 = 24;

impl SymbolTable {
    pub(super) fn read(file: &ElfFile) -> Self {
        let of = |f: &ElfFile, kind: u32| {
            let s = f.sections.iter().find(|s| s.sh_type == kind && s.size >= ENTRY)?;
            let strings = f.sections.get(s.link as usize)?;
            (range(f.bytes(), s.offset, s.size).is_some()
                && range(f.bytes(), strings.offset, strings.size).is_some())
            .then_some(((s.offset, s.size), (strings.offset, strings.size)))
        };
        let companion = file.companion.as_deref();
        let found = of(file, section_header::SHT_SYMTAB)
            .map(|t| (false, t))
            .or_else(|| companion.and_then(|c| of(c, section_header::SHT_SYMTAB)).map(|t| (true, t)))
            .or_else(|| of(file, section_header::SHT_DYNSYM).map(|t| (false, t)));
        let mut t = Self {
            companion: false,
            table: (0, 0),
            strings: (0, 0),
            count: 0,
            files: Vec::new(),
            by_name: OnceLock::new(),
            functions: Vec::new(),
            objects: Vec::new(),
        };
        let Some((in_companion, (table, strings))) = found else {
            return t;
        };
        t.companion = in_companion;
        (t.table, t.strings) = (table, strings);
        t.count = usize::try_from(table.1 / ENTRY).unwrap_or(0);
        t.index(file);
        t
    }

    fn index(&mut self, file: &ElfFile) {
        let mut functions = Vec::new();
        let mut objects = Vec::new();
        for i in 0..self.count {
            let Some(raw) = self.raw(file, i) else { break };
            if raw.kind == sym::STT_FILE {
                self.files.push((i as u32, i as u32));
                continue;
            }
            if raw.section == 0 || raw.kind == sym::STT_SECTION {
                continue;
            }
            match raw.kind {
                sym::STT_FUNC | sym::STT_GNU_IFUNC => functions.push((raw, i as u32)),
                sym::STT_OBJECT => objects.push((raw, i as u32)),
                // A label counts as code if its section does.
                sym::STT_NOTYPE => {
                    let section = file.sections.get(usize::from(raw.section));
                    if section.is_some_and(|s| s.flags & u64::from(section_header::SHF_EXECINSTR) != 0) {
                        functions.push((raw, i as u32));
                    }
                }
                _ => {}
            }
        }
        self.functions = self.extents(file, functions);
        self.objects = self.extents(file, objects);
    }

    fn names(&self, file: &ElfFile) -> &[(u64, u32)] {
        self.by_name.get_or_init(|| {
            let defined = (0..self.count).filter_map(|i| {
                let raw = self.raw(file, i)?;
                let named = raw.section != 0 && raw.kind != sym::STT_SECTION && raw.kind != sym::STT_FILE;
                let name = named.then(|| self.name(file, raw.name)).filter(|n| !n.is_empty())?;
                Some((hash(name), i as u32))
            });
            let mut v: Vec<_> = defined.collect();
            v.sort_unstable();
            v
        })
    }

    /// One symbol per start address. Among aliases the choice depends on nothing but their names and binding,
    /// so that two builds agree: sized before unsized, global before weak before local, fewer leading
    /// underscores, then the name's order.
    fn extents(&self, file: &ElfFile, mut symbols: Vec<(Raw, u32)>) -> Vec<Extent> {
        let bind = |b: u8| match b {
            sym::STB_LOCAL => 2,
            sym::STB_WEAK => 1,
            _ => 0,
        };
        let underscores = |n: &str| n.len() - n.trim_start_matches('_').len();
        let key = |r: &Raw| {
            let name = self.name(file, r.name);
            (r.size == 0, r.kind == sym::STT_NOTYPE, bind(r.bind), underscores(name), name)
        };
        symbols.sort_unstable_by_key(|s| (s.0.value, s.1));
        let mut best: Vec<(Raw, u32)> = Vec::with_capacity(symbols.len());
        for s in symbols {
            match best.last_mut().filter(|b| b.0.value == s.0.value) {
                Some(b) if key(&s.0) < key(&b.0) => *b = s,
                Some(_) => {}
                None => best.push(s),
            }
        }
        let mut out = Vec::with_capacity(best.len());
        let mut inside = 0;
        for (n, (raw, i)) in best.iter().enumerate() {
            let end = if raw.size > 0 {
                raw.value.saturating_add(raw.size)
            } else if raw.value < inside {
                // A label in the middle of a function is not a function.
                continue;
            } else {
                // An unsized symbol reaches to the next one, at most to the end of its section.
                let section = file.sections.get(usize::from(raw.section));
                let limit = section.map_or(raw.value, |s| s.addr.0.saturating_add(s.size));
                best.get(n + 1).map_or(limit, |next| next.0.value.min(limit))
            };
            inside = inside.max(end);
            out.push((raw.value, end, *i));
        }
        out
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    fn data<'a>(&self, file: &'a ElfFile) -> &'a [u8] {
        match (self.companion, &file.companion) {
            (true, Some(c)) => Arc::as_ref(c).bytes(),
            _ => file.bytes(),
        }
    }

    fn raw(&self, file: &ElfFile, i: usize) -> Option<Raw> {
        if i >= self.count {
            return None;
        }
        let at = usize::try_from(self.table.0).ok()?.checked_add(i * ENTRY as usize)?;
        let e = self.data(file).get(at..at + ENTRY as usize)?;
        Some(Raw {
            name: half(e, 0)?,
            kind: e[4] & 15,
            bind: e[4] >> 4,
            section: u16::from_le_bytes([e[6], e[7]]),
            value: word(e, 8)?,
            size: word(e, 16)?,
        })
    }

    fn name<'a>(&self, file: &'a ElfFile, offset: u32) -> &'a str {
        let strings = range(self.data(file), self.strings.0, self.strings.1).unwrap_or(&[]);
        c_string(strings, offset.into()).and_then(|s| std::str::from_utf8(s).ok()).unwrap_or("")
    }

    pub(super) fn get<'a>(&self, file: &'a ElfFile, i: usize) -> Option<Symbol<'a>> {
        let raw = self.raw(file, i)?;
        let bind = match raw.bind {
            sym::STB_LOCAL => Bind::Local,
            sym::STB_WEAK => Bind::Weak,
            _ => Bind::Global,
        };
        let source = match bind {
            Bind::Local => {
                let n = self.files.partition_point(|f| f.0 as usize <= i);
                let file_symbol = n.checked_sub(1).and_then(|n| self.raw(file, self.files[n].1 as usize));
                file_symbol.map(|r| self.name(file, r.name)).filter(|n| !n.is_empty())
            }
            _ => None,
        };
        Some(Symbol {
            name: self.name(file, raw.name),
            addr: LinkAddr(raw.value),
            size: raw.size,
            kind: match raw.kind {
                sym::STT_NOTYPE => SymbolKind::None,
                sym::STT_OBJECT => SymbolKind::Object,
                sym::STT_FUNC => SymbolKind::Func,
                sym::STT_GNU_IFUNC => SymbolKind::IFunc,
                sym::STT_TLS => SymbolKind::Tls,
                _ => SymbolKind::Other,
            },
            bind,
            section: (raw.section != 0).then(|| u32::from(raw.section)),
            file: source,
        })
    }

    pub(super) fn named<'a>(&self, file: &'a ElfFile, name: &str) -> Vec<Symbol<'a>> {
        let (names, h) = (self.names(file), hash(name));
        let first = names.partition_point(|n| n.0 < h);
        let same = names[first..].iter().take_while(|n| n.0 == h);
        same.filter_map(|n| self.get(file, n.1 as usize)).filter(|s| s.name == name).collect()
    }

    pub(super) fn function_at<'a>(&self, file: &'a ElfFile, a: LinkAddr) -> Option<Symbol<'a>> {
        covering(&self.functions, a).and_then(|i| self.get(file, i as usize))
    }

    pub(super) fn object_at<'a>(&self, file: &'a ElfFile, a: LinkAddr) -> Option<Symbol<'a>> {
        covering(&self.objects, a).and_then(|i| self.get(file, i as usize))
    }
}

#[derive(Clone, Copy)]
struct Raw {
    name: u32,
    kind: u8,
    bind: u8,
    section: u16,
    value: u64,
    size: u64,
}

/// The entry with the greatest start that holds the address (symbols may nest, rarely and not deep).
fn covering(entries: &[(u64, u64, u32)], a: LinkAddr) -> Option<u32> {
    let n = entries.partition_point(|e| e.0 <= a.0);
    entries[..n].iter().rev().take(32).find(|e| a.0 < e.1).map(|e| e.2)
}
