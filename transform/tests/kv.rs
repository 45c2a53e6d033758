//! Patches of the bundled server, from one version to the next.

mod support;

use mcr_image::proto::{self, reloc};
use mcr_image::{Addr, DebugDirs, ElfFile, Memory};
use mcr_plugin::Rules;
use mcr_transform::types::TypeModel;
use mcr_transform::{Loaded, Options, PatchedMemory, Prepared, transform_process};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use support::{Target, compile};

struct Client(BufReader<TcpStream>);

impl Client {
    fn connect(port: u16) -> Self {
        loop {
            if let Ok(s) = TcpStream::connect(("127.0.0.1", port)) {
                return Self(BufReader::new(s));
            }
            std::thread::yield_now();
        }
    }
    fn ask(&mut self, line: &str) -> String {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut out = String::new();
        self.0.read_line(&mut out).unwrap();
        out.trim().to_owned()
    }
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/kv").join(name)
}

fn epolls(pid: u32) -> Vec<proto::Fd> {
    let mut out = Vec::new();
    for e in std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap() {
        let e = e.unwrap();
        let text = std::fs::read_to_string(e.path()).unwrap_or_default();
        let watch = |l: &str| {
            let w: Vec<&str> = l.split_whitespace().collect();
            (w.first() == Some(&"tfd:")).then(|| proto::EpollWatch {
                fd: w[1].parse().unwrap(),
                events: support::hex(w[3]) as u32,
                data: support::hex(w[5]),
            })
        };
        let watches: Vec<_> = text.lines().filter_map(watch).collect();
        if !watches.is_empty() {
            let object = Some(proto::fd::Object::Epoll(proto::Epoll { ino: 0, watches }));
            let number = e.file_name().to_string_lossy().parse().unwrap();
            out.push(proto::Fd { number, object, ..Default::default() });
        }
    }
    out
}

fn run(old: &str, new: &str, port: u16) -> (proto::Patch, Target, Vec<Client>) {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (compile(dir.path(), "old", &example(&format!("{old}.c")), &[]), dir.path().join("new"));
    compile(dir.path(), "new", &example(&format!("{new}.c")), &[]);
    let log = dir.path().join("log");
    let t = Target::start(&a, &[&port.to_string(), log.to_str().unwrap()]);
    let mut clients: Vec<Client> = (0..5).map(|_| Client::connect(port)).collect();
    for (i, c) in clients.iter_mut().enumerate() {
        for k in 0..40 {
            assert_eq!(c.ask(&format!("SET key{i}.{k} value{k}")), "OK");
        }
        c.ask("WORK 7");
        c.ask(&format!("NAME client{i}"));
    }
    assert_eq!(clients[1].ask("MODE upper"), "OK");
    assert_eq!(clients[0].ask("SELFCHECK"), "OK");
    t.stop();
    let mut process = t.process();
    process.fds = epolls(t.pid());
    let toml = std::fs::read_to_string(example(&format!("{new}.toml"))).unwrap_or_default();
    let rules = Rules::parse(&toml, Path::new("kv.toml")).unwrap();
    let options = Options { rules, ..Options::default() };
    let p = transform_process(&process, &t, &t.modules(), &b, &options).unwrap_or_else(|e| panic!("{e}"));
    for f in &p.findings {
        eprintln!("{} {}: {} [{}]", f.severity, f.code, f.message, f.path);
    }
    (p, t, clients)
}

#[test]
fn v1_to_v2() {
    let (p, t, _clients) = run("v1", "v2", 17461);
    let s = p.stats.as_ref().unwrap();
    // Five sessions outgrow their chunks, 200 entries do not.
    assert_eq!((s.moved, s.relaid), (5, 205), "{:#?}", p.changes);
    let m = PatchedMemory::new(&t, &p);
    let moved = |a: u64| p.objects.iter().any(|o| o.addr == a && o.moved);
    let sessions = p.globals.iter().find(|g| g.name == "sessions").unwrap();
    let mut at = u64::from_le_bytes(sessions.content[..8].try_into().unwrap());
    let mut n = 0;
    while at != 0 {
        assert!(moved(at));
        n += 1;
        at = m.u64(Addr(at)).unwrap();
    }
    assert_eq!(n, 5);
    // Watches: five sessions by address, listener and ticker by symbol.
    assert_eq!(p.epoll.iter().filter(|e| moved(e.new_data)).count(), 5);
    let named: Vec<&str> =
        p.epoll.iter().filter_map(|e| e.reloc.as_ref()).map(|r| r.symbol.as_str()).collect();
    assert_eq!(named.len(), 2, "{named:?}");
    assert!(p.globals.iter().any(|g| g.name == "requests_served" && g.size == 8));
    let thread = |r: &proto::Reloc| matches!(r.target, Some(reloc::Target::ThreadOf(_)));
    assert!(p.relocs.iter().filter(|r| thread(r)).count() >= 3);
}

#[test]
fn v2_to_v3() {
    let (p, _t, _clients) = run("v2", "v3", 17462);
    assert!(p.stats.as_ref().unwrap().relaid >= 5);
}

#[test]
fn the_same_build_changes_no_object() {
    let (p, _t, _clients) = run("v1", "v1", 17463);
    let s = p.stats.as_ref().unwrap();
    assert_eq!((s.moved, s.relaid, p.regions.len()), (0, 0, 0));
    assert!(p.changes.is_empty());
}

#[test]
fn what_is_known_from_an_earlier_plan_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let old = compile(dir.path(), "old", &example("v1.c"), &[]);
    let new = compile(dir.path(), "new", &example("v2.c"), &[]);
    let log = dir.path().join("log");
    let port = 17438;
    let t = Target::start(&old, &[&port.to_string(), log.to_str().unwrap()]);
    let toml = std::fs::read_to_string(example("v2.toml")).unwrap();
    let rules = Rules::parse(&toml, Path::new("kv.toml")).unwrap();
    let read = |path: &Path| {
        let elf = ElfFile::open_with_debug(path, &DebugDirs::default()).unwrap();
        let types = TypeModel::load(&elf, &DebugDirs::default()).unwrap();
        (elf, types)
    };
    let ((_, old_types), (elf, types)) = (read(&old), read(&new));
    let loaded = Loaded { path: new.display().to_string(), elf: &elf, types: &types, old_types: &old_types };
    let kept = Prepared::new(&loaded, &rules);
    let plan = |prepared: &Prepared<'_>| {
        let mut process = t.process();
        process.fds = epolls(t.pid());
        let (patch, heap) = prepared.plan(&process, &t, &t.modules()).unwrap();
        (proto::Patch { stats: None, ..patch }, heap.chunks)
    };
    let mut clients = Vec::new();
    for round in 0..4 {
        clients.push(Client::connect(port));
        for k in 0..300 {
            let key = (k * 37 + round * 11) % 400;
            let asked = if (k + round) % 5 == 4 {
                format!("DEL key{key}")
            } else {
                format!("SET key{key} {round}.{k}")
            };
            clients[k % (round + 1)].ask(&asked);
        }
        assert_eq!(clients[0].ask("SELFCHECK"), "OK");
        t.stop();
        let (again, fresh) = (plan(&kept), plan(&Prepared::new(&loaded, &rules)));
        assert!(!again.0.objects.is_empty() && !again.0.globals.is_empty() && !again.0.relocs.is_empty());
        assert!(again == fresh, "round {round}: a plan with what an earlier one found out is another one");
        t.go_on();
    }
}
