//! Small C programs under test: built by gcc, talked to over pipes, killed by pid.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};

/// A running test program.
pub struct Program {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    pub stdout: BufReader<ChildStdout>,
    pub dir: Option<tempfile::TempDir>,
}

/// Compiles C source; the directory lives as long as the program.
pub fn build(source: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (c, exe) = (dir.path().join("t.c"), dir.path().join("t"));
    std::fs::write(&c, source).unwrap();
    let out = Command::new("gcc").args(["-g", "-O1", "-pthread", "-o"]).arg(&exe).arg(&c).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    (dir, exe)
}

impl Program {
    /// Builds and starts; the program prints a line "ready" when it is.
    pub fn start(source: &str) -> Self {
        let (dir, exe) = build(source);
        let mut p = Self::spawn(&exe);
        p.dir = Some(dir);
        p
    }

    /// Starts a program that was built before.
    pub fn spawn(exe: &std::path::Path) -> Self {
        Self::spawn_with(exe, &[])
    }

    /// The same with arguments.
    pub fn spawn_with(exe: &std::path::Path, args: &[&str]) -> Self {
        let mut cmd = Command::new(exe);
        cmd.args(args);
        cmd.stdin(Stdio::piped()).stdout(Stdio::piped()).current_dir(exe.parent().unwrap()).process_group(0);
        let mut child = cmd.spawn().unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut p = Self { child, stdin, stdout, dir: None };
        assert_eq!(p.line(), "ready");
        p
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn line(&mut self) -> String {
        let mut s = String::new();
        self.stdout.read_line(&mut s).unwrap();
        s.trim_end().to_owned()
    }

    /// Waits until a thread sleeps in the system call.
    pub fn wait_blocked(&self, tid: i32, nr: i64) {
        self.wait_blocked_in(tid, &[nr]);
    }

    /// Waits until a thread sleeps in one of these system calls.
    pub fn wait_blocked_in(&self, tid: i32, calls: &[i64]) {
        let path = format!("/proc/{}/task/{tid}/syscall", self.pid());
        let sleeps = |s: &str| s.split(' ').next().is_some_and(|n| calls.iter().any(|c| n == c.to_string()));
        while !sleeps(&std::fs::read_to_string(&path).unwrap()) {
            std::thread::yield_now();
        }
    }

    /// Sends a line.
    pub fn tell(&mut self, text: &str) {
        self.stdin.as_mut().unwrap().write_all(format!("{text}\n").as_bytes()).unwrap();
    }

    /// Closes stdin and waits; returns what was still printed.
    pub fn finish(mut self) -> (ExitStatus, String) {
        drop(self.stdin.take());
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap(), rest)
    }

    /// Finishes and expects exit status 0.
    pub fn finish_ok(self) -> String {
        let (status, out) = self.finish();
        assert!(status.success(), "{status:?} signal {:?}: {out}", status.signal());
        out
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
