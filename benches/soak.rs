//! `cargo bench --bench soak [-- N]`: N updates (500) of the bundled server and a fifth as many of Redis in a row under
//! load. Every reply is checked; what would show that something piles up is printed now and then.
#![allow(missing_docs)]

#[path = "../tests/support/mod.rs"]
mod support;

/// The tests' macro needs a name for what a check returns.
pub use support::Check;

use std::path::Path;
use std::time::{Duration, Instant};
use support::kv::{self, Kv};
use support::redis::{self, Redis};
use support::servers::{Load, under_load};
use support::{expect_mcr, json, reported_pid};

const CLIENTS: usize = 6;

/// What `/proc/PID/status` says in KiB.
fn kib(pid: i32, name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default();
    line.split_whitespace().next().and_then(|w| w.parse().ok()).unwrap_or(0)
}

/// Updates of one process, and what became of it.
#[derive(Default)]
struct Row {
    frozen: Vec<u64>,
}

impl Row {
    fn step(&mut self, pid: i32, to: &Path, last: bool) -> Check {
        let done = expect_mcr(0, &["update", &pid.to_string(), "--to", &to.display().to_string(), "--json"])?;
        if reported_pid(&done)? != pid {
            return Err("another pid".into());
        }
        self.frozen.push(json(&done)?["frozen_us"].as_u64().ok_or("no frozen_us")?);
        let n = self.frozen.len();
        if last || matches!(n, 1 | 10) || n.is_multiple_of(50) {
            let mut recent: Vec<u64> = self.frozen.iter().rev().take(50).copied().collect();
            recent.sort_unstable();
            let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
            let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
            println!(
                "{n:>6} {:>9} {:>9} {:>6} {fds:>6} {:>12} {:>12}",
                kib(pid, "VmRSS:"),
                kib(pid, "VmSize:"),
                maps.lines().count(),
                recent[recent.len() / 2],
                recent[recent.len() - 1]
            );
        }
        Ok(())
    }
}

fn heading(what: &str) {
    println!("== {what}");
    println!("update   RSS KiB  Size KiB   maps    fds  stopped us  longest us (of the last 50)");
}

fn bundled(updates: usize) -> Check {
    heading("the bundled server with four workers, to the same version again");
    let kv = Kv::start_with_workers(2, 4);
    let to = kv::binary(2);
    let mut row = Row::default();
    under_load(
        CLIENTS,
        |me, load| kv::count(&kv, me, load),
        |load| {
            for n in 1..=updates {
                load.more(30)?;
                row.step(kv.server.pid, &to, n == updates)?;
            }
            load.more(30)
        },
    )
}

/// Counts in Redis.
fn count(r: &Redis, me: usize, load: &Load) -> Result<u64, String> {
    let mut c = r.connect();
    let (counter, key) = (format!("counter:{me}"), format!("list:{me}"));
    let (mut n, mut longest) = (0u64, Duration::ZERO);
    while load.goes_on() {
        n += 1;
        let text = n.to_string();
        let start = Instant::now();
        c.expect(&["INCR", &counter], &text)?;
        c.expect(&["RPUSH", &key, &text], &(n.min(101)).to_string())?;
        c.expect(&["LTRIM", &key, "-100", "-1"], "OK")?;
        longest = longest.max(start.elapsed());
        load.got(3);
    }
    c.expect(&["GET", &counter], &n.to_string())?;
    Ok(longest.as_micros() as u64)
}

fn redis_server(updates: usize) -> Check {
    let (old, new, _) = redis::pair()?;
    heading("redis, to the next release and back in turn");
    let r = Redis::start(&old);
    let mut row = Row::default();
    under_load(
        CLIENTS,
        |me, load| count(&r, me, load),
        |load| {
            for n in 1..=updates {
                load.more(30)?;
                row.step(r.server.pid, if n % 2 == 1 { &new } else { &old }, n == updates)?;
            }
            load.more(30)
        },
    )
}

fn main() {
    let given = std::env::args().skip(1).find_map(|a| a.parse().ok());
    let updates: usize = given.unwrap_or(500);
    let began = Instant::now();
    for r in [bundled(updates), redis_server(updates.div_ceil(5))] {
        if let Err(e) = r {
            println!("FAILED: {e}");
            std::process::exit(1);
        }
    }
    println!("{:.0} s", began.elapsed().as_secs_f64());
}
