//! `cargo bench`: what an update and a checkpoint cost, measured side by side in one run. Ratios and medians;
//! phases in microseconds. `cargo bench -- quick` leaves out the large sizes, `cargo bench -- throughput` what is not
//! named so.
#![allow(missing_docs)]

#[path = "../tests/support/mod.rs"]
mod support;

/// The tests' macro needs a name for what a check returns.
pub use support::Check;

use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use support::redis::Redis;
use support::{Server, kv, redis, run_mcr};

type Outcome = Result<(), String>;

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v.get(v.len() / 2).copied().unwrap_or(f64::NAN)
}

fn mcr(args: &[&str]) -> Result<Value, String> {
    let out = run_mcr(args);
    if !out.status.success() {
        return Err(format!(
            "mcr {}: {}\n{}",
            args.join(" "),
            out.status,
            String::from_utf8_lossy(&out.stderr)
        ));
    }
    serde_json::from_slice(&out.stdout).map_err(|e| format!("mcr {}: {e}", args.join(" ")))
}

/// Updates `pid` with statistics; hands back those and the new pid.
fn update(
    pid: i32,
    to: &Path,
    rules: Option<&Path>,
    dir: &Path,
    more: &[&str],
) -> Result<(Value, i32), String> {
    let stats = dir.join("stats.json");
    let (pid, to, file) = (pid.to_string(), to.display().to_string(), stats.display().to_string());
    let mut args = vec!["update", &pid, "--to", &to, "--json", "--stats", &file];
    args.extend(more);
    let rules = rules.map(|r| r.display().to_string());
    if let Some(r) = &rules {
        args.extend(["--rules", r]);
    }
    let said = mcr(&args)?;
    let text = std::fs::read_to_string(&stats).map_err(|e| e.to_string())?;
    let pid = said["pid"].as_i64().ok_or("no pid")? as i32;
    Ok((serde_json::from_str(&text).map_err(|e| e.to_string())?, pid))
}

/// What was measured of one server state.
#[derive(Default)]
struct Samples {
    in_place: Vec<Value>,
    /// The same with a process of its own, for comparison.
    beside: Vec<Value>,
    rss: (u64, u64),
}

fn of(stats: &[Value], field: &str) -> f64 {
    median(stats.iter().filter_map(|s| s[field].as_f64()).collect())
}

fn row(server: &str, connections: usize, keys: usize, s: &Samples) {
    let mut phases: Vec<String> = Vec::new();
    for p in s.in_place.last().and_then(|s| s["phases"].as_array()).into_iter().flatten() {
        let name = p["name"].as_str().unwrap_or("?");
        if p["frozen"].as_bool() == Some(true) && !name.starts_with("rehearsal") {
            phases.push(format!("{name} {:.0}", p["duration_us"].as_f64().unwrap_or(0.0)));
        }
    }
    let (pause, beside) = (of(&s.in_place, "frozen_us"), of(&s.beside, "frozen_us"));
    println!(
        "{server:<6} {connections:>5} conns {keys:>8} keys  pause {pause:>8.0} us, before it {:>7.0} us  \
         in place : --new-pid = {:.2}  RSS x{:.3}  [{}]",
        of(&s.in_place, "rehearsal_us"),
        pause / beside,
        s.rss.1 as f64 / s.rss.0.max(1) as f64,
        phases.join(", ")
    );
}

