//! `mcr demo`: the bundled server goes through two updates under open connections, by the very commands that
//! a user would type.

use crate::cli::DemoArgs;
use crate::exit::{Failure, Outcome};
use mcr_image::proto::Phase;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const SOURCES: [&str; 3] = [
    include_str!("../examples/kv/v1.c"),
    include_str!("../examples/kv/v2.c"),
    include_str!("../examples/kv/v3.c"),
];
const RULES: [&str; 2] = [include_str!("../examples/kv/v2.toml"), include_str!("../examples/kv/v3.toml")];
const CLIENTS: usize = 50;
const KEYS: usize = 2000;

/// Ends the server when the demo ends, however it ends.
struct Running(Option<Pid>);

impl Running {
    fn pid(&self) -> String {
        self.0.map_or_else(|| "-".into(), |p| p.to_string())
    }

    /// The process has ended, or is about to: collect it, so that its pid is free again.
    fn reap(&mut self) {
        if let Some(pid) = self.0.take() {
            let _ = waitpid(pid, None);
        }
    }

    /// The server goes on under this pid.
    fn becomes(&mut self, pid: Pid) {
        if self.0 != Some(pid) {
            self.reap();
            self.0 = Some(pid);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _ = kill(pid, Signal::SIGKILL);
            self.reap();
        }
    }
}

struct Client {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Client {
    fn connect(port: u16) -> Result<Self, Failure> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Self { reader: BufReader::new(stream.try_clone()?), stream })
    }

    fn send(&mut self, raw: &str) -> Outcome {
        Ok(self.stream.write_all(raw.as_bytes())?)
    }

    fn line(&mut self) -> Result<String, Failure> {
        let mut s = String::new();
        if self.reader.read_line(&mut s)? == 0 {
            return Err(Failure::refused("demo: a connection was closed"));
        }
        Ok(s.trim_end().to_owned())
    }

    fn ask(&mut self, request: &str) -> Result<String, Failure> {
        self.send(request)?;
        self.send("\n")?;
        self.line()
    }

    fn expect(&mut self, request: &str, reply: &str) -> Outcome {
        let got = self.ask(request)?;
        if got.eq_ignore_ascii_case(reply) {
            return Ok(());
        }
        Err(Failure::refused(format!("demo: {request}: expected {reply:?}, got {got:?}")))
    }
}

fn needs() -> Outcome {
    if !nix::unistd::geteuid().is_root() {
        return Err(Failure::refused(
            "demo: this needs root: ptrace of a server and pids chosen by clone3(2) are privileged\nrun it as root",
        ));
    }
    if Command::new("cc").arg("--version").output().is_err() {
        return Err(Failure::refused(
            "demo: no C compiler `cc`: the bundled server is built from its source\ninstall gcc or clang",
        ));
    }
    Ok(())
}

fn build(dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    let mut out = Vec::new();
    for (i, source) in SOURCES.iter().enumerate() {
        let c = dir.join(format!("kv{}.c", i + 1));
        let exe = dir.join(format!("kv{}", i + 1));
        std::fs::write(&c, source)?;
        let done = Command::new("cc").args(["-g", "-O2", "-pthread", "-o"]).arg(&exe).arg(&c).output()?;
        if !done.status.success() {
            return Err(Failure::refused(format!("demo: cc: {}", String::from_utf8_lossy(&done.stderr))));
        }
        out.push(exe);
    }
    for (i, text) in RULES.iter().enumerate() {
        std::fs::write(dir.join(format!("v{}.toml", i + 2)), text)?;
    }
    Ok(out)
}

/// Runs ourselves with these arguments, shows the command, and hands back the JSON object it printed.
fn mcr(args: &[&OsStr]) -> Result<serde_json::Value, Failure> {
    let shown: Vec<_> = args.iter().map(|a| a.to_string_lossy()).collect();
    println!("$ mcr {}", shown.join(" "));
    let out = Command::new("/proc/self/exe").args(args).arg("--json").stdin(Stdio::null()).output()?;
    print!("{}", String::from_utf8_lossy(&out.stderr));
    if !out.status.success() {
        return Err(Failure::with_code(
            out.status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(crate::exit::REFUSED),
            format!("demo: mcr {} failed: {}", shown.join(" "), out.status),
        ));
    }
    let said: serde_json::Value = serde_json::from_slice(&out.stdout)?;
    timeline(&said);
    Ok(said)
}

/// Phases as a table: `#` while the server stands still.
fn timeline(said: &serde_json::Value) {
    let phases = said["phases"].as_array().map(Vec::as_slice).unwrap_or_default();
    let number = |v: &serde_json::Value| v.as_u64().unwrap_or(0);
    let phases: Vec<Phase> = phases
        .iter()
        .map(|p| Phase {
            name: p["name"].as_str().unwrap_or_default().to_owned(),
            start_us: number(&p["start_us"]),
            duration_us: number(&p["duration_us"]),
            frozen: p["frozen"].as_bool().unwrap_or(false),
        })
        .collect();
    if !phases.is_empty() {
        print!("{}", crate::report::chart(&phases));
    }
}

