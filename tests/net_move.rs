//! Connections that move to another network namespace. The namespaces have no names and the interfaces live in
//! them: both are gone when the last descriptor of this test is closed, however it ends.

use crate::support::{Check, Server, cc, expect_mcr, reported_pid, run_mcr, scratch};
use crate::{Case, ensure};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const V4: usize = 20;
const V6: usize = 4;
const BIG: usize = 20_000;
const SERVER4: &str = "10.231.0.1";
const SERVER6: &str = "fd31::1";
const PORT: u16 = 7777;

pub fn cases() -> Vec<Case> {
    let name = "tcp-repair: 24 connections move to another network namespace, every byte once";
    let ended = "tcp-repair: an IPv6 connection that its peer has ended is refused by name, nothing touched";
    vec![Case::new(name, moved).skip_if(unavailable()), Case::new(ended, ended_ipv6).skip_if(unavailable())]
}

fn unavailable() -> Option<String> {
    let ip = Command::new("ip").arg("-V").output().is_ok_and(|o| o.status.success());
    if !ip {
        return Some("ip(8) is not installed".to_owned());
    }
    Net::new().and_then(|n| n.ip("link set lo up")).err().map(|e| format!("no network namespaces: {e}"))
}

/// A network namespace that lives as long as this and the sockets made in it.
struct Net(File);

impl Net {
    fn new() -> Result<Net, String> {
        let made = std::thread::spawn(|| {
            // SAFETY: unshare(2) of the network namespace of this thread, which ends at once.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
            File::open("/proc/thread-self/ns/net")
        });
        made.join().map_err(|_| "unshare: panic")?.map(Net).map_err(|e| format!("unshare: {e}"))
    }