fn kv_rows(quick: bool) -> Outcome {
    let connections: &[usize] = if quick { &[0, 50] } else { &[0, 50, 1000] };
    let key_counts: &[usize] = if quick { &[0, 10_000] } else { &[0, 100_000] };
    for &n in connections {
        for &keys in key_counts {
            let mut all = Samples::default();
            for _ in 0..3 {
                let mut s = kv::Kv::start(1);
                let mut clients: Vec<_> = (0..n.max(1)).map(|_| s.connect()).collect();
                for i in 0..keys {
                    let c = i % clients.len();
                    clients[c].expect(&format!("SET key{i} value{i}"), "OK")?;
                }
                clients[0].expect("SELFCHECK", "OK")?;
                let before = s.server.rss_kib();
                let (new, dir) = (kv::binary(2), s.dir.path().to_owned());
                let (stats, pid) = update(s.server.pid, &new, Some(&kv::rules(2)), &dir, &[])?;
                s.server.becomes(pid);
                clients[0].expect("SELFCHECK", "OK")?;
                all.rss = (before, s.server.rss_kib());
                all.in_place.push(stats);
                let (stats, pid) = update(s.server.pid, &new, None, &dir, &["--new-pid"])?;
                s.server.becomes(pid);
                clients[0].expect("SELFCHECK", "OK")?;
                all.beside.push(stats);
            }
            row("kv", n, keys, &all);
        }
    }
    Ok(())
}

fn fill(r: &Redis, keys: usize) -> Outcome {
    let mut c = r.connect();
    let text =
        |i: usize| vec!["SET".to_owned(), format!("key:{i}"), format!("value-{i}-{}", "x".repeat(i % 64))];
    for from in (0..keys).step_by(50_000) {
        c.pipeline(&(from..(from + 50_000).min(keys)).map(text).collect::<Vec<_>>())?;
    }
    Ok(())
}

fn redis_rows(quick: bool) -> Outcome {
    let (old, new, version) = redis::pair()?;
    println!("redis to {version}");
    let connections: &[usize] = if quick { &[0, 50] } else { &[0, 50, 1000] };
    let sizes: &[usize] = if quick { &[0, 100_000] } else { &[0, 100_000, 1_000_000] };
    for &keys in sizes {
        for &n in connections {
            let mut all = Samples::default();
            for _ in 0..(if keys > 100_000 { 1 } else { 3 }) {
                let mut r = Redis::start(&old);
                fill(&r, keys)?;
                let mut clients: Vec<_> = (0..n).map(|_| r.connect()).collect();
                for c in &mut clients {
                    c.ask(&["PING"])?;
                }
                let before = r.server.rss_kib();
                let (stats, pid) = update(r.server.pid, &new, None, r.dir.path(), &[])?;
                r.server.becomes(pid);
                r.connect().expect(&["DBSIZE"], &keys.to_string())?;
                all.rss = (before, r.server.rss_kib());
                all.in_place.push(stats);
                let (stats, pid) = update(r.server.pid, &new, None, r.dir.path(), &["--new-pid"])?;
                r.server.becomes(pid);
                r.connect().expect(&["DBSIZE"], &keys.to_string())?;
                all.beside.push(stats);
            }
            row("redis", n, keys, &all);
        }
    }
    Ok(())
}

/// The same operations on an updated server and on a fresh one of the new version, in turn.
fn throughput() -> Outcome {
    let (old, new, _) = redis::pair()?;
    let keys = 20_000;
    let mut updated = Redis::start(&old);
    fill(&updated, keys)?;
    let (_, pid) = update(updated.server.pid, &new, None, updated.dir.path(), &[])?;
    updated.server.becomes(pid);
    let fresh = Redis::start(&new);
    fill(&fresh, keys)?;
    let ops: Vec<Vec<String>> = (0..100_000)
        .map(|i| {
            let k = format!("key:{}", (i * 7919) % keys);
            if i % 4 == 0 { vec!["SET".into(), k, format!("v{i}")] } else { vec!["GET".into(), k] }
        })
        .collect();
    let run = |r: &Redis| -> Result<f64, String> {
        let mut c = r.connect();
        let start = Instant::now();
        c.pipeline(&ops)?;
        Ok(ops.len() as f64 / start.elapsed().as_secs_f64())
    };
    run(&updated)?;
    run(&fresh)?;
    let mut ratios = Vec::new();
    for _ in 0..7 {
        let (a, b) = (run(&updated)?, run(&fresh)?);
        ratios.push(a / b);
    }
    println!("redis throughput, updated : fresh = {:.3} (median of 7 pairs)", median(ratios));
    Ok(())
}

