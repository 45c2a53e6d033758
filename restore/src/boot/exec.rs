//! execve(2) from outside: the old program, its libraries and thread stacks leave the host, the new program
//! and the dynamic linker are mapped, and everything that execve resets is reset. The heap, other anonymous
//! and shared memory and the old program's read-only data stay where they are.

use super::BootSpec;
use super::error::{BootError, Result};
use super::host::{AGENT_LEN, Host, SCRATCH_LEN};
use super::load::{self, LoadMap};
use super::ptrace;
use super::stack::{self, InitialStack, StackSpec};
use crate::link::Span;
use mcr_image::elf::ElfFile;
use mcr_image::{Addr, Memory, ModuleMap, Pid, Regs, Tid, proto};
use nix::errno::Errno;
use std::path::Path;
use std::sync::Arc;

const PAGE: u64 = 4096;
const RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
const ANON: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
const FIXED: u64 = ANON | libc::MAP_FIXED as u64;
const NOREPLACE: u64 = libc::MAP_FIXED_NOREPLACE as u64;
const NO_FD: u64 = u64::MAX;

/// What becomes of a mapping of the old process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Stays as it is.
    Keep,
    /// Read-only data of the old program: becomes anonymous memory with the same content.
    CopyReadOnly,
    /// Goes.
    Unmap,
    /// A library: goes, its place is kept free for the same library.
    Reserve,
    /// The main thread's stack: emptied and used again.
    Stack,
    /// vdso and friends.
    Kernel,
}

/// Decides for every mapping of the old process, cut by [`ModuleMap::cut`].
#[must_use]
pub fn fates(
    vmas: &[proto::Vma],
    old: &proto::Process,
    modules: &ModuleMap,
    memory: &dyn Memory,
) -> Vec<Fate> {
    let stacks: Vec<Span> = super::old_threads(memory, old).into_iter().filter_map(|t| t.block).collect();
    let start_stack = old.mm.as_ref().map_or(0, |m| m.start_stack);
    vmas.iter()
        .map(|m| {
            if matches!(m.name.as_str(), "[vdso]" | "[vvar]" | "[vvar_vclock]" | "[vsyscall]") {
                return Fate::Kernel;
            }
            if m.name == "[stack]" || (m.start <= start_stack && start_stack < m.end) {
                return Fate::Stack;
            }
            if let Some(module) = modules.find(Addr(m.start)) {
                if module.is_exe() {
                    let link = module.link(Addr(m.start));
                    let data = module.elf.segments().iter().any(|s| {
                        s.flags & 3 == 0 && link.0 < s.end().0 && link.0 + (m.end - m.start) > s.vaddr.0
                    });
                    let plain = m.prot == libc::PROT_READ as u32 && m.ino != 0;
                    return if data && plain { Fate::CopyReadOnly } else { Fate::Unmap };
                }
                return Fate::Reserve;
            }
            if stacks.iter().any(|s| s.start.0 <= m.start && m.end <= s.end.0) {
                return Fate::Unmap;
            }
            Fate::Keep
        })
        .collect()
}

/// The memory block of a pthread, found in its own descriptor: `stackblock`, `stackblock_size` and
/// `guardsize` lie next to each other in struct pthread, at an offset that depends on glibc's version.
pub(super) fn pthread_block(mem: &dyn Memory, fs_base: Addr, rsp: Addr) -> Option<Span> {
    let words: Vec<u64> = mem
        .bytes(fs_base, 0x900)
        .ok()?
        .chunks_exact(8)
        .map(|c| c.try_into().map(u64::from_le_bytes).unwrap_or(0))
        .collect();
    let mut found = words.windows(3).filter_map(|w| {
        let (block, size, guard) = (w[0], w[1], w[2]);
        let end = block.checked_add(size)?;
        let right = block % PAGE == 0
            && size % PAGE == 0
            && block != 0
            && guard % PAGE == 0
            && guard < size
            && block + guard <= rsp.0
            && rsp.0 < end
            && fs_base.0 < end
            && end - fs_base.0 < 4 * PAGE;
        right.then_some(Span::new(Addr(block), Addr(end)))
    });
    let first = found.next()?;
    found.all(|s| s == first).then_some(first)
}

