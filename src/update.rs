//! `mcr update PID --to NEW`: dump, transform and restore in one live transaction.

use crate::cli::{How, UpdateArgs};
use crate::exit::{Failure, Outcome};
use crate::{report, trial};
use mcr_image::Pid;
use mcr_image::proto::{Finding, Phase, TypeChange};
use mcr_plugin::Rules;
use mcr_restore::transaction::{UpdateError, UpdateOptions, UpdateReport, update};
use mcr_transform::Options;
use serde::Serialize;
use std::io::IsTerminal;
use std::time::Duration;

/// What `--json` and `--stats` say.
#[derive(Serialize)]
pub struct Body {
    pid: i32,
    old_pid: i32,
    dry_run: bool,
    frozen_us: u64,
    rehearsal_us: u64,
    phases: Vec<Phase>,
    findings: Vec<Finding>,
    changes: Vec<TypeChange>,
    link: mcr_restore::link::LinkStats,
    startup_output: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    trial: Option<trial::Trial>,
}

impl Body {
    /// From a finished update.
    pub fn new(u: UpdateReport) -> Self {
        Self {
            pid: u.pid.0,
            old_pid: u.old_pid.0,
            dry_run: u.dry_run,
            frozen_us: u.frozen_us,
            rehearsal_us: u.rehearsal_us,
            phases: u.phases,
            findings: u.findings,
            changes: u.patch.changes,
            link: u.link,
            startup_output: u.output,
            trial: None,
        }
    }

    /// The new process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// What became of it in its trial.
    pub fn trial(&self) -> Option<&trial::Trial> {
        self.trial.as_ref()
    }

    /// Waterfall, findings, and the pid on standard output.
    pub fn print(&self, title: &str) {
        report::waterfall(title, &self.phases);
        if self.rehearsal_us > 0 && !self.dry_run {
            eprintln!(
                "  pause {} ms; before it {} ms while the copy was made",
                ms(self.frozen_us),
                ms(self.rehearsal_us)
            );
        }
        report::findings(&self.findings);
    }

    /// What the pause would take, from what the same phases took on the copy.
    fn expected_us(&self) -> u64 {
        let same = ["freeze", "collect", "plan", "link"];
        let is_same = |p: &&Phase| p.name.strip_prefix("rehearsal: ").is_some_and(|n| same.contains(&n));
        self.phases.iter().filter(is_same).map(|p| p.duration_us).sum()
    }
}

fn ms(us: u64) -> String {
    format!("{:.3}", us as f64 / 1000.0)
}

/// Flags to the library's options.
pub fn options(how: &How) -> Result<Options, Failure> {
    let rules = match &how.rules {
        Some(path) => Rules::load(path)?,
        None => Rules::default(),
    };
    Ok(Options { debug_dirs: how.debug_dirs.clone(), rules })
}

/// Seconds of a flag.
pub fn limit(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.01, 3600.0))
}

/// An update that did not happen.
pub fn failure(e: &UpdateError, state: &str) -> Failure {
    let mut text = Failure::refused(e).message;
    if let UpdateError::Transform(t) = e {
        text = t.to_string();
    }
    Failure::with_code(e.exit_code(), format!("{text}\n{state}"))
}

/// Runs the verb.
pub fn run(a: &UpdateArgs) -> Outcome {
    let options = UpdateOptions {
        transform: options(&a.how)?,
        quiesce_timeout: limit(a.timeout),
        boot_timeout: limit(a.timeout),
        dry_run: a.dry_run,
        new_pid: a.new_pid,
        progress: (!a.json && std::io::stderr().is_terminal()).then_some(|what| eprintln!("  … {what}")),
        ..UpdateOptions::default()
    };
    let evidence = trial::Evidence::begin(a)?;
    let watch = trial::begin(a, Pid(a.pid))?;
    let done = update(Pid(a.pid), &a.to, &options).map_err(|e| {
        evidence.iter().for_each(trial::Evidence::clear);
        failure(&e, &format!("process {} was not changed and goes on", a.pid))
    })?;
    let mut body = Body::new(done);
    body.trial = trial::run(a, watch, Pid(body.pid));
    let outcome = trial::outcome(a, &body, evidence);
    report::stats("update", a.stats.as_deref(), &body)?;
    report::trace(a.trace.as_deref(), a.pid, &body.phases)?;
    if a.json {
        report::json("update", &body)?;
        return outcome;
    }
    if a.dry_run {
        body.print("dry run");
        println!(
            "{}: can be updated to {}, with a pause of about {} ms; nothing was changed",
            a.pid,
            a.to.display(),
            ms(body.expected_us())
        );
    } else {
        body.print("update");
        println!("{}", body.pid());
    }
    if let Some(t) = &body.trial {
        t.print();
    }
    outcome
}
