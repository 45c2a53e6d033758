//! `mcr quiesce PID`: each thread's stack, the call it is blocked in, and whether that is a safe point.

use crate::cli::QuiesceArgs;
use crate::exit::{Failure, Outcome};
use crate::report::{self, Table};
use mcr_criu_lite::{FreezeOptions, Frozen, QuiesceOptions};
use mcr_image::Pid;
use serde::Serialize;
use std::time::Duration;

#[derive(Serialize)]
struct Body {
    pid: i32,
    quiescent: bool,
    frozen_us: u64,
    threads: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    tid: i32,
    name: String,
    call: Option<&'static str>,
    stack: Vec<String>,
    quiescent: bool,
    why_not: Option<String>,
}

/// Runs the verb.
pub fn run(a: &QuiesceArgs) -> Outcome {
    let timeout = Duration::from_secs_f64(a.timeout.clamp(0.01, 3600.0));
    mcr_criu_lite::modules::preload(Pid(a.pid));
    let mut frozen = Frozen::seize(Pid(a.pid), &FreezeOptions { timeout })?;
    let states = frozen.quiesce(&QuiesceOptions { timeout })?;
    let stood = frozen.thaw()?;
    let threads: Vec<Row> = states
        .iter()
        .map(|s| Row {
            tid: s.tid.0,
            name: s.comm.clone(),
            call: s.call_name(),
            stack: s.stack.signature(),
            quiescent: s.quiescent(),
            why_not: s.obstacle.as_ref().map(ToString::to_string),
        })
        .collect();
    let body = Body {
        pid: a.pid,
        quiescent: threads.iter().all(|t| t.quiescent),
        frozen_us: stood.as_micros() as u64,
        threads,
    };
    if a.json {
        return report::json("quiesce", &body);
    }
    let mut t = Table::new(&["TID", "NAME", "VERDICT", "CALL", "STACK, innermost first"]);
    for r in &body.threads {
        t.row([
            r.tid.to_string(),
            r.name.clone(),
            r.why_not.clone().unwrap_or_else(|| "quiescent".into()),
            r.call.unwrap_or("-").to_owned(),
            r.stack.join(" < "),
        ]);
    }
    t.print();
    eprintln!("process {} stood still for {} us", a.pid, body.frozen_us);
    if body.quiescent {
        Ok(())
    } else {
        Err(Failure::refused("quiesce: not every thread is at a quiescent point"))
    }
}
