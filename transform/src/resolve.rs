//! From an address in the old program to the same thing in the new one.

use crate::layout::record_name;
use crate::relayout::Relayout;
use crate::types::{Type, TypeId, TypeModel, VarPlace, Variable};
use mcr_image::elf::SectionKind;
use mcr_image::{Addr, ElfFile, FastMap, LinkAddr};
use mcr_plugin::Rules;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

/// What an address in the old program means for the new one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// The same symbol of the new program.
    New { link: u64, symbol: String },
    /// The old program's read-only data, which stays mapped.
    Stays,
    /// Nothing that could be named.
    Unresolved(String),
}

/// Which element of a new array continues an old one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Elements {
    /// The one with the same index.
    Same,
    /// By key; `None`: the new version has no such element.
    Keyed(Vec<Option<u64>>),
    /// It cannot be told.
    Unknown(String),
}

/// Answers that hold for a pair of programs, wherever they are mapped.
#[derive(Default)]
pub(crate) struct Known {
    /// By address, and by the type that a pointer to it says.
    targets: RwLock<FastMap<(LinkAddr, Option<TypeId>), Target>>,
    elements: RwLock<HashMap<LinkAddr, Arc<Elements>>>,
}

pub(crate) struct Resolver<'a> {
    pub old_elf: &'a ElfFile,
    pub new_elf: &'a ElfFile,
    pub old: &'a TypeModel,
    pub new: &'a TypeModel,
    pub bias: u64,
    pub rules: &'a Rules,
    pub layouts: &'a dyn Relayout,
    pub known: &'a Known,
}

impl<'a> Resolver<'a> {
    pub fn new(
        old_elf: &'a ElfFile,
        new_elf: &'a ElfFile,
        (old, new): (&'a TypeModel, &'a TypeModel),
        bias: u64,
        rules: &'a Rules,
        layouts: &'a dyn Relayout,
        known: &'a Known,
    ) -> Self {
        Self { old_elf, new_elf, old, new, bias, rules, layouts, known }
    }

