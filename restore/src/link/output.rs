//! What `link` yields: a flat list of writes, register sets and kernel calls, or a refusal.

use mcr_image::{Addr, Fd, Regs, Tid, proto};

/// Bytes to put at an address of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemWrite {
    /// Where.
    pub addr: Addr,
    /// What.
    pub bytes: Vec<u8>,
}

/// A call to be made inside the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelCall {
    /// A private anonymous read-write mapping at a fixed free address; made before any write.
    Map {
        /// First address.
        start: Addr,
        /// Length in bytes.
        len: u64,
    },
    /// `epoll_ctl(2)`.
    EpollCtl {
        /// The epoll descriptor.
        epoll: Fd,
        /// `EPOLL_CTL_ADD`, `_MOD` or `_DEL`.
        op: i32,
        /// The watched descriptor.
        fd: Fd,
        /// Event mask.
        events: u32,
        /// The user's data word.
        data: u64,
    },
    /// `setitimer(2)` with the time that was left.
    SetItimer {
        /// `ITIMER_REAL` and friends.
        which: u32,
        /// Microseconds to the next expiry.
        value_us: u64,
        /// Period in microseconds.
        interval_us: u64,
    },
    /// `timer_create(2)` with a given id, in place of a timer that may be there, and `timer_settime(2)` with the
    /// time that was left.
    PosixTimer {
        /// As in old: clock, id, notification, times. `sigval` and `notify_tid` are the new version's.
        timer: proto::PosixTimer,
    },
}

/// General registers of a thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegWrite {
    /// The thread.
    pub tid: Tid,
    /// All its general registers.
    pub regs: Regs,
}

/// Counts for people and for `--stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct LinkStats {
    /// Start-up objects of the new version that were paired with old ones.
    pub pairs: usize,
    /// Of these, paired by a direct path from a global, thread-local or local.
    pub strong_pairs: usize,
    /// Words of surviving native memory that were redirected.
    pub redirected_words: usize,
    /// Registers and call arguments that were redirected.
    pub redirected_registers: usize,
    /// Start-up objects that stay because only the new version has them.
    pub native_survivors: usize,
    /// Words in dead stack memory that point at unpaired start-up objects.
    pub stale_words: usize,
    /// Globals that took old's value.
    pub globals: usize,
    /// Relocations resolved.
    pub relocs: usize,
    /// Locals that took old's value.
    pub locals: usize,
    /// Old `FILE`s adopted.
    pub files: usize,
    /// Bytes written.
    pub bytes: usize,
}

/// Everything that makes the booted host the old one's successor. Applied in this order: maps, memory,
/// registers, other kernel calls.
#[derive(Clone, Debug, Default)]
pub struct WriteList {
    /// Disjoint, ascending.
    pub memory: Vec<MemWrite>,
    /// One entry a thread that changes.
    pub registers: Vec<RegWrite>,
    /// In order.
    pub calls: Vec<KernelCall>,
    /// What people should know.
    pub findings: Vec<proto::Finding>,
    /// Counts.
    pub stats: LinkStats,
}

/// Why an update cannot be proven right. Nothing was touched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{invariant}: {message}{}", path_suffix(path))]
pub struct Refusal {
    /// The invariant that does not hold (`I1` … `I9`, or a short code).
    pub invariant: &'static str,
    /// Names the object and what is wrong with it.
    pub message: String,
    /// From a root: `server->clients->head`; empty where there is none.
    pub path: String,
    /// What the user can do.
    pub next_step: String,
}

fn path_suffix(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!(" (at {path})") }
}

impl Refusal {
    /// A refusal without a path.
    #[must_use]
    pub fn new(invariant: &'static str, message: impl Into<String>, next_step: impl Into<String>) -> Self {
        Self { invariant, message: message.into(), path: String::new(), next_step: next_step.into() }
    }
    /// With the path of the object.
    #[must_use]
    pub fn at(mut self, path: impl Into<String>) -> Self {
        self.path = path.into();
        self
    }
}
