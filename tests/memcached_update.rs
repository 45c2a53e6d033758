//! memcached, unprepared: four workers under load, changed in place to a build whose `conn` and `settings` differ.

use crate::support::servers::{Load, builds, under_load};
use crate::support::{Check, Server, expect_mcr, free_port, reported_pid, scratch};
use crate::{Case, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

pub fn cases(list: bool) -> Vec<Case> {
    // Listing the tests builds nothing.
    let reason = if list { None } else { builds::<2>("memcached").err() };
    vec![
        Case::new("memcached: four workers under load, there and back again", there_and_back).skip_if(reason),
    ]
}

/// A connection in the text protocol.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(port: u16) -> std::io::Result<Self> {
        let s = TcpStream::connect(("127.0.0.1", port))?;
        s.set_read_timeout(Some(Duration::from_secs(20)))?;
        s.set_nodelay(true)?;
        Ok(Self(BufReader::new(s)))
    }

    fn tell(&mut self, request: &str) -> Check {
        self.0.get_mut().write_all(request.as_bytes()).map_err(|e| format!("{request:?}: {e}"))
    }

    fn line(&mut self) -> Result<String, String> {
        let mut s = String::new();
        let n = self.0.read_line(&mut s).map_err(|e| e.to_string())?;
        ensure!(n > 0, "the connection was closed");
        Ok(s.trim_end().to_owned())
    }

    fn expect(&mut self, request: &str, reply: &str) -> Check {
        self.tell(request)?;
        let got = self.line()?;
        ensure!(got == reply, "{request:?}: expected {reply:?}, got {got:?}");
        Ok(())
    }

    fn get(&mut self, key: &str, value: &str) -> Check {
        self.expect(&format!("get {key}\r\n"), &format!("VALUE {key} 0 {}", value.len()))?;
        let mut got = vec![0; value.len() + 2];
        self.0.read_exact(&mut got).map_err(|e| e.to_string())?;
        ensure!(got == format!("{value}\r\n").as_bytes(), "{key} has another value");
        let end = self.line()?;
        ensure!(end == "END", "{key}: {end:?}");
        Ok(())
    }

    /// `stats WHAT` as lines without STAT.
    fn stats(&mut self, what: &str) -> Result<Vec<String>, String> {
        self.tell(&format!("stats {what}\r\n"))?;
        let mut out = Vec::new();
        loop {
            let l = self.line()?;
            match l.strip_prefix("STAT ") {
                Some(s) => out.push(s.to_owned()),
                None if l == "END" => return Ok(out),
                None => return Err(format!("stats {what}: {l:?}")),
            }
        }
    }
}

fn value(i: u64) -> String {
    format!("value {i} ").repeat(1 + i as usize % 40)
}

/// Counts as fast as it can; every reply is checked, so a lost or doubled one is seen. The longest wait in µs.
fn count(port: u16, me: usize, load: &Load) -> Result<u64, String> {
    let mut c = Client::connect(port).map_err(|e| e.to_string())?;
    c.expect(&format!("set counter{me} 0 0 1\r\n0\r\n"), "STORED")?;
    let (mut n, mut longest) = (0u64, 0u64);
    while load.goes_on() {
        let start = Instant::now();
        n += 1;
        c.expect(&format!("incr counter{me} 1\r\n"), &n.to_string())?;
        let key = format!("load{me}-{}", n % 300);
        let v = value(n % 300);
        c.expect(&format!("set {key} 0 0 {}\r\n{v}\r\n", v.len()), "STORED")?;
        c.get(&key, &v)?;
        longest = longest.max(start.elapsed().as_micros() as u64);
        load.got(3);
    }
    Ok(longest)
}

fn there_and_back() -> Check {
    let [(_, changed), (_, plain)] = builds("memcached")?;
    let dir = scratch();
    let port = free_port();
    let port_text = port.to_string();
    let server = Server::start(
        Command::new(&plain)
            .args(["-u", "root", "-l", "127.0.0.1", "-U", "0", "-t", "4", "-p", &port_text])
            .current_dir(dir.path()),
        None,
    );
    server.listens(port)?;
    // Connections that rest, with state of their own: half a request each.
    let mut resting: Vec<Client> =
        (0..20).map(|_| Client::connect(port)).collect::<Result<_, _>>().map_err(|e| e.to_string())?;
    for i in 0..2000u64 {
        let v = value(i);
        let c = &mut resting[i as usize % 20];
        c.expect(&format!("set key{i} 0 0 {}\r\n{v}\r\n", v.len()), "STORED")?;
    }
    let work = |me, load: &Load| count(port, me, load);
    under_load(6, work, |load| {
        for (round, to) in [&changed, &plain, &changed].into_iter().enumerate() {
            for (i, c) in resting.iter_mut().enumerate() {
                c.tell(&format!("get key{i}"))?;
            }
            load.more(60)?;
            let args = ["update", &server.pid.to_string(), "--to", &to.display().to_string(), "--json"];
            let done = expect_mcr(0, &args)?;
            ensure!(reported_pid(&done)? == server.pid, "another pid");
            for (i, c) in resting.iter_mut().enumerate() {
                let v = value(i as u64);
                c.expect("\r\n", &format!("VALUE key{i} 0 {}", v.len()))?;
                let mut rest = vec![0; v.len() + 7];
                c.0.read_exact(&mut rest).map_err(|e| e.to_string())?;
                ensure!(rest == format!("{v}\r\nEND\r\n").as_bytes(), "round {round}: key{i}");
            }
            inside(&mut resting[0], &server, port)?;
        }
        Ok(())
    })?;
    for i in 0..2000u64 {
        resting[i as usize % 20].get(&format!("key{i}"), &value(i))?;
    }
    // And all of it can go.
    resting[1].expect("flush_all\r\n", "OK")?;
    resting[2].expect("get key1\r\n", "END")
}

/// What the server says of itself: each connection once, on a descriptor of its own that the process has open.
fn inside(c: &mut Client, server: &Server, port: u16) -> Check {
    let conns = c.stats("conns")?;
    let mut fds: Vec<u32> = conns
        .iter()
        .filter_map(|l| {
            l.split_once(":addr tcp:127.0.0.1:").filter(|(_, a)| !a.starts_with(&port.to_string()))
        })
        .filter_map(|(fd, _)| fd.parse().ok())
        .collect();
    let all = fds.len();
    fds.sort_unstable();
    fds.dedup();
    ensure!(fds.len() == all && all == 26, "{all} connections on {} descriptors: {conns:?}", fds.len());
    for fd in fds {
        let link = std::fs::read_link(format!("/proc/{}/fd/{fd}", server.pid))
            .map_err(|e| format!("fd {fd}: {e}"))?;
        ensure!(link.to_string_lossy().starts_with("socket:"), "fd {fd} is {}", link.display());
    }
    let settings = c.stats("settings")?;
    for want in ["num_threads 4".to_owned(), format!("tcpport {port}"), "inter 127.0.0.1".into()] {
        ensure!(settings.contains(&want), "no {want:?} in {settings:?}");
    }
    Ok(())
}
