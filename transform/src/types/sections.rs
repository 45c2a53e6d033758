//! The DWARF sections of a program, held for as long as its type model: locals are read when asked for.

use super::TypesError;
use gimli::{EndianSlice, LittleEndian, SectionId};
use mcr_image::elf::{DebugDirs, ElfFile};
use std::fmt;

/// How gimli reads our bytes.
pub(super) type Slice<'a> = EndianSlice<'a, LittleEndian>;
pub(super) type Dwarf<'a> = gimli::Dwarf<Slice<'a>>;
pub(super) type Unit<'a> = gimli::Unit<Slice<'a>>;

/// `.debug_info` of the program.
pub(super) const SPACE_INFO: u64 = 0;
/// `.debug_info` of the supplementary file (dwz).
pub(super) const SPACE_SUP: u64 = 1 << 60;
/// `.debug_types` (DWARF 4 type units).
pub(super) const SPACE_TYPES: u64 = 2 << 60;
pub(super) const SPACE_MASK: u64 = 3 << 60;

const WANTED: &[SectionId] = &[
    SectionId::DebugAbbrev,
    SectionId::DebugAddr,
    SectionId::DebugInfo,
    SectionId::DebugLine,
    SectionId::DebugLineStr,
    SectionId::DebugLoc,
    SectionId::DebugLocLists,
    SectionId::DebugRanges,
    SectionId::DebugRngLists,
    SectionId::DebugStr,
    SectionId::DebugStrOffsets,
    SectionId::DebugTypes,
];

/// Decompressed content of the sections that are read.
#[derive(Default)]
pub struct Sections {
    main: Vec<(SectionId, Vec<u8>)>,
    sup: Vec<(SectionId, Vec<u8>)>,
}

impl fmt::Debug for Sections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |v: &[(SectionId, Vec<u8>)]| v.iter().map(|s| s.1.len()).sum::<usize>();
        write!(f, "Sections({} + {} bytes)", size(&self.main), size(&self.sup))
    }
}

impl Sections {
    pub(super) fn read(elf: &ElfFile, dirs: &DebugDirs) -> Result<Self, TypesError> {
        let path = elf.path().display().to_string();
        let take = |elf: &ElfFile| -> Result<Vec<(SectionId, Vec<u8>)>, TypesError> {
            let mut v = Vec::new();
            for &id in WANTED {
                let data = elf.section_data(id.name()).map_err(TypesError::Elf)?;
                if let Some(d) = data {
                    v.push((id, d.into_owned()));
                }
            }
            Ok(v)
        };
        let main = take(elf)?;
        if main.iter().all(|s| s.0 != SectionId::DebugInfo || s.1.is_empty()) {
            return Err(TypesError::NoDwarf { path, build_id: elf.build_id_hex() });
        }
        let wants_sup = elf.section_data(".gnu_debugaltlink").map_err(TypesError::Elf)?.is_some();
        let sup = match (wants_sup, dirs.alternate(elf)) {
            (false, _) => Vec::new(),
            (true, Some(f)) => take(&f)?,
            (true, None) => return Err(TypesError::NoSupplement { path }),
        };
        Ok(Self { main, sup })
    }

    /// Sections given directly, for tests.
    #[cfg(test)]
    pub(super) fn of(main: Vec<(SectionId, Vec<u8>)>) -> Self {
        Self { main, sup: Vec::new() }
    }
    /// The content, for tests that damage it.
    #[cfg(test)]
    pub(super) fn main(&self) -> &[(SectionId, Vec<u8>)] {
        &self.main
    }

    /// gimli's view.
    pub(super) fn dwarf(&self) -> Dwarf<'_> {
        fn get(v: &[(SectionId, Vec<u8>)], id: SectionId) -> Slice<'_> {
            let found = v.iter().find(|s| s.0 == id).map_or(&[][..], |s| &s.1);
            EndianSlice::new(found, LittleEndian)
        }
        let Ok(mut dwarf) = Dwarf::load(|id| Ok::<_, std::convert::Infallible>(get(&self.main, id)));
        if !self.sup.is_empty() {
            let Ok(sup) = Dwarf::load(|id| Ok::<_, std::convert::Infallible>(get(&self.sup, id)));
            dwarf.set_sup(sup);
        }
        dwarf
    }
}
