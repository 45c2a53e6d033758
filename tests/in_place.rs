//! The update in place: the process keeps its pid, whoever watches it sees nothing, nothing piles up, and a
//! dying `mcr` leaves it wholly old or wholly new.

use crate::kv_update::{Load, update};
use crate::support::kv::{Kv, binary, rules};
use crate::support::{Check, expect_mcr, json, mcr, reported_pid, run_mcr};
use crate::{Case, ensure};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("in place: a supervisor sees nothing", supervised as fn() -> Check),
        Case::new("in place: ten updates level off", generations),
        Case::new(
            "in place: ten updates level off, with an arena of malloc for each of four threads",
            arenas,
        ),
        Case::new("in place: mcr killed at random instants", killed),
        Case::new("in place: two updates at once", two_at_once),
        Case::new("in place: a debugger is attached", debugged),
        Case::new("in place: with a process of its own on request", new_pid),
        Case::new("in place: the service manager is told of another pid, by the main process", notify),
        Case::new("in place: history and trace", history),
        Case::new("in place: without address randomisation", unrandomised),
    ]
}

fn field(pid: i32, file: &str, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default();
    line.trim_start_matches(':').trim().to_owned()
}

fn number(pid: i32, file: &str, name: &str) -> u64 {
    field(pid, file, name).split_whitespace().next().and_then(|w| w.parse().ok()).unwrap_or(0)
}

fn maps(pid: i32) -> usize {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default().lines().count()
}

fn tids(pid: i32) -> Vec<i32> {
    let dir = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    let mut v: Vec<i32> = dir.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect();
    v.sort_unstable();
    v
}

/// What a parent that waits for its children is told, without taking anything away.
fn told_to_parent() -> i32 {
    // SAFETY: an all-zero siginfo_t is valid; waitid(2) fills it.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        libc::waitid(
            libc::P_ALL,
            0,
            &raw mut info,
            libc::WEXITED | libc::WSTOPPED | libc::WCONTINUED | libc::WNOHANG | libc::WNOWAIT,
        );
        info.si_pid()
    }
}

fn supervised() -> Check {
    let mut kv = Kv::start(1);
    let mut load = Load::put(&kv, 200, 5)?;
    let pid = kv.server.pid;
    let kept = ["PPid", "NSpid", "Uid", "NSsid", "NSpgid", "SigBlk", "FDSize"];
    let before: Vec<String> = kept.iter().map(|n| field(pid, "status", n)).collect();
    let (threads, group) = (tids(pid), std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok());
    let done = update(&mut kv, 1, 2, &[])?;
    ensure!(reported_pid(&done)? == pid, "the pid changed");
    let after: Vec<String> = kept.iter().map(|n| field(pid, "status", n)).collect();
    ensure!(before == after, "{kept:?}: {before:?} became {after:?}");
    ensure!(tids(pid) == threads, "threads {threads:?} became {:?}", tids(pid));
    ensure!(std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok() == group, "another cgroup");
    ensure!(told_to_parent() != pid, "the parent was told of the server");
    ensure!(number(pid, "status", "TracerPid") == 0, "still traced");
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).map_err(|e| e.to_string())?;
    let new = binary(2).canonicalize().map_err(|e| e.to_string())?;
    ensure!(exe == new, "exe names {}", exe.display());
    let text = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|e| e.to_string())?;
    let old = binary(1).canonicalize().map_err(|e| e.to_string())?.display().to_string();
    ensure!(!text.contains(&old), "the old program is still mapped:\n{text}");
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    ensure!(name.trim() == "kv2", "comm is {name:?}");
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    ensure!(line.split(|b| *b == 0).any(|a| a == kv.port.to_string().as_bytes()), "cmdline: {line:?}");
    load.verify("2.0")?;
    load.go_on(&kv)
}

fn generations() -> Check {
    let mut kv = Kv::start(2);
    let mut load = Load::put(&kv, 300, 5)?;
    let pid = kv.server.pid;
    let mut sizes = Vec::new();
    for round in 0..10 {
        update(&mut kv, 2, 2, &[])?;
        load.verify("2.0").map_err(|e| format!("round {round}: {e}"))?;
        sizes.push((maps(pid), number(pid, "status", "VmSize"), number(pid, "status", "VmRSS")));
    }
    let (early, late) = (sizes[3], sizes[9]);
    ensure!(early.0 == late.0 && early.1 == late.1, "maps and VmSize go on growing: {sizes:?}");
    ensure!(late.2 * 10 <= early.2 * 11, "RSS goes on growing: {sizes:?}");
    load.go_on(&kv)
}

