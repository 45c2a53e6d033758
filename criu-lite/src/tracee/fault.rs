//! Fault points: the engine kills itself before a chosen call on its target.
//!
//! Every request, memory access and wait of the tracee layer passes a point. Tests run an engine once to count
//! them and then once for each with [`kill_before`]: whatever call is the last one, the target must survive.

use std::sync::atomic::{AtomicU64, Ordering};

static PASSED: AtomicU64 = AtomicU64::new(0);
static DEADLY: AtomicU64 = AtomicU64::new(0);

/// How many points this process has passed.
#[must_use]
pub fn passed() -> u64 {
    PASSED.load(Ordering::Relaxed)
}

/// This process gets SIGKILL when it reaches its `n`-th point from the beginning (1 is the first). 0: never.
pub fn kill_before(n: u64) {
    DEADLY.store(n, Ordering::Relaxed);
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
}
