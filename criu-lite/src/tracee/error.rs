//! Why a ptrace operation failed.

use mcr_image::{MemoryError, Pid, Tid};
use nix::errno::Errno;

/// Errors of the tracee layer. Each names the thread and the request.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The thread is gone (exited or killed).
    #[error("thread {tid} is gone")]
    Gone {
        /// The thread.
        tid: Tid,
    },
    /// A ptrace request failed.
    #[error("thread {tid}: {request}: {errno}")]
    Request {
        /// The thread.
        tid: Tid,
        /// The request's name.
        request: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// An injected system call returned an error.
    #[error("thread {tid}: injected system call {nr}: {errno}")]
    Syscall {
        /// The thread that executed it.
        tid: Tid,
        /// Its number.
        nr: i64,
        /// What it returned.
        errno: Errno,
    },
    /// The deadline passed while waiting for the thread to stop.
    #[error("thread {tid} did not stop in time (is it in uninterruptible sleep?)")]
    Timeout {
        /// The thread.
        tid: Tid,
    },
    /// SIGINT or SIGTERM came; things are put back.
    #[error("interrupted")]
    Interrupted,
    /// The thread stopped in a way that was not asked for.
    #[error("thread {tid} stopped unexpectedly: {stop}")]
    UnexpectedStop {
        /// The thread.
        tid: Tid,
        /// What it did.
        stop: String,
    },
    /// The thread ended while we held it.
    #[error("thread {tid} ended while traced: {how}")]
    Died {
        /// The thread.
        tid: Tid,
        /// Exit code or signal.
        how: String,
    },
    /// No `syscall` instruction is mapped.
    #[error("process {pid}: no executable mapping holds a `syscall` instruction")]
    NoSyscall {
        /// The process.
        pid: Pid,
    },
    /// Its memory could not be read or written.
    #[error("thread {tid}: {source}")]
    Memory {
        /// The thread.
        tid: Tid,
        /// Why.
        source: MemoryError,
    },
    /// A file of /proc could not be read.
    #[error("{path}: {source}")]
    Proc {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

impl TraceError {
    /// ESRCH becomes [`TraceError::Gone`].
    pub(crate) fn of(tid: Tid, request: &'static str, errno: Errno) -> Self {
        if errno == Errno::ESRCH { Self::Gone { tid } } else { Self::Request { tid, request, errno } }
    }

    /// The errno of an injected call or a request.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Syscall { errno, .. } | Self::Request { errno, .. } => Some(*errno),
            Self::Gone { .. } => Some(Errno::ESRCH),
            _ => None,
        }
    }
}
