//! Phases of a transaction with one origin.

use mcr_image::proto;
use std::time::Instant;

/// Phases with one origin.
pub(super) struct Clock {
    origin: Instant,
    last: Instant,
    pub(super) phases: Vec<proto::Phase>,
    /// Before this one: the rehearsal.
    first: usize,
    /// Before the names of phases.
    stage: &'static str,
}

impl Clock {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { origin: now, last: now, phases: Vec::new(), first: 0, stage: "" }
    }
    pub(super) fn lap(&mut self, name: &str, frozen: bool) {
        self.lap_until(name, frozen, Instant::now());
    }
    /// A phase that ended at `now`.
    pub(super) fn lap_until(&mut self, name: &str, frozen: bool, now: Instant) {
        self.phases.push(proto::Phase {
            name: format!("{}{name}", self.stage),
            start_us: (self.last - self.origin).as_micros() as u64,
            duration_us: (now - self.last).as_micros() as u64,
            frozen,
        });
        self.last = now;
    }
    /// The parts of a phase that has just been measured by its own clock.
    pub(super) fn parts(&mut self, parts: &[(String, u64)], frozen: bool) {
        let mut at = (self.last - self.origin).as_micros() as u64;
        for (name, us) in parts {
            let name = format!("{}{name}", self.stage);
            self.phases.push(proto::Phase { name, start_us: at, duration_us: *us, frozen });
            at += us;
        }
        self.last = Instant::now();
    }
    /// Phases from here on are the rehearsal's.
    pub(super) fn rehearsal_begins(&mut self) {
        self.stage = "rehearsal: ";
    }
    /// What counts as the pause begins here.
    pub(super) fn pause_begins(&mut self) {
        self.stage = "";
        self.first = self.phases.len();
    }
    /// For how long nobody served, before the pause.
    pub(super) fn rehearsal_us(&self) -> u64 {
        self.phases[..self.first].iter().filter(|p| p.frozen).map(|p| p.duration_us).sum()
    }
    /// For how long nobody served.
    pub(super) fn frozen_us(&self) -> u64 {
        self.phases[self.first..].iter().filter(|p| p.frozen).map(|p| p.duration_us).sum()
    }
}
