//! Servers to try things on.
#![allow(dead_code)]

use mcr_image::Pid;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

static PORT: AtomicU16 = AtomicU16::new(0);
static BUILDS: Mutex<()> = Mutex::new(());

/// Whether programs can be built here.
pub fn build() -> std::io::Result<()> {
    Command::new("cc").arg("--version").stdout(Stdio::null()).status().map(drop)
}

/// A directory of this test.
pub fn scratch(name: &str) -> PathBuf {
    let d = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir_all(&d).unwrap();
    d
}

fn compile(source: &Path, out: &Path, flags: &[&str]) {
    let _one = BUILDS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if out.exists() {
        return;
    }
    let status = Command::new("cc")
        .args(["-g", "-O1", "-fno-inline", "-pthread", "-o"])
        .arg(out)
        .arg(source)
        .args(flags)
        .status()
        .expect("a C compiler (cc)");
    assert!(status.success(), "{} compiles", source.display());
}

/// A version of the bundled server.
pub fn example(version: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../examples/kv/{version}.c"));
    let out = scratch("bin").join(format!("kv-{version}"));
    compile(&source, &out, &[]);
    out
}

/// A program of `tests/programs`.
pub fn build_source(source: &str, name: &str, flags: &[&str]) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs").join(source);
    let out = scratch("bin").join(format!("{}-{name}", source.file_stem().unwrap().to_string_lossy()));
    compile(&source, &out, flags);
    out
}

/// What whoever started the tests has left open does not reach a server: its numbers would depend on it.
pub fn keep_to_ourselves() {
    // SAFETY: close_range(2), with CLOSE_RANGE_CLOEXEC since Linux 5.11, is async-signal-safe and closes nothing yet.
    let r = unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    assert_eq!(r, 0, "close_range(2)");
}

/// Ended, but not collected by its parent yet.
pub fn is_zombie(pid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| s.contains(") Z "))
}

/// A running server in a session of its own, killed when dropped.
pub struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// `PORT` and `LOG` in the arguments are replaced. Returns when it accepts connections.
    pub fn start(program: &Path, args: &[&str]) -> Self {
        Self::start_with(program, args, &[])
    }

    /// As [`Self::start`], with more open than the standard streams: (number, our descriptor).
    pub fn start_with(program: &Path, args: &[&str], inherited: &[(RawFd, RawFd)]) -> Self {
        let n = PORT.fetch_add(1, Ordering::SeqCst);
        let port = 20_000 + (std::process::id() % 150) as u16 * 60 + n;
        let log = scratch("log").join(format!("{port}.log"));
        let mut c = Command::new(program);
        for a in args {
            match *a {
                "PORT" => c.arg(port.to_string()),
                "LOG" => c.arg(&log),
                a => c.arg(a),
            };
        }
        c.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let inherited = inherited.to_vec();
        // SAFETY: setsid, close_range, fcntl and dup2 are async-signal-safe.
        unsafe {
            c.pre_exec(move || {
                nix::unistd::setsid()?;
                keep_to_ourselves();
                // Out of the way first: a source may have the number of a target.
                let above = inherited.iter().map(|f| f.0.max(f.1)).max().unwrap_or(0) + 1;
                let mut moved = [-1; 16];
                for (m, (_, from)) in moved.iter_mut().zip(&inherited) {
                    *m = libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, above);
                }
                for (m, (to, _)) in moved.iter().zip(&inherited) {
                    if libc::dup2(*m, *to) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let child = c.spawn().expect("server starts");
        let s = Self { child, port };
        s.connect();
        s
    }

    pub fn pid(&self) -> Pid {
        Pid(self.child.id() as i32)
    }

    /// What the kernel says about it, for messages.
    pub fn state(&self) -> String {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        let fds = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count);
        format!("{stat} {fds} descriptors")
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn connect(&self) -> Client {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            match TcpStream::connect(("127.0.0.1", self.port)) {
                Ok(s) => {
                    s.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                    return Client { stream: BufReader::new(s) };
                }
                Err(e) if Instant::now() > end => panic!("connecting to port {}: {e}", self.port),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection that asks line by line.
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    pub fn ask(&mut self, line: &str) -> String {
        self.stream.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut reply = String::new();
        self.stream.read_line(&mut reply).unwrap();
        reply.trim_end().to_owned()
    }
}

/// Ends a process that is our child by CLONE_PARENT, and collects it.
pub struct Reaper(pub Pid);

impl Drop for Reaper {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.0);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(pid, None);
    }
}

/// Ended, whether collected or not.
pub fn gone(pid: Pid) -> bool {
    is_zombie(pid) || !Path::new(&format!("/proc/{pid}")).exists()
}

/// Asks again until there is an answer.
pub fn eventually<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(t) = ask() {
            return t;
        }
        assert!(Instant::now() < end, "nothing came of it in a minute");
        std::thread::yield_now();
    }
}

/// What a process has open, as /proc shows it, by number.
pub fn links(pid: Pid) -> BTreeMap<i32, String> {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|e| {
            let e = e.ok()?;
            let link = std::fs::read_link(e.path()).ok()?.to_string_lossy().into_owned();
            Some((e.file_name().to_str()?.parse().ok()?, link))
        })
        .collect()
}
