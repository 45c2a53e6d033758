//! `mcr history PID`: which updates a process has been through.

use crate::cli::HistoryArgs;
use crate::exit::{Failure, Outcome};
use crate::report::{self, Table};
use mcr_image::Pid;
use mcr_restore::transaction::{Entry, History};
use serde::Serialize;

#[derive(Serialize)]
struct Body {
    pid: i32,
    updates: Vec<Entry>,
}

/// Runs the verb.
pub fn run(a: &HistoryArgs) -> Outcome {
    if !std::path::Path::new(&format!("/proc/{}", a.pid)).exists() {
        return Err(Failure::refused(format!(
            "process {}: there is none; look for its pid with pgrep",
            a.pid
        )));
    }
    let body = Body { pid: a.pid, updates: History::load(Pid(a.pid)).updates };
    if a.json {
        return report::json("history", &body);
    }
    if body.updates.is_empty() {
        println!("{}: no update is recorded", a.pid);
        return Ok(());
    }
    let mut table = Table::new(&["when", "from", "to", "pause", "pid", "program"]);
    for u in &body.updates {
        table.row([
            utc(u.unix_s),
            short(&u.from),
            short(&u.to),
            format!("{:.3} ms", u.frozen_us as f64 / 1000.0),
            if u.in_place { "kept" } else { "new" }.to_owned(),
            u.program.clone(),
        ]);
    }
    table.print();
    Ok(())
}

/// The first digits of a build-id.
fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

/// Seconds since 1970 as a date of the Gregorian calendar, UTC.
fn utc(unix_s: u64) -> String {
    let (days, s) = (unix_s / 86400, unix_s % 86400);
    // Days since 0000-03-01, in eras of 400 years (146097 days).
    let z = days + 719_468;
    let (era, day) = (z / 146_097, z % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let in_year = day - (365 * year + year / 4 - year / 100);
    let m = (5 * in_year + 2) / 153;
    let (d, month) = (in_year - (153 * m + 2) / 5 + 1, if m < 10 { m + 3 } else { m - 9 });
    let y = year + era * 400 + u64::from(month <= 2);
    format!("{y:04}-{month:02}-{d:02} {:02}:{:02}:{:02} UTC", s / 3600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_795_391_999), "2026-11-22 23:59:59 UTC");
    }
}
