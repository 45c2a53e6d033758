//! DWARF → [`TypeModel`]: units are read in parallel, then joined.

use super::TypesError;
use super::dies::{Attrs, RawFunc, RawUnit, RawVar, Ref, read_unit, space_of};
use super::intern::intern;
use super::model::{Function, Name, TypeModel, Variable};
use super::names::unit_name;
use super::sections::{Dwarf, SPACE_MASK, SPACE_SUP, SPACE_TYPES, Sections, Unit};
use mcr_image::elf::{DebugDirs, ElfFile};
use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

type Header<'a> = gimli::UnitHeader<super::sections::Slice<'a>>;

impl TypeModel {
    /// Reads the types, static variables and functions of a program from its DWARF, its debug companion's,
    /// or that of a file in `dirs`.
    pub fn load(elf: &ElfFile, dirs: &DebugDirs) -> Result<Self, TypesError> {
        let path = elf.path().display().to_string();
        let mut model = if elf.has_dwarf() {
            Self::from_sections(Sections::read(elf, dirs)?, &path)?
        } else {
            let companion = dirs
                .companion(elf)
                .ok_or_else(|| TypesError::NoDwarf { path: path.clone(), build_id: elf.build_id_hex() })?;
            Self::from_sections(Sections::read(&companion, dirs)?, &path)?
        };
        // An initialiser may fill a flexible array: the symbol knows how far.
        let sizes: HashMap<u64, u64> = elf
            .symbols()
            .filter(|s| s.kind == mcr_image::elf::SymbolKind::Object && s.is_defined())
            .map(|s| (s.addr.0, s.size))
            .collect();
        for v in &mut model.globals {
            if let Some(a) = v.place.link() {
                v.size = v.size.max(sizes.get(&a.0).copied().unwrap_or(0));
            }
        }
        Ok(model)
    }

    pub(super) fn from_sections(sections: Sections, path: &str) -> Result<Self, TypesError> {
        let mut model = {
            let dwarf = sections.dwarf();
            let units = Units::read(&dwarf, path)?;
            units.join()
        };
        model.sections = sections;
        model.path = path.to_owned();
        model.index();
        Ok(model)
    }

    fn index(&mut self) {
        for (i, v) in self.globals.iter().enumerate() {
            self.globals_by_name.entry(v.name.clone()).or_default().push(i);
            if v.place.link().is_some() {
                self.globals_by_addr.push(i);
            }
        }
        let globals = &self.globals;
        self.globals_by_addr.sort_by_key(|&i| globals[i].place.link());
        for (i, f) in self.functions.iter().enumerate() {
            self.functions_by_name.entry(f.name.clone()).or_default().push(i);
            for r in &f.ranges {
                self.function_ranges.push((r.0.0, r.1.0, i as u32));
            }
        }
        self.function_ranges.sort_unstable();
    }
}

/// Units with what was read of them, ascending by space and offset.
struct Units<'d, 'a> {
    dwarf: &'d Dwarf<'a>,
    all: Vec<(u64, Unit<'a>, RawUnit<'a>)>,
}

/// What an abstract or declaring entry says.
#[derive(Clone, Default)]
struct Origin<'a> {
    name: Option<&'a [u8]>,
    ty: Option<Ref>,
    external: bool,
    file: Option<u64>,
    line: u32,
    unit: usize,
}

