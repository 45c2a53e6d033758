//! Updates of the bundled server: through an image and live, in chains, with the heap stressed afterwards.

use crate::support::kv::{Client, Kv, binary, rules};
use crate::support::{Check, expect_mcr, json, reported_pid};
use crate::{Case, ensure};

pub fn cases() -> Vec<Case> {
    let mut v = vec![
        Case::new("kv: v1 to v2 through an image", || offline(1, 2)),
        Case::new("kv: v1 to v2 live", || live(&[1, 2])),
        Case::new("kv: v1 to v2 to v3 live", || live(&[1, 2, 3])),
        Case::new("kv: three updates in a row to the same version", || live(&[2, 2, 2, 2])),
        Case::new("kv: v2 to v3 through an image", || offline(2, 3)),
        Case::new("kv: dry run leaves the server alone", dry_run),
        Case::new("kv: --json and --stats of an update", stats),
        Case::new("kv: refused without the rule that names the renamed field", needs_rule),
    ];
    for seed in 1..=5 {
        v.push(Case::new(&format!("kv: malloc for good after a live update, seed {seed}"), move || {
            malloc_stress(seed)
        }));
    }
    v
}

/// Clients with state of every kind, and what the server must say about each later on.
pub struct Load {
    clients: Vec<Client>,
    keys: usize,
    requests: Vec<u64>,
    jobs: u64,
}

impl Load {
    pub fn put(kv: &Kv, keys: usize, n: usize) -> Result<Load, String> {
        let mut clients: Vec<Client> = (0..n).map(|_| kv.connect()).collect();
        let mut requests = vec![0u64; n];
        for i in 0..keys {
            let c = i % n;
            clients[c].expect(&format!("SET key{i} value-{i}-{}", "x".repeat(i % 90)), "OK")?;
            requests[c] += 1;
        }
        for i in (0..keys).step_by(7) {
            clients[0].expect(&format!("DEL key{i}"), "OK")?;
            requests[0] += 1;
        }
        let mut load = Load { clients, keys, requests, jobs: 0 };
        for i in 0..n {
            load.tell(i, &format!("NAME client-{i}"), "OK")?;
            if i % 3 == 1 {
                load.tell(i, "MODE upper", "OK")?;
            }
            load.tell(i, &format!("WORK {}", i + 1), "OK")?;
            load.jobs += 1;
        }
        Ok(load)
    }

    fn tell(&mut self, i: usize, request: &str, reply: &str) -> Check {
        self.requests[i] += 1;
        let got = self.clients[i].ask(request)?;
        ensure!(got.eq_ignore_ascii_case(reply), "client {i}: {request}: expected {reply:?}, got {got:?}");
        Ok(())
    }

    /// Half a request, to be completed on the other side.
    pub fn begin_half_request(&mut self) -> Check {
        self.clients[0].send("GE")
    }

    pub fn end_half_request(&mut self) -> Check {
        self.end_half_request_unanswered()?;
        self.answers_of_half_requests()
    }

    pub fn end_half_request_unanswered(&mut self) -> Check {
        self.clients[0].send("T key1\n")?;
        self.requests[0] += 1;
        Ok(())
    }

    pub fn answers_of_half_requests(&mut self) -> Check {
        let got = self.clients[0].line()?;
        ensure!(got == format!("value-1-{}", "x"), "the half request gave {got:?}");
        Ok(())
    }

    /// Everything still there, over the connections of before; and the server's own opinion.
    pub fn verify(&mut self, version: &str) -> Check {
        for i in 0..self.clients.len() {
            self.tell(i, "SELFCHECK", "OK")?;
            let who = self.clients[i].ask("WHOAMI")?.to_lowercase();
            self.requests[i] += 1;
            for want in [
                format!("name=client-{i} "),
                format!("mode={} ", if i % 3 == 1 { "upper" } else { "plain" }),
                "last=selfcheck ".into(),
                format!("nreq={} ", self.requests[i]),
            ] {
                ensure!(who.contains(&want), "client {i}: no {want:?} in {who:?}");
            }
            self.tell(i, "VERSION", version)?;
        }
        for i in 0..self.keys {
            let c = i % self.clients.len();
            let want = if i % 7 == 0 { "NONE".into() } else { format!("value-{i}-{}", "x".repeat(i % 90)) };
            self.tell(c, &format!("GET key{i}"), &want)?;
        }
        // Jobs are done by another thread: ask until they are, the last reply decides.
        let sum: u64 = (1..=self.jobs).map(|x| x * x).sum();
        let want = format!("done={} sum={sum}", self.jobs);
        let mut got = String::new();
        for _ in 0..2000 {
            got = self.clients[0].ask("JOBS")?;
            self.requests[0] += 1;
            if got == want {
                break;
            }
        }
        ensure!(got == want, "jobs: expected {want:?}, got {got:?}");
        Ok(())
    }

    /// The worker still gets its work, new clients come and go, ticks go on.
    pub fn go_on(&mut self, kv: &Kv) -> Check {
        self.tell(0, &format!("WORK {}", self.jobs + 1), "OK")?;
        self.jobs += 1;
        for i in 0..20 {
            let mut c = kv.connect();
            c.expect(&format!("SET fresh{i} {i}"), "OK")?;
            c.expect(&format!("GET fresh{i}"), &i.to_string())?;
            c.expect(&format!("DEL fresh{i}"), "OK")?;
            c.expect("SELFCHECK", "OK")?;
        }
        let first: u64 = self.clients[0].ask("TICKS")?.parse().map_err(|e| format!("TICKS: {e}"))?;
        self.requests[0] += 1;
        let mut later = first;
        for _ in 0..20_000 {
            later = self.clients[0].ask("TICKS")?.parse().map_err(|e| format!("TICKS: {e}"))?;
            self.requests[0] += 1;
            if later > first {
                break;
            }
        }
        ensure!(later > first, "the timer stands still at {first}");
        Ok(())
    }
}

