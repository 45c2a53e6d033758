//! A child process that stands still, and its memory by /proc/PID/mem.
#![allow(dead_code)]

use mcr_image::{Addr, Memory, MemoryError, Region, proto};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

pub fn compile(dir: &Path, name: &str, source: &Path, flags: &[&str]) -> PathBuf {
    let out = dir.join(name);
    let status = Command::new("gcc")
        .args(["-g", "-O1", "-fPIE", "-pie", "-pthread", "-Wl,-z,now", "-o"])
        .arg(&out)
        .arg(source)
        .args(flags)
        .status()
        .expect("gcc runs");
    assert!(status.success(), "{name} does not compile");
    out
}

/// A running program that printed "ready".
pub struct Target {
    pub child: Child,
    pub lines: Vec<String>,
    mem: std::fs::File,
}

impl Target {
    pub fn spawn(exe: &Path, args: &[&str]) -> Self {
        let mut child = Command::new(exe)
            .args(args)
            .stdout(Stdio::piped())
            .stdin(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut lines = Vec::new();
        for line in BufReader::new(child.stdout.take().expect("piped")).lines() {
            let line = line.expect("utf-8");
            if line == "ready" {
                break;
            }
            lines.push(line);
        }
        let mem = std::fs::File::open(format!("/proc/{}/mem", child.id())).expect("its memory");
        Self { child, lines, mem }
    }
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
    /// A program that does not say when it is ready.
    pub fn start(exe: &Path, args: &[&str]) -> Self {
        let child = Command::new(exe).args(args).stdout(Stdio::null()).spawn().expect("starts");
        let mem = std::fs::File::open(format!("/proc/{}/mem", child.id())).expect("its memory");
        Self { child, lines: Vec::new(), mem }
    }
    /// Stops a program that would go on by itself (a timer): plans are made of processes that stand still. Not
    /// before each thread waits for something: one that has just answered may hold a lock still.
    pub fn stop(&self) {
        use nix::sys::wait::{WaitPidFlag, waitpid};
        let pid = nix::unistd::Pid::from_raw(self.pid() as i32);
        loop {
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("it lives");
            waitpid(pid, Some(WaitPidFlag::WUNTRACED)).expect("it stops");
            if self.rests() {
                return;
            }
            self.go_on();
        }
    }
    /// Whether all threads are in calls that wait (/proc/PID/task/TID/syscall: number, arguments, sp, pc).
    fn rests(&self) -> bool {
        let dir = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("it lives");
        dir.flatten().all(|t| {
            let text = std::fs::read_to_string(t.path().join("syscall")).expect("it lives");
            let mut words = text.split_whitespace();
            let number = words.next().and_then(|n| n.parse().ok());
            let args: Vec<u64> = words.take(6).map(|w| hex(w.trim_start_matches("0x"))).collect();
            number
                .zip(args.try_into().ok())
                .is_some_and(|(n, args)| mcr_image::syscalls::is_resting(n, &args))
        })
    }
    /// After [`Self::stop`].
    pub fn go_on(&self) {
        let pid = nix::unistd::Pid::from_raw(self.pid() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).expect("it lives");
        std::thread::yield_now();
    }
    /// The words of all lines that start with `tag`.
    pub fn tagged(&self, tag: &str) -> Vec<Vec<String>> {
        let split = |l: &String| l.split(' ').map(str::to_owned).collect::<Vec<_>>();
        self.lines.iter().map(split).filter(|w| w[0] == tag).map(|w| w[1..].to_vec()).collect()
    }
    pub fn vmas(&self) -> Vec<proto::Vma> {
        let text = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).expect("maps");
        text.lines().map(vma).collect()
    }
    /// Threads from "T tid fs_base" lines.
    pub fn threads(&self) -> Vec<proto::Thread> {
        self.tagged("T")
            .iter()
            .map(|w| proto::Thread { tid: w[0].parse().unwrap(), fs_base: hex(&w[1]), ..Default::default() })
            .collect()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Memory for Target {
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.mem.read_exact_at(buf, addr.0).map_err(|source| MemoryError::Io { addr, len: buf.len(), source })
    }
    fn regions(&self) -> Vec<Region> {
        self.vmas()
            .into_iter()
            .filter(|v| v.prot & 1 != 0 && !v.name.starts_with("[v"))
            .map(|v| Region { start: Addr(v.start), end: Addr(v.end), prot: v.prot, name: v.name })
            .collect()
    }
}

pub fn hex(s: &str) -> u64 {
    u64::from_str_radix(s.trim_start_matches("0x"), 16).unwrap_or_else(|_| panic!("hex: {s}"))
}

fn vma(line: &str) -> proto::Vma {
    let mut w = line.split_whitespace();
    let (start, end) = w.next().unwrap().split_once('-').unwrap();
    let perms = w.next().unwrap();
    let file_offset = hex(w.next().unwrap());
    w.next();
    let ino = w.next().unwrap().parse().unwrap();
    let name = w.next().unwrap_or("").to_owned();
    let has = |c, bit| if perms.contains(c) { bit } else { 0 };
    let kind = match (ino, perms.ends_with('s')) {
        (0, false) => proto::VmaKind::VmaAnonPrivate,
        (0, true) => proto::VmaKind::VmaAnonShared,
        (_, false) => proto::VmaKind::VmaFilePrivate,
        (_, true) => proto::VmaKind::VmaFileShared,
    };
    proto::Vma {
        start: hex(start),
        end: hex(end),
        prot: has('r', 1) | has('w', 2) | has('x', 4),
        kind: kind as i32,
        name,
        file_offset,
        ino,
        ..Default::default()
    }
}

use mcr_image::{ElfFile, ModuleMap};
use std::sync::Arc;

impl Target {
    pub fn auxv(&self) -> Vec<u8> {
        std::fs::read(format!("/proc/{}/auxv", self.pid())).expect("auxv")
    }
    pub fn modules(&self) -> ModuleMap {
        let load = |v: &proto::Vma| ElfFile::open(&v.name).ok().map(Arc::new);
        ModuleMap::read(&self.vmas(), &self.auxv(), self, load)
    }
    /// What a dump would say, as far as a transform needs it. The threads must be asleep.
    pub fn process(&self) -> proto::Process {
        let mut threads = self.threads();
        for t in &mut threads {
            t.regs = blocked_regs(self.pid(), t);
        }
        if threads.is_empty() {
            threads = find_threads(self);
        }
        proto::Process {
            pid: self.pid(),
            exe_path: format!("/proc/{}/exe", self.pid()),
            mm: Some(proto::Mm { auxv: self.auxv(), ..Default::default() }),
            threads,
            vmas: self.vmas(),
            ..Default::default()
        }
    }
}

/// rsp and rip of a sleeping thread, from /proc/PID/task/TID/syscall; the other registers are unknown.
fn blocked_regs(pid: u32, t: &proto::Thread) -> Vec<u64> {
    let path = format!("/proc/{pid}/task/{}/syscall", t.tid);
    loop {
        let text = std::fs::read_to_string(&path).expect("syscall");
        let words: Vec<&str> = text.split_whitespace().collect();
        if words.len() < 9 {
            std::thread::yield_now(); // still running towards its pause()
            continue;
        }
        let mut regs = mcr_image::Regs { rsp: hex(words[7]), rip: hex(words[8]), ..Default::default() };
        regs.fs_base = t.fs_base;
        return regs.to_words();
    }
}

/// Threads of a program that says nothing about them: `struct pthread` starts with pointers to itself, and
/// holds the tid.
pub fn find_threads(t: &Target) -> Vec<proto::Thread> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", t.pid())).expect("tasks");
    let mut tids: Vec<u32> =
        tasks.map(|e| e.unwrap().file_name().to_string_lossy().parse().unwrap()).collect();
    tids.sort_by_key(|&tid| (tid != t.pid(), tid));
    let mut found = Vec::new();
    for v in t.vmas().iter().filter(|v| v.prot & 3 == 3 && v.ino == 0 && v.end - v.start < 64 << 20) {
        let Ok(raw) = t.bytes(Addr(v.start), (v.end - v.start) as usize) else { continue };
        let word = |o: usize| u64::from_le_bytes(raw[o..o + 8].try_into().unwrap());
        for o in (0..raw.len().saturating_sub(0x300)).step_by(64) {
            let at = v.start + o as u64;
            if word(o) == at && word(o + 16) == at {
                let tid = (0x2c0..0x300).step_by(8).map(|i| word(o + i) as u32).find(|w| tids.contains(w));
                found.extend(tid.map(|tid| (tid, at)));
            }
        }
    }
    tids.iter()
        .map(|&tid| {
            let fs_base = found.iter().find(|f| f.0 == tid).expect("its struct pthread").1;
            let mut thread = proto::Thread { tid, fs_base, ..Default::default() };
            thread.regs = blocked_regs(t.pid(), &thread);
            thread
        })
        .collect()
}