impl<'d, 'a> Units<'d, 'a> {
    fn read(dwarf: &'d Dwarf<'a>, path: &str) -> Result<Self, TypesError> {
        let damaged = |at: &str, e: gimli::Error| TypesError::Damaged {
            path: path.to_owned(),
            at: at.to_owned(),
            what: e.to_string(),
        };
        let mut headers: Vec<(bool, Header<'a>)> = Vec::new();
        let mut it = dwarf.units();
        while let Some(h) = it.next().map_err(|e| damaged("a unit header of .debug_info", e))? {
            headers.push((false, h));
        }
        if let Some(sup) = dwarf.sup() {
            let mut it = sup.units();
            while let Some(h) =
                it.next().map_err(|e| damaged("a unit header of the supplementary file", e))?
            {
                headers.push((true, h));
            }
        }
        let mut it = dwarf.type_units();
        while let Some(h) = it.next().map_err(|e| damaged("a unit header of .debug_types", e))? {
            headers.push((false, h));
        }
        // C programs are written in 4 and 5; start files of the C library may carry 2 or 3.
        if let Some(h) = headers.iter().find(|h| !(2..=5).contains(&h.1.version())) {
            return Err(TypesError::Version { path: path.to_owned(), version: h.1.version() });
        }
        let next = AtomicUsize::new(0);
        let done = Mutex::new(Vec::with_capacity(headers.len()));
        let failed = Mutex::new(None);
        let work = || {
            let mut mine = Vec::new();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(&(in_sup, header)) = headers.get(i) else {
                    break;
                };
                let source = match (in_sup, dwarf.sup()) {
                    (true, Some(sup)) => sup,
                    _ => dwarf,
                };
                let read = source.unit(header).and_then(|u| {
                    let raw = read_unit(source, &u, in_sup)?;
                    Ok((u, raw))
                });
                match read {
                    Ok((u, raw)) => {
                        let key = space_of(&u, in_sup) | (header.offset().0 as u64 & !SPACE_MASK);
                        mine.push((key, u, raw));
                    }
                    Err(e) => {
                        let at =
                            format!("the unit at {:#x} of {}", header.offset().0, header.section().name());
                        *failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
                            Some(damaged(&at, e));
                        break;
                    }
                }
            }
            done.lock().unwrap_or_else(std::sync::PoisonError::into_inner).append(&mut mine);
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        if threads == 1 || headers.len() < 4 {
            work();
        } else {
            std::thread::scope(|s| {
                for _ in 0..threads {
                    s.spawn(work);
                }
            });
        }
        if let Some(e) = failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            return Err(e);
        }
        let mut all = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.sort_by_key(|u| u.0);
        if let Some(dwo) = all.iter().find_map(|u| u.2.dwo) {
            return Err(TypesError::Split {
                path: path.to_owned(),
                dwo: String::from_utf8_lossy(dwo).into_owned(),
            });
        }
        Ok(Self { dwarf, all })
    }

    /// The unit that holds an entry.
    fn unit_of(&self, die: u64) -> Option<usize> {
        let n = self.all.partition_point(|u| u.0 <= die).checked_sub(1)?;
        (self.all[n].0 & SPACE_MASK == die & SPACE_MASK).then_some(n)
    }

