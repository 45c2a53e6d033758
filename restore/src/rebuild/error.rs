//! Why a process could not be rebuilt.

use crate::keeper::KeeperError;
use mcr_image::{MemoryError, Pid};
use std::io;

/// Errors of the rebuild. Whatever was made before the error is gone when it is returned.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// The pid or a tid of the image belongs to somebody else.
    #[error("{what} {id} is in use by {by}: end it, or restore in a pid namespace of its own")]
    IdInUse {
        /// "pid" or "tid".
        what: &'static str,
        /// The number.
        id: i32,
        /// Who has it: command name and process.
        by: String,
    },
    /// The old process has ended but its parent has not collected its exit status.
    #[error(
        "pid {pid} still belongs to the ended process: its parent ({parent}) has not waited for it in {waited_ms} \
         ms; end or wake the parent, then restore again"
    )]
    NotReaped {
        /// The number.
        pid: Pid,
        /// Its parent.
        parent: String,
        /// How long was waited.
        waited_ms: u64,
    },
    /// A system call of the engine failed.
    #[error("{object}: {call}: {source}{}", hint(next))]
    Call {
        /// What was being made.
        object: String,
        /// The call.
        call: &'static str,
        /// What the system said.
        source: io::Error,
        /// What to do, or empty.
        next: &'static str,
    },
    /// A system call executed by the new process failed.
    #[error("{object}: {call} in the new process: {source}{}", hint(next))]
    Inside {
        /// What was being made.
        object: String,
        /// The call.
        call: &'static str,
        /// What the system said.
        source: io::Error,
        /// What to do, or empty.
        next: &'static str,
    },
    /// The image asks for something that cannot be made here.
    #[error("{object}: {why}{}", hint(next))]
    Refused {
        /// What it is.
        object: String,
        /// Why not.
        why: String,
        /// What to do, or empty.
        next: &'static str,
    },
    /// The image lacks something it must have.
    #[error("the image is incomplete: {0}")]
    Image(String),
    /// The keeper has what is needed and does not give it.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// Pages could not be read from the image.
    #[error("reading the image's memory: {0}")]
    Memory(#[from] MemoryError),
}

fn hint(next: &str) -> String {
    if next.is_empty() { String::new() } else { format!("; {next}") }
}

impl RebuildError {
    pub(crate) fn call<E: Into<io::Error>>(
        object: impl Into<String>,
        call: &'static str,
    ) -> impl FnOnce(E) -> Self {
        let object = object.into();
        move |e| Self::Call { object, call, source: e.into(), next: "" }
    }

    pub(crate) fn refused(object: impl Into<String>, why: impl Into<String>, next: &'static str) -> Self {
        Self::Refused { object: object.into(), why: why.into(), next }
    }
}