    /// Resolves an address inside the old program; `want`: the pointee's type where the pointer is typed.
    pub fn resolve(&self, addr: u64, want: Option<TypeId>) -> Target {
        let link = LinkAddr(addr.wrapping_sub(self.bias));
        let key = (link, want);
        if let Some(t) = self.known.targets.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return t.clone();
        }
        let kind = self.old_elf.section_kind(link);
        let out = match kind {
            SectionKind::Text | SectionKind::Plt => self.function(link),
            SectionKind::Rodata | SectionKind::RelRo | SectionKind::Data | SectionKind::Bss => {
                self.data(link, kind, want)
            }
            // Names and tables of the dynamic loader, read-only: old's stay mapped.
            SectionKind::ReadOnlyOther => Target::Stays,
            _ => Target::Unresolved(format!("{link} is in no code, data or constant of the program")),
        };
        self.known.targets.write().unwrap_or_else(PoisonError::into_inner).insert(key, out.clone());
        out
    }

    fn function(&self, link: LinkAddr) -> Target {
        let entry = |f: &crate::types::Function| f.ranges.first().map(|r| r.0);
        if let Some(f) = self.old.function_at(link) {
            if entry(f) != Some(link) {
                let at = link.0.wrapping_sub(entry(f).unwrap_or_default().0);
                return Target::Unresolved(format!(
                    "it points into the middle of function {}+{at:#x}",
                    f.name
                ));
            }
            let name = self.rules.new_function(&f.name);
            let all: Vec<_> = self.new.functions_named(name).filter(|n| !n.ranges.is_empty()).collect();
            let same_unit: Vec<_> =
                all.iter().filter(|n| n.unit == f.unit && n.external == f.external).collect();
            let found = match (same_unit.as_slice(), all.as_slice()) {
                ([one], _) => Some(**one),
                (_, [one]) => Some(*one),
                _ => all.iter().find(|n| n.external && f.external).copied(),
            };
            return match found.and_then(entry) {
                Some(new) => Target::New { link: new.0, symbol: format!("function {name}") },
                None if all.is_empty() => Target::Unresolved(format!(
                    "function {} is not in the new version; if it was renamed: [rename.functions] {} = \"…\"",
                    f.name, f.name
                )),
                None => Target::Unresolved(format!(
                    "the new version has {} static functions named {name}, and none in {}",
                    all.len(),
                    f.unit
                )),
            };
        }
        match self.old_elf.function_at(link) {
            Some(s) if s.addr == link => match self.new_elf.symbol(self.rules.new_function(s.name)) {
                Some(n) => Target::New { link: n.addr.0, symbol: format!("function {}", n.name) },
                None => Target::Unresolved(format!(
                    "function {} has no unique namesake in the new version",
                    s.name
                )),
            },
            Some(s) => Target::Unresolved(format!(
                "it points into the middle of function {}+{:#x}",
                s.name,
                link.0 - s.addr.0
            )),
            None => Target::Unresolved(format!("{link} is code without a symbol")),
        }
    }

    fn data(&self, link: LinkAddr, kind: SectionKind, want: Option<TypeId>) -> Target {
        let constant = kind == SectionKind::Rodata;
        if let Some(v) = self.old.global_at(link) {
            let offset = link.0 - v.place.link().unwrap_or_default().0;
            let Some(n) = self.new_variable(v) else {
                if constant {
                    return Target::Stays;
                }
                return Target::Unresolved(format!(
                    "variable {} is not in the new version; if it was renamed: [rename.globals] {} = \"…\"",
                    v.display(),
                    v.name
                ));
            };
            let Some(start) = n.place.link() else {
                return Target::Unresolved(format!("variable {} became thread-local", v.display()));
            };
            return match self.offset_in(v, n, offset, want) {
                Ok(o) => {
                    let tail = if o == 0 { String::new() } else { format!("+{o:#x}") };
                    Target::New { link: start.0 + o, symbol: format!("global {}{tail}", n.display()) }
                }
                Err(_) if constant && !matches!(self.old.strip(v.ty), Type::Record(_)) => Target::Stays,
                Err(why) => Target::Unresolved(why),
            };
        }
        if let Some(s) = self.old_elf.object_at(link) {
            let offset = link.0 - s.addr.0;
            let name = self.rules.new_global(s.name);
            if let Some(n) = self.new_elf.symbol(name).filter(|n| offset < n.size.max(1)) {
                return Target::New { link: n.addr.0 + offset, symbol: format!("global {name}+{offset:#x}") };
            }
            if !constant {
                return Target::Unresolved(format!(
                    "variable {name} has no unique namesake in the new version"
                ));
            }
        }
        match kind {
            SectionKind::Rodata => Target::Stays,
            _ => Target::Unresolved(format!("{link} is in no variable that the debug information names")),
        }
    }

    /// The offset in the new variable of an offset in the old one.
    pub fn offset_in(
        &self,
        old: &Variable,
        new: &Variable,
        offset: u64,
        want: Option<TypeId>,
    ) -> Result<u64, String> {
        let lost = || format!("what lies {offset:#x} bytes into {} is not in the new version", old.display());
        let (Type::Array { element: oe, .. }, Type::Array { element: ne, .. }) =
            (self.old.strip(old.ty), self.new.strip(new.ty))
        else {
            return self.layouts.map_offset(old.ty, new.ty, offset, want).ok_or_else(lost);
        };
        let (os, ns) = (self.old.size_of(*oe), self.new.size_of(*ne));
        if os == 0 || ns == 0 {
            return Ok(offset);
        }
        let (i, rest) = (offset / os, offset % os);
        let i = match &*self.elements(old, new) {
            Elements::Same => i,
            Elements::Keyed(map) => map
                .get(i as usize)
                .copied()
                .flatten()
                .ok_or_else(|| format!("element {i} of {} is not in the new version", old.display()))?,
            Elements::Unknown(why) => return Err(why.clone()),
        };
        let rest = self.layouts.map_offset(*oe, *ne, rest, want).ok_or_else(lost)?;
        let at = i * ns + rest;
        if at >= new.size.max(1) {
            return Err(format!("element {i} of {} is not in the new version", old.display()));
        }
        Ok(at)
    }

    /// The new version's variable that continues an old one.
    pub fn new_variable(&self, v: &Variable) -> Option<&'a Variable> {
        let name = self.rules.new_global(&v.name);
        let kind = |n: &&Variable| {
            matches!(
                (v.place, n.place),
                (VarPlace::Link(_), VarPlace::Link(_)) | (VarPlace::Tls(_), VarPlace::Tls(_))
            )
        };
        let function = v.function.as_ref().map(|f| self.rules.new_function(f));
        let all: Vec<&'a Variable> =
            self.new.globals_named(name).filter(kind).filter(|n| n.function.as_deref() == function).collect();
        let pick = |test: &dyn Fn(&&&'a Variable) -> bool| {
            let mut it = all.iter().filter(test);
            it.next().copied().filter(|_| it.next().is_none())
        };
        if v.external && function.is_none() {
            return pick(&|n| n.external).or_else(|| pick(&|_| true));
        }
        pick(&|n| n.unit == v.unit && n.ordinal == v.ordinal)
            .or_else(|| pick(&|n| n.ordinal == v.ordinal))
            .or_else(|| pick(&|_| true))
    }

    /// How the elements of two arrays correspond, by what the two files say they contain at the start.
    pub fn elements(&self, old: &Variable, new: &Variable) -> Arc<Elements> {
        let key = old.place.link().unwrap_or_default();
        if let Some(e) = self.known.elements.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Arc::clone(e);
        }
        let e = Arc::new(self.find_elements(old, new));
        self.known.elements.write().unwrap_or_else(PoisonError::into_inner).insert(key, Arc::clone(&e));
        e
    }

    fn find_elements(&self, old: &Variable, new: &Variable) -> Elements {
        let count = |m: &TypeModel, v: &Variable| match m.strip(v.ty) {
            Type::Array { element, count } => {
                let size = m.size_of(*element);
                Some((*element, count.unwrap_or(v.size / size.max(1))))
            }
            _ => None,
        };
        let (Some((oe, on)), Some((ne, nn))) = (count(self.old, old), count(self.new, new)) else {
            return Elements::Same;
        };
        let old_keys = keys(self.old_elf, self.old, old, oe, on);
        let new_keys = keys(self.new_elf, self.new, new, ne, nn);
        let (Some(old_keys), Some(new_keys)) = (old_keys, new_keys) else {
            return Elements::Same; // nothing names the elements: the index does
        };
        if old_keys.iter().zip(&new_keys).all(|(a, b)| a == b) && on <= nn {
            return Elements::Same;
        }
        let named = |v: &[Option<Vec<u8>>]| v.iter().any(Option::is_some);
        if !named(&old_keys) || !named(&new_keys) {
            return Elements::Same;
        }
        let unique = |v: &[Option<Vec<u8>>]| {
            let mut seen = std::collections::HashSet::new();
            v.iter().flatten().all(|k| seen.insert(k.clone()))
        };
        if !unique(&old_keys) || !unique(&new_keys) {
            return Elements::Unknown(format!(
                "the elements of the table {} changed places between the versions and their names are not unique; \
                 say which version's table wins: [keep] {} = \"new\" (or \"old\")",
                old.display(),
                new.name
            ));
        }
        let find = |k: &Vec<u8>| new_keys.iter().position(|n| n.as_ref() == Some(k)).map(|i| i as u64);
        let mut map: Vec<Option<u64>> = old_keys.iter().map(|k| k.as_ref().and_then(find)).collect();
        // Closing entries without a name keep their distance from the end.
        for (i, k) in old_keys.iter().enumerate().rev() {
            let j = (nn as usize).checked_sub(on as usize - i);
            match (k, j) {
                (None, Some(j)) if new_keys[j].is_none() => map[i] = Some(j as u64),
                _ => break,
            }
        }
        Elements::Keyed(map)
    }
}

