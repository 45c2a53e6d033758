//! What came of a commit.

use crate::TraceError;
use mcr_image::{Addr, Pid, Tid};
use nix::errno::Errno;
use std::time::Duration;

/// A list of calls in a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// `before` of this thread.
    Before(Tid),
    /// The process-wide calls.
    Calls,
    /// Making the page of this address present and writable, before the writes.
    Page(Addr),
    /// Making the new thread of this index.
    Clone(usize),
    /// `calls` of this thread.
    Thread(Tid),
    /// `calls` of the new thread of this index.
    NewThread(usize),
}

/// The call that made a commit go back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Where it stands in the plan.
    pub list: List,
    /// Its index there.
    pub index: usize,
    /// Its number.
    pub nr: i64,
    /// What it returned.
    pub errno: Errno,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { list, index, nr, errno } = self;
        match list {
            List::Before(tid) => write!(f, "thread {tid}: call {index} before the change (nr {nr}): {errno}"),
            List::Calls => write!(f, "process-wide call {index} (nr {nr}): {errno}"),
            List::Page(at) => write!(f, "the page at {at} cannot be written: {errno}"),
            List::Clone(n) => write!(f, "making new thread {n}: {errno}"),
            List::Thread(tid) => write!(f, "thread {tid}: call {index} (nr {nr}): {errno}"),
            List::NewThread(n) => write!(f, "new thread {n}: call {index} (nr {nr}): {errno}"),
        }
    }
}

/// How a commit ended. The process runs, untraced.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The process is wholly new; otherwise it is wholly old.
    pub committed: bool,
    /// Why it is old.
    pub failure: Option<Failure>,
    /// Results of the process-wide calls (errors are −4095…−1); those that were not reached are missing.
    pub calls: Vec<i64>,
    /// Results of the `after` calls.
    pub after: Vec<i64>,
    /// Tids of the new threads, in the plan's order.
    pub new_threads: Vec<Tid>,
    /// What is left of the staging area in the process when all threads have left it: address and length. After
    /// a commit that is the code (a page, two from about 160 threads on), after an abort all but the lists.
    /// [`sweep`](super::sweep) drops it, now or at the next update.
    pub area: (Addr, u64),
    /// From the first detach to the verdict.
    pub took: Duration,
}

/// Why a commit was not begun, or its end was not seen.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The plan does not fit the process.
    #[error("the commit plan for process {pid} is wrong: {why}")]
    Plan {
        /// The process.
        pid: Pid,
        /// What is wrong.
        why: String,
    },
    /// The target could not be made ready. It is as before.
    #[error("preparing the commit in process {pid}: {source}")]
    Trace {
        /// The process.
        pid: Pid,
        /// Why.
        source: TraceError,
    },
    /// A system call of the engine failed. The target is as before.
    #[error("preparing the commit in process {pid}: {call}: {errno}")]
    Engine {
        /// The process.
        pid: Pid,
        /// The call.
        call: &'static str,
        /// What it returned.
        errno: Errno,
    },
    /// The process ended before the verdict.
    #[error("process {pid} ended while it changed; was it killed? (its parent knows its status)")]
    Ended {
        /// The process.
        pid: Pid,
    },
    /// No verdict yet. The process decides by itself; the engine is not needed.
    #[error(
        "process {pid} has not finished the change within {after:?}; is it stopped or frozen by somebody else?"
    )]
    Timeout {
        /// The process.
        pid: Pid,
        /// How long was waited.
        after: Duration,
    },
}
