//! What the end-to-end tests share: servers in sessions of their own, clients, and the `mcr` binary.
#![allow(dead_code)]

pub mod kv;
pub mod limit;
pub mod redis;
pub mod servers;

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};

pub type Check = Result<(), String>;

/// Fails a check with a formatted text.
#[macro_export]
macro_rules! ensure {
    ($cond:expr, $($arg:tt)*) => { if !$cond { return Err(format!($($arg)*)); } };
}

/// A scratch directory that goes away with its owner.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("mcr-test-").tempdir().expect("a temporary directory")
}

/// A port that was free a moment ago, below those that connect(2) takes by itself: who tries to connect before
/// the server listens must not become its own peer.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + (std::process::id() % 900) as u16 * 10;
    loop {
        let port = first + NEXT.fetch_add(1, Ordering::Relaxed) % 900;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

pub fn mcr() -> &'static str {
    env!("CARGO_BIN_EXE_mcr")
}

/// Runs `mcr` and hands back everything it said.
pub fn run_mcr(args: &[&str]) -> Output {
    Command::new(mcr()).args(args).stdin(Stdio::null()).output().expect("mcr starts")
}

/// Runs `mcr` and expects exit status `code`.
pub fn expect_mcr(code: i32, args: &[&str]) -> Result<Output, String> {
    let out = run_mcr(args);
    if out.status.code() == Some(code) {
        return Ok(out);
    }
    Err(format!(
        "mcr {}: expected exit {code}, got {}\n--- stdout\n{}--- stderr\n{}",
        args.join(" "),
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    ))
}

/// The object that `mcr --json` printed.
pub fn json(out: &Output) -> Result<serde_json::Value, String> {
    serde_json::from_slice(&out.stdout)
        .map_err(|e| format!("--json printed no object: {e}\n{}", String::from_utf8_lossy(&out.stdout)))
}

/// The pid that `restore` or `update` reported.
pub fn reported_pid(out: &Output) -> Result<i32, String> {
    json(out)?["pid"].as_i64().map(|p| p as i32).ok_or_else(|| "no pid in the JSON object".into())
}

/// A server process of ours, by pid: it may be the child that we started or what `mcr` made of it.
pub struct Server {
    pub pid: i32,
}

impl Server {
    /// Starts `cmd` in a session of its own and waits for `ready` on its standard output.
    pub fn start(cmd: &mut Command, ready: Option<&str>) -> Server {
        become_subreaper();
        // SAFETY: setsid(2) is async-signal-safe and touches nothing of the parent.
        unsafe {
            cmd.pre_exec(|| {
                libc::setsid();
                Ok(())
            });
        }
        // Reaped by pid, in `reap`: what becomes of it need not be our child.
        #[allow(clippy::zombie_processes)]
        let mut child = cmd.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the server starts");
        let out = child.stdout.take().expect("a pipe");
        if let Some(ready) = ready {
            let mut line = String::new();
            let mut out = BufReader::new(out);
            out.read_line(&mut line).expect("the server speaks");
            assert!(line.contains(ready), "the server said {line:?} instead of {ready:?}");
            // Keep reading, so that the server never blocks on a full pipe.
            std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
        } else {
            let mut out = out;
            std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
        }
        Server { pid: child.id() as i32 }
    }

    pub fn alive(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit(')')
            .next()
            .and_then(|r| r.split_whitespace().next())
            .is_some_and(|s| s != "Z" && s != "X")
    }

    /// Waits until the process is gone and reaped.
    pub fn reap(&self) {
        loop {
            // SAFETY: waitpid(2) with a null status pointer is allowed.
            let r = unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
            if r == self.pid || (r < 0 && std::io::Error::last_os_error().raw_os_error() != Some(libc::EINTR))
            {
                return;
            }
        }
    }

    /// The server goes on under another pid (or the same one): watch that from now on.
    pub fn becomes(&mut self, pid: i32) {
        if pid != self.pid {
            self.reap();
        }
        self.pid = pid;
    }

    pub fn rss_kib(&self) -> u64 {
        let s = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        s.lines()
            .find_map(|l| l.strip_prefix("VmRSS:"))
            .and_then(|v| v.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SAFETY: plain kill(2) of a pid that we own.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        self.reap();
    }
}

/// Orphans of `mcr restore` come back to us, so that their pids are reaped at once.
pub fn become_subreaper() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        // SAFETY: prctl(2) PR_SET_CHILD_SUBREAPER takes one integer.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
    });
}

/// Where fetched sources live: outside the work tree.
pub fn cache_dir() -> PathBuf {
    if let Some(d) = std::env::var_os("MCR_CACHE") {
        return d.into();
    }
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    base.or_else(|| std::env::var_os("HOME").map(|h| Path::new(&h).join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("mcr")
}

/// Compiles C with plain flags; each test binary builds what it needs once.
pub fn cc(source: &Path, out: &Path, flags: &[&str]) -> Check {
    let o = Command::new("cc")
        .args(["-g", "-O2", "-pthread", "-o"])
        .arg(out)
        .arg(source)
        .args(flags)
        .output()
        .map_err(|e| format!("cc: {e}"))?;
    ensure!(o.status.success(), "cc {}: {}", source.display(), String::from_utf8_lossy(&o.stderr));
    Ok(())
}

pub fn read_some(mut r: impl Read) -> String {
    let mut s = String::new();
    let _ = r.read_to_string(&mut s);
    s
}
