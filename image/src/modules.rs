//! Which ELF files a process has mapped, and where.

use crate::elf::ElfFile;
use crate::{Addr, LinkAddr, Memory, MemoryError, proto};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

const AT_PHDR: u64 = 3;
const AT_BASE: u64 = 7;
const AT_ENTRY: u64 = 9;
const AT_SYSINFO_EHDR: u64 = 33;

/// The value of an entry in a raw auxiliary vector.
#[must_use]
pub fn auxv_value(auxv: &[u8], key: u64) -> Option<u64> {
    let word = |c: &[u8]| c.try_into().map(u64::from_le_bytes).unwrap_or(0);
    auxv.chunks_exact(16).map(|c| (word(&c[..8]), word(&c[8..]))).find(|e| e.0 == key).map(|e| e.1)
}

/// What a module is to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The main executable.
    Exe,
    /// The dynamic loader.
    Interp,
    /// A shared library.
    Library,
    /// The kernel's code in user space.
    Vdso,
}

/// One mapped ELF file.
pub struct Module {
    /// As in /proc/PID/maps, without " (deleted)".
    pub path: String,
    /// The file is gone from its path.
    pub deleted: bool,
    /// Load bias: run-time address minus link address.
    pub bias: Addr,
    /// First page.
    pub start: Addr,
    /// One past the last page, bss included.
    pub end: Addr,
    /// What it is to the process.
    pub role: Role,
    /// The file.
    pub elf: Arc<ElfFile>,
    /// `EmbeddedFile.key`: build-id in hex, or "dev:ino" where there is none.
    pub key: String,
    /// Device number of the file.
    pub dev: u64,
    /// Inode number of the file.
    pub ino: u64,
    /// glibc's number of its thread-local block, where it has one and `read_tls` found it.
    pub tls_modid: Option<u64>,
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Module({} at {:#x}–{:#x}, {:?})", self.path, self.start.0, self.end.0, self.role)
    }
}

impl Module {
    /// The last component of the path.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }
    /// NT_GNU_BUILD_ID.
    #[must_use]
    pub fn build_id(&self) -> Option<&[u8]> {
        self.elf.build_id()
    }
    /// The main executable.
    #[must_use]
    pub fn is_exe(&self) -> bool {
        self.role == Role::Exe
    }
    /// The dynamic loader.
    #[must_use]
    pub fn is_interp(&self) -> bool {
        self.role == Role::Interp
    }
    /// Holds the address.
    #[must_use]
    pub fn contains(&self, a: Addr) -> bool {
        a >= self.start && a < self.end
    }
    /// The address in the file's own space.
    #[must_use]
    pub fn link(&self, a: Addr) -> LinkAddr {
        LinkAddr(a.0.wrapping_sub(self.bias.0))
    }
    /// The run-time address of a link address.
    #[must_use]
    pub fn addr(&self, a: LinkAddr) -> Addr {
        a.at(self.bias)
    }
    /// The run-time address of a symbol that is defined once.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<Addr> {
        self.elf.symbol(name).map(|s| self.addr(s.addr))
    }
    /// As the image records it. `mtime_ns` and `embedded` are for the caller to fill.
    #[must_use]
    pub fn to_proto(&self) -> proto::EmbeddedFile {
        proto::EmbeddedFile {
            path: self.path.clone(),
            build_id: self.build_id().unwrap_or_default().to_vec(),
            size: self.elf.bytes().len() as u64,
            dev: self.dev,
            ino: self.ino,
            key: self.key.clone(),
            base: self.bias.0,
            is_exe: self.is_exe(),
            is_interp: self.is_interp(),
            ..Default::default()
        }
    }
}

/// The ELF modules of one process, by address.
#[derive(Debug, Default, Clone)]
pub struct ModuleMap {
    modules: Vec<Arc<Module>>,
    missing: Vec<String>,
}