/// The result of [`userland_exec`].
pub(super) struct Loaded {
    pub new_base: Addr,
    /// Ranges of old memory that stay.
    pub retained: Vec<Span>,
    /// Old library ranges kept free, with the library's file (dev, ino) and name.
    pub reserved: Vec<Span>,
    pub stack: Span,
    /// The stack pointer that the program started with: argc lies there, the vectors above it.
    pub entry_stack: Addr,
    /// What was given to PR_SET_MM_MAP.
    pub mm: MmMap,
    /// Where the start-up's own mappings go: away from where old's next ones will be.
    pub area: Addr,
    pub findings: Vec<proto::Finding>,
}

struct Exec<'a, 'b> {
    host: &'a mut Host,
    tid: Tid,
    spec: &'a BootSpec<'b>,
    findings: Vec<proto::Finding>,
}

/// Makes the host the new program, standing at the dynamic linker's first instruction.
pub(super) fn userland_exec(host: &mut Host, spec: &BootSpec<'_>) -> Result<Loaded> {
    let tid = Tid(host.pid.0);
    let mut e = Exec { host, tid, spec, findings: Vec::new() };
    e.run()
}

impl Exec<'_, '_> {
    fn call(&self, what: &str, nr: i64, args: &[u64]) -> Result<u64> {
        self.host.call(self.tid, what, nr, args)
    }

    fn run(&mut self) -> Result<Loaded> {
        let interp = self.check_files()?;
        let maps = self.host.maps()?;
        // Signals stay out until the new program runs.
        ptrace::set_sigmask(self.tid, u64::MAX)?;

        let mut taken: Vec<(Addr, Addr)> = maps.iter().map(|m| (m.start, m.end)).collect();
        taken.extend(self.spec.reserve.iter().map(|s| (s.start, s.end)));
        let bias = load::fresh_bias(self.spec.new.load_range(), &taken).ok_or_else(|| BootError::Unsupported {
            what: "there is no free gigabyte of address space for the new program between 0x550000000000 and 0x580000000000".into(),
            next_step: "restart the server once instead of updating it".into(),
        })?;
        self.map_scratch(Addr(bias.0 - (512 << 20)))?;

        // A whole descriptor table for itself, with 0, 1 and 2 only: new finds its natural numbers.
        self.call("close_range", libc::SYS_close_range, &[3, u64::from(u32::MAX), 0])?;
        self.reset()?;

        let vmas: Vec<proto::Vma> = maps.iter().map(super::host::to_vma).collect();
        let vmas = self.spec.old_modules.cut(&vmas);
        let fates = fates(&vmas, self.spec.old, self.spec.old_modules, &self.host.mem);
        let (retained, reserved) = self.clear(&vmas, &fates)?;
        for s in &self.spec.reserve {
            self.map("memory for moved objects", s.start, s.len(), RW, ANON | NOREPLACE, NO_FD, 0)?;
        }
        let stack = vmas
            .iter()
            .zip(&fates)
            .filter(|(_, f)| **f == Fate::Stack)
            .map(|(v, _)| Span::new(Addr(v.start), Addr(v.end)))
            .next_back()
            .ok_or_else(|| BootError::Unsupported {
                what: "the old process has no stack mapping".into(),
                next_step: "restart the server once instead of updating it".into(),
            })?;

        let interp_bias = self.spec.old_modules.interp().map(|m| m.bias).unwrap_or_default();
        let new = Arc::clone(&self.spec.new);
        let exe_fd = self.open(&self.spec.new_path)?;
        self.load(&new, bias, exe_fd, NOREPLACE)?;
        let interp_fd = self.open(interp.path())?;
        self.load(&interp, interp_bias, interp_fd, libc::MAP_FIXED as u64)?;
        self.call("close", libc::SYS_close, &[interp_fd])?;

        let initial = self.build_stack(stack, bias, interp_bias)?;
        let mm = self.set_mm(&initial, bias, exe_fd)?;
        self.call("close", libc::SYS_close, &[exe_fd])?;
        let name = self.spec.new_path.file_name().map(|n| n.as_encoded_bytes().to_vec()).unwrap_or_default();
        let at = self.host.stage(0, &[&name[..name.len().min(15)], &[0]].concat())?;
        self.call("prctl(PR_SET_NAME)", libc::SYS_prctl, &[libc::PR_SET_NAME as u64, at])?;

        let regs = Regs {
            rip: interp.entry().at(interp_bias).0,
            rsp: initial.rsp.0,
            eflags: 0x202,
            cs: 0x33,
            ss: 0x2b,
            orig_rax: u64::MAX,
            ..Regs::default()
        };
        ptrace::reset_xstate(self.tid)?;
        ptrace::set_regs(self.tid, &regs)?;
        ptrace::set_sigmask(self.tid, 0)?;
        Ok(Loaded {
            new_base: bias,
            retained,
            reserved,
            stack,
            entry_stack: initial.rsp,
            mm,
            area: load::own_area(self.spec.new.load_range(), bias),
            findings: std::mem::take(&mut self.findings),
        })
    }

