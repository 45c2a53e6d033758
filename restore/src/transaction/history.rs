//! What was done to a process: which update, when, and what it left behind. One file a process, in
//! /run/mcr (or `MCR_STATE_DIR`), named by pid and start time: a pid that is used again has no history.

use crate::link::Span;
use mcr_image::{Addr, Pid};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// One update.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Seconds since 1970.
    pub unix_s: u64,
    /// Build-id of the version before, hexadecimal.
    pub from: String,
    /// Build-id of the version after.
    pub to: String,
    /// Its program file.
    pub program: String,
    /// The process kept its pid.
    pub in_place: bool,
    /// How long nobody served, in microseconds.
    pub frozen_us: u64,
    /// Anonymous memory that its start-up made; of no use once another version has taken over.
    #[serde(default)]
    pub native: Vec<(u64, u64)>,
    /// Constants of the version before.
    #[serde(default)]
    pub constants: Vec<(u64, u64)>,
}

/// All updates of a process, the last one last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// In order.
    pub updates: Vec<Entry>,
}

fn pack(spans: &[Span]) -> Vec<(u64, u64)> {
    spans.iter().map(|s| (s.start.0, s.end.0)).collect()
}

fn unpack(spans: &[(u64, u64)]) -> impl Iterator<Item = Span> + '_ {
    spans.iter().filter(|s| s.0 < s.1).map(|s| Span::new(Addr(s.0), Addr(s.1)))
}

impl Entry {
    /// With what it left behind.
    #[must_use]
    pub(super) fn leaving(mut self, native: &[Span], constants: &[Span]) -> Self {
        self.native = pack(native);
        self.constants = pack(constants);
        self
    }
}

impl History {
    /// Reads a process's history; empty when there is none, or none that is readable.
    #[must_use]
    pub fn load(pid: Pid) -> Self {
        let text = file(pid).and_then(std::fs::read);
        text.ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default()
    }

    /// Ranges that the version which runs now has no use for, if nothing points there.
    pub(super) fn leftovers(&self) -> Vec<Span> {
        let last = self.updates.len().saturating_sub(1);
        let of = |(i, e): (usize, &Entry)| {
            let native = if i < last { unpack(&e.native).collect::<Vec<_>>() } else { Vec::new() };
            native.into_iter().chain(unpack(&e.constants).collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        self.updates.iter().enumerate().flat_map(of).collect()
    }

    /// Adds an update after which the ranges `dropped` are no more, and writes the file for `pid`.
    pub(super) fn record(mut self, pid: Pid, entry: Entry, dropped: &[Span]) -> std::io::Result<()> {
        let stays = |s: &(u64, u64)| !dropped.iter().any(|d| d.start.0 <= s.0 && s.1 <= d.end.0);
        for e in &mut self.updates {
            e.native.retain(stays);
            e.constants.retain(stays);
        }
        self.updates.push(entry);
        let path = file(pid)?;
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        prune(&path);
        let part = path.with_extension("part");
        std::fs::write(&part, serde_json::to_vec(&self)?)?;
        std::fs::rename(&part, &path)
    }
}

/// Histories of processes that are no more go.
fn prune(beside: &std::path::Path) {
    for entry in beside.parent().and_then(|d| std::fs::read_dir(d).ok()).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let pid = name.split_once('-').and_then(|(pid, _)| pid.parse().ok()).map(Pid);
        if pid.is_some_and(|p| file(p).map_or(true, |f| f.file_name() != path.file_name())) {
            // It is nobody's; should it stay, it is only untidy.
            drop(std::fs::remove_file(&path));
        }
    }
}

fn file(pid: Pid) -> std::io::Result<PathBuf> {
    let dir = std::env::var_os("MCR_STATE_DIR").map_or_else(|| PathBuf::from("/run/mcr"), PathBuf::from);
    // starttime, field 22 of proc_pid_stat(5).
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(") ").map_or("", |(_, r)| r).split_whitespace();
    let start = fields.into_iter().nth(22 - 3).unwrap_or("0");
    Ok(dir.join(format!("{pid}-{start}.json")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_become_leftovers_one_update_later() {
        let span = |a, b| Span::new(Addr(a), Addr(b));
        let entry = |n: u64| Entry::default().leaving(&[span(n, n + 1)], &[span(n + 10, n + 11)]);
        let mut h = History { updates: vec![entry(100)] };
        assert_eq!(h.leftovers(), [span(110, 111)], "the version that runs uses its own memory");
        h.updates.push(entry(200));
        assert_eq!(h.leftovers(), [span(100, 101), span(110, 111), span(210, 211)]);
    }
}
