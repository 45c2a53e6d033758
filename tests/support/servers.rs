//! Real servers from their sources, and clients that keep one busy while something is done to it.

use super::{Check, Server, cache_dir};
use crate::ensure;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// A build of a server: its version, and the program.
pub type Build = (String, PathBuf);

/// What tests/servers/NAME.sh has built, older first: `N` at least, the newest ones. Or the reason why there are none.
pub fn builds<const N: usize>(name: &str) -> Result<[Build; N], String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/servers/{name}.sh"));
    let out = Command::new("sh").arg(script).arg(cache_dir().join(name)).output();
    let out = out.map_err(|e| format!("sh: {e}"))?;
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut all: Vec<Build> =
        said.lines().filter_map(|l| l.split_once(' ')).map(|(v, p)| (v.into(), p.into())).collect();
    all.split_off(all.len().saturating_sub(N)).try_into().map_err(|_| format!("{name}.sh said {said:?}"))
}

impl Server {
    /// Waits until something listens at the port; a refused connection is what says "not yet".
    pub fn listens(&self, port: u16) -> Check {
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(self.alive(), "the server on port {port} does not start");
            std::thread::yield_now();
        }
        Ok(())
    }
}

/// What the clients that keep a server busy share.
#[derive(Default)]
pub struct Load {
    stop: AtomicBool,
    replies: AtomicU64,
    ended: AtomicUsize,
}

impl Load {
    /// Whether a client should ask again.
    pub fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// So many more replies were right.
    pub fn got(&self, replies: u64) {
        self.replies.fetch_add(replies, Ordering::Relaxed);
    }

    /// Waits until all clients together have got so many more replies.
    pub fn more(&self, replies: u64) -> Check {
        let wanted = self.replies.load(Ordering::Relaxed) + replies;
        while self.replies.load(Ordering::Relaxed) < wanted {
            ensure!(self.ended.load(Ordering::Relaxed) == 0, "a client has ended");
            std::thread::yield_now();
        }
        Ok(())
    }
}

/// Runs `body` while `clients` threads do `work`, each with its number: it goes on as long as [`Load::goes_on`] says,
/// and returns its longest wait in µs. Prints how many replies there were, and the longest wait of all.
pub fn under_load(
    clients: usize,
    work: impl Fn(usize, &Load) -> Result<u64, String> + Sync,
    body: impl FnOnce(&Load) -> Check,
) -> Check {
    let load = Load::default();
    let one = |me| {
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(me, &load)));
        load.ended.fetch_add(1, Ordering::Relaxed);
        done.unwrap_or_else(|_| Err("a client panicked".into()))
    };
    std::thread::scope(|s| {
        let threads: Vec<_> = (0..clients).map(|me| s.spawn(move || one(me))).collect();
        let result = body(&load);
        load.stop.store(true, Ordering::Relaxed);
        let mut longest = 0;
        for t in threads {
            longest = longest.max(t.join().map_err(|_| "a client panicked")??);
        }
        eprintln!(
            "{} replies under load, the longest wait {longest} us",
            load.replies.load(Ordering::Relaxed)
        );
        result
    })
}
