//! `--trial S --health CMD` of `mcr update`: watch the new version, and say what became of it.

use crate::cli::UpdateArgs;
use crate::exit::{Failure, Outcome};
use crate::update::limit;
use mcr_image::Pid;
use mcr_restore::trial::{TrialOptions, Verdict, Watch};
use serde::Serialize;

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

impl Trial {
    /// For people.
    pub fn print(&self) {
        if self.healthy {
            eprintln!("trial of {} s: {}", self.seconds, self.what);
        }
    }

    /// 4 if the server died, 3 if it is not healthy.
    pub fn outcome(&self) -> Outcome {
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