fn pid_of(said: &serde_json::Value) -> Result<Pid, Failure> {
    said["pid"]
        .as_i64()
        .map(|p| Pid::from_raw(p as i32))
        .ok_or_else(|| Failure::refused("demo: no pid was reported"))
}

fn load(port: u16) -> Result<Vec<Client>, Failure> {
    let mut clients = (0..CLIENTS).map(|_| Client::connect(port)).collect::<Result<Vec<_>, _>>()?;
    for i in 0..KEYS {
        clients[i % CLIENTS].expect(&format!("SET key{i} value{i}"), "OK")?;
    }
    for (i, c) in clients.iter_mut().enumerate() {
        c.expect(&format!("NAME client-{i}"), "OK")?;
        c.expect(&format!("WORK {i}"), "OK")?;
    }
    Ok(clients)
}

fn check(clients: &mut [Client], version: &str) -> Outcome {
    for (i, c) in clients.iter_mut().enumerate() {
        c.expect("VERSION", version)?;
        c.expect("SELFCHECK", "OK")?;
        let who = c.ask("WHOAMI")?;
        if !who.contains(&format!("name=client-{i} ")) {
            return Err(Failure::refused(format!("demo: client {i} is taken for another: {who}")));
        }
    }
    for i in 0..KEYS {
        clients[i % CLIENTS].expect(&format!("GET key{i}"), &format!("value{i}"))?;
    }
    println!(
        "  {CLIENTS} connections answer as version {version}; {KEYS} keys, names, counters, jobs: all there"
    );
    Ok(())
}

/// A half request is sent before, its second half after.
fn half(clients: &mut [Client]) -> Outcome {
    clients[0].send("GE")
}

fn other_half(clients: &mut [Client]) -> Outcome {
    clients[0].send("T key1\n")?;
    let got = clients[0].line()?;
    if got != "value1" {
        return Err(Failure::refused(format!("demo: the request that was half sent gave {got:?}")));
    }
    println!("  the request of which half was sent before is answered: {got}");
    Ok(())
}

/// Runs the verb.
pub fn run(a: &DemoArgs) -> Outcome {
    needs()?;
    let start = Instant::now();
    let at = || format!("[{:>7.3} s]", start.elapsed().as_secs_f64());
    let dir = match &a.dir {
        Some(d) => d.clone(),
        None => std::env::temp_dir().join(format!("mcr-demo-{}", std::process::id())),
    };
    std::fs::create_dir_all(&dir)?;
    let _ = nix::sys::prctl::set_child_subreaper(true);
    let kv = build(&dir)?;
    println!("{} built the bundled server, versions 1 to 3, with `cc -g -O2` in {}", at(), dir.display());

    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut server = Command::new(&kv[0]);
    server.arg(port.to_string()).arg(dir.join("kv.log")).stdin(Stdio::null()).stdout(Stdio::piped());
    server.process_group(0);
    let mut child = server.spawn()?;
    let mut running = Running(Some(Pid::from_raw(child.id() as i32)));
    let mut ready = [0u8; 6];
    if let Some(out) = child.stdout.as_mut() {
        out.read_exact(&mut ready)?;
    }
    let mut clients = load(port)?;
    check(&mut clients, "1.0")?;
    println!("{} version 1 serves as pid {}", at(), running.pid());

    half(&mut clients)?;
    let (image, update) = (dir.join("kv.mcr"), dir.join("kv-v2.mcr"));
    let pid = running.pid();
    mcr(&["dump".as_ref(), pid.as_ref(), "-o".as_ref(), image.as_ref()])?;
    running.reap();
    println!("{} dumped; no server runs, the connections stay open", at());
    let rules = dir.join("v2.toml");
    mcr(&[
        "transform".as_ref(),
        image.as_ref(),
        "--to".as_ref(),
        kv[1].as_ref(),
        "--rules".as_ref(),
        rules.as_ref(),
        "-o".as_ref(),
        update.as_ref(),
    ])?;
    let said = mcr(&["restore".as_ref(), update.as_ref()])?;
    running.becomes(pid_of(&said)?);
    println!("{} version 2 runs as pid {}", at(), running.pid());
    other_half(&mut clients)?;
    check(&mut clients, "2.0")?;

    half(&mut clients)?;
    let pid = running.pid();
    let rules = dir.join("v3.toml");
    let said = mcr(&[
        "update".as_ref(),
        pid.as_ref(),
        "--to".as_ref(),
        kv[2].as_ref(),
        "--rules".as_ref(),
        rules.as_ref(),
    ])?;
    running.becomes(pid_of(&said)?);
    println!("{} version 3 runs as pid {}, updated live", at(), running.pid());
    other_half(&mut clients)?;
    check(&mut clients, "3.0")?;
    println!("{} done; look at the images with", at());
    println!("  mcr inspect {}", image.display());
    println!("  mcr inspect {}", update.display());
    Ok(())
}
