//! A core made from an image opens in gdb and shows the stack.

use mcr_image::proto::{Meta, Mm, Process, Thread, Vma, VmaKind};
use mcr_image::{Addr, Image, ImageWriter, PAGE, RecordKind, Regs, export_core, export_core_file};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const PROGRAM: &str = r#"
#include <unistd.h>
#include <stdio.h>
struct conn { int id; const char *name; } the_conn = { 42, "hello" };
static volatile char zeros[1 << 15];
__attribute__((noinline)) int wait_here(struct conn *c) { puts(c->name); fflush(stdout); pause(); return c->id + zeros[5]; }
int main(void) { return wait_here(&the_conn) + 1; }
"#;

fn have(tool: &str) -> bool {
    Command::new(tool)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

/// Ends the program also when the test fails.
struct Running(Child);
impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An image of a program blocked in pause(): /proc/PID/syscall shows its stack pointer and pc, which is all
/// that CFI needs here.
fn snapshot(pid: u32, out: &Path) {
    let proc_file = |n: &str| format!("/proc/{pid}/{n}");
    let words: Vec<String> = std::fs::read_to_string(proc_file("syscall"))
        .unwrap()
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    let hex = |s: &str| u64::from_str_radix(s.trim_start_matches("0x"), 16).unwrap();
    let regs = Regs { rsp: hex(&words[7]), rip: hex(&words[8]), cs: 0x33, ss: 0x2b, ..Default::default() };
    let mem = std::fs::File::open(proc_file("mem")).unwrap();
    let mut w = ImageWriter::create(out).unwrap();
    let mut vmas = Vec::new();
    for line in std::fs::read_to_string(proc_file("maps")).unwrap().lines() {
        let f: Vec<&str> = line.split_whitespace().collect();
        let (start, end) = f[0].split_once('-').map(|(a, b)| (hex(a), hex(b))).unwrap();
        let name = f.get(5).copied().unwrap_or("");
        let prot = f[1].bytes().take(3).zip([1, 2, 4]).map(|(c, b)| if c == b'-' { 0 } else { b }).sum();
        let kind = match name {
            "[vvar]" | "[vvar_vclock]" => VmaKind::VmaVvar,
            "[vsyscall]" => VmaKind::VmaVsyscall,
            _ if name.starts_with('/') => VmaKind::VmaFilePrivate,
            _ => VmaKind::VmaAnonPrivate,
        };
        vmas.push(Vma {
            start,
            end,
            prot,
            kind: kind as i32,
            name: name.into(),
            file_offset: hex(f[2]),
            ino: f[4].parse().unwrap(),
            ..Default::default()
        });
        let wanted = kind == VmaKind::VmaAnonPrivate || kind == VmaKind::VmaFilePrivate && prot & 4 == 0;
        if wanted && prot != 0 {
            let mut buf = vec![0; (end - start) as usize];
            mem.read_exact_at(&mut buf, start).unwrap();
            w.pages(Addr(start), &buf).unwrap();
        }
    }
    let mut xstate = vec![0; 832];
    xstate[464] = 7; // XCR0: x87, SSE, AVX
    let process = Process {
        pid,
        comm: "blocked".into(),
        cmdline: b"./blocked\0".to_vec(),
        mm: Some(Mm { auxv: std::fs::read(proc_file("auxv")).unwrap(), ..Default::default() }),
        threads: vec![Thread { tid: pid, regs: regs.to_words(), xstate, ..Default::default() }],
        vmas,
        ..Default::default()
    };
    w.put(RecordKind::Meta, &Meta::default()).unwrap();
    w.put(RecordKind::Process, &process).unwrap();
    w.finish().unwrap();
}

#[test]
fn gdb_shows_the_stack() {
    if !have("gdb") || !have("cc") {
        eprintln!("skipped: needs gdb and cc");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (src, exe, image, core) =
        (dir.path().join("b.c"), dir.path().join("blocked"), dir.path().join("i"), dir.path().join("core"));
    std::fs::write(&src, PROGRAM).unwrap();
    let cc =
        Command::new("cc").args(["-g", "-O1", "-fPIE", "-pie", "-o"]).arg(&exe).arg(&src).status().unwrap();
    assert!(cc.success());
    let mut child = Running(Command::new(&exe).stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    let stdout = child.0.stdout.take().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
    let pid = child.0.id();
    // It has printed; pause(2) (34) is the next call it blocks in.
    while !std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap().starts_with("34 ") {
        std::thread::yield_now();
    }
    snapshot(pid, &image);
    drop(child);
    let image = Image::open(&image).unwrap();
    export_core_file(&image, &core).unwrap();
    let mut streamed = Vec::new();
    export_core(&image, &mut streamed).unwrap();
    assert!(streamed == std::fs::read(&core).unwrap(), "the core with holes has other content");
    let out = Command::new("gdb")
        .args(["-nx", "-batch", "-ex", "bt", "-ex", "frame function wait_here", "-ex", "print the_conn"])
        .args(["-ex", "print 1048576 + zeros[77]", "-ex", "info proc mappings"])
        .arg(&exe)
        .arg(&core)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(!text.contains("Unexpected size"), "{text}");
    for wanted in ["wait_here", "pause", "main () at", "id = 42", "\"hello\"", "= 1048576", "/blocked"] {
        assert!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
}

#[test]
fn a_thread_without_registers_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i");
    let mut w = ImageWriter::create(&path).unwrap();
    w.put(RecordKind::Meta, &Meta::default()).unwrap();
    let vmas = vec![Vma { start: 0x1000, end: 0x1000 + PAGE as u64, prot: 3, ..Default::default() }];
    let threads = vec![Thread { tid: 9, ..Default::default() }];
    w.put(RecordKind::Process, &Process { threads, vmas, ..Default::default() }).unwrap();
    w.finish().unwrap();
    let e = export_core(&Image::open(&path).unwrap(), &mut Vec::new()).unwrap_err().to_string();
    assert!(e.contains("thread 9 has 0 registers"), "{e}");
}
