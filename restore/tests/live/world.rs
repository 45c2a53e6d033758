//! `tests/programs/world.c`, which uses much of what the kernel keeps and checks it from inside: updated live
//! and through an image, as root and after it has given up root, over connections that stay open.

use crate::support::{Reaper, build_source, scratch};
use libtest_mimic::{Failed, Trial};
use mcr_criu_lite::dump::{DumpOptions, Kept, dump};
use mcr_image::{Image, Pid};
use mcr_restore::keeper::{Keeper, KeeperOptions};
use mcr_restore::rebuild::{RebuildOptions, restore_image};
use mcr_restore::transaction::{UpdateOptions, UpdateReport, restore_update, update};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("world_updated_in_place", || live(29_535, false, false)),
        Trial::test("world_updated_in_place_without_root", || live(29_536, true, false)),
        Trial::test("world_updated_beside", || live(29_531, false, true)),
        Trial::test("world_updated_beside_without_root", || live(29_532, true, true)),
        Trial::test("world_restored_without_keeper", || made_anew(29_537, false)),
        Trial::test("world_updated_without_keeper", || made_anew(29_538, true)),
        Trial::test("world_updated_through_an_image", || offline(29_533, false)),
        Trial::test("world_updated_through_an_image_without_root", || offline(29_534, true)),
    ]
}

fn v1() -> PathBuf {
    build_source("world.c", "v1", &[])
}

fn v2() -> PathBuf {
    build_source("world.c", "v2", &["-DV2"])
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// Clients over TCP and over unix sockets with a path and with an abstract name.
struct Clients(Vec<(&'static str, BufReader<Box<dyn Stream>>)>);

impl Clients {
    fn connect(port: u16, dir: &Path) -> Result<Self, Failed> {
        let limit = Some(Duration::from_secs(20));
        let until = Instant::now() + Duration::from_secs(20);
        let tcp = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(s) => break s,
                Err(e) if Instant::now() > until => return Err(e.into()),
                // It is starting.
                Err(_) => std::thread::yield_now(),
            }
        };
        tcp.set_read_timeout(limit)?;
        let path =
            UnixStream::connect(dir.join("sock")).map_err(|e| format!("connecting to the path: {e}"))?;
        path.set_read_timeout(limit)?;
        let name = SocketAddr::from_abstract_name(format!("mcr-world-{port}"))?;
        let name =
            UnixStream::connect_addr(&name).map_err(|e| format!("connecting to the abstract name: {e}"))?;
        name.set_read_timeout(limit)?;
        let all: [(_, Box<dyn Stream>); 3] =
            [("TCP", Box::new(tcp)), ("unix path", Box::new(path)), ("abstract", Box::new(name))];
        Ok(Self(all.into_iter().map(|(n, s)| (n, BufReader::new(s))).collect()))
    }

    fn ask(&mut self, client: usize, question: &str) -> Result<String, Failed> {
        let (name, c) = &mut self.0[client];
        let mut line = String::new();
        c.get_mut()
            .write_all(format!("{question}\n").as_bytes())
            .and_then(|()| c.read_line(&mut line))
            .map_err(|e| format!("{name} client, {question}: {e}"))?;
        Ok(line.trim().to_owned())
    }

    /// Everything is there, for every client, and every timer goes on.
    fn check(&mut self, when: &str) -> Result<(), Failed> {
        for i in 0..self.0.len() {
            let said = self.ask(i, "CHECK")?;
            if said != "OK" {
                return Err(format!("{when}, {} client: {said}", self.0[i].0).into());
            }
        }
        let begun = self.counts()?;
        let until = Instant::now() + Duration::from_secs(20);
        // Ten of each: the awaited event, with a limit for a server in which one does not come.
        while self.counts()?.iter().zip(&begun).any(|(now, then)| *now < then + 10) {
            if Instant::now() > until {
                return Err(format!("{when}: a timer stands still: {begun:?}, {:?}", self.counts()?).into());
            }
        }
        let said = self.ask(0, "CHECK")?;
        if said == "OK" { Ok(()) } else { Err(format!("{when}, some ticks later: {said}").into()) }
    }

    fn counts(&mut self) -> Result<Vec<u64>, Failed> {
        Ok(self.ask(0, "COUNT")?.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
    }
}

fn start(port: u16, without_root: bool, name: &str) -> Result<(Reaper, Clients, PathBuf), Failed> {
    let dir = scratch(name);
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777))?;
    let mut c = Command::new(v1());
    c.arg(port.to_string()).arg(&dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if without_root {
        c.arg("drop");
    }
    // SAFETY: setsid is async-signal-safe.
    unsafe {
        c.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into));
    }
    let server = Reaper(Pid(c.spawn()?.id() as i32));
    let mut clients = Clients::connect(port, &dir)?;
    assert_eq!(clients.ask(0, "SETUP")?, "PONG");
    clients.check("before")?;
    Ok((server, clients, dir))
}

