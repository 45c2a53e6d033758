//! The verdict.

use super::area::{Map, Mapped};
use super::layout::{ENTRY, Layout, Lists, NOT_RUN, control};
use super::outcome::{CommitError, Failure, List, Outcome};
use crate::Frozen;
use mcr_image::{Addr, Tid};
use nix::errno::Errno;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const COMMIT: u32 = 2;
/// Longer than any plan takes: somebody else must have stopped the process.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a wait looks whether the process still lives.
const LOOK: i64 = 20_000_000;

/// Waits until the target says that it is done, or ends.
pub(super) fn verdict(frozen: &Frozen, map: &Map, done: u64, began: Instant) -> Result<(), CommitError> {
    let pid = frozen.pid();
    let word = map.word(done);
    while word.load(Ordering::SeqCst) == 0 {
        futex_wait(word);
        if word.load(Ordering::SeqCst) != 0 {
            break;
        }
        let mut p = libc::pollfd { fd: frozen.pidfd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live pollfd.
        if unsafe { libc::poll(&raw mut p, 1, 0) } > 0 && word.load(Ordering::SeqCst) == 0 {
            return Err(CommitError::Ended { pid });
        }
        if began.elapsed() > PATIENCE {
            return Err(CommitError::Timeout { pid, after: PATIENCE });
        }
    }
    Ok(())
}

/// FUTEX_WAIT for the word to leave 0, across processes.
fn futex_wait(word: &AtomicU32) {
    let t = libc::timespec { tv_sec: 0, tv_nsec: LOOK };
    // SAFETY: the word and the time are live.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, 0, &raw const t) };
}

/// The outcome from the area's fields.
pub(super) fn read(
    map: &Map,
    layout: &Layout,
    lists: &Lists,
    tids: &[Tid],
    area: Mapped,
    took: Duration,
) -> Outcome {
    let committed = map.word(layout.control + control::STATE).load(Ordering::SeqCst) == COMMIT;
    let results = |r: &Range<u64>| -> Vec<i64> {
        r.clone()
            .step_by(ENTRY as usize)
            .map(|e| map.value(e + 56) as i64)
            .take_while(|&v| v != NOT_RUN)
            .collect()
    };
    let failed = map.value(layout.control + control::FAILED);
    let new = tids.len()..lists.threads.len();
    let tid_at = |n: usize| map.word(layout.block(n) + 68).load(Ordering::SeqCst) as i32;
    Outcome {
        committed,
        failure: (!committed && failed != 0).then(|| failure(map, layout, lists, tids, failed - area.at.0)),
        calls: results(&lists.calls),
        after: results(&lists.after),
        new_threads: if committed { new.map(|n| Tid(tid_at(n))).collect() } else { Vec::new() },
        area: (area.at, if committed { layout.control } else { layout.lists }),
        took,
    }
}

/// What stands at `offset`: an entry of a list, or the block of a thread that could not be made.
fn failure(map: &Map, layout: &Layout, lists: &Lists, tids: &[Tid], offset: u64) -> Failure {
    if offset < layout.lists {
        let n = ((offset - layout.blocks) / layout.block) as usize;
        let errno = Errno::from_raw(-(map.word(offset + 68).load(Ordering::SeqCst) as i32));
        return Failure { list: List::Clone(n - tids.len()), index: 0, nr: libc::SYS_clone, errno };
    }
    let errno = Errno::from_raw(-(map.value(offset + 56) as i64) as i32);
    let nr = map.value(offset) as i64;
    let at = |r: &Range<u64>| r.contains(&offset).then(|| ((offset - r.start) / ENTRY) as usize);
    if at(&lists.pages).is_some() {
        return Failure { list: List::Page(Addr(map.value(offset + 8))), index: 0, nr, errno };
    }
    for (n, [before, calls]) in lists.threads.iter().enumerate() {
        if let Some(index) = at(before) {
            return Failure { list: List::Before(tids[n]), index, nr, errno };
        }
        if let Some(index) = at(calls) {
            let list =
                tids.get(n).map_or(List::NewThread(n.saturating_sub(tids.len())), |&t| List::Thread(t));
            return Failure { list, index, nr, errno };
        }
    }
    Failure { list: List::Calls, index: at(&lists.calls).unwrap_or(0), nr, errno }
}
