//! Checkpoints without an update: dump, restore, the same process again.

use crate::kv_update::Load;
use crate::support::kv::Kv;
use crate::support::{Check, expect_mcr, json, reported_pid};
use crate::{Case, ensure};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("kv: dump and restore, five times over", dump_restore),
        Case::new("kv: dump --tcp-repair, restored through the keeper", || tcp_repair(false)),
        Case::new("kv: dump --tcp-repair, the keeper killed, restored from the records", || tcp_repair(true)),
        Case::new("kv: dump --leave-running, twenty times", leave_running),
        Case::new("kv: inspect shows maps, threads, descriptors and typed values", inspect),
    ]
}

fn dump_restore() -> Check {
    let kv = Kv::start(1);
    let mut load = Load::put(&kv, 500, 7)?;
    let pid = kv.server.pid;
    for round in 0..5 {
        load.begin_half_request()?;
        let img = kv.dir.path().join(format!("kv{round}.mcr")).display().to_string();
        let level = ["1", "0"][round % 2];
        expect_mcr(0, &["dump", &pid.to_string(), "-o", &img, "--compress", level])?;
        kv.server.reap();
        let done = expect_mcr(0, &["restore", &img, "--json"])?;
        ensure!(reported_pid(&done)? == pid, "another pid: {}", reported_pid(&done)?);
        load.end_half_request()?;
        load.verify("1.0")?;
        load.go_on(&kv)?;
    }
    Ok(())
}

/// A hundred connections with half-sent requests; data that arrives while they are held must arrive once.
fn tcp_repair(kill_keeper: bool) -> Check {
    let kv = Kv::start(1);
    let mut load = Load::put(&kv, 200, 100)?;
    load.begin_half_request()?;
    let img = kv.dir.path().join("kv.mcr").display().to_string();
    let out = expect_mcr(0, &["dump", &kv.server.pid.to_string(), "-o", &img, "--tcp-repair"])?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(said.contains("100 connections recorded"), "{said}");
    kv.server.reap();
    if kill_keeper {
        self::kill_keeper(&img)?;
    } else {
        // Into held sockets: dropped there, and sent again by the clients' kernel.
        load.end_half_request_unanswered()?;
    }
    let done = expect_mcr(0, &["restore", &img, "--json"])?;
    ensure!(reported_pid(&done)? == kv.server.pid, "another pid");
    if kill_keeper {
        load.end_half_request()?;
    } else {
        load.answers_of_half_requests()?;
    }
    load.verify("1.0")?;
    load.go_on(&kv)
}

/// Kills the keeper of an image of ours, and waits for its end.
pub fn kill_keeper(img: &str) -> Check {
    let image = mcr_image::Image::open(std::path::Path::new(img)).map_err(|e| e.to_string())?;
    let keeper = process_with_argument(&image.meta().keeper_socket).ok_or("no keeper")?;
    // SAFETY: plain kill(2) and waitpid(2) of the keeper of our own image, which we inherit as a subreaper.
    unsafe {
        libc::kill(keeper, libc::SIGKILL);
        libc::waitpid(keeper, std::ptr::null_mut(), 0);
    }
    Ok(())
}

fn process_with_argument(argument: &str) -> Option<i32> {
    std::fs::read_dir("/proc").ok()?.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).find(
        |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|b| *b == 0).any(|a| a == argument.as_bytes())
        },
    )
}

fn leave_running() -> Check {
    let kv = Kv::start(1);
    let mut load = Load::put(&kv, 500, 5)?;
    for round in 0..20 {
        let img = kv.dir.path().join(format!("kv{round}.mcr")).display().to_string();
        let done =
            expect_mcr(0, &["dump", &kv.server.pid.to_string(), "-o", &img, "--leave-running", "--json"])?;
        ensure!(json(&done)?["schema_version"].is_u64(), "no schema_version");
        load.verify("1.0")?;
    }
    load.go_on(&kv)
}

fn inspect() -> Check {
    let kv = Kv::start(1);
    let _load = Load::put(&kv, 50, 3)?;
    let img = kv.dir.path().join("kv.mcr").display().to_string();
    expect_mcr(0, &["dump", &kv.server.pid.to_string(), "-o", &img, "--leave-running"])?;
    let text = |args: &[&str]| -> Result<String, String> {
        let mut all = vec!["inspect", img.as_str()];
        all.extend(args);
        Ok(String::from_utf8_lossy(&expect_mcr(0, &all)?.stdout).into_owned())
    };
    for (args, wants) in [
        (&["--maps"][..], &["[heap]", "[stack]", "libc"][..]),
        (&["--threads"], &["epoll_wait", "worker_main", "main"]),
        (&["--fds"], &["epoll", "timerfd", "kv.log", "127.0.0.1"]),
        (&["--object", "sessions->name"], &["client-2"]),
        (&["--object", "*config"], &["hello", "max_keys", "2000000"]),
        (&["--object", "nkeys"], &["42"]),
    ] {
        let got = text(args)?;
        for want in wants {
            ensure!(got.contains(want), "inspect {args:?}: no {want:?} in\n{got}");
        }
    }
    Ok(())
}