/// What each start-up's threads got from malloc goes with the next update but one.
fn arenas() -> Check {
    let mut kv = Kv::start_with_workers(2, 4);
    let pid = kv.server.pid;
    let mut clients: Vec<_> = (0..8).map(|_| kv.connect()).collect();
    let mut sizes = Vec::new();
    for round in 0..10 {
        for (i, c) in clients.iter_mut().enumerate() {
            c.expect(&format!("SET key{i} {round}"), "OK")?;
        }
        update(&mut kv, 2, 2, &[])?;
        for (i, c) in clients.iter_mut().enumerate() {
            c.expect(&format!("GET key{i}"), &round.to_string())?;
            c.expect("SELFCHECK", "OK")?;
        }
        sizes.push((maps(pid), number(pid, "status", "VmSize"), number(pid, "status", "VmRSS")));
    }
    // One that is not dropped: nine mappings, and a reserve of 64 MiB for each thread.
    let (early, late) = (sizes[4], sizes[9]);
    ensure!(late.0 < early.0 + 9 && late.1 < early.1 + (64 << 10), "maps or VmSize go on growing: {sizes:?}");
    ensure!(late.2 * 10 <= early.2 * 11, "RSS goes on growing: {sizes:?}");
    Ok(())
}

/// Kills of `mcr`; more with MCR_TEST_KILLS.
fn kills() -> u64 {
    std::env::var("MCR_TEST_KILLS").ok().and_then(|v| v.parse().ok()).unwrap_or(25)
}

fn killed() -> Check {
    let mut kv = Kv::start(2);
    let mut load = Load::put(&kv, 200, 5)?;
    let began = Instant::now();
    update(&mut kv, 2, 2, &[])?;
    let whole = began.elapsed();
    let (pid, new) = (kv.server.pid.to_string(), binary(2).display().to_string());
    let mut x = 88_172_645_463_325_252u64;
    for round in 0..kills() {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let after = whole.mul_f64((x >> 11) as f64 / (1u64 << 53) as f64 * 1.1);
        let mut engine = Command::new(mcr())
            .args(["update", &pid, "--to", &new])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| e.to_string())?;
        // The instant is the point, not an event.
        std::thread::sleep(after);
        let _ = engine.kill();
        engine.wait().map_err(|e| e.to_string())?;
        let checked = load.verify("2.0").and_then(|()| load.go_on(&kv));
        checked.map_err(|e| format!("round {round}, killed after {after:?} of {whole:?}: {e}"))?;
    }
    update(&mut kv, 2, 2, &[])?;
    load.verify("2.0")
}

fn two_at_once() -> Check {
    let mut kv = Kv::start(2);
    let mut load = Load::put(&kv, 100, 3)?;
    let (pid, new) = (kv.server.pid.to_string(), binary(2).display().to_string());
    for round in 0..5 {
        let start = || {
            Command::new(mcr())
                .args(["update", &pid, "--to", &new])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .map_err(|e| e.to_string())
        };
        let both = [start()?, start()?];
        for engine in both {
            let out = engine.wait_with_output().map_err(|e| e.to_string())?;
            let said = String::from_utf8_lossy(&out.stderr).into_owned();
            ensure!(matches!(out.status.code(), Some(0 | 1 | 3)), "round {round}: {}: {said}", out.status);
            ensure!(out.status.success() || said.contains(&pid), "round {round}: no name in: {said}");
        }
        load.verify("2.0").map_err(|e| format!("round {round}: {e}"))?;
    }
    update(&mut kv, 2, 2, &[])?;
    load.go_on(&kv)
}

fn debugged() -> Check {
    let kv = Kv::start(1);
    let mut load = Load::put(&kv, 50, 3)?;
    let pid = kv.server.pid;
    // SAFETY: PTRACE_SEIZE and PTRACE_DETACH take no memory of ours.
    let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) };
    ensure!(seized == 0, "PTRACE_SEIZE: {}", std::io::Error::last_os_error());
    let rules = rules(2).display().to_string();
    let out =
        run_mcr(&["update", &pid.to_string(), "--to", &binary(2).display().to_string(), "--rules", &rules]);
    // SAFETY: PTRACE_INTERRUPT, waitpid and PTRACE_DETACH of our own tracee.
    unsafe {
        libc::ptrace(libc::PTRACE_INTERRUPT, pid, 0, 0);
        libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL);
        libc::ptrace(libc::PTRACE_DETACH, pid, 0, 0);
    }
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(out.status.code() == Some(1), "expected a refusal, got {}: {said}", out.status);
    ensure!(said.contains("traced") || said.contains("debug"), "the tracer is not named: {said}");
    load.verify("1.0")
}

