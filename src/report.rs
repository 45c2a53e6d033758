//! The two ways to speak: a table for people, one JSON object for programs.

use crate::exit::Outcome;
use mcr_image::proto::Phase;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write;
use std::path::Path;

/// Version of every JSON object that `mcr` prints.
pub const SCHEMA_VERSION: u32 = 1;

#[derive(Serialize)]
struct Envelope<'a, T: Serialize> {
    schema_version: u32,
    command: &'a str,
    #[serde(flatten)]
    body: &'a T,
}

/// One JSON object on standard output.
pub fn json<T: Serialize>(command: &str, body: &T) -> Outcome {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &Envelope { schema_version: SCHEMA_VERSION, command, body })?;
    writeln!(out)?;
    Ok(())
}

/// The same object into the file of `--stats`.
pub fn stats<T: Serialize>(command: &str, path: Option<&Path>, body: &T) -> Outcome {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(&Envelope { schema_version: SCHEMA_VERSION, command, body })?;
    std::fs::write(path, text + "\n")
        .map_err(|e| crate::exit::Failure::refused(format!("--stats {}: {e}", path.display())))
}

/// The phases as events of Chrome's trace format, for `--trace`.
pub fn trace(path: Option<&Path>, pid: i32, phases: &[Phase]) -> Outcome {
    #[derive(Serialize)]
    struct Event {
        name: String,
        cat: &'static str,
        ph: &'static str,
        ts: u64,
        dur: u64,
        pid: i32,
        tid: i32,
    }
    let Some(path) = path else { return Ok(()) };
    let event = |p: &'_ Phase| {
        let cat = if p.frozen { "stopped" } else { "serving" };
        Event { name: p.name.clone(), cat, ph: "X", ts: p.start_us, dur: p.duration_us, pid, tid: pid }
    };
    let events: Vec<Event> = phases.iter().map(event).collect();
    std::fs::write(path, serde_json::to_string(&events)? + "\n")
        .map_err(|e| crate::exit::Failure::refused(format!("--trace {}: {e}", path.display())))
}

/// Rows in aligned columns.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With column headings.
    pub fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|s| (*s).to_owned()).collect()] }
    }

    /// One more row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// To standard output.
    pub fn print(&self) {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width: Vec<usize> = (0..columns)
            .map(|c| self.rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0))
            .collect();
        let mut out = std::io::stdout().lock();
        for r in &self.rows {
            let mut line = String::new();
            for (c, cell) in r.iter().enumerate() {
                line.push_str(cell);
                if c + 1 < r.len() {
                    line.extend(std::iter::repeat_n(' ', width[c] - cell.chars().count() + 2));
                }
            }
            // A closed pipe (`| head`) is no error worth a message.
            let _ = writeln!(out, "{}", line.trim_end());
        }
    }
}

/// A waterfall of phases on standard error: what took how long, and what of it with the server stopped.
pub fn waterfall(title: &str, phases: &[Phase]) {
    eprint!("{title}\n{}", chart(phases));
}

/// One line a phase, and the sums.
pub fn chart(phases: &[Phase]) -> String {
    const WIDTH: u64 = 40;
    let end = phases.iter().map(|p| p.start_us + p.duration_us).max().unwrap_or(0).max(1);
    let name = phases.iter().map(|p| p.name.chars().count()).max().unwrap_or(0);
    let mut out = String::new();
    for p in phases {
        let from = (p.start_us * WIDTH / end).min(WIDTH - 1) as usize;
        let len = ((p.duration_us * WIDTH).div_ceil(end) as usize).clamp(1, WIDTH as usize - from);
        let mark = if p.frozen { "#" } else { "=" };
        let bar = " ".repeat(from) + &mark.repeat(len);
        let pad = " ".repeat(name - p.name.chars().count());
        let _ = writeln!(out, "  {}{pad} {:>10.3} ms |{bar}", p.name, p.duration_us as f64 / 1000.0);
    }
    let frozen: u64 = phases.iter().filter(|p| p.frozen).map(|p| p.duration_us).sum();
    let _ = writeln!(
        out,
        "  {:.3} ms in all, {:.3} ms of it with the server stopped (#)",
        end as f64 / 1000.0,
        frozen as f64 / 1000.0
    );
    out
}

/// `len` bytes for people.
pub fn size(len: u64) -> String {
    match len {
        0..=9999 => format!("{len} B"),
        10_000..=9_999_999 => format!("{:.1} KiB", len as f64 / 1024.0),
        _ => format!("{:.1} MiB", len as f64 / 1048576.0),
    }
}

/// Findings on standard error: warnings and refusals first, notes counted.
pub fn findings(all: &[mcr_image::proto::Finding]) {
    use mcr_image::proto::Severity;
    let notes = all.iter().filter(|f| f.severity() == Severity::Info).count();
    for f in all.iter().filter(|f| f.severity() != Severity::Info) {
        let word = if f.severity() == Severity::Refusal { "refused" } else { "warning" };
        eprintln!("{word}: {} [{}]", f.message, f.code);
        if !f.path.is_empty() {
            eprintln!("  at {}", f.path);
        }
        if !f.next_step.is_empty() {
            eprintln!("  {}", f.next_step);
        }
    }
    if notes > 0 {
        eprintln!("{notes} notes (--json shows them)");
    }
}
