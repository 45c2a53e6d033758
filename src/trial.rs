//! `--trial S --health CMD` of `mcr update`: watch the new version, and say what became of it.

use crate::cli::UpdateArgs;
use crate::exit::{Failure, Outcome};
use crate::report;
use crate::update::{Body, limit};
use mcr_criu_lite::dump::{DumpOptions, Kept, dump};
use mcr_image::Pid;
use mcr_restore::trial::{TrialOptions, Verdict, Watch};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What `--json` says of it.
#[derive(Serialize)]
pub struct Trial {
    seconds: f64,
    healthy: bool,
    what: String,
    #[serde(skip)]
    dead: bool,
}

/// Begins to watch before the update, so that nothing is missed; none if no trial is wanted.
pub fn begin(a: &UpdateArgs, pid: Pid) -> Result<Option<Watch>, Failure> {
    if a.trial.is_none() {
        return Ok(None);
    }
    Watch::begin(pid).map(Some).map_err(|e| Failure::refused(format!("process {pid}: pidfd_open: {e}")))
}

/// Watches the new version.
pub fn run(a: &UpdateArgs, watch: Option<Watch>, pid: Pid) -> Option<Trial> {
    let (seconds, watch) = (a.trial?, watch?);
    let options = TrialOptions {
        window: limit(seconds),
        health: a.health.clone(),
        health_timeout: limit(a.health_timeout),
    };
    // With a process of its own.
    let watch = if watch.pid() == pid { Ok(watch) } else { Watch::begin(pid) };
    let of = |v: Verdict| Trial {
        seconds,
        healthy: v.is_healthy(),
        what: format!("process {pid}: {v}"),
        dead: v.is_dead(),
    };
    Some(watch.map_or_else(
        |e| Trial {
            seconds,
            healthy: false,
            what: format!("process {pid}: it ended right after the update ({e})"),
            dead: true,
        },
        |w| of(w.run(&options)),
    ))
}

/// What says later on why a trial failed; goes again if it does not fail.
pub struct Evidence {
    dir: PathBuf,
    made: bool,
}

const BEFORE: &str = "before.mcr";
const AFTER: &str = "after.mcr";

/// An image of a process that runs on.
fn image(a: &UpdateArgs, pid: Pid, out: &Path) -> Outcome {
    let options = DumpOptions { leave_running: true, timeout: limit(a.timeout), ..DumpOptions::default() };
    dump(pid, out, &options, &mut |_, _| Ok(Kept::default())).map(drop).map_err(Failure::from)
}

impl Evidence {
    /// Before the update: an image of the server as it is. None if none is wanted.
    pub fn begin(a: &UpdateArgs) -> Result<Option<Self>, Failure> {
        let Some(dir) = a.keep.clone() else { return Ok(None) };
        let named = |e: &dyn std::fmt::Display| {
            Failure::refused(format!(
                "--keep {}: {e}\nprocess {} was not changed and goes on",
                dir.display(),
                a.pid
            ))
        };
        let made = !dir.exists();
        std::fs::create_dir_all(&dir).map_err(|e| named(&e))?;
        let this = Self { dir: dir.clone(), made };
        let before = dir.join(BEFORE);
        if before.exists() {
            return Err(named(&format!("{BEFORE} of an earlier update is there; give another directory")));
        }
        if let Err(e) = image(a, Pid(a.pid), &before) {
            this.clear();
            return Err(named(&e.message));
        }
        Ok(Some(this))
    }

    /// Nothing is wrong, or nothing was changed.
    pub fn clear(&self) {
        // What stays is only untidy.
        drop(std::fs::remove_file(self.dir.join(BEFORE)));
        if self.made {
            drop(std::fs::remove_dir(&self.dir));
        }
    }

    /// After a failed trial: the new version as it is, if it still is, and the report. Says what was kept.
    fn complete(&self, a: &UpdateArgs, body: &Body, dead: bool) -> String {
        let mut text = format!("kept in {}: {BEFORE} (the server before the update)", self.dir.display());
        if !dead {
            match image(a, Pid(body.pid()), &self.dir.join(AFTER)) {
                Ok(()) => text.push_str(&format!(", {AFTER} (the new version now)")),
                Err(e) => text.push_str(&format!(" (no {AFTER}: {})", e.message)),
            }
        }
        match report::stats("update", Some(&self.dir.join("report.json")), body) {
            Ok(()) => text.push_str(", report.json"),
            Err(e) => text.push_str(&format!(" (no report.json: {})", e.message)),
        }
        let before = self.dir.join(BEFORE);
        let before = before.display();
        if dead {
            text.push_str(&format!(
                "\nthe old version with its state before the update, without its connections: mcr restore {before} \
                 --drop-connections"
            ));
        }
        text + &format!("\nthe same update again, offline: mcr transform {before} --to {}", a.to.display())
    }
}

/// What came of it all: the trial's verdict, and the evidence kept or gone.
pub fn outcome(a: &UpdateArgs, body: &Body, evidence: Option<Evidence>) -> Outcome {
    let failed = body.trial().and_then(|t| t.outcome().err().map(|f| (f, t.dead)));
    match (failed, evidence) {
        (None, e) => {
            e.iter().for_each(Evidence::clear);
            Ok(())
        }
        (Some((f, _)), None) => Err(f),
        (Some((f, dead)), Some(e)) => {
            let kept = e.complete(a, body, dead);
            Err(Failure::with_code(f.code, format!("{}\n{kept}", f.message)))
        }
    }
}

impl Trial {
    /// For people.
    pub fn print(&self) {
        if self.healthy {
            eprintln!("trial of {} s: {}", self.seconds, self.what);
        }
    }

    /// 4 if the server died, 3 if it is not healthy.
    fn outcome(&self) -> Outcome {
        let (code, next) = match (self.healthy, self.dead) {
            (true, _) => return Ok(()),
            (_, true) => (
                4,
                "its state and its connections are lost: there is no way back once the new version has run; start it anew",
            ),
            _ => (
                3,
                "it goes on with all of its state: there is no way back once the new version has run, but forward to \
                 a version that is right, with another `mcr update`",
            ),
        };
        Err(Failure::with_code(code, format!("the update was done, the trial failed: {}\n{next}", self.what)))
    }
}
