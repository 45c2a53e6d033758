//! What must be refused: each with a message that says what and what next, the right exit code, and an
//! unharmed server.

use crate::kv_update::Load;
use crate::support::kv::{Kv, binary};
use crate::support::{Check, cc, run_mcr, scratch};
use crate::{Case, ensure};
use std::path::{Path, PathBuf};

pub fn cases() -> Vec<Case> {
    let mut v = vec![
        Case::new("bad input: a dead pid", || refused(&["dump", "4194303", "-o", "/dev/null"], &["4194303"])),
        Case::new("bad input: a kernel thread", || {
            refused(&["dump", "2", "-o", "/dev/null"], &["kernel thread"])
        }),
        Case::new("bad input: ourselves", ourselves),
        Case::new("bad input: no disk space", no_space),
        Case::new("bad input: truncated, flipped and foreign images", images),
        Case::new("bad input: usage", usage),
    ];
    for (name, source, flags, wants) in [
        ("crashes", "int main(void){ *(volatile int *)16 = 1; return 0; }", &[][..], &["SIGSEGV"][..]),
        ("exits with 0", "int main(void){ return 0; }", &[], &["exit"]),
        ("exits with 3", "int main(void){ return 3; }", &[], &["exit", "3"]),
        ("hangs", "#include <unistd.h>\nint main(void){ for (;;) pause(); }", &[], &["pause"]),
        ("has no DWARF", "int main(void){ return 0; }", &["-g0", "-s"], &["-g"]),
        ("is not PIE", "int main(void){ return 0; }", &["-no-pie"], &["PIE"]),
        ("is static", "int main(void){ return 0; }", &["-static"], &["static"]),
        ("is no ELF", "", &[], &["ELF"]),
        ("listens elsewhere", LISTENS, &[], &["listen"]),
    ] {
        let (wants, flags) = (wants.to_vec(), flags.to_vec());
        v.push(Case::new(&format!("bad input: a new binary that {name}"), move || {
            new_binary(source, &flags, &wants)
        }));
    }
    v
}

const LISTENS: &str = r"
#include <arpa/inet.h>
#include <sys/socket.h>
int main(void) {
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000001), .sin_port = htons(1) };
	a.sin_port = 0;
	if (bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 5)) return 1;
	accept(fd, 0, 0);
	return 0;
}";

fn refused(args: &[&str], wants: &[&str]) -> Check {
    let out = run_mcr(args);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(matches!(out.status.code(), Some(1 | 3 | 5)), "mcr {args:?}: {}: {said}", out.status);
    for w in wants {
        ensure!(said.to_lowercase().contains(&w.to_lowercase()), "mcr {args:?}: no {w:?} in: {said}");
    }
    Ok(())
}

fn ourselves() -> Check {
    // A shell that becomes mcr keeps its pid.
    let script = format!("exec {} dump $$ -o /dev/null", crate::support::mcr());
    let out = std::process::Command::new("sh").args(["-c", &script]).output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(out.status.code() == Some(1) && said.contains("itself"), "{}: {said}", out.status);
    Ok(())
}

fn usage() -> Check {
    for args in [&["dump"][..], &["frobnicate"], &["update", "1"], &["dump", "x", "-o", "y"]] {
        let out = run_mcr(args);
        ensure!(out.status.code() == Some(2), "mcr {args:?}: {} instead of 2", out.status);
    }
    Ok(())
}

fn no_space() -> Check {
    let kv = Kv::start(1);
    let mut load = Load::put(&kv, 100, 3)?;
    let pid = kv.server.pid.to_string();
    refused(&["dump", &pid, "-o", "/dev/full"], &["/dev/full"])?;
    ensure!(kv.server.alive(), "the server is gone");
    load.verify("1.0")?;
    refused(&["dump", &pid, "-o", "/nonexistent/dir/x.mcr"], &["/nonexistent/dir"])?;
    load.verify("1.0")
}

fn images() -> Check {
    let kv = Kv::start(1);
    let path = kv.dir.path().join("kv.mcr");
    let img = path.display().to_string();
    crate::support::expect_mcr(0, &["dump", &kv.server.pid.to_string(), "-o", &img, "--leave-running"])?;
    let good = std::fs::read(&path).map_err(|e| e.to_string())?;
    let mut variants: Vec<(String, Vec<u8>)> = vec![
        ("empty".into(), vec![]),
        ("foreign".into(), std::fs::read("/proc/self/exe").map_err(|e| e.to_string())?),
    ];
    for cut in [1, 100, good.len() / 2, good.len() - 1] {
        variants.push((format!("cut to {cut}"), good[..cut].to_vec()));
    }
    for at in [0, 9, 40, good.len() / 3, good.len() - 20] {
        let mut b = good.clone();
        b[at] ^= 0x40;
        variants.push((format!("flipped at {at}"), b));
    }
    let bad = kv.dir.path().join("bad.mcr");
    for (name, bytes) in variants {
        std::fs::write(&bad, bytes).map_err(|e| e.to_string())?;
        let out = run_mcr(&["restore", &bad.display().to_string()]);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.code() == Some(1), "{name}: {} instead of 1: {said}", out.status);
        ensure!(said.contains("bad.mcr") && !said.contains("panicked"), "{name}: {said}");
    }
    kv.connect().expect("SELFCHECK", "OK")
}

fn build(source: &str, flags: &[&str]) -> Result<(tempfile::TempDir, PathBuf), String> {
    let dir = scratch();
    let (c, out) = (dir.path().join("new.c"), dir.path().join("new"));
    std::fs::write(&c, source).map_err(|e| e.to_string())?;
    if source.is_empty() {
        std::fs::write(&out, "#!/bin/sh\n").map_err(|e| e.to_string())?;
    } else {
        cc(Path::new(&c), &out, flags)?;
    }
    Ok((dir, out))
}

fn new_binary(source: &str, flags: &[&str], wants: &[&str]) -> Check {
    let (_dir, new) = build(source, flags)?;
    let kv = Kv::start(1);
    let mut load = Load::put(&kv, 100, 3)?;
    let pid = kv.server.pid.to_string();
    let new = new.display().to_string();
    refused(&["update", &pid, "--to", &new, "--timeout", "3"], wants)?;
    ensure!(kv.server.alive(), "the old server is gone");
    load.verify("1.0")?;
    // And the next, good update still works.
    let done =
        crate::support::expect_mcr(0, &["update", &pid, "--to", &binary(1).display().to_string(), "--json"])?;
    let mut kv = kv;
    kv.server.becomes(crate::support::reported_pid(&done)?);
    load.verify("1.0")
}
