//! Redis between two real releases, unprepared: 100,000 keys of every type and fifty connections in the
//! middle of what they were doing.

use crate::support::redis::{Client, Redis, Reply, broken, command, pair};
use crate::support::{Check, Server, expect_mcr, json, mcr, reported_pid};
use crate::{Case, ensure};
use std::path::Path;
use std::process::{Command, Stdio};

pub fn cases(listing: bool) -> Vec<Case> {
    // Fetching and building is for a run, not for a listing.
    let skip = if listing { None } else { pair().err().map(|e| format!("no Redis pair: {e}")) };
    [
        Case::new("redis: dump and restore", plain as fn() -> Check),
        Case::new("redis: to the next release through an image", || updated(Way::Image, 1)),
        Case::new("redis: to the next release live", || updated(Way::Live, 1)),
        Case::new("redis: three live updates in a row", || updated(Way::Live, 3)),
        Case::new("redis: to a build that crashes on a request, under trial", crashes),
    ]
    .into_iter()
    .map(|c| c.skip_if(skip.clone()))
    .collect()
}

#[derive(Clone, Copy)]
enum Way {
    Image,
    Live,
}

/// Fifty connections, each somewhere in its life.
struct Sessions {
    plain: Vec<Client>,
    multi: Client,
    subscribed: Client,
    blocked: Client,
    half: Client,
    digest: String,
}

fn words(s: &str) -> Vec<String> {
    s.split(' ').map(str::to_owned).collect()
}

fn fill(c: &mut Client, keys: usize) -> Check {
    let mut all = Vec::with_capacity(keys);
    for i in 0..keys {
        all.push(words(&match i % 8 {
            0 => format!("SET str:{i} {}", "v".repeat(1 + i % 200)),
            1 => format!("SET int:{i} {i}"),
            2 => format!("RPUSH list:{i} a b c {} e", "l".repeat(i % 100 + 1)),
            3 => format!("HSET hash:{i} f1 v1 f2 {} f3 3", "h".repeat(i % 120 + 1)),
            4 => format!("SADD set:{i} m1 m2 m{i} 17"),
            5 => format!("SADD ints:{i} 1 2 3 {i}"),
            6 => format!("ZADD zset:{i} 1 one 2.5 two {i} many"),
            _ => format!("XADD stream:{i} 1-{} field value{i}", i + 1),
        }));
        if i % 1000 == 0 {
            // A few big ones, past the compact encodings.
            for j in 0..300 {
                all.push(words(&format!("HSET bighash:{i} field{j} {}", "b".repeat(80))));
                all.push(words(&format!("ZADD bigz:{i} {j} member{j}")));
                all.push(words(&format!("SADD bigset:{i} element-number-{j}")));
                all.push(words(&format!("RPUSH biglist:{i} {}", "q".repeat(60))));
            }
        }
        if i % 16 == 0 {
            all.push(words(&format!("EXPIRE str:{i} 100000")));
        }
    }
    c.pipeline(&all)
}

impl Sessions {
    fn open(r: &Redis, keys: usize) -> Result<Sessions, String> {
        let mut first = r.connect();
        fill(&mut first, keys)?;
        first.expect(&["EVAL", "return redis.call('incr', KEYS[1])", "1", "scripted"], "1")?;
        let mut plain = vec![first];
        for i in 0..45 {
            let mut c = r.connect();
            c.expect(&["CLIENT", "SETNAME", &format!("c{i}")], "OK")?;
            c.expect(&["SELECT", "0"], "OK")?;
            plain.push(c);
        }
        let mut multi = r.connect();
        multi.expect(&["MULTI"], "OK")?;
        multi.expect(&["SET", "from-multi", "yes"], "QUEUED")?;
        multi.expect(&["INCR", "multi-counter"], "QUEUED")?;
        let mut subscribed = r.connect();
        subscribed.ask(&["SUBSCRIBE", "news"])?;
        let mut blocked = r.connect();
        blocked.send(&["BLPOP", "nothing-yet", "0"])?;
        let mut half = r.connect();
        half.send_raw(b"*3\r\n$3\r\nSET\r\n$4\r\nha")?;
        let mut s = Sessions { plain, multi, subscribed, blocked, half, digest: String::new() };
        // The server has seen all that was sent once it has answered on a later connection and says so itself.
        for _ in 0..2000 {
            if s.plain[0].ask(&["CLIENT", "LIST"])?.text().contains("cmd=blpop") {
                break;
            }
        }
        s.digest = s.plain[0].ask(&["DEBUG", "DIGEST"])?.text();
        Ok(s)
    }