    /// Runs `f` on a thread that is in the namespace; processes that it starts are in it, too.
    fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, String> {
        std::thread::scope(|s| {
            let inside = s.spawn(|| {
                // SAFETY: setns(2) of this thread, which ends with `f`.
                if unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
                    return Err(format!("setns: {}", std::io::Error::last_os_error()));
                }
                Ok(f())
            });
            inside.join().map_err(|_| "panic inside the namespace".to_owned())?
        })
    }

    fn ip(&self, args: &str) -> Check {
        let out = self.run(|| Command::new("ip").args(args.split(' ')).output())?;
        let out = out.map_err(|e| format!("ip: {e}"))?;
        ensure!(out.status.success(), "ip {args}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    }

    /// A pair of interfaces, `mcr0` here and `mcr0` in `other`, both down.
    fn pair(&self, other: &Net) -> Check {
        let path = format!("/proc/{}/fd/{}", std::process::id(), other.0.as_raw_fd());
        self.ip(&format!("link add mcr0 type veth peer name mcr0 netns {path}"))
    }

    fn up(&self, last: u8) -> Check {
        self.ip("link set lo up")?;
        self.ip("link set mcr0 up")?;
        self.ip(&format!("addr add 10.231.0.{last}/24 dev mcr0"))?;
        self.ip(&format!("addr add fd31::{last}/64 dev mcr0 nodad"))
    }
}

struct Peer {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Peer {
    fn connect(address: &str) -> Result<Peer, String> {
        let stream = TcpStream::connect((address, PORT)).map_err(|e| format!("connect {address}: {e}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(60))).map_err(|e| e.to_string())?;
        stream.set_nodelay(true).map_err(|e| e.to_string())?;
        let reader = BufReader::new(stream.try_clone().map_err(|e| e.to_string())?);
        Ok(Peer { stream, reader })
    }

    fn send(&mut self, text: &str) -> Check {
        self.stream.write_all(text.as_bytes()).map_err(|e| format!("send: {e}"))
    }

    fn hear(&mut self, want: &str) -> Check {
        let mut line = String::new();
        self.reader.read_line(&mut line).map_err(|e| format!("waiting for {want:.60}: {e}"))?;
        let got = line.trim_end();
        ensure!(got == want, "expected {want:.60}, got {got:.60} ({} and {} bytes)", want.len(), got.len());
        Ok(())
    }
}

fn start(a: &Net, dir: &Path) -> Result<Server, String> {
    let exe = dir.join("echo");
    cc(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/live/echo.c"), &exe, &[])?;
    a.run(|| Server::start(Command::new(&exe).arg(PORT.to_string()).current_dir("/"), Some("ready")))
}

fn moved() -> Check {
    let dir = scratch();
    let (a, b, c) = (Net::new()?, Net::new()?, Net::new()?);
    a.pair(&b)?;
    a.up(1)?;
    b.up(2)?;
    let server = start(&a, dir.path())?;
    let mut peers = b.run(|| {
        let of = |address, n| (0..n).map(move |_| Peer::connect(address));
        of(SERVER4, V4).chain(of(SERVER6, V6)).collect::<Result<Vec<_>, _>>()
    })??;
    let late = "late ".repeat(500);
    for (i, p) in peers.iter_mut().enumerate() {
        p.send(&format!("hello {i}\n"))?;
        p.hear(&format!("= hello {i}"))?;
        match i % 4 {
            // Not read by the server: whole lines in its receive queue.
            0 => {
                p.send("stop\n")?;
                p.hear("= stop")?;
                p.send(&format!("{late}\n{late}\n"))?;
            }
            // Not read by the client yet.
            1 => p.send(&format!("big {BIG}\n"))?,
            // A request of which the end is missing.
            2 => p.send("half of")?,
            // The client has ended its side, and the server does not read that yet.
            _ if i < V4 => {
                p.send("stop\n")?;
                p.hear("= stop")?;
                p.send("last\n")?;
                p.stream.shutdown(Shutdown::Write).map_err(|e| e.to_string())?;
            }
            _ => {}
        }
    }
    let img = dir.path().join("net.mcr").display().to_string();
    let out = a.run(|| expect_mcr(0, &["dump", &server.pid.to_string(), "-o", &img, "--tcp-repair"]))??;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(said.contains(&format!("{} connections recorded", V4 + V6)), "{said}");
    server.reap();
    crate::restore_plain::kill_keeper(&img)?;
    // The first link goes; the other end of the second one stays down until the server runs again.
    a.ip("link del mcr0")?;
    c.pair(&b)?;
    c.up(1)?;
    // Requests go on meanwhile: the kernel of the clients keeps them.
    for (_, p) in peers.iter_mut().enumerate().filter(|(i, _)| i % 4 == 2) {
        p.send(" it\n")?;
    }
    let done = c.run(|| expect_mcr(0, &["restore", &img, "--json"]))??;
    ensure!(reported_pid(&done)? == server.pid, "another pid");
    b.up(2)?;
    let big: String = (0..BIG).map(|i| char::from(b'a' + (i % 23) as u8)).collect();
    let told = |i: usize, e: String| format!("connection {i} of {}: {e}", V4 + V6);
    // A connection that is not stopped lets the others go on.
    peers[2].hear("= half of it").map_err(|e| told(2, e))?;
    peers[2].send("go\n")?;
    peers[2].hear("= go").map_err(|e| told(2, e))?;
    for (i, p) in peers.iter_mut().enumerate() {
        let mut check = || match i % 4 {
            0 => (0..2).try_for_each(|_| p.hear(format!("= {late}").trim_end())),
            1 => p.hear(&big),
            2 if i != 2 => p.hear("= half of it"),
            3 if i < V4 => {
                p.hear("= last")?;
                p.hear(&format!("bye {}", format!("hello {i}\nstop\nlast\n").len()))?;
                p.hear("")
            }
            _ => Ok(()),
        };
        check().map_err(|e| told(i, e))?;
        if i % 4 != 3 || i >= V4 {
            p.send("and on\n").and_then(|()| p.hear("= and on")).map_err(|e| told(i, e))?;
        }
    }
    Ok(())
}

fn ended_ipv6() -> Check {
    let dir = scratch();
    let a = Net::new()?;
    a.ip("link set lo up")?;
    let server = start(&a, dir.path())?;
    let mut p = a.run(|| Peer::connect("::1"))??;
    let mut other = a.run(|| Peer::connect("::1"))??;
    p.send("stop\n")?;
    p.hear("= stop")?;
    p.stream.shutdown(Shutdown::Write).map_err(|e| e.to_string())?;
    let img = dir.path().join("net.mcr");
    let args = ["dump", &server.pid.to_string(), "-o", &img.display().to_string(), "--tcp-repair"];
    let out = a.run(|| run_mcr(&args))?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(out.status.code() == Some(1) && said.contains("CLOSE-WAIT"), "{}: {said}", out.status);
    ensure!(!img.exists(), "an image is left");
    ensure!(server.alive(), "the server is gone");
    other.send("go\n")?;
    other.hear("= go")?;
    p.hear("bye 5")
}