impl ModuleMap {
    /// Finds the modules among a process's mappings. `loader` gives the ELF file behind a mapping, or `None`
    /// for a file that is not one; it is asked once per file. The vdso has no file: see [`Self::read`].
    pub fn new(
        vmas: &[proto::Vma],
        auxv: &[u8],
        mut loader: impl FnMut(&proto::Vma) -> Option<Arc<ElfFile>>,
    ) -> Self {
        let mut files: HashMap<(u64, u64, &str), Option<Arc<ElfFile>>> = HashMap::new();
        let mut map = Self::default();
        let code = |v: &proto::Vma| v.prot & 4 != 0;
        for v in vmas {
            if v.kind() != proto::VmaKind::VmaFilePrivate || !v.name.starts_with('/') {
                continue;
            }
            if map
                .modules
                .last()
                .is_some_and(|m| m.contains(Addr(v.start)) && m.dev == v.dev && m.ino == v.ino)
            {
                continue;
            }
            let same = |o: &&proto::Vma| o.dev == v.dev && o.ino == v.ino && o.name == v.name;
            // A file with no executable mapping anywhere is data that happens to be mapped.
            let mut others = vmas.iter().filter(same);
            let Some(first_code) = others.find(|o| code(o) && o.start >= v.start) else {
                continue;
            };
            let key = (v.dev, v.ino, v.name.as_str());
            let Some(elf) = files.entry(key).or_insert_with(|| loader(v)) else {
                if !map.missing.contains(&v.name) {
                    map.missing.push(v.name.clone());
                }
                continue;
            };
            let Some(bias) = bias_of(elf, v) else {
                continue;
            };
            // The code has to be where this bias puts it.
            let placed = elf.segments().iter().filter(|s| s.flags & 1 != 0).any(|s| {
                let at = s.vaddr.at(bias).0;
                vmas.iter().any(|o| same(&o) && code(o) && o.start <= at && at < o.end)
            });
            if !placed || first_code.start < v.start {
                continue;
            }
            let key = match elf.build_id() {
                Some(_) => elf.build_id_hex(),
                None => format!("{:x}:{:x}", v.dev, v.ino),
            };
            map.push(v.name.clone(), v.deleted, bias, Arc::clone(elf), key, (v.dev, v.ino));
        }
        map.modules.sort_by_key(|m| m.start);
        map.assign_roles(auxv);
        map
    }

    /// [`Self::new`], then the vdso and the TLS module numbers, which need the process's memory.
    pub fn read(
        vmas: &[proto::Vma],
        auxv: &[u8],
        memory: &dyn Memory,
        loader: impl FnMut(&proto::Vma) -> Option<Arc<ElfFile>>,
    ) -> Self {
        let mut map = Self::new(vmas, auxv, loader);
        map.read_vdso(vmas, auxv, memory);
        // Without it only the program's own thread-locals are found.
        let _ = map.read_tls(memory);
        map
    }

    fn push(
        &mut self,
        path: String,
        deleted: bool,
        bias: Addr,
        elf: Arc<ElfFile>,
        key: String,
        id: (u64, u64),
    ) {
        let (start, end) = elf.load_range();
        let m = Module {
            path,
            deleted,
            bias,
            start: start.at(bias),
            end: end.at(bias),
            role: Role::Library,
            elf,
            key,
            dev: id.0,
            ino: id.1,
            tls_modid: None,
        };
        self.modules.push(Arc::new(m));
    }

    fn edit(&mut self, i: usize, change: impl FnOnce(&mut Module)) {
        // The map has just been made, nobody else holds its modules.
        if let Some(m) = self.modules.get_mut(i).and_then(Arc::get_mut) {
            change(m);
        }
    }

    fn assign_roles(&mut self, auxv: &[u8]) {
        let holds = |map: &Self, a: Option<u64>| {
            let a = Addr(a.filter(|&a| a != 0)?);
            map.modules.iter().position(|m| m.contains(a))
        };
        let exe = holds(self, auxv_value(auxv, AT_PHDR))
            .or_else(|| holds(self, auxv_value(auxv, AT_ENTRY)))
            .or_else(|| self.modules.iter().position(|m| m.elf.is_pie() && m.elf.interp().is_some()));
        if let Some(i) = exe {
            self.edit(i, |m| m.role = Role::Exe);
        }
        let interp_name = exe.and_then(|i| self.modules[i].elf.interp().map(str::to_owned));
        let interp = holds(self, auxv_value(auxv, AT_BASE)).filter(|&i| Some(i) != exe).or_else(|| {
            let file = interp_name.as_deref()?.rsplit('/').next()?;
            self.modules.iter().position(|m| m.name() == file || m.elf.soname().as_deref() == Some(file))
        });
        if let Some(i) = interp.filter(|&i| Some(i) != exe) {
            self.edit(i, |m| m.role = Role::Interp);
        }
    }