    /// The dynamic linker must be the one that old has.
    fn check_files(&self) -> Result<ElfFile> {
        let unsupported =
            |what: String, next_step: &str| BootError::Unsupported { what, next_step: next_step.into() };
        if self.spec.old_modules.exe().is_none() {
            return Err(unsupported(
                "the old program's mappings were not recognised".into(),
                "keep the old binary (or its debug file) readable under its build-id",
            ));
        }
        let Some(path) = self.spec.new.interp() else {
            return Err(unsupported(
                format!("{} is statically linked", self.spec.new_path.display()),
                "build it as a dynamically linked position-independent program",
            ));
        };
        let interp = ElfFile::open(Path::new(path)).map_err(|e| {
            unsupported(format!("dynamic linker of the new program: {e}"), "install its C library")
        })?;
        let Some(old) = self.spec.old_modules.interp() else {
            return Err(unsupported(
                "the old process has no dynamic linker mapped".into(),
                "only dynamically linked programs are supported",
            ));
        };
        if old.build_id() != interp.build_id() {
            return Err(BootError::LibraryChanged {
                path: path.to_owned(),
                old: old.elf.build_id_hex(),
                new: interp.build_id_hex(),
            });
        }
        Ok(interp)
    }

    #[allow(clippy::too_many_arguments)]
    fn map(&self, what: &str, at: Addr, len: u64, prot: u64, flags: u64, fd: u64, offset: u64) -> Result<()> {
        let r = self.call(what, libc::SYS_mmap, &[at.0, len, prot, flags, fd, offset])?;
        if r == at.0 {
            Ok(())
        } else {
            Err(BootError::step(format!("{what} at {at}"), nix::errno::Errno::EEXIST))
        }
    }

    fn map_scratch(&mut self, at: Addr) -> Result<()> {
        self.map("memory for call arguments", at, SCRATCH_LEN, RW, ANON | NOREPLACE, NO_FD, 0)?;
        let rx = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        let code = at.add(SCRATCH_LEN);
        self.map("memory for the agent", code, AGENT_LEN, rx, ANON | NOREPLACE, NO_FD, 0)?;
        self.host.mem.write(code, crate::rebuild::remote::AGENT)?;
        self.host.scratch = at;
        Ok(())
    }

    /// What execve(2) resets and fork(2) does not.
    fn reset(&self) -> Result<()> {
        let (addr, size, signature) = ptrace::rseq(self.tid)?;
        if addr != 0 {
            self.call("rseq", libc::SYS_rseq, &[addr, size.into(), 1, signature.into()])?;
        }
        self.call("set_robust_list", libc::SYS_set_robust_list, &[0, 24])?;
        self.call("set_tid_address", libc::SYS_set_tid_address, &[0])?;
        // stack_t { sp, flags, size }
        let disable = [0u64.to_le_bytes(), 2u64.to_le_bytes(), 0u64.to_le_bytes()].concat();
        let at = self.host.stage(0, &disable)?;
        self.call("sigaltstack", libc::SYS_sigaltstack, &[at, 0])?;
        // struct kernel_sigaction of zeros is SIG_DFL; ignored signals stay ignored.
        let at = self.host.stage(0, &[0; 32])?;
        for a in self.spec.old.sigactions.iter().filter(|a| a.handler > 1) {
            self.call("rt_sigaction", libc::SYS_rt_sigaction, &[a.signo.into(), at, 0, 8])?;
        }
        for which in 0..3 {
            self.call("setitimer", libc::SYS_setitimer, &[which, at, 0])?;
        }
        Ok(())
    }

