//! Call frame information of one file: `.eh_frame` by its search table, else `.debug_frame`; rows are compiled
//! once for each program counter and kept.

use crate::LinkAddr;
use crate::elf::ElfFile;
use gimli::{
    BaseAddresses, CfaRule, CieOrFde, DebugFrame, EhFrame, EndianSlice, FrameDescriptionEntry, LittleEndian,
    RegisterRule, UnwindContext, UnwindSection,
};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

type Slice<'a> = EndianSlice<'a, LittleEndian>;

/// Link address, file offset, and a length or count.
type Place = (u64, usize, usize);

/// How the canonical frame address is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cfa {
    Offset(usize, i64),
    Expression(Vec<u8>),
}

/// How the caller's value of a register is found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Rule {
    /// The file says nothing.
    #[default]
    Unspecified,
    Undefined,
    Same,
    /// Saved at CFA + n.
    At(i64),
    /// Is CFA + n.
    Value(i64),
    Register(usize),
    AtExpression(Vec<u8>),
    ValueExpression(Vec<u8>),
    Constant(u64),
}

/// The rules that hold at one program counter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) cfa: Cfa,
    pub(super) rules: [Rule; 17],
    /// A signal trampoline ('S' in the augmentation).
    pub(super) signal: bool,
}

struct Table {
    /// (start, end, offset of the FDE), ascending.
    entries: Vec<(u64, u64, usize)>,
}

/// The unwind information of a file, read as it is needed.
pub(crate) struct CfiIndex {
    /// (link address, file offset, length) of `.eh_frame`.
    eh_frame: Option<Place>,
    /// (link address, file offset, length) of `.eh_frame_hdr`'s search table and its entry count.
    search: Option<Place>,
    bases: BaseAddresses,
    scanned: OnceLock<Table>,
    debug_frame: OnceLock<Option<(Vec<u8>, Table)>>,
    rows: Mutex<HashMap<u64, Option<Arc<Row>>>>,
}

