//! nginx, unprepared, as one process: through four adjacent releases in place, with requests half sent, under load.

use crate::support::servers::{Load, builds, under_load};
use crate::support::{Check, Server, expect_mcr, free_port, reported_pid, scratch};
use crate::{Case, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

const REQUEST: &str = "GET /file.txt HTTP/1.1\r\nHost: localhost\r\n\r\n";

pub fn cases(list: bool) -> Vec<Case> {
    // Listing the tests builds nothing.
    let reason = if list { None } else { builds::<4>("nginx").err() };
    vec![Case::new("nginx: three releases on in place, under load", three_on).skip_if(reason)]
}

/// A keep-alive connection.
struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(port: u16) -> Result<Self, String> {
        let s = TcpStream::connect(("127.0.0.1", port)).map_err(|e| format!("connect: {e}"))?;
        s.set_read_timeout(Some(Duration::from_secs(30))).map_err(|e| e.to_string())?;
        s.set_nodelay(true).map_err(|e| e.to_string())?;
        Ok(Self(BufReader::new(s)))
    }

    fn tell(&mut self, text: &str) -> Check {
        self.0.get_mut().write_all(text.as_bytes()).map_err(|e| format!("{text:?}: {e}"))
    }

    /// Reads one reply, whose body must be `content`; the version that the server calls itself.
    fn reply(&mut self, content: &[u8]) -> Result<String, String> {
        let (mut version, mut first) = (String::new(), true);
        loop {
            let mut l = String::new();
            let n = self.0.read_line(&mut l).map_err(|e| format!("reply: {e}"))?;
            ensure!(n > 0, "the connection was closed");
            let l = l.trim_end();
            ensure!(!first || l == "HTTP/1.1 200 OK", "status {l:?}");
            first = false;
            if let Some(v) = l.strip_prefix("Server: nginx/") {
                version = v.to_owned();
            } else if let Some(n) = l.strip_prefix("Content-Length: ") {
                ensure!(n == content.len().to_string(), "length {n} instead of {}", content.len());
            }
            if l.is_empty() {
                break;
            }
        }
        let mut got = vec![0; content.len()];
        self.0.read_exact(&mut got).map_err(|e| format!("body: {e}"))?;
        ensure!(got == content, "the body has other bytes");
        Ok(version)
    }
}

/// Asks as fast as it can; the longest wait in µs.
fn ask(port: u16, content: &[u8], load: &Load) -> Result<u64, String> {
    let mut c = Client::connect(port)?;
    let mut longest = 0;
    while load.goes_on() {
        let start = Instant::now();
        c.tell(REQUEST)?;
        c.reply(content)?;
        longest = longest.max(start.elapsed().as_micros() as u64);
        load.got(1);
    }
    Ok(longest)
}

fn three_on() -> Check {
    let builds = builds::<4>("nginx")?;
    let (dir, port) = (scratch(), free_port());
    let content: Vec<u8> = (0..9000u32).flat_map(|i| format!("{i} ").into_bytes()).collect();
    let config = format!(
        "daemon off; master_process off; pid nginx.pid; error_log error.log notice;\n\
         events {{ worker_connections 256; }}\n\
         http {{ access_log access.log; keepalive_timeout 600s; keepalive_requests 100000000;\n\
         client_header_timeout 600s; server {{ listen 127.0.0.1:{port}; root html; }} }}\n"
    );
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(dir.path().join(name), bytes).map_err(|e| format!("{name}: {e}"))
    };
    // "logs": where it complains before it has read its configuration.
    for sub in ["html", "logs"] {
        std::fs::create_dir(dir.path().join(sub)).map_err(|e| format!("{sub}: {e}"))?;
    }
    write("html/file.txt", &content)?;
    write("nginx.conf", config.as_bytes())?;
    let server =
        Server::start(Command::new(&builds[0].1).arg("-p").arg(dir.path()).args(["-c", "nginx.conf"]), None);
    server.listens(port)?;
    let mut resting: Vec<Client> = (0..20).map(|_| Client::connect(port)).collect::<Result<_, _>>()?;
    for c in &mut resting {
        c.tell(REQUEST)?;
        let v = c.reply(&content)?;
        ensure!(v == builds[0].0, "nginx {v} was started");
    }
    let work = |_, load: &Load| ask(port, &content, load);
    under_load(4, work, |load| {
        for (version, program) in &builds[1..] {
            // Every other one has sent a part of its request, each another one.
            let sent = |i: usize| if i % 2 == 1 { 2 + i } else { 0 };
            for (i, c) in resting.iter_mut().enumerate() {
                c.tell(&REQUEST[..sent(i)])?;
            }
            load.more(40)?;
            let args = ["update", &server.pid.to_string(), "--to", &program.display().to_string(), "--json"];
            let done = expect_mcr(0, &args)?;
            ensure!(reported_pid(&done)? == server.pid, "another pid");
            for (i, c) in resting.iter_mut().enumerate() {
                c.tell(&REQUEST[sent(i)..])?;
                let v = c.reply(&content).map_err(|e| format!("to {version}, connection {i}: {e}"))?;
                ensure!(v == *version, "connection {i}: nginx {v} instead of {version}");
            }
            let mut fresh = Client::connect(port)?;
            fresh.tell(REQUEST)?;
            fresh.reply(&content)?;
        }
        Ok(())
    })?;
    graceful_end(server)?;
    let log = std::fs::read_to_string(dir.path().join("error.log")).map_err(|e| format!("error.log: {e}"))?;
    let bad = log.lines().find(|l| ["[error]", "[alert]", "[crit]", "[emerg]"].iter().any(|w| l.contains(w)));
    ensure!(bad.is_none(), "error.log: {bad:?}");
    Ok(())
}

/// SIGQUIT ends it with status 0.
fn graceful_end(server: Server) -> Check {
    let mut status = 0;
    // SAFETY: kill(2) and waitpid(2) of our own child, with a status of ours.
    let r = unsafe {
        libc::kill(server.pid, libc::SIGQUIT);
        libc::waitpid(server.pid, &mut status, 0)
    };
    let pid = server.pid;
    if r == pid {
        // It is reaped: its pid is no longer ours to kill.
        std::mem::forget(server);
    }
    ensure!(r == pid, "waitpid: {}", std::io::Error::last_os_error());
    ensure!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "nginx ended with {status:#x}");
    Ok(())
}