fn new_pid() -> Check {
    let mut kv = Kv::start(1);
    let mut load = Load::put(&kv, 200, 5)?;
    let before = kv.server.pid;
    load.begin_half_request()?;
    let done = update(&mut kv, 1, 2, &["--new-pid"])?;
    kv.server.becomes(reported_pid(&done)?);
    ensure!(kv.server.pid != before, "the pid stayed");
    load.end_half_request()?;
    load.verify("2.0")?;
    load.go_on(&kv)?;
    // And the next one in place.
    let pid = kv.server.pid;
    ensure!(reported_pid(&update(&mut kv, 2, 3, &[])?)? == pid, "the pid changed");
    load.verify("3.0")
}

fn notify() -> Check {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, setsockopt, sockopt};
    use std::os::fd::AsRawFd;
    let dir = crate::support::scratch();
    let path = dir.path().join("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&path).map_err(|e| e.to_string())?;
    setsockopt(&manager, sockopt::PassCred, &true).map_err(|e| e.to_string())?;
    manager.set_nonblocking(true).map_err(|e| e.to_string())?;
    let mut kv = Kv::start_with(1, "NOTIFY_SOCKET", path.as_os_str());
    let mut load = Load::put(&kv, 50, 3)?;
    let told = || -> Result<(String, i32), nix::Error> {
        let mut text = [0u8; 64];
        let mut space = nix::cmsg_space!(nix::sys::socket::UnixCredentials);
        let mut parts = [std::io::IoSliceMut::new(&mut text)];
        let got = recvmsg::<UnixAddr>(manager.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
        let sender = got.cmsgs()?.find_map(|c| match c {
            ControlMessageOwned::ScmCredentials(c) => Some(c.pid()),
            _ => None,
        });
        let n = got.bytes;
        Ok((String::from_utf8_lossy(&text[..n]).into_owned(), sender.unwrap_or(0)))
    };
    // Same pid: nothing to say. A dry run: nothing has happened.
    update(&mut kv, 1, 2, &[])?;
    expect_mcr(
        0,
        &[
            "update",
            &kv.server.pid.to_string(),
            "--to",
            &binary(3).display().to_string(),
            "--rules",
            &rules(3).display().to_string(),
            "--new-pid",
            "--dry-run",
        ],
    )?;
    ensure!(told() == Err(nix::Error::EAGAIN), "told though the pid stayed");
    let before = kv.server.pid;
    let done = update(&mut kv, 2, 3, &["--new-pid"])?;
    kv.server.becomes(reported_pid(&done)?);
    let want = (format!("MAINPID={}\n", kv.server.pid), before);
    let got = told();
    ensure!(got == Ok(want.clone()), "expected {want:?}, got {got:?}");
    ensure!(told() == Err(nix::Error::EAGAIN), "told twice");
    load.verify("3.0")
}

fn history() -> Check {
    let mut kv = Kv::start(1);
    let mut load = Load::put(&kv, 50, 3)?;
    let trace = kv.dir.path().join("trace.json");
    update(&mut kv, 1, 2, &["--trace", &trace.display().to_string()])?;
    update(&mut kv, 2, 3, &[])?;
    let said = json(&expect_mcr(0, &["history", &kv.server.pid.to_string(), "--json"])?)?;
    let updates = said["updates"].as_array().cloned().unwrap_or_default();
    ensure!(updates.len() == 2, "expected two updates in {said}");
    ensure!(updates[0]["to"] == updates[1]["from"], "the build-ids do not follow each other: {said}");
    ensure!(updates[1]["program"].as_str().is_some_and(|p| p.ends_with("kv3")), "no program in {said}");
    let text = std::fs::read_to_string(&trace).map_err(|e| format!("--trace: {e}"))?;
    let events: serde_json::Value = serde_json::from_str(&text).map_err(|e| format!("--trace: {e}"))?;
    let names: Vec<&str> =
        events.as_array().into_iter().flatten().filter_map(|e| e["name"].as_str()).collect();
    ensure!(names.contains(&"commit") && names.contains(&"rehearsal: start-up"), "phases: {names:?}");
    let late = Duration::from_secs(3600 * 24 * 366 * 40).as_secs();
    ensure!(updates[0]["unix_s"].as_u64().is_some_and(|s| s > late), "no time in {said}");
    load.verify("3.0")
}

fn unrandomised() -> Check {
    for extra in [&[][..], &["--new-pid"]] {
        let mut kv = Kv::start_unrandomised(1);
        let mut load = Load::put(&kv, 400, 5)?;
        for to in [2, 3] {
            let done = update(&mut kv, to - 1, to, extra)?;
            kv.server.becomes(reported_pid(&done)?);
            load.verify(&format!("{to}.0")).map_err(|e| format!("{extra:?}: {e}"))?;
            load.go_on(&kv)?;
        }
    }
    Ok(())
}
