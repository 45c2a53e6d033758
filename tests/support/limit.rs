//! A case that hangs ends the run and tells where, instead of hanging with it.

use std::fs::read_to_string;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

/// Longer than any case takes on the slowest machine.
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// Watches over a case until it is dropped.
pub struct Limit(Sender<()>);

impl Limit {
    pub fn new(case: &str) -> Self {
        let case = case.to_owned();
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            if receiver.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("\n{case}: no end after {LIMIT:?}; what still runs:");
                for child in show(std::process::id(), 0) {
                    // SAFETY: plain numbers; a descendant of ours.
                    unsafe { libc::kill(child, libc::SIGKILL) };
                }
                std::process::exit(101);
            }
        });
        Self(sender)
    }
}

/// Prints a process and its descendants, thread by thread. Returns those.
fn show(pid: u32, depth: usize) -> Vec<i32> {
    let mut all = Vec::new();
    let command = read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ");
    eprintln!("{:depth$}{pid} {command}", "");
    for tid in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let at = |what| read_to_string(tid.path().join(what)).unwrap_or_default();
        let stat = at("stat");
        let state = stat.rsplit_once(") ").map_or("", |(_, s)| &s[..1]);
        eprintln!("{:depth$}  {state} {} {}", "", at("wchan"), at("syscall").trim());
        for child in at("children").split_whitespace().filter_map(|c| c.parse().ok()) {
            all.push(child as i32);
            all.extend(show(child, depth + 2));
        }
    }
    all
}
