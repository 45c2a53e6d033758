//! The self-verifying programs of `tests/live`: dumped, restored and asked, five times each, over one control
//! connection that stays open all the time.

use crate::snapshot::dump;
use libtest_mimic::{Failed, Trial};
use mcr_restore::keeper::Keeper;
use mcr_restore::rebuild::{RebuildError, RebuildOptions, restore_image};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("live_descriptors", || repeated("fdzoo", 29511, &[])),
        Trial::test("live_mappings", || repeated("memzoo", 29512, &["third argument"])),
        Trial::test("live_threads", || repeated("threads", 29513, &[])),
        Trial::test("live_process_state", || repeated("state", 29514, &[])),
        Trial::test("live_dropped_privileges", || repeated("state", 29515, &["drop"])),
        Trial::test("live_without_keeper_is_refused", without_keeper),
        Trial::test("live_descriptors_made_anew", made_anew),
        Trial::test("live_program_replaced_on_disk", replaced),
    ]
}

/// A running program and its control connection; killed when dropped.
struct Program {
    pid: i32,
    child: Option<Child>,
    control: BufReader<TcpStream>,
    dir: tempfile::TempDir,
}

fn build(dir: &Path, name: &str) -> Result<PathBuf, Failed> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/live").join(format!("{name}.c"));
    let out = dir.join(name);
    let status =
        Command::new("gcc").args(["-g", "-O2", "-w", "-pthread", "-o"]).arg(&out).arg(source).status()?;
    if status.success() { Ok(out) } else { Err(format!("gcc {name}: {status}").into()) }
}

impl Program {
    fn start(name: &str, port: u16, args: &[&str]) -> Result<Self, Failed> {
        let dir = tempfile::Builder::new().prefix("mcr").tempdir()?;
        let exe = build(dir.path(), name)?;
        let mut command = Command::new(exe);
        command.arg(port.to_string()).args(args);
        // SAFETY: setsid is async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                Ok(())
            });
        }
        let child = command.spawn()?;
        // Below the ports that connect(2) takes by itself: it could otherwise be its own peer while it tries.
        let until = Instant::now() + Duration::from_secs(10);
        let control = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(s) => break s,
                Err(e) if Instant::now() > until => return Err(e.into()),
                // It is starting.
                Err(_) => std::thread::yield_now(),
            }
        };
        control.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Self { pid: child.id() as i32, child: Some(child), control: BufReader::new(control), dir })
    }

    fn ask(&mut self, question: &str) -> Result<String, Failed> {
        self.control.get_mut().write_all(question.as_bytes())?;
        let mut line = String::new();
        self.control.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    /// The dumped process has ended; the dump may have collected it already, as its tracer and parent.
    fn collect(&mut self) {
        match self.child.take() {
            Some(mut c) => drop(c.wait()),
            None => drop(nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.pid), None)),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        if self.child.is_some() || std::path::Path::new(&format!("/proc/{pid}")).exists() {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(pid, None);
        }
    }
}

fn repeated(name: &str, port: u16, args: &[&str]) -> Result<(), Failed> {
    let mut p = Program::start(name, port, args)?;
    assert_eq!(p.ask("check\n")?, "ok", "before any dump");
    for round in 0..5 {
        let image = dump(p.pid, p.dir.path())?;
        p.collect();
        // Sent while nobody serves.
        p.control.get_mut().write_all(b"ping\n")?;
        let restored = restore_image(&image, &RebuildOptions::default())?;
        assert_eq!(restored.pid.0, p.pid);
        let mut line = String::new();
        p.control.read_line(&mut line)?;
        assert_eq!(line, "ok\n", "round {round}: the line sent meanwhile");
        assert_eq!(p.ask("check\n")?, "ok", "round {round}");
    }
    Ok(())
}

fn without_keeper() -> Result<(), Failed> {
    let mut p = Program::start("memzoo", 29516, &["third argument"])?;
    assert_eq!(p.ask("check\n")?, "ok");
    let image = dump(p.pid, p.dir.path())?;
    p.collect();
    Keeper::drop_all(&image.meta().keeper_socket)?;
    let e = restore_image(&image, &RebuildOptions::default()).err().ok_or("no refusal")?;
    assert!(matches!(e, RebuildError::Refused { .. }), "{e}");
    assert!(e.to_string().contains("--drop-connections"), "{e}");
    let options = RebuildOptions { drop_connections: true, ..Default::default() };
    restore_image(&image, &options)?;
    // The old connection is gone, the listener serves.
    p.control = BufReader::new(TcpStream::connect(("127.0.0.1", 29516))?);
    assert_eq!(p.ask("check\n")?, "ok");
    Ok(())
}

/// Pipes, sockets and their contents from the image alone.
fn made_anew() -> Result<(), Failed> {
    let mut p = Program::start("fdzoo", 29517, &[])?;
    assert_eq!(p.ask("check\n")?, "ok");
    for round in 0..5 {
        let image = dump(p.pid, p.dir.path())?;
        p.collect();
        Keeper::drop_all(&image.meta().keeper_socket)?;
        let options = RebuildOptions { drop_connections: true, ..Default::default() };
        let restored = restore_image(&image, &options)?;
        assert!(restored.findings.iter().any(|f| f.code == "connection-dropped"), "{:?}", restored.findings);
        p.control = BufReader::new(TcpStream::connect(("127.0.0.1", 29517))?);
        assert_eq!(p.ask("check\n")?, "ok", "round {round}");
    }
    Ok(())
}

/// After a package upgrade the old program is gone from disk: it comes from the image, again and again.
fn replaced() -> Result<(), Failed> {
    let mut p = Program::start("memzoo", 29518, &["third argument"])?;
    assert_eq!(p.ask("check\n")?, "ok");
    let on_disk = p.dir.path().join("memzoo");
    for round in 0..3 {
        let image = dump(p.pid, p.dir.path())?;
        p.collect();
        match round {
            0 => std::fs::remove_file(&on_disk)?,
            _ => std::fs::write(&on_disk, b"another program")?,
        }
        restore_image(&image, &RebuildOptions::default())?;
        assert_eq!(p.ask("check\n")?, "ok", "round {round}");
        let exe = std::fs::read_link(format!("/proc/{}/exe", p.pid))?;
        assert_eq!(exe, Path::new("/memfd:memzoo (deleted)"), "round {round}");
    }
    Ok(())
}
