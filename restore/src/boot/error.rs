//! Why a new version could not be booted. Nothing of the old one was touched in any of these cases.

use super::ptrace::PtraceError;
use mcr_image::{MemoryError, Tid};
use nix::errno::Errno;

/// What a thread of the new version was doing when it was given up.
#[derive(Clone, Debug, Default)]
pub struct Where {
    /// The thread.
    pub tid: Tid,
    /// Its call, by name, or empty when it was computing.
    pub call: String,
    /// Its stack, innermost first.
    pub stack: Vec<String>,
}

impl std::fmt::Display for Where {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let call = if self.call.is_empty() { "computing" } else { &self.call };
        let stack = if self.stack.is_empty() { "?".into() } else { self.stack.join(" < ") };
        write!(f, "thread {}: {call} in {stack}", self.tid)
    }
}

fn tail(output: &str) -> String {
    if output.trim().is_empty() { String::new() } else { format!("; its last output: {}", output.trim_end()) }
}

fn list(places: &[Where]) -> String {
    places.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// A boot that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The new version ended.
    #[error(
        "the new version ended during its start-up with status {status} (in {place}){}; \
         run it by hand with the same arguments and environment to see why",
        tail(output)
    )]
    Exited {
        /// Its exit status; 0 is a failure, too.
        status: i32,
        /// Who called exit, and from where.
        place: Where,
        /// The end of what it wrote to its standard output and error.
        output: String,
    },
    /// The new version got a fatal signal.
    #[error(
        "the new version crashed during its start-up: {signal} in {place}{}; \
         run it by hand under a debugger",
        tail(output)
    )]
    Crashed {
        /// The signal's name.
        signal: String,
        /// Where it happened.
        place: Where,
        /// The end of what it wrote.
        output: String,
    },
    /// It did not come to rest where the old one rests.
    #[error(
        "the new version did not come to rest like the old one within {seconds} s: {}{}{}; \
         if a function of the event loop was renamed, add a rename to the rules file; if start-up is slow, raise the boot timeout",
        list(places),
        unpaired(missing),
        tail(output)
    )]
    Hangs {
        /// The deadline that passed (0: no thread could go on).
        seconds: u64,
        /// Where its threads are.
        places: Vec<Where>,
        /// Stacks of the old version's threads that no new thread has.
        missing: Vec<Where>,
        /// The end of what it wrote.
        output: String,
    },
    /// It binds an address that the old version does not have.
    #[error(
        "the new version wants to listen on {wanted}, but the old one has {had} \
         (I2); start it with the old one's addresses, or change the old one's first"
    )]
    ListensElsewhere {
        /// The new address.
        wanted: String,
        /// The old version's addresses.
        had: String,
    },
    /// It creates a process.
    #[error(
        "the new version starts another process during its start-up ({call} in {place}); process trees are not \
         supported yet: make it run as one process in the foreground"
    )]
    Forks {
        /// fork, vfork, clone, execve.
        call: String,
        /// From where.
        place: Where,
    },
    /// A shared library was replaced together with the program.
    #[error(
        "the new version loads {path} (build-id {new}), the old one has another build of it mapped ({old}); \
         a changed library is not supported yet: restart the server, or update with the old library in place"
    )]
    LibraryChanged {
        /// The library.
        path: String,
        /// Old build-id.
        old: String,
        /// New build-id.
        new: String,
    },
    /// The program cannot be started this way.
    #[error("{what}; {next_step}")]
    Unsupported {
        /// Names the object.
        what: String,
        /// What to do.
        next_step: String,
    },
    /// The host was killed from outside.
    #[error(
        "the process that was to become the new version was killed by {signal}; look for an out-of-memory kill and try again"
    )]
    HostKilled {
        /// The signal's name.
        signal: String,
    },
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A step in the host failed.
    #[error("{step}: {errno}; nothing was changed")]
    Step {
        /// Which, with its object.
        step: String,
        /// What the kernel said.
        errno: Errno,
    },
    /// ptrace failed.
    #[error(transparent)]
    Ptrace(#[from] PtraceError),
    /// The host's memory could not be read or written.
    #[error("memory of the new version: {0}")]
    Memory(#[from] MemoryError),
    /// A file could not be read.
    #[error("{what}: {source}")]
    Io {
        /// The file and why we want it.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
}

fn unpaired(missing: &[Where]) -> String {
    if missing.is_empty() { String::new() } else { format!("; the old one also has {}", list(missing)) }
}

impl BootError {
    pub(super) fn step(step: impl Into<String>, errno: Errno) -> Self {
        Self::Step { step: step.into(), errno }
    }
    pub(super) fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }
}

pub(super) type Result<T> = std::result::Result<T, BootError>;