    fn verify(&mut self, version: Option<&str>) -> Check {
        let digest = self.plain[0].ask(&["DEBUG", "DIGEST"])?.text();
        ensure!(digest == self.digest, "DEBUG DIGEST was {}, is {digest}", self.digest);
        if let Some(v) = version {
            let info = self.plain[0].ask(&["INFO", "server"])?.text();
            ensure!(info.contains(&format!("redis_version:{v}\r")), "INFO says: {info}");
        }
        for (i, c) in self.plain.iter_mut().enumerate().skip(1) {
            c.expect(&["CLIENT", "GETNAME"], &format!("c{}", i - 1))?;
            c.expect(&["PING"], "PONG")?;
        }
        Ok(())
    }

    /// Every connection goes on where it was.
    fn go_on(&mut self) -> Check {
        let multi = self.multi.ask(&["EXEC"])?.text();
        ensure!(multi.starts_with("OK "), "EXEC gave {multi:?}");
        self.multi.expect(&["GET", "from-multi"], "yes")?;
        self.plain[1].expect(&["PUBLISH", "news", "flash"], "1")?;
        let news = self.subscribed.reply()?.text();
        ensure!(news == "message news flash", "the subscriber got {news:?}");
        self.plain[2].expect(&["RPUSH", "nothing-yet", "here"], "1")?;
        let popped = self.blocked.reply()?.text();
        ensure!(popped == "nothing-yet here", "BLPOP gave {popped:?}");
        self.half.send_raw(b"lf\r\n$3\r\nyes\r\n")?;
        let set = self.half.reply()?;
        ensure!(set == Reply::Simple("OK".into()), "the half command gave {set:?}");
        self.half.expect(&["GET", "half"], "yes")?;
        let c = &mut self.plain[3];
        c.expect(&["DEL", "from-multi", "multi-counter", "half"], "3")?;
        // Ready for another round.
        self.multi.expect(&["MULTI"], "OK")?;
        self.multi.expect(&["SET", "from-multi", "yes"], "QUEUED")?;
        self.multi.expect(&["INCR", "multi-counter"], "QUEUED")?;
        self.blocked.send(&["BLPOP", "nothing-yet", "0"])?;
        self.half.send_raw(b"*3\r\n$3\r\nSET\r\n$4\r\nha")?;
        for _ in 0..2000 {
            if self.plain[0].ask(&["CLIENT", "LIST"])?.text().contains("cmd=blpop") {
                break;
            }
        }
        self.digest = self.plain[0].ask(&["DEBUG", "DIGEST"])?.text();
        Ok(())
    }

