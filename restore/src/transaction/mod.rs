//! An update as one transaction: until the commit the old process is whole, and whatever goes wrong it goes
//! on under its own pid; after the commit the new version owns its connections and its state.

mod beside;
mod clock;
mod error;
mod hand;
mod history;
mod in_place;
mod make;
mod notify;
mod offline;
mod programs;
mod rehearse;

pub use error::UpdateError;
pub use history::{Entry, History};
pub use offline::restore_update;

use crate::boot::BootOutcome;
use crate::link::{LinkInput, LinkStats, WriteList};
use clock::Clock;
use mcr_criu_lite::{CollectOptions, FreezeOptions, Frozen, QuiesceOptions, modules};
use mcr_image::{Pid, proto};
use mcr_transform::Prepared;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How to update.
#[derive(Clone, Debug, Default)]
pub struct UpdateOptions {
    /// Do everything on a copy while the old version serves, and report.
    pub dry_run: bool,
    /// Give the new version a process of its own instead of the old one's.
    pub new_pid: bool,
    /// Debug directories and rules.
    pub transform: mcr_transform::Options,
    /// How long to wait for a quiescent point; zero: the default.
    pub quiesce_timeout: Duration,
    /// How long the new version's start-up may take; zero: what the rules say, else 10 s.
    pub boot_timeout: Duration,
    /// Told what the rehearsal is doing; never while the server stands still.
    pub progress: Option<fn(&str)>,
    /// How to rebuild the process (offline restores).
    pub drop_connections: bool,
    /// Sees what link made before I10 and I11 look at it, and may spoil it: for tests of these two.
    #[doc(hidden)]
    pub examine: Option<Examine>,
}

/// See [`UpdateOptions::examine`].
pub type Examine = fn(&LinkInput<'_>, &mut WriteList, &Prepared<'_>);

impl UpdateOptions {
    fn tell(&self, what: &str) {
        if let Some(f) = self.progress {
            f(what);
        }
    }
    fn quiesce(&self) -> QuiesceOptions {
        let mut wait = QuiesceOptions::default();
        if !self.quiesce_timeout.is_zero() {
            wait.timeout = self.quiesce_timeout;
        }
        wait
    }
    fn boot_limit(&self) -> Duration {
        match (self.boot_timeout, self.transform.rules.boot().timeout_s) {
            (Duration::ZERO, Some(s)) => Duration::from_secs(s),
            (Duration::ZERO, None) => Duration::from_secs(10),
            (d, _) => d,
        }
    }
}

/// What an update did, or, after a dry run, would do.
#[derive(Clone, Debug, Default)]
pub struct UpdateReport {
    /// The new version's process.
    pub pid: Pid,
    /// The old version's process.
    pub old_pid: Pid,
    /// Nothing was changed.
    pub dry_run: bool,
    /// Every phase.
    pub phases: Vec<proto::Phase>,
    /// How long nobody served, in microseconds.
    pub frozen_us: u64,
    /// How long nobody served at the begin of the rehearsal, while the copy was made.
    pub rehearsal_us: u64,
    /// What people should know.
    pub findings: Vec<proto::Finding>,
    /// What changed.
    pub patch: proto::Patch,
    /// Counts of the link.
    pub link: LinkStats,
    /// The end of what the new version wrote to its standard output and error while it started.
    pub output: String,
}

/// Updates a living process to a new build: rehearsed on a copy, then laid into the process itself, or, with
/// `new_pid`, beside it.
pub fn update(pid: Pid, new: &Path, options: &UpdateOptions) -> Result<UpdateReport, UpdateError> {
    if options.new_pid && !options.dry_run {
        beside::update(pid, new, options)
    } else {
        in_place::update(pid, new, options)
    }
}

/// What an update of a running process would do; refusals stay among the patch's findings. The process stands
/// still while it is looked at, and runs on.
pub fn plan(pid: Pid, new: &Path, options: &mcr_transform::Options) -> Result<proto::Patch, UpdateError> {
    mcr_criu_lite::freeze::examine(pid)?;
    modules::preload(pid);
    let mut frozen = Frozen::seize(pid, &FreezeOptions::default())?;
    let states = frozen.quiesce(&QuiesceOptions::default())?;
    let mut collected = frozen.collect_with(&states, &CollectOptions::live())?;
    let memory = Arc::clone(frozen.memory());
    collected.let_go();
    let patch = mcr_transform::plan_process(&collected.process, &*memory, &collected.modules, new, options)?;
    frozen.thaw()?;
    Ok(patch)
}

/// What the history says of an update that has just been done.
fn entry(patch: &proto::Patch, clock: &Clock, in_place: bool) -> Entry {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Entry {
        unix_s: now.map_or(0, |d| d.as_secs()),
        from: programs::hex(&patch.old_build_id),
        to: programs::hex(&patch.new_build_id),
        program: patch.new_path.clone(),
        in_place,
        frozen_us: clock.frozen_us(),
        ..Entry::default()
    }
}

fn not_recorded(e: std::io::Error) -> proto::Finding {
    proto::Finding {
        severity: proto::Severity::Warning.into(),
        code: "history".into(),
        message: format!("the update could not be recorded: {e}"),
        next_step: "the next update cannot drop what this one left; make /run/mcr writable".into(),
        ..Default::default()
    }
}

#[allow(clippy::too_many_arguments)]
fn report(
    pid: Pid,
    old_pid: Pid,
    dry_run: bool,
    clock: Clock,
    outcome: &BootOutcome,
    list: WriteList,
    patch: proto::Patch,
    mut findings: Vec<proto::Finding>,
) -> UpdateReport {
    let mut all = patch.findings.clone();
    all.extend(outcome.booted.findings.iter().cloned());
    all.extend(list.findings);
    all.append(&mut findings);
    // What the copy met and the process met again is told once.
    let mut told = std::collections::HashSet::new();
    all.retain(|f| told.insert((f.code.clone(), f.message.clone(), f.next_step.clone())));
    UpdateReport {
        pid,
        old_pid,
        dry_run,
        frozen_us: clock.frozen_us(),
        rehearsal_us: clock.rehearsal_us(),
        phases: clock.phases,
        findings: all,
        patch,
        link: list.stats,
        output: outcome.output.clone(),
    }
}
