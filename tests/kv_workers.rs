//! The bundled server with four equal threads that have thread-specific data: two updates in place under load,
//! every reply checked, and every thread asked whether it still has what is its own.

use crate::support::kv::{self, Client, Kv, binary, rules};
use crate::support::servers::under_load;
use crate::support::{Check, expect_mcr, reported_pid};
use crate::{Case, ensure};
use std::collections::BTreeSet;

const WORKERS: usize = 4;
const LOAD: usize = 6;
/// Each worker has three of them.
const RESTING: usize = 12;

pub fn cases() -> Vec<Case> {
    let case = |round| {
        Case::new(&format!("kv workers: v1 to v2 to v3 under load, round {round}"), || through(&[1, 2, 3]))
    };
    let mut v: Vec<Case> = (1..=3).map(case).collect();
    v.push(Case::new("kv workers: again and again to the same version", || through(&[2, 2, 2, 2])));
    v
}

fn tids(pid: i32) -> BTreeSet<i32> {
    let dir = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    dir.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// A worker can see its thread-specific data only itself: each of them is asked.
fn every_worker(resting: &mut [Client]) -> Check {
    let mut seen = BTreeSet::new();
    for (i, c) in resting.iter_mut().enumerate() {
        c.expect("SELFCHECK", "OK").map_err(|e| format!("resting client {i}: {e}"))?;
        let said = c.ask("POLLER")?;
        let worker = said.split_whitespace().next().unwrap_or_default().to_owned();
        let want = format!("poller={}", (i + 1) % WORKERS);
        ensure!(worker == want, "resting client {i} was served by {want}, now {said:?}");
        seen.insert(worker);
    }
    ensure!(seen.len() == WORKERS, "only {seen:?} answered");
    Ok(())
}

fn through(versions: &[u32]) -> Check {
    let kv = Kv::start_with_workers(versions[0], WORKERS);
    // Connections that rest, with state of their own; sessions are numbered from 1 and dealt out in turn.
    let mut resting: Vec<Client> = Vec::new();
    for i in 0..RESTING {
        let mut c = kv.connect();
        c.expect(&format!("NAME rest{i}"), "OK")?;
        c.expect(&format!("SET rest{i} value{i}"), "OK")?;
        resting.push(c);
    }
    every_worker(&mut resting)?;
    under_load(
        LOAD,
        |me, load| kv::count(&kv, me, load),
        |load| {
            for pair in versions.windows(2) {
                load.more(100)?;
                step(&kv, &mut resting, pair[0], pair[1])?;
                load.more(100)?;
                every_worker(&mut resting)?;
            }
            Ok(())
        },
    )?;
    // Whoever comes is dealt out as before, and whoever goes is counted.
    for i in 0..8 {
        let mut c = kv.connect();
        c.expect(&format!("SET fresh{i} {i}"), "OK")?;
        c.expect("SELFCHECK", "OK")?;
    }
    every_worker(&mut resting)
}

/// One update under load, with half a request in each resting connection.
fn step(kv: &Kv, resting: &mut [Client], from: u32, to: u32) -> Check {
    for c in resting.iter_mut() {
        c.send("GET re")?;
    }
    let (pid, threads) = (kv.server.pid, tids(kv.server.pid));
    let (id, new, toml) =
        (pid.to_string(), binary(to).display().to_string(), rules(to).display().to_string());
    let mut args = vec!["update", &id, "--to", &new, "--json"];
    if from != to {
        args.extend(["--rules", &toml]);
    }
    let done = expect_mcr(0, &args)?;
    ensure!(reported_pid(&done)? == pid, "another pid");
    let now = tids(pid);
    // Version 3 starts a second thread for jobs.
    let extra = usize::from(from < 3 && to == 3);
    ensure!(
        now.is_superset(&threads) && now.len() == threads.len() + extra,
        "threads {threads:?}, now {now:?}"
    );
    for (i, c) in resting.iter_mut().enumerate() {
        c.send(&format!("st{i}\n"))?;
        let got = c.line()?;
        ensure!(got == format!("value{i}"), "resting client {i}: {got:?}");
        let who = c.ask("WHOAMI")?;
        ensure!(who.contains(&format!("name=rest{i} ")), "resting client {i}: {who:?}");
    }
    resting[0].expect("VERSION", &format!("{to}.0"))
}
