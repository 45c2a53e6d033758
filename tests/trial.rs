//! After the update: the trial that watches the new version, and a debugger that looks at it.

use crate::kv_update::{Load, update};
use crate::support::kv::{Client, Kv};
use crate::support::{Check, Server, cc, expect_mcr, free_port, json, mcr, reported_pid};
use crate::{Case, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub fn cases() -> Vec<Case> {
    let no_gdb = Command::new("gdb").arg("--version").stdout(Stdio::null()).status().err();
    vec![
        Case::new("trial: a new version that dies of its first request", dies as fn() -> Check),
        Case::new("trial: a health command that fails", unhealthy),
        Case::new("trial: a new version that is fine", fine),
        Case::new("in place: gdb sees the new program", gdb).skip_if(no_gdb.map(|e| format!("gdb: {e}"))),
    ]
}

/// A server that answers PONG, and its next version.
struct Small {
    server: Server,
    port: u16,
    new: PathBuf,
    dir: tempfile::TempDir,
}

impl Small {
    fn start(flags: &[&str]) -> Result<Small, String> {
        let dir = crate::support::scratch();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("restore/tests/programs/boot_server.c");
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        cc(&source, &old, &[])?;
        cc(&source, &new, flags)?;
        let port = free_port();
        let log = std::fs::File::create(dir.path().join("log")).map_err(|e| e.to_string())?;
        let server = Server::start(Command::new(&old).arg(port.to_string()).stderr(log), None);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(server.alive(), "the server does not start");
            std::thread::yield_now();
        }
        Ok(Small { server, port, new, dir })
    }

    fn kept(&self) -> String {
        self.dir.path().join("kept").display().to_string()
    }

    fn args(&self, more: &[&str]) -> Vec<String> {
        let new = self.new.display().to_string();
        let all = ["update", &self.server.pid.to_string(), "--to", &new, "--json"].map(str::to_owned);
        all.into_iter().chain(more.iter().map(|s| (*s).to_owned())).collect()
    }
}

fn dies() -> Check {
    let s = Small::start(&["-DFRAGILE"])?;
    let mut client = Client::connect(s.port);
    client.expect("PING", "PONG")?;
    let engine = Command::new(mcr())
        .args(s.args(&["--trial", "60", "--keep", &s.kept()]))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let exe = format!("/proc/{}/exe", s.server.pid);
    let new = s.new.canonicalize().map_err(|e| e.to_string())?;
    while s.server.alive() && std::fs::read_link(&exe).is_ok_and(|e| e != new) {
        std::thread::yield_now();
    }
    client.send("PING\n")?;
    let out = engine.wait_with_output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(out.status.code() == Some(4), "expected exit 4, got {}: {said}", out.status);
    for want in ["signal 11 (SIGSEGV)", "it wrote: cannot stand requests", "no way back"] {
        ensure!(said.contains(want), "no {want:?} in: {said}");
    }
    let trial = &json(&out)?["trial"];
    ensure!(trial["healthy"] == false && trial["seconds"] == 60.0, "trial: {trial}");
    let report = std::fs::read_to_string(format!("{}/report.json", s.kept())).map_err(|e| e.to_string())?;
    ensure!(report.contains("SIGSEGV"), "{report}");
    ensure!(!Path::new(&s.kept()).join("after.mcr").exists(), "an image of a dead process");
    // The server as it was before can be looked at, and updated again offline.
    let before = format!("{}/before.mcr", s.kept());
    let out = expect_mcr(
        0,
        &["transform", &before, "--to", &s.new.display().to_string(), "-o", &format!("{before}.new")],
    )?;
    drop((out, s.dir));
    Ok(())
}

fn unhealthy() -> Check {
    let s = Small::start(&[])?;
    let mut client = Client::connect(s.port);
    let args =
        s.args(&["--trial", "60", "--health", "echo nothing works in $MCR_PID; exit 7", "--keep", &s.kept()]);
    let out = expect_mcr(3, &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    let trial = &json(&out)?["trial"];
    let what = trial["what"].as_str().unwrap_or_default();
    let want = format!("the health command exited with status 7: nothing works in {}", s.server.pid);
    ensure!(trial["healthy"] == false && what.contains(&want), "trial: {trial}");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(said.contains("it goes on with all of its state"), "{said}");
    // Images of both versions.
    for (image, program) in [("before.mcr", "old"), ("after.mcr", "new")] {
        let image = mcr_image::Image::open(&Path::new(&s.kept()).join(image)).map_err(|e| e.to_string())?;
        let exe = image.process().exe_path.clone();
        ensure!(exe.ends_with(program), "{exe} instead of {program}");
    }
    client.expect("PING", "PONG")
}

fn fine() -> Check {
    let mut s = Small::start(&[])?;
    let mut client = Client::connect(s.port);
    let kept = s.kept();
    for more in [&["--health", "test -e /proc/$MCR_PID", "--keep", &kept][..], &[], &["--new-pid"]] {
        let args = s.args(&[&["--trial", "0.6"], more].concat());
        let out = expect_mcr(0, &args.iter().map(String::as_str).collect::<Vec<_>>())?;
        s.server.becomes(reported_pid(&out)?);
        let trial = &json(&out)?["trial"];
        ensure!(trial["healthy"] == true, "trial: {trial}");
        ensure!(!Path::new(&kept).exists(), "kept without need");
        client.expect("PING", "PONG")?;
    }
    Ok(())
}

fn gdb() -> Check {
    let mut kv = Kv::start(1);
    let mut load = Load::put(&kv, 50, 3)?;
    update(&mut kv, 1, 2, &[])?;
    let out = Command::new("gdb")
        .args(["-nx", "-batch", "-p", &kv.server.pid.to_string(), "-ex", "bt"])
        .env("DEBUGINFOD_URLS", "")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let main = said.lines().find(|l| l.contains(" main (")).unwrap_or_default();
    ensure!(
        main.contains("v2.c:"),
        "no frame of the new main in: {said}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    load.verify("2.0")?;
    load.go_on(&kv)
}