fn number(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(b.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

impl CfiIndex {
    pub(crate) fn read(file: &ElfFile) -> Self {
        let mut bases = BaseAddresses::default();
        let place = |name: &str| {
            let s = file.section(name).filter(|s| s.has_content())?;
            let (offset, len) = (usize::try_from(s.offset).ok()?, usize::try_from(s.size).ok()?);
            file.bytes().get(offset..offset.checked_add(len)?)?;
            Some((s.addr.0, offset, len))
        };
        // Without section headers PT_GNU_EH_FRAME leads to both.
        const PT_GNU_EH_FRAME: u32 = 0x6474_e550;
        let header = place(".eh_frame_hdr").or_else(|| {
            let p = file.program_headers().iter().find(|p| p.p_type == PT_GNU_EH_FRAME)?;
            let (offset, len) = (usize::try_from(p.p_offset).ok()?, usize::try_from(p.p_filesz).ok()?);
            file.bytes().get(offset..offset.checked_add(len)?)?;
            Some((p.p_vaddr, offset, len))
        });
        let (eh_ptr, search) = header.and_then(|h| search_table(file, h)).unzip();
        let eh_frame = place(".eh_frame").or_else(|| {
            let start = LinkAddr(eh_ptr?);
            let s = file.segment_at(start)?;
            let skip = start.0 - s.vaddr.0;
            let len = usize::try_from(s.file_size.checked_sub(skip)?).ok()?;
            Some((start.0, usize::try_from(s.file_offset + skip).ok()?, len))
        });
        if let Some((addr, ..)) = eh_frame {
            bases = bases.set_eh_frame(addr);
        }
        if let Some((addr, ..)) = header {
            bases = bases.set_eh_frame_hdr(addr);
        }
        if let Some((addr, ..)) = place(".text") {
            bases = bases.set_text(addr);
        }
        if let Some((addr, ..)) = place(".got") {
            bases = bases.set_got(addr);
        }
        Self {
            eh_frame,
            search: search.flatten(),
            bases,
            scanned: OnceLock::new(),
            debug_frame: OnceLock::new(),
            rows: Mutex::new(HashMap::new()),
        }
    }

    /// The rules at `pc`; `None` where the file has none.
    pub(super) fn row(&self, file: &ElfFile, pc: LinkAddr) -> Option<Arc<Row>> {
        let rows = || self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = rows().get(&pc.0) {
            return known.clone();
        }
        let row = self.eh_frame_row(file, pc).or_else(|| self.debug_frame_row(file, pc)).map(Arc::new);
        rows().insert(pc.0, row.clone());
        row
    }

    fn eh_frame_row(&self, file: &ElfFile, pc: LinkAddr) -> Option<Row> {
        let (addr, offset, len) = self.eh_frame?;
        let bytes = file.bytes().get(offset..offset.checked_add(len)?)?;
        let section = EhFrame::new(bytes, LittleEndian);
        let at = match self.search {
            Some((base, at, count)) => {
                let table = file.bytes().get(at..at.checked_add(count.checked_mul(8)?)?)?;
                let start =
                    |i: usize| base.wrapping_add(number(table, i * 8).unwrap_or(0) as i32 as i64 as u64);
                let (mut low, mut high) = (0, count);
                while low < high {
                    let middle = low + (high - low) / 2;
                    if start(middle) <= pc.0 { low = middle + 1 } else { high = middle }
                }
                let i = low.checked_sub(1)?;
                let fde = base.wrapping_add(number(table, i * 8 + 4)? as i32 as i64 as u64);
                usize::try_from(fde.checked_sub(addr)?).ok().filter(|&o| o < len)?
            }
            None => self.scanned.get_or_init(|| Table::scan(&section, &self.bases, |o| o.0)).find(pc.0)?,
        };
        let fde = section.fde_from_offset(&self.bases, at.into(), EhFrame::cie_from_offset).ok()?;
        compile(&section, &self.bases, &fde, pc)
    }

    fn debug_frame_row(&self, file: &ElfFile, pc: LinkAddr) -> Option<Row> {
        let make = || {
            let data = file.section_data(".debug_frame").ok().flatten()?.into_owned();
            let mut section = DebugFrame::new(&data, LittleEndian);
            section.set_address_size(8);
            let table = Table::scan(&section, &BaseAddresses::default(), |o| o.0);
            Some((data, table))
        };
        let (data, table) = self.debug_frame.get_or_init(make).as_ref()?;
        let mut section = DebugFrame::new(data, LittleEndian);
        section.set_address_size(8);
        let bases = BaseAddresses::default();
        let fde =
            section.fde_from_offset(&bases, table.find(pc.0)?.into(), DebugFrame::cie_from_offset).ok()?;
        compile(&section, &bases, &fde, pc)
    }
}

/// Reads the header of `.eh_frame_hdr` in the form that every linker writes: version 1, `.eh_frame` pointer
/// pc-relative sdata4, count udata4, table relative to the header sdata4. Anything else: no table.
fn search_table(file: &ElfFile, (addr, offset, len): (u64, usize, usize)) -> Option<(u64, Option<Place>)> {
    let h = file.bytes().get(offset..offset.checked_add(len)?)?;
    if *h.first()? != 1 || *h.get(1)? != 0x1b {
        return None;
    }
    let eh_frame = addr.wrapping_add(4).wrapping_add(number(h, 4)? as i32 as i64 as u64);
    let standard = *h.get(2)? == 0x03 && *h.get(3)? == 0x3b;
    let count = number(h, 8).map_or(0, |n| n as usize);
    let table = (standard && count > 0 && count <= (len.saturating_sub(12)) / 8).then_some((
        addr,
        offset + 12,
        count,
    ));
    Some((eh_frame, table))
}

impl Table {
    fn scan<'a, S: UnwindSection<Slice<'a>>>(
        section: &S,
        bases: &BaseAddresses,
        offset: impl Fn(S::Offset) -> usize,
    ) -> Self {
        let mut entries = Vec::new();
        let mut it = section.entries(bases);
        // An entry that cannot be read ends the scan: what was found so far stays usable.
        while let Ok(Some(entry)) = it.next() {
            let CieOrFde::Fde(partial) = entry else {
                continue;
            };
            let Ok(fde) = partial.parse(|s: &S, b, o| s.cie_from_offset(b, o)) else {
                continue;
            };
            entries.push((fde.initial_address(), fde.end_address(), offset(fde.offset().into())));
        }
        entries.sort_unstable();
        Self { entries }
    }

    fn find(&self, pc: u64) -> Option<usize> {
        let n = self.entries.partition_point(|e| e.0 <= pc);
        self.entries[..n].last().filter(|e| pc < e.1).map(|e| e.2)
    }
}

fn compile<'a, S: UnwindSection<Slice<'a>>>(
    section: &S,
    bases: &BaseAddresses,
    fde: &FrameDescriptionEntry<Slice<'a>>,
    pc: LinkAddr,
) -> Option<Row> {
    if !fde.contains(pc.0) {
        return None;
    }
    let mut context = UnwindContext::new();
    let row = fde.unwind_info_for_address(section, bases, &mut context, pc.0).ok()?;
    let bytes = |e: &gimli::UnwindExpression<usize>| e.get(section).ok().map(|e| e.0.slice().to_vec());
    let cfa = match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => Cfa::Offset(usize::from(register.0), *offset),
        CfaRule::Expression(e) => Cfa::Expression(bytes(e)?),
    };
    let mut rules: [Rule; 17] = Default::default();
    for (register, rule) in row.registers() {
        let Some(slot) = rules.get_mut(usize::from(register.0)) else {
            continue;
        };
        *slot = match rule {
            RegisterRule::Undefined => Rule::Undefined,
            RegisterRule::SameValue => Rule::Same,
            RegisterRule::Offset(n) => Rule::At(*n),
            RegisterRule::ValOffset(n) => Rule::Value(*n),
            RegisterRule::Register(r) => Rule::Register(usize::from(r.0)),
            RegisterRule::Expression(e) => Rule::AtExpression(bytes(e)?),
            RegisterRule::ValExpression(e) => Rule::ValueExpression(bytes(e)?),
            RegisterRule::Constant(v) => Rule::Constant(*v),
            _ => Rule::Undefined,
        };
    }
    Some(Row { cfa, rules, signal: fde.is_signal_trampoline() })
}