    /// 200,000 operations on old and new keys, a saved file that a fresh server loads, and an empty end.
    fn stress(&mut self, r: &Redis, binary: &Path, keys: usize) -> Check {
        let mut ops = Vec::new();
        let mut x = 12345u64;
        for n in 0..200_000usize {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let i = (x >> 33) as usize % keys;
            ops.push(words(&match (x >> 20) % 10 {
                0 => format!("DEL str:{i} int:{i} list:{i} hash:{i} set:{i} ints:{i} zset:{i} stream:{i}"),
                1 => format!("SET str:new{n} {}", "n".repeat(n % 500 + 1)),
                2 => format!("APPEND str:new{i} {}", "a".repeat(n % 64 + 1)),
                3 => format!("HSET hash:new{i} f{n} {n} g {}", "z".repeat(n % 90)),
                4 => format!("RPUSH list:new{} {n} {}", i % 100, "r".repeat(n % 70)),
                5 => format!("LPOP list:new{}", i % 100),
                6 => format!("ZADD zset:new{} {n} m{}", i % 50, n % 700),
                7 => format!("GET str:{i}"),
                8 => format!("HDEL bighash:{} field{}", i / 1000 * 1000, n % 300),
                _ => format!("SREM bigset:{} element-number-{}", i / 1000 * 1000, n % 300),
            }));
        }
        // Empty words would be empty arguments: those are legal, but not what is meant.
        for o in &mut ops {
            o.retain(|w| !w.is_empty());
            if o[0] == "HSET" && o.len() % 2 == 1 {
                o.push("0".into());
            }
        }
        self.plain[4].pipeline(&ops)?;
        let digest = self.plain[0].ask(&["DEBUG", "DIGEST"])?.text();
        let c = &mut self.plain[5];
        let before = c.ask(&["LASTSAVE"])?;
        // LASTSAVE counts seconds: the save must end in a later one.
        std::thread::sleep(std::time::Duration::from_millis(1100));
        ensure!(matches!(c.ask(&["BGSAVE"])?, Reply::Simple(_)), "BGSAVE was refused");
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while c.ask(&["LASTSAVE"])? == before {
            ensure!(std::time::Instant::now() < end, "BGSAVE does not end");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let dir = crate::support::scratch();
        std::fs::copy(r.dir.path().join("dump.rdb"), dir.path().join("dump.rdb"))
            .map_err(|e| format!("dump.rdb: {e}"))?;
        let port = crate::support::free_port();
        let fresh = Redis { server: Server::start(&mut command(binary, port, dir.path()), None), port, dir };
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let loaded = loop {
            // DEBUG answers while the file is still being read; DBSIZE does not.
            if let Ok(mut c) = Client::try_connect(port)
                && let Ok(Reply::Int(_)) = c.ask(&["DBSIZE"])
            {
                break c.ask(&["DEBUG", "DIGEST"])?.text();
            }
            ensure!(std::time::Instant::now() < end, "the fresh server does not answer");
            std::thread::sleep(std::time::Duration::from_millis(20));
        };
        ensure!(loaded == digest, "the saved file holds {loaded}, the server {digest}");
        drop(fresh);
        self.plain[6].expect(&["FLUSHALL"], "OK")?;
        self.plain[7].expect(&["DBSIZE"], "0")?;
        self.plain[8].expect(&["SET", "after", "all"], "OK")?;
        self.plain[9].expect(&["GET", "after"], "all")
    }
}

const KEYS: usize = 100_000;

fn plain() -> Check {
    let (old, _, _) = pair()?;
    let r = Redis::start(&old);
    let mut s = Sessions::open(&r, KEYS)?;
    let img = r.dir.path().join("redis.mcr").display().to_string();
    expect_mcr(0, &["dump", &r.server.pid.to_string(), "-o", &img])?;
    r.server.reap();
    let done = expect_mcr(0, &["restore", &img, "--json"])?;
    ensure!(reported_pid(&done)? == r.server.pid, "another pid");
    s.verify(None)?;
    s.go_on()?;
    s.stress(&r, &old, KEYS)
}

fn updated(way: Way, times: usize) -> Check {
    let (old, new, version) = pair()?;
    let mut r = Redis::start(&old);
    let mut s = Sessions::open(&r, KEYS)?;
    for n in 0..times {
        let (to, v) = if n % 2 == 0 { (&new, Some(version.as_str())) } else { (&old, None) };
        let to = to.display().to_string();
        let pid = r.server.pid.to_string();
        let done = match way {
            Way::Live => expect_mcr(0, &["update", &pid, "--to", &to, "--json"])?,
            Way::Image => {
                let img = r.dir.path().join("redis.mcr").display().to_string();
                let out = r.dir.path().join("redis-new.mcr").display().to_string();
                expect_mcr(0, &["dump", &pid, "-o", &img])?;
                r.server.reap();
                expect_mcr(0, &["transform", &img, "--to", &to, "-o", &out])?;
                expect_mcr(0, &["restore", &out, "--json"])?
            }
        };
        let now = reported_pid(&done)?;
        match way {
            Way::Live => r.server.becomes(now),
            Way::Image => r.server.pid = now,
        }
        s.verify(v)?;
        s.go_on()?;
    }
    s.stress(&r, &new, KEYS)
}

/// The new version is healthy until somebody asks for the fields of a string. What is told is that, and the old
/// state is there to go on with.
fn crashes() -> Check {
    let (old, new) = (pair()?.0, broken()?.display().to_string());
    let mut r = Redis::start(&old);
    fill(&mut r.connect(), 1000)?;
    let mut c = r.connect();
    c.expect(&["SET", "text", "no hash"], "OK")?;
    let before = c.ask(&["DEBUG", "DIGEST"])?.text();
    c.expect(&["HMGET", "text", "field"], WRONG_TYPE)?;
    let (pid, kept) = (r.server.pid, r.dir.path().join("kept"));
    let engine = Command::new(mcr())
        .args(["update", &pid.to_string(), "--to", &new, "--json", "--trial", "60"])
        .args(["--health", "test -d /proc/$MCR_PID/fd", "--keep", &kept.display().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let exe = format!("/proc/{pid}/exe");
    while r.server.alive() && std::fs::read_link(&exe).is_ok_and(|e| e != Path::new(&new)) {
        std::thread::yield_now();
    }
    ensure!(c.ask(&["DEBUG", "DIGEST"])?.text() == before, "another digest");
    c.send(&["HMGET", "text", "field"])?;
    let out = engine.wait_with_output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(out.status.code() == Some(4), "expected exit 4, got {}: {said}", out.status);
    // "Unknown hash encoding", and abort(3).
    let image = kept.join("before.mcr").display().to_string();
    for want in ["signal 6 (SIGABRT)".to_owned(), format!("mcr restore {image} --drop-connections")] {
        ensure!(said.contains(&want), "no {want:?} in {said}");
    }
    let trial = &json(&out)?["trial"];
    ensure!(trial["healthy"] == false && trial["seconds"] == 60.0, "trial: {trial}");
    // What was kept is the old version as it was: its state goes on.
    r.server.reap();
    let done = expect_mcr(0, &["restore", &image, "--drop-connections", "--json"])?;
    r.server.pid = reported_pid(&done)?;
    let mut c = r.connect();
    ensure!(c.ask(&["DEBUG", "DIGEST"])?.text() == before, "another digest after the restore");
    c.expect(&["HMGET", "text", "field"], WRONG_TYPE)
}

const WRONG_TYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";
