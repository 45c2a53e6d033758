//! The bundled server and its client.

use super::servers::Load;
use super::{Server, cc, free_port};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Path of version `v` of the example, built once per test run.
pub fn binary(v: u32) -> PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        let d = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kv");
        std::fs::create_dir_all(&d).expect("a directory for the example");
        for v in 1..=3 {
            let src = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("examples/kv/v{v}.c"));
            cc(&src, &d.join(format!("kv{v}")), &[]).expect("the example compiles");
        }
        d
    });
    dir.join(format!("kv{v}"))
}

/// The rules file that leads to version `v`.
pub fn rules(v: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("examples/kv/v{v}.toml"))
}

pub struct Kv {
    pub server: Server,
    pub port: u16,
    pub dir: tempfile::TempDir,
}

impl Kv {
    pub fn start(v: u32) -> Kv {
        Kv::start_by(Command::new(binary(v)), &[])
    }

    /// With that many equal threads that serve the sessions.
    pub fn start_with_workers(v: u32, n: usize) -> Kv {
        Kv::start_by(Command::new(binary(v)), &[n.to_string()])
    }

    /// With a variable in its environment.
    pub fn start_with(v: u32, name: &str, value: &std::ffi::OsStr) -> Kv {
        let mut cmd = Command::new(binary(v));
        cmd.env(name, value);
        Kv::start_by(cmd, &[])
    }

    /// Without address randomisation: the heap touches the program's bss then.
    pub fn start_unrandomised(v: u32) -> Kv {
        let mut cmd = Command::new(binary(v));
        // SAFETY: personality(2) is a plain system call and touches nothing of the parent.
        unsafe {
            cmd.pre_exec(|| {
                libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong);
                Ok(())
            });
        }
        Kv::start_by(cmd, &[])
    }

    fn start_by(mut cmd: Command, more: &[String]) -> Kv {
        let dir = super::scratch();
        let port = free_port();
        let cmd = cmd.arg(port.to_string()).arg(dir.path().join("kv.log")).args(more).current_dir("/");
        let server = Server::start(cmd, Some("ready"));
        Kv { server, port, dir }
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.port)
    }
}

pub struct Client {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Client {
    pub fn connect(port: u16) -> Client {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the server accepts");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        stream.set_nodelay(true).expect("nodelay");
        Client { reader: BufReader::new(stream.try_clone().expect("a second handle")), stream }
    }

    pub fn send(&mut self, raw: &str) -> Result<(), String> {
        self.stream.write_all(raw.as_bytes()).map_err(|e| format!("sending {raw:?}: {e}"))
    }

    pub fn line(&mut self) -> Result<String, String> {
        let mut s = String::new();
        match self.reader.read_line(&mut s) {
            Ok(0) => Err("the connection was closed".into()),
            Ok(_) => Ok(s.trim_end().to_owned()),
            Err(e) => Err(format!("no reply: {e}")),
        }
    }

    pub fn ask(&mut self, request: &str) -> Result<String, String> {
        self.send(request)?;
        self.send("\n")?;
        self.line().map_err(|e| format!("{request}: {e}"))
    }

    pub fn expect(&mut self, request: &str, reply: &str) -> Result<(), String> {
        let got = self.ask(request)?;
        if got == reply { Ok(()) } else { Err(format!("{request}: expected {reply:?}, got {got:?}")) }
    }
}

/// Counts as fast as it can. The server counts, too: a reply that is lost, doubled or another one's is seen at once.
/// The longest wait for one reply in µs.
pub fn count(kv: &Kv, me: usize, load: &Load) -> Result<u64, String> {
    let mut c = kv.connect();
    let (mut n, mut longest) = (0u64, Duration::ZERO);
    let mut timed = |c: &mut Client, request: &str, reply: &str| -> Result<(), String> {
        let start = Instant::now();
        c.expect(request, reply).map_err(|e| format!("client {me}: {e}"))?;
        longest = longest.max(start.elapsed());
        load.got(1);
        Ok(())
    };
    while load.goes_on() {
        n += 1;
        timed(&mut c, &format!("SET counter{me} {me}.{n}"), "OK")?;
        timed(&mut c, &format!("GET counter{me}"), &format!("{me}.{n}"))?;
        timed(&mut c, &format!("HITS counter{me}"), &n.to_string())?;
    }
    let who = c.ask("WHOAMI")?;
    if !who.contains(&format!("nreq={} ", 3 * n + 1)) {
        return Err(format!("client {me}: {n} rounds, and {who:?}"));
    }
    Ok(longest.as_micros() as u64)
}