    /// Adds the vdso, which is a whole ELF file in memory.
    pub fn read_vdso(&mut self, vmas: &[proto::Vma], auxv: &[u8], memory: &dyn Memory) {
        let by_kind = vmas.iter().find(|v| v.kind() == proto::VmaKind::VmaVdso);
        let start = auxv_value(auxv, AT_SYSINFO_EHDR);
        let vma = by_kind.or_else(|| vmas.iter().find(|v| Some(v.start) == start));
        let Some(v) = vma.filter(|v| v.end - v.start <= 1 << 20) else {
            return;
        };
        let Ok(bytes) = memory.bytes(Addr(v.start), (v.end - v.start) as usize) else {
            return;
        };
        let Ok(elf) = ElfFile::from_bytes("[vdso]", bytes) else {
            return;
        };
        let Some(first) = elf.segments().first() else {
            return;
        };
        let bias = Addr(v.start.wrapping_sub(first.vaddr.0));
        let key = elf.build_id_hex();
        self.push("[vdso]".into(), false, bias, Arc::new(elf), key, (0, 0));
        let i = self.modules.len() - 1;
        self.edit(i, |m| m.role = Role::Vdso);
        self.modules.sort_by_key(|m| m.start);
    }

    /// Mappings, cut in two where a module ends: the kernel joins anonymous memory that touches the bss of a
    /// program or a library with it (the heap without address randomisation), and only the bss is the module's.
    #[must_use]
    pub fn cut(&self, vmas: &[proto::Vma]) -> Vec<proto::Vma> {
        let mut out = Vec::with_capacity(vmas.len());
        for v in vmas {
            let end =
                self.find(Addr(v.start)).map_or(v.end, |m| m.end.0.next_multiple_of(crate::PAGE as u64));
            if v.ino == 0 && v.kind() == proto::VmaKind::VmaAnonPrivate && v.start < end && end < v.end {
                out.push(proto::Vma { end, ..v.clone() });
                out.push(proto::Vma { start: end, ..v.clone() });
            } else {
                out.push(v.clone());
            }
        }
        out
    }

    /// All modules, ascending by address.
    #[must_use]
    pub fn modules(&self) -> &[Arc<Module>] {
        &self.modules
    }
    /// Paths of files with executable mappings whose content the loader could not give.
    #[must_use]
    pub fn missing(&self) -> &[String] {
        &self.missing
    }
    /// The module that holds an address.
    #[must_use]
    pub fn find(&self, a: Addr) -> Option<&Arc<Module>> {
        let n = self.modules.partition_point(|m| m.start <= a);
        self.modules[..n].last().filter(|m| m.contains(a))
    }
    fn with_role(&self, role: Role) -> Option<&Arc<Module>> {
        self.modules.iter().find(|m| m.role == role)
    }
    /// The main executable.
    #[must_use]
    pub fn exe(&self) -> Option<&Arc<Module>> {
        self.with_role(Role::Exe)
    }
    /// The dynamic loader.
    #[must_use]
    pub fn interp(&self) -> Option<&Arc<Module>> {
        self.with_role(Role::Interp)
    }
    /// The vdso.
    #[must_use]
    pub fn vdso(&self) -> Option<&Arc<Module>> {
        self.with_role(Role::Vdso)
    }
    /// A module by DT_SONAME or file name ("libc.so.6").
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<&Arc<Module>> {
        self.modules
            .iter()
            .find(|m| m.name() == name)
            .or_else(|| self.modules.iter().find(|m| m.elf.soname().as_deref() == Some(name)))
    }
    /// A module by build-id.
    #[must_use]
    pub fn by_build_id(&self, id: &[u8]) -> Option<&Arc<Module>> {
        self.modules.iter().find(|m| m.build_id() == Some(id))
    }
    /// The C library.
    #[must_use]
    pub fn libc(&self) -> Option<&Arc<Module>> {
        self.by_name("libc.so.6")
    }
    /// For the image's list of files (the vdso is not a file).
    #[must_use]
    pub fn to_proto(&self) -> Vec<proto::EmbeddedFile> {
        self.modules.iter().filter(|m| m.role != Role::Vdso).map(|m| m.to_proto()).collect()
    }