    /// Takes the old program out. Returns what stays and what is kept free.
    fn clear(&self, vmas: &[proto::Vma], fates: &[Fate]) -> Result<(Vec<Span>, Vec<Span>)> {
        let (mut retained, mut reserved) = (Vec::new(), Vec::new());
        for (v, fate) in vmas.iter().zip(fates) {
            let (start, len) = (Addr(v.start), v.end - v.start);
            let span = Span::new(start, Addr(v.end));
            match fate {
                Fate::Keep => retained.push(span),
                Fate::Kernel => {}
                Fate::Unmap => {
                    self.call("munmap", libc::SYS_munmap, &[start.0, len])?;
                }
                Fate::Reserve => {
                    let flags = FIXED | libc::MAP_NORESERVE as u64;
                    self.map("reserving a library's place", start, len, 0, flags, NO_FD, 0)?;
                    reserved.push(span);
                }
                Fate::CopyReadOnly => {
                    let content = self.host.mem.bytes(start, len as usize)?;
                    self.map("copy of the old program's constants", start, len, RW, FIXED, NO_FD, 0)?;
                    self.host.mem.write(start, &content)?;
                    self.call("mprotect", libc::SYS_mprotect, &[start.0, len, libc::PROT_READ as u64])?;
                    retained.push(span);
                }
                Fate::Stack => {
                    self.call("madvise", libc::SYS_madvise, &[start.0, len, libc::MADV_DONTNEED as u64])?;
                }
            }
        }
        Ok((retained, reserved))
    }

    /// Opens a file inside the host, with the host's view of the file system.
    fn open(&self, path: &Path) -> Result<u64> {
        let at = self.host.stage(0, &[path.as_os_str().as_encoded_bytes(), &[0]].concat())?;
        let flags = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;
        let r = self.host.call_raw(
            self.tid,
            "openat",
            libc::SYS_openat,
            &[libc::AT_FDCWD as u64, at, flags, 0],
        )?;
        u64::try_from(r).map_err(|_| BootError::Unsupported {
            what: format!(
                "the process cannot open {}: {}",
                path.display(),
                Errno::from_raw(-r as i32).desc()
            ),
            next_step: "make the new binary readable for the server's user, at a path that exists in its root directory"
                .into(),
        })
    }

    fn load(&self, elf: &ElfFile, bias: Addr, fd: u64, how: u64) -> Result<()> {
        let path = elf.path().display().to_string();
        for LoadMap { start, len, prot, offset, zero_from } in load::plan(elf.segments(), bias) {
            let what = format!("mapping {path}");
            match offset {
                Some(o) => self.map(&what, start, len, prot.into(), libc::MAP_PRIVATE as u64 | how, fd, o)?,
                None => self.map(&what, start, len, prot.into(), ANON | how, NO_FD, 0)?,
            }
            if let Some(from) = zero_from {
                self.host.mem.write(from, &vec![0; (start.0 + len - from.0) as usize])?;
            }
        }
        Ok(())
    }

    fn build_stack(&self, stack: Span, bias: Addr, interp_bias: Addr) -> Result<InitialStack> {
        let raw = self.spec.old.mm.as_ref().map(|m| m.auxv.as_slice()).unwrap_or_default();
        let mut auxv = stack::parse_auxv(raw);
        let random = auxv.iter().find(|e| e.0 == stack::AT_RANDOM).map(|e| Addr(e.1));
        let mut bytes = [0u8; 16];
        match (self.spec.random, random) {
            (Some(r), _) => bytes = r,
            (None, Some(a)) => self.host.mem.read(a, &mut bytes)?,
            (None, None) => {}
        }
        let new = &self.spec.new;
        let phdr = new.program_header_addr().map_or(0, |a| a.at(bias).0);
        let vdso = self.host.maps()?.into_iter().find(|m| m.name == b"[vdso]").map_or(0, |m| m.start.0);
        for (key, value) in [
            (stack::AT_PHDR, phdr),
            (stack::AT_PHENT, 56),
            (stack::AT_PHNUM, new.program_headers().len() as u64),
            (stack::AT_BASE, interp_bias.0),
            (stack::AT_ENTRY, new.entry().at(bias).0),
            (stack::AT_SYSINFO_EHDR, vdso),
        ] {
            match auxv.iter_mut().find(|e| e.0 == key) {
                Some(e) => e.1 = value,
                None => auxv.push((key, value)),
            }
        }
        let initial = InitialStack::build(StackSpec {
            top: stack.end,
            argv: &self.spec.argv,
            envp: &self.spec.envp,
            execfn: self.spec.new_path.as_os_str().as_encoded_bytes(),
            random: bytes,
            auxv,
        });
        if initial.rsp.0 < stack.start.0 + 64 * 1024 {
            return Err(BootError::Unsupported {
                what: format!(
                    "arguments and environment ({} bytes) do not fit into the stack of the old process",
                    initial.bytes.len()
                ),
                next_step: "shorten the environment by unset_env in the rules file".into(),
            });
        }
        self.host.mem.write(initial.rsp, &initial.bytes)?;
        Ok(initial)
    }

