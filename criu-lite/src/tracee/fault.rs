//! Fault points: the engine kills itself before a chosen call on its target.
//!
//! Every request, memory access and wait of the tracee layer passes a point. Tests run an engine once to count
//! them and then once for each with [`kill_before`]: whatever call is the last one, the target must survive.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

static PASSED: AtomicU64 = AtomicU64::new(0);
static DEADLY: AtomicU64 = AtomicU64::new(0);
static ALARMING: AtomicU64 = AtomicU64::new(0);
static SPOILED: AtomicBool = AtomicBool::new(false);

/// How many points this process has passed.
#[must_use]
pub fn passed() -> u64 {
    PASSED.load(Ordering::Relaxed)
}

/// This process gets SIGKILL when it reaches its `n`-th point from the beginning (1 is the first). 0: never.
pub fn kill_before(n: u64) {
    DEADLY.store(n, Ordering::Relaxed);
}

/// This process panics when it reaches its `n`-th point. 0: never.
pub fn panic_before(n: u64) {
    ALARMING.store(n, Ordering::Relaxed);
}

/// Commits of this process get a call that fails after everything else has been done.
pub fn spoil_commits(yes: bool) {
    SPOILED.store(yes, Ordering::Relaxed);
}

pub(crate) fn spoiled() -> bool {
    SPOILED.load(Ordering::Relaxed)
}

/// One point.
pub(crate) fn point() {
    let n = PASSED.fetch_add(1, Ordering::Relaxed) + 1;
    if n == DEADLY.load(Ordering::Relaxed) {
        // SAFETY: ourselves; the signal does not come back.
        unsafe {
            libc::kill(libc::getpid(), libc::SIGKILL);
            libc::pause();
        }
    }
    assert!(n != ALARMING.load(Ordering::Relaxed), "the engine panics before its call {n}, as asked");
}