fn options() -> UpdateOptions {
    UpdateOptions { boot_timeout: Duration::from_secs(10), ..UpdateOptions::default() }
}

/// New connections are served, too, and nothing that a check needs was only reported.
fn after(r: &UpdateReport, clients: &mut Clients, port: u16, dir: &Path, when: &str) -> Result<(), Failed> {
    let tell = |e: Failed| {
        let findings: Vec<String> = r.findings.iter().map(|f| format!("{}: {}", f.code, f.message)).collect();
        format!("{}\n{}", e.message().unwrap_or_default(), findings.join("\n"))
    };
    clients.check(when).map_err(tell)?;
    Clients::connect(port, dir)?.check(when).map_err(tell)?;
    Ok(())
}

fn live(port: u16, without_root: bool, new_pid: bool) -> Result<(), Failed> {
    let (server, mut clients, dir) = start(port, without_root, &format!("world-{port}"))?;
    let mut last = server;
    for round in 0..4 {
        let when = format!("after live update {round}");
        let options = UpdateOptions { new_pid, ..options() };
        let r = update(last.0, &v2(), &options).map_err(|e| format!("{when}: {e}"))?;
        if r.pid != last.0 {
            last = Reaper(r.pid);
        }
        after(&r, &mut clients, port, &dir, &when)?;
    }
    Ok(())
}

/// Nobody is connected and nobody keeps anything: everything is made anew from the image.
fn made_anew(port: u16, updated: bool) -> Result<(), Failed> {
    let (server, mut clients, dir) = start(port, false, &format!("world-{port}"))?;
    // Its own connection goes last: the server has closed the others when it answers.
    clients.0.truncate(1);
    clients.check("alone")?;
    drop(clients);
    let mut last = server;
    for round in 0..2 {
        let when = format!("round {round} without a keeper");
        let (image, patched) = (dir.join("image.mcr"), dir.join("updated.mcr"));
        // The server may still be closing the last connection.
        let until = Instant::now() + Duration::from_secs(10);
        while connections(last.0) > 0 && Instant::now() < until {}
        dump(last.0, &image, &DumpOptions::default(), &mut |_, _| Ok(Kept::default()))
            .map_err(|e| format!("{when}: {e}"))?;
        drop(last);
        let dumped = Image::open(&image)?;
        last = if updated {
            let patch = mcr_transform::transform(&dumped, &v2(), &mcr_transform::Options::default())
                .map_err(|e| format!("{when}: {e}"))?;
            dumped.write_update(&patched, &patch)?;
            Reaper(
                restore_update(&Image::open(&patched)?, &options()).map_err(|e| format!("{when}: {e}"))?.pid,
            )
        } else {
            Reaper(
                restore_image(&dumped, &RebuildOptions::default()).map_err(|e| format!("{when}: {e}"))?.pid,
            )
        };
        Clients::connect(port, &dir)?.check(&when)?;
    }
    Ok(())
}

/// Connected sockets that have a name: those of clients.
fn connections(pid: Pid) -> usize {
    let links = crate::support::links(pid);
    let sockets = links.values().filter(|l| l.starts_with("socket:")).count();
    // Three listeners and two pairs.
    sockets.saturating_sub(7)
}

/// Ends with the test, also when it fails.
struct Holder(Option<Keeper>);

impl Drop for Holder {
    fn drop(&mut self) {
        if let Some(k) = self.0.take() {
            // Gone already if the restore has confirmed.
            let _ = Keeper::drop_all(k.name());
            k.abandon();
        }
    }
}

fn offline(port: u16, without_root: bool) -> Result<(), Failed> {
    let (server, mut clients, dir) = start(port, without_root, &format!("world-{port}"))?;
    let mut last = server;
    for round in 0..3 {
        let when = format!("after update {round} through an image");
        let (image, updated) = (dir.join("image.mcr"), dir.join("updated.mcr"));
        let mut keeper = Holder(None);
        dump(last.0, &image, &DumpOptions::default(), &mut |id, all| {
            let k = Keeper::for_process(id, &mut all.process, &KeeperOptions::default())
                .map_err(|e| e.to_string())?
                .ok_or("nothing to keep")?;
            let kept = Kept { socket: k.name().to_owned(), deadline_unix_s: u64::MAX };
            keeper.0 = Some(k);
            Ok(kept)
        })
        .map_err(|e| format!("{when}: {e}"))?;
        // The parent collects the dumped process: its pid is used again.
        drop(last);
        let dumped = Image::open(&image)?;
        let patch = mcr_transform::transform(&dumped, &v2(), &mcr_transform::Options::default())
            .map_err(|e| format!("{when}: {e}"))?;
        dumped.write_update(&updated, &patch)?;
        let r = restore_update(&Image::open(&updated)?, &options()).map_err(|e| format!("{when}: {e}"))?;
        last = Reaper(r.pid);
        after(&r, &mut clients, port, &dir, &when)?;
    }
    Ok(())
}
