//! What must be refused: each with a message that says what and what next, the right exit code, and an
//! unharmed server.

use crate::kv_update::Load;
use crate::support::kv::{Kv, binary};
use crate::support::{Check, cc, expect_mcr, run_mcr, scratch};
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
        Case::new("bad input: a process of another user, without rights", without_rights),
        Case::new("bad input: usage", usage),
    ];
    for (name, broken, wants) in [
        ("crashes", "*(volatile int *)16 = 1;", &["SIGSEGV"][..]),
        ("exits with 0", "if (getpid()) exit(0);", &["exit", "0"]),
        ("exits with 3", "if (getpid()) exit(3);", &["exit", "3"]),
        ("hangs", "while (getpid()) pause();", &["pause"]),
        ("listens elsewhere", "argv[1] = \"0\";", &["127.0.0.1"]),
        ("forks", "if (fork() == 0) pause();", &["fork"]),
    ] {
        let wants = wants.to_vec();
        v.push(Case::new(&format!("bad input: a new version that {name} at start-up"), move || {
            new_binary(&kv_that(broken)?, &[], &wants)
        }));
    }
    for (name, source, flags, wants) in [
        ("has no DWARF", "int main(void){ return 0; }", &["-g0", "-s"][..], &["-g"][..]),
        ("is not PIE", "int main(void){ return 0; }", &["-no-pie"], &["PIE"]),
        ("is static", "int main(void){ return 0; }", &["-static"], &["static"]),
        ("is no ELF", "", &[], &["ELF"]),
        ("is another program", "int main(void){ return 0; }", &[], &["is not in the new version"]),
    ] {
        let (wants, flags) = (wants.to_vec(), flags.to_vec());
        v.push(Case::new(&format!("bad input: a new binary that {name}"), move || {
            new_binary(source, &flags, &wants)
        }));
    }
    v.push(Case::new("bad input: a new binary that is 32-bit", thirty_two_bit));
    v
}

/// The class byte of an ELF header decides before anything else is believed.
fn thirty_two_bit() -> Check {
    let dir = scratch();
    let new = dir.path().join("small");
    let mut bytes = std::fs::read(binary(1)).map_err(|e| e.to_string())?;
    bytes[4] = 1; // EI_CLASS = ELFCLASS32
    std::fs::write(&new, bytes).map_err(|e| e.to_string())?;
    let kv = Kv::start(1);
    let mut load = Load::put(&kv, 50, 2)?;
    let pid = kv.server.pid.to_string();
    refused(&["update", &pid, "--to", &new.display().to_string()], &["32-bit"])?;
    load.verify("1.0")
}

/// The bundled server with a statement at the start of its main().
fn kv_that(broken: &str) -> Result<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/kv/v1.c");
    let source = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
    let at = "\tsignal(SIGPIPE, SIG_IGN);";
    ensure!(source.contains(at), "the example has no {at:?}");
    Ok(source.replace(at, &format!("\t{broken}\n{at}")))
}

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

/// mcr as nobody against a server of root: each verb says so, and the server does not notice.
fn without_rights() -> Check {
    use std::os::unix::fs::PermissionsExt;
    let kv = Kv::start(1);
    let mut load = Load::put(&kv, 100, 3)?;
    let pid = kv.server.pid.to_string();
    // Where nobody may execute it.
    let dir = scratch();
    let mcr = dir.path().join("mcr");
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).map_err(|e| e.to_string())?;
    std::fs::copy(crate::support::mcr(), &mcr).map_err(|e| e.to_string())?;
    let new = dir.path().join("new");
    std::fs::copy(binary(2), &new).map_err(|e| e.to_string())?;
    let (new, image) = (new.display().to_string(), dir.path().join("x.mcr").display().to_string());
    for args in [
        &["dump", &pid, "-o", &image][..],
        &["update", &pid, "--to", &new],
        &["plan", &pid, "--to", &new],
        &["quiesce", &pid],
    ] {
        let out = std::process::Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&mcr)
            .args(args)
            .output()
            .map_err(|e| format!("setpriv: {e}"))?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.code() == Some(1), "mcr {args:?}: {} instead of 1: {said}", out.status);
        let lower = said.to_lowercase();
        ensure!(said.contains(&pid), "mcr {args:?}: no pid in: {said}");
        ensure!(lower.contains("permi") || lower.contains("root"), "mcr {args:?}: no reason in: {said}");
        ensure!(!Path::new(&image).exists(), "mcr {args:?} left an image");
        load.verify("1.0")?;
    }
    Ok(())
}

fn images() -> Check {
    let mut kv = Kv::start(1);
    let mut load = Load::put(&kv, 100, 3)?;
    let path = kv.dir.path().join("kv.mcr");
    let img = path.display().to_string();
    expect_mcr(0, &["dump", &kv.server.pid.to_string(), "-o", &img])?;
    kv.server.reap();
    let good = std::fs::read(&path).map_err(|e| e.to_string())?;
    let mut variants: Vec<(String, Vec<u8>)> = vec![
        ("empty".into(), vec![]),
        ("foreign".into(), std::fs::read("/proc/self/exe").map_err(|e| e.to_string())?),
    ];
    for cut in [1, 100, good.len() / 2, good.len() - 1] {
        variants.push((format!("cut to {cut}"), good[..cut].to_vec()));
    }
    for at in [0, 9, 40, 200, good.len() / 3, good.len() / 2, good.len() - 20] {
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
        ensure!(!kv.server.alive(), "{name}: something runs under the pid");
    }
    // The good one still comes back, with its connections.
    let done = expect_mcr(0, &["restore", &img, "--json"])?;
    kv.server.pid = crate::support::reported_pid(&done)?;
    load.verify("1.0")
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
    let done = expect_mcr(0, &["update", &pid, "--to", &binary(1).display().to_string(), "--json"])?;
    let mut kv = kv;
    kv.server.becomes(crate::support::reported_pid(&done)?);
    load.verify("1.0")
}