/// The initial string of each element's first `char *` member (or of the element itself); `None`: elements
/// have no such member.
fn keys(
    elf: &ElfFile,
    m: &TypeModel,
    v: &Variable,
    element: TypeId,
    count: u64,
) -> Option<Vec<Option<Vec<u8>>>> {
    let at = key_offset(m, element, 0)?;
    let size = m.size_of(element);
    let start = v.place.link()?;
    let total = usize::try_from(size.checked_mul(count)?).ok()?;
    let init = elf.initial_bytes(start, total, Addr(0))?;
    let key = |i: u64| {
        let o = (i * size + at) as usize;
        let word = init.bytes.get(o..o + 8)?;
        let p = u64::from_le_bytes(word.try_into().expect("eight bytes"));
        (p != 0).then(|| elf_string(elf, LinkAddr(p))).flatten()
    };
    Some((0..count).map(key).collect())
}

fn key_offset(m: &TypeModel, ty: TypeId, at: u64) -> Option<u64> {
    match m.strip(ty) {
        Type::Pointer(to) => {
            matches!(m.strip(*to), Type::Base { encoding, size: 1, .. } if encoding.is_char()).then_some(at)
        }
        Type::Record(r) if record_name(m, ty).is_some() || r.size > 0 => {
            r.members.iter().filter(|x| x.bits.is_none()).find_map(|x| key_offset(m, x.ty, at + x.offset))
        }
        _ => None,
    }
}

fn elf_string(elf: &ElfFile, at: LinkAddr) -> Option<Vec<u8>> {
    let offset = usize::try_from(elf.file_offset(at)?).ok()?;
    let tail = elf.bytes().get(offset..)?;
    let len = tail.iter().take(4096).position(|&b| b == 0)?;
    Some(tail[..len].to_vec())
}