    /// /proc/PID/exe, cmdline, environ, auxv. The break stays old's.
    fn set_mm(&mut self, s: &InitialStack, bias: Addr, exe_fd: u64) -> Result<MmMap> {
        let old = self.spec.old.mm.clone().unwrap_or_default();
        let segments = self.spec.new.segments();
        let code = segments.iter().filter(|x| x.flags & 1 != 0);
        let start_code = code.clone().map(|x| x.vaddr.at(bias).0).min().unwrap_or(bias.0);
        let end_code = code.map(|x| x.vaddr.at(bias).0 + x.file_size).max().unwrap_or(bias.0 + PAGE);
        let last = segments.last();
        let mm = MmMap {
            code: [start_code, end_code],
            data: last.map_or([end_code; 2], |x| [x.vaddr.at(bias).0, x.vaddr.at(bias).0 + x.file_size]),
            brk: [old.start_brk, old.brk],
            stack: [s.rsp.0, s.arg_start.0, s.arg_end.0, s.env_start.0, s.env_end.0],
            auxv: s.auxv.clone(),
        };
        let aux_at = self.host.stage(1024, &mm.auxv)?;
        let set = |fd: u64| -> Result<i64> {
            let b = mm.encode(Addr(aux_at), fd as u32);
            let at = self.host.stage(0, &b)?;
            let args = [libc::PR_SET_MM as u64, libc::PR_SET_MM_MAP as u64, at, b.len() as u64, 0];
            self.host.call_raw(self.tid, "prctl(PR_SET_MM_MAP)", libc::SYS_prctl, &args)
        };
        let r = set(exe_fd)?;
        if r < 0 {
            let e = Errno::from_raw(-r as i32);
            let again = set(u64::from(u32::MAX))?;
            if again < 0 {
                return Err(BootError::step("prctl(PR_SET_MM_MAP)", Errno::from_raw(-again as i32)));
            }
            self.findings.extend(exe_link(self.host.pid, &self.spec.new_path, e));
        }
        Ok(mm)
    }
}

/// What it means that the kernel did not change the link to the program (prctl(2), PR_SET_MM_EXE_FILE; kernel/sys.c,
/// prctl_set_mm_map). Nothing where it was the same program before.
pub(crate) fn exe_link(pid: Pid, program: &Path, e: Errno) -> Option<proto::Finding> {
    let link = std::fs::read_link(format!("/proc/{pid}/exe"));
    if link.is_ok_and(|l| l == program) {
        return None;
    }
    let next_step = match e {
        Errno::EBUSY => {
            "nothing is wrong with the server, but tools that look at the link are misled: memory that came \
            from the old program's file stays in use"
        }
        _ => {
            "nothing is wrong with the server, but tools that look at the link are misled; only a server that has \
            CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN itself can change it"
        }
    };
    let message = format!("/proc/PID/exe still names the old program ({e})");
    Some(super::host::finding("exe-link", proto::Severity::Warning, message, next_step))
}

/// What PR_SET_MM_MAP is told about a program (prctl(2), struct prctl_mm_map).
#[derive(Clone, Debug, Default)]
pub struct MmMap {
    /// start_code, end_code.
    pub code: [u64; 2],
    /// start_data, end_data.
    pub data: [u64; 2],
    /// start_brk, brk.
    pub brk: [u64; 2],
    /// start_stack, arg_start, arg_end, env_start, env_end.
    pub stack: [u64; 5],
    /// The auxiliary vector.
    pub auxv: Vec<u8>,
}

impl MmMap {
    /// struct prctl_mm_map with the auxiliary vector at `auxv`; `exe_fd` -1: the link stays.
    #[must_use]
    pub fn encode(&self, auxv: Addr, exe_fd: u32) -> Vec<u8> {
        let words = [&self.code[..], &self.data, &self.brk, &self.stack, &[auxv.0]].concat();
        let mut b: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        b.extend_from_slice(&(self.auxv.len() as u32).to_le_bytes());
        b.extend_from_slice(&exe_fd.to_le_bytes());
        b
    }
}