/// Reads all private memory through /proc/PID/mem and writes it to a file: what any dump must at least do.
fn plain_copy(pid: i32, out: &Path) -> Result<Duration, String> {
    let start = Instant::now();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|e| e.to_string())?;
    let mem = File::open(format!("/proc/{pid}/mem")).map_err(|e| e.to_string())?;
    let mut file = File::create(out).map_err(|e| e.to_string())?;
    let mut buf = vec![0u8; 1 << 20];
    for line in maps.lines().filter(|l| l.contains("rw-p")) {
        let Some((range, _)) = line.split_once(' ') else { continue };
        let Some((a, b)) = range.split_once('-') else { continue };
        let (mut at, end) =
            (u64::from_str_radix(a, 16).unwrap_or(0), u64::from_str_radix(b, 16).unwrap_or(0));
        while at < end {
            let n = buf.len().min((end - at) as usize);
            let got = mem.read_at(&mut buf[..n], at).map_err(|e| e.to_string())?;
            file.write_all(&buf[..got]).map_err(|e| e.to_string())?;
            at += got as u64;
        }
    }
    file.sync_all().map_err(|e| e.to_string())?;
    Ok(start.elapsed())
}

fn dumps(quick: bool) -> Outcome {
    let dir = support::scratch();
    let exe = dir.path().join("bigmem");
    support::cc(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/live/bigmem.c")), &exe, &[])?;
    for mib in if quick { &[256][..] } else { &[256, 1024] } {
        let mut server =
            Server::start(Command::new(&exe).arg(mib.to_string()).current_dir("/"), Some("ready"));
        let (img, copy) = (dir.path().join("big.mcr"), dir.path().join("big.raw"));
        for level in ["0", "1"] {
            let (mut dump, mut restore, mut frozen, mut read) =
                (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            for _ in 0..3 {
                let plain = plain_copy(server.pid, &copy)?.as_secs_f64();
                let start = Instant::now();
                let mut sink = File::open(&copy).map_err(|e| e.to_string())?;
                let mut buf = vec![0u8; 1 << 20];
                while sink.read(&mut buf).map_err(|e| e.to_string())? > 0 {}
                let plain_read = start.elapsed().as_secs_f64();
                let image = img.display().to_string();
                let start = Instant::now();
                let said =
                    mcr(&["dump", &server.pid.to_string(), "-o", &image, "--compress", level, "--json"])?;
                dump.push(start.elapsed().as_secs_f64() / plain);
                frozen.push(said["frozen_us"].as_f64().unwrap_or(f64::NAN));
                server.reap();
                let start = Instant::now();
                let said = mcr(&["restore", &image, "--json"])?;
                restore.push(start.elapsed().as_secs_f64() / plain_read);
                read.push(start.elapsed().as_secs_f64());
                server.pid = said["pid"].as_i64().ok_or("no pid")? as i32;
            }
            let size = std::fs::metadata(&img).map_err(|e| e.to_string())?.len() >> 20;
            println!(
                "{mib} MiB, --compress {level}: dump {:.2} x plain copy (frozen {:.0} us), restore {:.2} x reading the copy ({:.3} s), image {size} MiB",
                median(dump),
                median(frozen),
                median(restore),
                median(read)
            );
        }
    }
    Ok(())
}

fn main() {
    let quick = std::env::args().any(|a| a == "quick");
    type Part = (&'static str, fn(bool) -> Outcome);
    let parts: [Part; 4] = [
        ("updates of the bundled server", kv_rows),
        ("updates of redis", redis_rows),
        ("throughput after an update", |_| throughput()),
        ("dump and restore", dumps),
    ];
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|a| !a.starts_with("--") && a != "quick").collect();
    for (name, run) in parts {
        if !wanted.is_empty() && !wanted.iter().any(|w| name.contains(w.as_str())) {
            continue;
        }
        println!("== {name}");
        if let Err(e) = run(quick) {
            println!("not measured: {e}");
        }
    }
}
