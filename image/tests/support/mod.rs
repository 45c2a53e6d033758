//! A compiled program under ptrace, for the tests.
#![allow(dead_code)]

use mcr_image::{Addr, ElfFile, Memory, MemoryError, ModuleMap, Region, Regs, proto};
use nix::sys::{ptrace, wait};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

/// Compiles a program of `tests/programs`.
pub fn compile(dir: &Path, source: &str, flags: &[&str]) -> PathBuf {
    let out = dir.join(source.trim_end_matches(".c"));
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(source);
    let run = Command::new("gcc").args(["-g", "-pthread"]).args(flags).arg("-o").arg(&out).arg(from).output();
    let run = run.expect("gcc is needed");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    out
}

/// A child that is killed at the end of the test.
pub struct Target {
    pub child: Child,
    pub line: String,
    attached: bool,
}

pub struct ProcMem(std::fs::File);

impl Memory for ProcMem {
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let r = self.0.read_exact_at(buf, addr.0);
        r.map_err(|source| MemoryError::Io { addr, len: buf.len(), source })
    }
    fn regions(&self) -> Vec<Region> {
        Vec::new()
    }
}

impl Target {
    /// Starts the program and waits for its first line.
    pub fn start(program: &Path, args: &[&str]) -> Self {
        let mut child = Command::new(program).args(args).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        Self { child, line, attached: false }
    }
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }
    pub fn tids(&self) -> Vec<i32> {
        let dir = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let mut v: Vec<i32> =
            dir.map(|e| e.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
        v.sort_unstable();
        v
    }
    /// Waits until every thread sleeps in a call.
    pub fn settle(&self) {
        let asleep = |tid: i32| {
            let s = std::fs::read_to_string(format!("/proc/{}/task/{tid}/stat", self.pid())).unwrap();
            s.rsplit(") ").next().unwrap().starts_with('S')
        };
        while !self.tids().into_iter().all(asleep) {
            std::thread::yield_now();
        }
    }
    /// Attaches to all threads.
    pub fn attach(&mut self) {
        self.settle();
        for t in self.tids() {
            ptrace::attach(Pid::from_raw(t)).unwrap();
            wait::waitpid(Pid::from_raw(t), Some(wait::WaitPidFlag::__WALL)).unwrap();
        }
        self.attached = true;
    }
    pub fn detach(&mut self) {
        for t in self.tids() {
            ptrace::detach(Pid::from_raw(t), None).unwrap();
        }
        self.attached = false;
    }
    pub fn regs(&self, tid: i32) -> Regs {
        let r = ptrace::getregs(Pid::from_raw(tid)).unwrap();
        Regs {
            r15: r.r15,
            r14: r.r14,
            r13: r.r13,
            r12: r.r12,
            rbp: r.rbp,
            rbx: r.rbx,
            r11: r.r11,
            r10: r.r10,
            r9: r.r9,
            r8: r.r8,
            rax: r.rax,
            rcx: r.rcx,
            rdx: r.rdx,
            rsi: r.rsi,
            rdi: r.rdi,
            orig_rax: r.orig_rax,
            rip: r.rip,
            cs: r.cs,
            eflags: r.eflags,
            rsp: r.rsp,
            ss: r.ss,
            fs_base: r.fs_base,
            gs_base: r.gs_base,
            ds: r.ds,
            es: r.es,
            fs: r.fs,
            gs: r.gs,
        }
    }
    pub fn memory(&self) -> ProcMem {
        ProcMem(std::fs::File::open(format!("/proc/{}/mem", self.pid())).unwrap())
    }
    pub fn auxv(&self) -> Vec<u8> {
        std::fs::read(format!("/proc/{}/auxv", self.pid())).unwrap()
    }
    pub fn vmas(&self) -> Vec<proto::Vma> {
        let mut text = String::new();
        std::fs::File::open(format!("/proc/{}/maps", self.pid())).unwrap().read_to_string(&mut text).unwrap();
        text.lines().map(vma).collect()
    }
    pub fn modules(&self) -> ModuleMap {
        ModuleMap::read(&self.vmas(), &self.auxv(), &self.memory(), |v| {
            ElfFile::open(&v.name).ok().map(Arc::new)
        })
    }
}

fn vma(line: &str) -> proto::Vma {
    let f: Vec<&str> = line.split_whitespace().collect();
    let (start, end) = f[0].split_once('-').unwrap();
    let hex = |s| u64::from_str_radix(s, 16).unwrap();
    let p = f[1].as_bytes();
    let prot = u32::from(p[0] == b'r') | u32::from(p[1] == b'w') << 1 | u32::from(p[2] == b'x') << 2;
    let (major, minor) = f[3].split_once(':').unwrap();
    let name = f.get(5).copied().unwrap_or("").to_owned();
    let mut v = proto::Vma {
        start: hex(start),
        end: hex(end),
        prot,
        file_offset: hex(f[2]),
        dev: hex(major) << 8 | hex(minor),
        ino: f[4].parse().unwrap(),
        ..Default::default()
    };
    v.set_kind(match name.as_str() {
        "[vdso]" => proto::VmaKind::VmaVdso,
        n if n.starts_with('/') => proto::VmaKind::VmaFilePrivate,
        _ => proto::VmaKind::VmaAnonPrivate,
    });
    v.name = name;
    v
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        if self.attached {
            // The leader's end shows only after every other traced thread was reaped.
            for t in self.tids().into_iter().rev() {
                let _ = wait::waitpid(Pid::from_raw(t), Some(wait::WaitPidFlag::__WALL));
            }
        }
        let _ = self.child.wait();
    }
}

/// A stack of small numbers and addresses.
struct Garbage;

impl Memory for Garbage {
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
        for (i, b) in buf.iter_mut().enumerate() {
            *b = (addr.0 as usize).wrapping_add(i) as u8 ^ 0x5a;
        }
        Ok(())
    }
    fn regions(&self) -> Vec<Region> {
        Vec::new()
    }
}

/// Unwinds from places all over a file.
pub fn unwind_offline(file: ElfFile) {
    let file = Arc::new(file);
    let bias = 0x5555_5555_4000;
    let vmas: Vec<proto::Vma> = file
        .segments()
        .iter()
        .map(|s| {
            let start = (s.vaddr.0 & !4095) + bias;
            let mut v = proto::Vma {
                start,
                end: start + s.mem_size.min(1 << 30) + 4096,
                prot: s.prot(),
                file_offset: s.file_offset & !4095,
                name: "/x".into(),
                ..Default::default()
            };
            v.set_kind(proto::VmaKind::VmaFilePrivate);
            v
        })
        .collect();
    let modules = ModuleMap::read(&vmas, &[], &Garbage, |_| Some(Arc::clone(&file)));
    for s in file.segments().iter().filter(|s| s.flags & 1 != 0) {
        for i in 0..200 {
            let rip = bias + s.vaddr.0 + i * (s.mem_size / 200).max(1);
            let regs = Regs { rip, rsp: 0x7fff_0000, rbp: 0x7fff_0100, ..Regs::default() };
            let _ = mcr_image::unwind(&modules, &Garbage, &regs);
        }
    }
}
