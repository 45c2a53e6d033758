//! A real server: Redis from two Debian releases, and a client that speaks RESP2.

use super::servers::builds;
use super::{Server, free_port};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

/// Version → server binary; or the reason why there is none.
pub fn binaries() -> &'static Result<BTreeMap<String, PathBuf>, String> {
    static ALL: OnceLock<Result<BTreeMap<String, PathBuf>, String>> = OnceLock::new();
    ALL.get_or_init(|| Ok(builds::<3>("redis")?.into()))
}

/// The two adjacent releases, older first.
pub fn pair() -> Result<(PathBuf, PathBuf, String), String> {
    let all = binaries().as_ref().map_err(Clone::clone)?;
    let mut it = all.iter().filter(|b| !b.0.contains('-'));
    match (it.next(), it.next_back()) {
        (Some((_, old)), Some((v, new))) => Ok((old.clone(), new.clone(), v.clone())),
        _ => Err("fewer than two Redis versions".into()),
    }
}

/// The newer release, but for a return that is missing in the handler of HMGET.
pub fn broken() -> Result<PathBuf, String> {
    let all = binaries().as_ref().map_err(Clone::clone)?;
    let found = all.iter().find(|b| b.0.ends_with("-hmget"));
    found.map(|b| b.1.clone()).ok_or_else(|| "no broken Redis".into())
}

pub struct Redis {
    pub server: Server,
    pub port: u16,
    pub dir: tempfile::TempDir,
}

impl Redis {
    pub fn start(binary: &Path) -> Redis {
        let dir = super::scratch();
        let port = free_port();
        let server = Server::start(&mut command(binary, port, dir.path()), None);
        let r = Redis { server, port, dir };
        r.wait();
        r
    }

    /// Connects until the server answers PING; a refused connection is what says "not yet".
    fn wait(&self) {
        let end = std::time::Instant::now() + Duration::from_secs(30);
        while std::time::Instant::now() < end {
            if let Ok(mut c) = Client::try_connect(self.port)
                && c.ask(&["PING"]).is_ok_and(|r| r == Reply::Simple("PONG".into()))
            {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("redis on port {} does not answer", self.port);
    }

    pub fn connect(&self) -> Client {
        Client::try_connect(self.port).expect("redis accepts")
    }
}

/// The command line of a plain server without persistence of its own accord.
pub fn command(binary: &Path, port: u16, dir: &Path) -> Command {
    let mut c = Command::new(binary);
    c.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--enable-debug-command", "yes", "--logfile"])
        .arg(dir.join("redis.log"))
        .arg("--dir")
        .arg(dir)
        .current_dir(dir);
    c
}

#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    Simple(String),
    Error(String),
    Int(i64),
    Bulk(Option<Vec<u8>>),
    Array(Option<Vec<Reply>>),
}

impl Reply {
    pub fn text(&self) -> String {
        match self {
            Reply::Simple(s) | Reply::Error(s) => s.clone(),
            Reply::Int(i) => i.to_string(),
            Reply::Bulk(Some(b)) => String::from_utf8_lossy(b).into_owned(),
            Reply::Bulk(None) | Reply::Array(None) => "(nil)".into(),
            Reply::Array(Some(v)) => v.iter().map(Reply::text).collect::<Vec<_>>().join(" "),
        }
    }
}

pub struct Client {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Client {
    pub fn try_connect(port: u16) -> std::io::Result<Client> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_nodelay(true)?;
        Ok(Client { reader: BufReader::new(stream.try_clone()?), stream })
    }

    pub fn encode(args: &[&str]) -> Vec<u8> {
        let mut v = format!("*{}\r\n", args.len()).into_bytes();
        for a in args {
            v.extend_from_slice(format!("${}\r\n{a}\r\n", a.len()).as_bytes());
        }
        v
    }

    pub fn send_raw(&mut self, raw: &[u8]) -> Result<(), String> {
        self.stream.write_all(raw).map_err(|e| format!("sending: {e}"))
    }

    pub fn send(&mut self, args: &[&str]) -> Result<(), String> {
        self.send_raw(&Self::encode(args))
    }

    pub fn ask(&mut self, args: &[&str]) -> Result<Reply, String> {
        self.send(args)?;
        self.reply().map_err(|e| format!("{}: {e}", args.join(" ")))
    }

    pub fn expect(&mut self, args: &[&str], text: &str) -> Result<(), String> {
        let got = self.ask(args)?.text();
        if got == text { Ok(()) } else { Err(format!("{}: expected {text:?}, got {got:?}", args.join(" "))) }
    }

    /// Many commands in one go; errors among the replies are errors.
    pub fn pipeline(&mut self, commands: &[Vec<String>]) -> Result<(), String> {
        for part in commands.chunks(1000) {
            let mut raw = Vec::new();
            for c in part {
                raw.extend(Self::encode(&c.iter().map(String::as_str).collect::<Vec<_>>()));
            }
            self.send_raw(&raw)?;
            for c in part {
                if let Reply::Error(e) = self.reply()? {
                    return Err(format!("{}: {e}", c.join(" ")));
                }
            }
        }
        Ok(())
    }

    fn line(&mut self) -> Result<String, String> {
        let mut s = String::new();
        match self.reader.read_line(&mut s) {
            Ok(0) => Err("the connection was closed".into()),
            Ok(_) => Ok(s.trim_end().to_owned()),
            Err(e) => Err(format!("no reply: {e}")),
        }
    }

    pub fn reply(&mut self) -> Result<Reply, String> {
        let line = self.line()?;
        let (kind, rest) = line.split_at(line.len().min(1));
        let number = || rest.parse::<i64>().map_err(|e| format!("bad reply {line:?}: {e}"));
        Ok(match kind {
            "+" => Reply::Simple(rest.into()),
            "-" => Reply::Error(rest.into()),
            ":" => Reply::Int(number()?),
            "$" => match usize::try_from(number()?) {
                Err(_) => Reply::Bulk(None),
                Ok(n) => {
                    let mut b = vec![0; n + 2];
                    self.reader.read_exact(&mut b).map_err(|e| format!("short bulk: {e}"))?;
                    b.truncate(n);
                    Reply::Bulk(Some(b))
                }
            },
            "*" => match usize::try_from(number()?) {
                Err(_) => Reply::Array(None),
                Ok(n) => Reply::Array(Some((0..n).map(|_| self.reply()).collect::<Result<_, _>>()?)),
            },
            _ => return Err(format!("bad reply {line:?}")),
        })
    }
}