    /// The loader's list of modules (`r_debug` by DT_DEBUG), in load order, as (bias, address of link_map).
    pub fn link_map(&self, memory: &dyn Memory) -> Result<Vec<(Addr, Addr)>, MemoryError> {
        const DT_DEBUG: u64 = 21;
        let Some(exe) = self.exe() else {
            return Ok(Vec::new());
        };
        let Some(dynamic) = exe.elf.dynamic_addr() else {
            return Ok(Vec::new());
        };
        let mut debug = 0;
        for i in 0..exe.elf.dynamic().len() as u64 {
            let at = exe.addr(dynamic).add(i * 16);
            if memory.u64(at)? == DT_DEBUG {
                debug = memory.u64(at.add(8))?;
                break;
            }
        }
        let mut out: Vec<(Addr, Addr)> = Vec::new();
        if debug == 0 {
            return Ok(out);
        }
        // struct r_debug { int version; struct link_map *map; … }; struct link_map { l_addr, l_name, l_ld, l_next, … }
        let mut at = Addr(memory.u64(Addr(debug).add(8))?);
        while at.0 != 0 && out.len() < 4096 && out.iter().all(|o| o.1 != at) {
            out.push((Addr(memory.u64(at)?), at));
            at = Addr(memory.u64(at.add(24))?);
        }
        Ok(out)
    }

    /// Finds the TLS module numbers: `link_map.l_tls_modid`, whose offset glibc publishes for debuggers.
    /// Where that is missing, modules with a TLS segment are numbered in load order.
    pub fn read_tls(&mut self, memory: &dyn Memory) -> Result<(), MemoryError> {
        let list = self.link_map(memory)?;
        // { bits, count, offset } of the field.
        let descriptor = self.libc().and_then(|m| m.symbol("_thread_db_link_map_l_tls_modid"));
        let offset = match descriptor {
            Some(a) => Some(memory.u32(a.add(8))?).filter(|&o| o < 1 << 16),
            None => None,
        };
        let mut counted = 0;
        for (bias, link_map) in list {
            let Some(i) = self.modules.iter().position(|m| m.bias == bias && m.role != Role::Vdso) else {
                continue;
            };
            if self.modules[i].elf.tls().is_none_or(|t| t.mem_size == 0) {
                continue;
            }
            counted += 1;
            let id = match offset {
                Some(o) => memory.u64(link_map.add(o.into()))?,
                None => counted,
            };
            if id != 0 {
                self.edit(i, |m| m.tls_modid = Some(id));
            }
        }
        Ok(())
    }
}

/// The load bias, if this mapping holds the start of the file's first segment.
fn bias_of(elf: &ElfFile, v: &proto::Vma) -> Option<Addr> {
    let first = elf.segments().first()?;
    let page = first.file_offset & !4095;
    let inside = page.checked_sub(v.file_offset).filter(|d| *d < v.end - v.start)?;
    Some(Addr(v.start.wrapping_add(inside).wrapping_sub(first.vaddr.0 & !4095)))
}

/// Where a thread's block of a module's thread-local variables lies: by the thread's DTV, and for the program
/// itself, should the DTV be unreadable, by the ABI (it lies right below the thread pointer). `None` when the
/// thread has not touched them yet (allocated on first use).
#[must_use]
pub fn tls_block(memory: &dyn Memory, fs_base: Addr, module: &Module) -> Option<Addr> {
    let tls = module.elf.tls()?;
    if fs_base.0 == 0 {
        return None;
    }
    let by_dtv = || {
        let id = module.tls_modid.filter(|&id| id < 1 << 20)?;
        let dtv = Addr(memory.u64(fs_base.add(8)).ok()?);
        // dtv[-1].counter is the number of slots, dtv[id] = { pointer, pointer to free }.
        let slots = memory.u64(Addr(dtv.0.wrapping_sub(16))).ok()?;
        let block = (id <= slots).then(|| memory.u64(dtv.add(id * 16)).ok())??;
        (block != u64::MAX && block != 0).then_some(Addr(block))
    };
    by_dtv().or_else(|| module.is_exe().then(|| Addr(fs_base.0.wrapping_sub(tls.exe_offset()))))
}