fn version(v: u32) -> String {
    format!("{v}.0")
}

/// Arguments that lead from `from` to `to`.
fn rules_for(from: u32, to: u32) -> Vec<String> {
    if from == to { vec![] } else { vec!["--rules".into(), rules(to).display().to_string()] }
}

fn offline(from: u32, to: u32) -> Check {
    let mut kv = Kv::start(from);
    let mut load = Load::put(&kv, 500, 7)?;
    load.begin_half_request()?;
    let img = kv.dir.path().join("kv.mcr").display().to_string();
    let out = kv.dir.path().join("kv-new.mcr").display().to_string();
    expect_mcr(0, &["dump", &kv.server.pid.to_string(), "-o", &img])?;
    kv.server.reap();
    let new = binary(to).display().to_string();
    let mut args = vec!["transform".to_owned(), img, "--to".into(), new, "-o".into(), out.clone()];
    args.extend(rules_for(from, to));
    expect_mcr(0, &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    let done = expect_mcr(0, &["restore", &out, "--json"])?;
    kv.server.pid = reported_pid(&done)?;
    load.end_half_request()?;
    load.verify(&version(to))?;
    load.go_on(&kv)?;
    load.verify(&version(to))
}

pub fn update(kv: &mut Kv, from: u32, to: u32, extra: &[&str]) -> Result<std::process::Output, String> {
    let pid = kv.server.pid.to_string();
    let new = binary(to).display().to_string();
    let mut args = vec!["update".to_owned(), pid, "--to".into(), new, "--json".into()];
    args.extend(rules_for(from, to));
    args.extend(extra.iter().map(|s| (*s).to_owned()));
    expect_mcr(0, &args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn live(versions: &[u32]) -> Check {
    let mut kv = Kv::start(versions[0]);
    let mut load = Load::put(&kv, 500, 7)?;
    for pair in versions.windows(2) {
        load.begin_half_request()?;
        let done = update(&mut kv, pair[0], pair[1], &[])?;
        kv.server.becomes(reported_pid(&done)?);
        load.end_half_request()?;
        load.verify(&version(pair[1]))?;
        load.go_on(&kv)?;
        load.verify(&version(pair[1]))?;
    }
    Ok(())
}

fn malloc_stress(seed: u32) -> Check {
    let mut kv = Kv::start(1);
    let mut load = Load::put(&kv, 4000, 5)?;
    let done = update(&mut kv, 1, 2, &[])?;
    kv.server.becomes(reported_pid(&done)?);
    load.verify("2.0")?;
    let mut c = kv.connect();
    for round in 0..8 {
        let said = c.ask(&format!("CHURN {}", seed * 100 + round))?;
        ensure!(said.starts_with("freed="), "CHURN said {said:?}");
        c.expect("SELFCHECK", "OK")?;
        for i in 0..400 {
            c.expect(&format!("SET new{round}-{i} {}", "y".repeat(1 + (i * 37) % 300)), "OK")?;
        }
        c.expect("SELFCHECK", "OK")?;
    }
    c.expect("FLUSH", "OK")?;
    c.expect("SELFCHECK", "OK")?;
    c.expect("COUNT", "0")
}

fn dry_run() -> Check {
    let mut kv = Kv::start(1);
    let mut load = Load::put(&kv, 200, 4)?;
    let pid = kv.server.pid;
    for _ in 0..5 {
        update(&mut kv, 1, 2, &["--dry-run"])?;
        ensure!(kv.server.pid == pid && kv.server.alive(), "the old server is gone");
        load.verify("1.0")?;
    }
    load.go_on(&kv)
}

fn stats() -> Check {
    let mut kv = Kv::start(1);
    let mut load = Load::put(&kv, 50, 2)?;
    let file = kv.dir.path().join("stats.json");
    let done = update(&mut kv, 1, 2, &["--stats", &file.display().to_string()])?;
    let said = json(&done)?;
    kv.server.becomes(reported_pid(&done)?);
    ensure!(said["schema_version"].as_u64().is_some(), "no schema_version in {said}");
    let text = std::fs::read_to_string(&file).map_err(|e| format!("--stats: {e}"))?;
    let stats: serde_json::Value = serde_json::from_str(&text).map_err(|e| format!("--stats: {e}"))?;
    ensure!(stats["frozen_us"].as_u64().is_some_and(|us| us > 0), "no frozen_us in {stats}");
    ensure!(stats["phases"].as_array().is_some_and(|p| p.len() > 3), "no phases in {stats}");
    load.verify("2.0")
}

fn needs_rule() -> Check {
    let kv = Kv::start(2);
    let mut load = Load::put(&kv, 50, 3)?;
    let new = binary(3).display().to_string();
    let out = crate::support::run_mcr(&["update", &kv.server.pid.to_string(), "--to", &new]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(matches!(out.status.code(), Some(1 | 5)), "expected a refusal, got {}: {said}", out.status);
    ensure!(said.contains("session"), "the refusal does not name the type: {said}");
    ensure!(kv.server.alive(), "the old server is gone");
    load.verify("2.0")
}
