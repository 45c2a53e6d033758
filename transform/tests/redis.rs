//! The patch of a real server: set MCR_REDIS_OLD and MCR_REDIS_NEW to two builds of redis-server.

mod support;

use mcr_transform::{Options, plan_process};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use support::Target;

fn connect(port: u16) -> TcpStream {
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(s) => return s,
            Err(_) => std::thread::yield_now(),
        }
    }
}

fn ask(s: &mut TcpStream, what: &str) -> String {
    s.write_all(what.as_bytes()).unwrap();
    let mut b = [0; 4096];
    let n = s.read(&mut b).unwrap();
    String::from_utf8_lossy(&b[..n]).into_owned()
}

#[test]
fn redis_pair() {
    let (Ok(old), Ok(new)) = (std::env::var("MCR_REDIS_OLD"), std::env::var("MCR_REDIS_NEW")) else {
        eprintln!("skipped: MCR_REDIS_OLD and MCR_REDIS_NEW are not set");
        return;
    };
    let keys: usize = std::env::var("MCR_REDIS_KEYS").ok().and_then(|k| k.parse().ok()).unwrap_or(2000);
    let port = 17471;
    let t = Target::start(
        Path::new(&old),
        &["--port", "17471", "--save", "", "--daemonize", "no", "--enable-debug-command", "yes"],
    );
    let mut clients: Vec<TcpStream> = (0..20).map(|_| connect(port)).collect();
    let fill = format!("DEBUG POPULATE {keys}\r\n");
    for c in ["HSET h a 1 b 2\r\n", "LPUSH l a b c\r\n", "SADD s x y z\r\n", "ZADD z 1 a 2 b\r\n", &fill] {
        eprint!("{}", ask(&mut clients[0], c));
    }
    ask(&mut clients[1], "MULTI\r\n");
    ask(&mut clients[1], "SET a b\r\n");
    ask(&mut clients[2], "SUBSCRIBE chan\r\n");
    clients[3].write_all(b"BLPOP nolist 0\r\n").unwrap();
    clients[4].write_all(b"*3\r\n$3\r\nSET\r\n$3\r\nab").unwrap();
    ask(&mut clients[5], "PING\r\n");
    // In its event loop's wait, where it holds no lock; stopped elsewhere, it is let go once more.
    let waits = || {
        let call = std::fs::read_to_string(format!("/proc/{}/syscall", t.pid())).unwrap_or_default();
        call.starts_with("232 ")
    };
    while !waits() || {
        t.stop();
        !waits()
    } {
        t.go_on();
    }
    let process = t.process();
    let started = std::time::Instant::now();
    let p = plan_process(&process, &t, &t.modules(), Path::new(&new), &Options::default()).unwrap();
    eprintln!("{:?} in all", started.elapsed());
    for f in &p.findings {
        eprintln!("{} {}: {} [{}]", f.severity, f.code, f.message, f.path);
    }
    for c in &p.changes {
        eprintln!("{c:?}");
    }
    eprintln!("{:#?}", p.stats);
    let refused = mcr_transform::refuse(p).is_err();
    assert!(!refused);
}