    /// Follows DW_AT_abstract_origin and DW_AT_specification.
    fn origin(&self, r: Option<Ref>) -> Origin<'a> {
        let mut out = Origin { unit: usize::MAX, ..Origin::default() };
        let mut next = r;
        for _ in 0..8 {
            let Some(Ref::Die(die)) = next else { break };
            let Some(n) = self.unit_of(die) else { break };
            let Some(a) = attrs_at(self.dwarf, &self.all[n].1, die) else {
                break;
            };
            out.name = out.name.or(a.name);
            out.ty = out.ty.or(a.ty);
            out.external |= a.external;
            out.file = out.file.or(a.file);
            if out.line == 0 {
                out.line = a.line;
            }
            if out.unit == usize::MAX {
                out.unit = n;
            }
            next = a.origin;
        }
        out
    }

    fn join(self) -> TypeModel {
        let mut model = TypeModel::default();
        let mut names = Names::default();
        model.unit_names = self
            .all
            .iter()
            .map(|(_, u, _)| {
                let text = |s: Option<super::sections::Slice<'_>>| {
                    s.map(|s| String::from_utf8_lossy(s.slice()).into_owned()).unwrap_or_default()
                };
                names.get(unit_name(&text(u.name), &text(u.comp_dir)).as_bytes())
            })
            .collect();
        let raw: Vec<&RawUnit<'a>> = self.all.iter().map(|u| &u.2).collect();
        let types = intern(&raw, &mut names);
        let type_of = |r: Option<Ref>| types.type_of(r);

        let mut files = FileNames::default();
        let mut seen = HashSet::new();
        for (n, (_, unit, raw)) in self.all.iter().enumerate() {
            for v in &raw.vars {
                let Some(mut g) = self.variable(v, n, &model.unit_names, &mut names, &type_of) else {
                    continue;
                };
                if !seen.insert((g.0.place, g.0.name.clone())) {
                    continue;
                }
                let (file_unit, file) = g.1;
                g.0.decl_file = file.and_then(|f| {
                    let u = self.all.get(file_unit).map_or(unit, |u| &u.1);
                    files.get(self.dwarf, u, file_unit, f, &mut names)
                });
                model.globals.push(g.0);
            }
        }
        number_statics(&mut model.globals);

        let mut replaced = HashSet::new();
        for (_, _, raw) in &self.all {
            for f in raw.funcs.iter().filter(|f| !f.ranges.is_empty()) {
                if let Some(Ref::Die(d)) = f.origin {
                    replaced.insert(d);
                }
            }
        }
        for (n, (_, _, raw)) in self.all.iter().enumerate() {
            for f in raw.funcs.iter().filter(|f| !(f.ranges.is_empty() && replaced.contains(&f.die))) {
                if let Some(f) = self.function(f, n, &model.unit_names, &mut names) {
                    model.functions.push(f);
                }
            }
        }
        types.finish(&mut model);
        for v in &mut model.globals {
            v.size = model.sizes.get(v.ty.0 as usize).copied().unwrap_or(0);
        }
        model
    }

    fn variable(
        &self,
        v: &RawVar<'a>,
        n: usize,
        unit_names: &[Name],
        names: &mut Names,
        type_of: &dyn Fn(Option<Ref>) -> super::TypeId,
    ) -> Option<(Variable, (usize, Option<u64>))> {
        let o = self.origin(v.origin);
        let name = v.name.or(o.name)?;
        // Link-time optimisation puts code in nameless units and points back at the unit it came from.
        let home = if o.unit == usize::MAX { n } else { o.unit };
        let function = v.scope.and_then(|s| {
            let name = s.name.or_else(|| self.origin(s.origin).name)?;
            Some(names.get(name))
        });
        let (file_unit, file) = match v.file {
            Some(f) => (n, Some(f)),
            None => (home, o.file),
        };
        let var = Variable {
            name: names.get(name),
            unit: unit_names[home].clone(),
            function,
            ordinal: 0,
            ty: type_of(v.ty.or(o.ty)),
            place: v.place,
            size: 0,
            external: v.external || o.external,
            decl_file: None,
            line: if v.line > 0 { v.line } else { o.line },
        };
        Some((var, (file_unit, file)))
    }

    fn function(
        &self,
        f: &RawFunc<'a>,
        n: usize,
        unit_names: &[Name],
        names: &mut Names,
    ) -> Option<Function> {
        let o = self.origin(f.origin);
        let home = if o.unit == usize::MAX { n } else { o.unit };
        Some(Function {
            name: names.get(f.name.or(o.name)?),
            unit: unit_names[home].clone(),
            ranges: f.ranges.clone(),
            external: f.external || o.external,
            line: if f.line > 0 { f.line } else { o.line },
            die: f.die,
        })
    }
}

/// Same name in the same function: counted by line.
fn number_statics(globals: &mut [Variable]) {
    let mut groups: HashMap<(Name, Name, Name), Vec<usize>> = HashMap::new();
    for (i, v) in globals.iter().enumerate() {
        if let Some(f) = &v.function {
            groups.entry((v.unit.clone(), f.clone(), v.name.clone())).or_default().push(i);
        }
    }
    for g in groups.values_mut().filter(|g| g.len() > 1) {
        g.sort_by_key(|&i| (globals[i].line, globals[i].place));
        for (n, &i) in g.iter().enumerate() {
            globals[i].ordinal = n as u32;
        }
    }
}

/// Attributes of one entry.
pub(super) fn attrs_at<'a>(dwarf: &Dwarf<'a>, unit: &Unit<'a>, die: u64) -> Option<Attrs<'a>> {
    let in_sup = die & SPACE_MASK == SPACE_SUP;
    let offset = (die & !SPACE_MASK).checked_sub(unit.header.offset().0 as u64)?;
    let offset = gimli::UnitOffset(usize::try_from(offset).ok()?);
    if !offset.is_in_bounds(&unit.header) {
        return None;
    }
    let entry = unit.entry(offset).ok()?;
    let source = match (in_sup, dwarf.sup()) {
        (true, Some(sup)) => sup,
        _ => dwarf,
    };
    let mut a = Attrs::default();
    for attr in entry.attrs() {
        a.take(source, unit, die & SPACE_MASK, attr);
    }
    Some(a)
}

/// The unit that holds an entry, parsed anew.
pub(super) fn unit_at<'a>(dwarf: &Dwarf<'a>, die: u64) -> Option<Unit<'a>> {
    let at = die & !SPACE_MASK;
    let holds = |h: &Header<'a>| {
        let start = h.offset().0 as u64;
        start <= at && at - start < h.length_including_self() as u64
    };
    let source = match (die & SPACE_MASK, dwarf.sup()) {
        (SPACE_SUP, Some(sup)) => sup,
        _ => dwarf,
    };
    if die & SPACE_MASK == SPACE_TYPES {
        let mut it = source.type_units();
        while let Ok(Some(h)) = it.next() {
            if holds(&h) {
                return source.unit(h).ok();
            }
        }
        return None;
    }
    let mut it = source.units();
    while let Ok(Some(h)) = it.next() {
        if holds(&h) {
            return source.unit(h).ok();
        }
    }
    None
}

/// Interned names.
#[derive(Default)]
pub(super) struct Names {
    known: HashMap<Vec<u8>, Name>,
}

impl Names {
    pub(super) fn get(&mut self, bytes: &[u8]) -> Name {
        if let Some(n) = self.known.get(bytes) {
            return n.clone();
        }
        let n: Name = String::from_utf8_lossy(bytes).into();
        self.known.insert(bytes.to_vec(), n.clone());
        n
    }
}

/// DW_AT_decl_file → path, by unit and number.
#[derive(Default)]
struct FileNames {
    known: HashMap<(usize, u64), Option<Name>>,
}

impl FileNames {
    fn get(
        &mut self,
        dwarf: &Dwarf<'_>,
        unit: &Unit<'_>,
        n: usize,
        file: u64,
        names: &mut Names,
    ) -> Option<Name> {
        if let Some(known) = self.known.get(&(n, file)) {
            return known.clone();
        }
        let path = (|| {
            let program = unit.line_program.as_ref()?.header();
            let entry = program.file(file)?;
            let text =
                |v| dwarf.attr_string(unit, v).ok().map(|s| String::from_utf8_lossy(s.slice()).into_owned());
            let name = text(entry.path_name())?;
            let dir = entry.directory(program).and_then(text).filter(|_| !name.starts_with('/'));
            let full = match dir.filter(|d| !d.is_empty()) {
                Some(d) => format!("{d}/{name}"),
                None => name,
            };
            let comp =
                unit.comp_dir.map(|c| String::from_utf8_lossy(c.slice()).into_owned()).unwrap_or_default();
            Some(names.get(unit_name(&full, &comp).as_bytes()))
        })();
        self.known.insert((n, file), path.clone());
        path
    }
}
