//! What a boot hands to `link`: the booted host as plain data. Memory is read beside it, through
//! [`mcr_image::Memory`]; nothing in here touches a process.
//!
//! Contract with `boot`:
//! - every range of `Patch.regions` is mapped (private, anonymous, read-write) *before* the new version's
//!   first instruction, so that nothing the boot maps can collide with it;
//! - every thread is normalised: `rip` on its `syscall` instruction, `rax` = the call's number,
//!   `orig_rax` = -1;
//! - all descriptors have their final numbers; epoll objects made by the boot still carry the watches that
//!   the new version registered (`link` decides the final ones).

use mcr_image::{Addr, Fd, Pid, Regs, Tid, proto};
use std::path::PathBuf;

/// A half-open range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// First address.
    pub start: Addr,
    /// One past the last address.
    pub end: Addr,
}

impl Span {
    /// The range `start..end`.
    #[must_use]
    pub fn new(start: Addr, end: Addr) -> Self {
        Self { start, end }
    }
    /// Whether `addr` lies inside.
    #[must_use]
    pub fn contains(&self, addr: Addr) -> bool {
        self.start <= addr && addr < self.end
    }
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.end.since(self.start)
    }
    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }
}

/// A frame of a thread, innermost first. Mirrors what the unwinder knows, as plain data.
#[derive(Clone, Debug, Default)]
pub struct BootFrame {
    /// Where execution stands (innermost) or will return to.
    pub pc: Addr,
    /// Canonical frame address.
    pub cfa: Addr,
    /// Register values valid in this frame, DWARF numbering.
    pub regs: [Option<u64>; 17],
    /// Where the frame's value of a register lives in memory; `None`: still in the live register.
    pub saved_at: [Option<Addr>; 17],
    /// Path or file name of the module; empty when unknown.
    pub module: String,
    /// Load bias of that module.
    pub module_base: Addr,
    /// Function by symbol, where there is one.
    pub function: Option<String>,
    /// The function's link-time address (0 when there is no symbol).
    pub function_link_addr: u64,
    /// `pc - function start`, or `pc - module base` where `function` is `None`.
    pub offset: u64,
    /// The frame belongs to the main executable.
    pub in_program: bool,
}

/// A thread of the new version, held at its blocking call.
#[derive(Clone, Debug, Default)]
pub struct NewThread {
    /// Its kernel tid.
    pub tid: Tid,
    /// Normalised general registers.
    pub regs: Regs,
    /// Frames, innermost first.
    pub frames: Vec<BootFrame>,
    /// Its stack signature, innermost first.
    pub signature: Vec<String>,
    /// The old thread it takes over; `None` for a thread that only the new version has.
    pub old_tid: Option<Tid>,
    /// Thread pointer (= address of its `struct pthread`).
    pub fs_base: Addr,
    /// The mapping its stack pointer lies in (for pthreads it also holds TLS and `struct pthread`).
    pub stack: Option<Span>,
    /// The call it is held at.
    pub syscall: i64,
    /// That call's six arguments.
    pub args: [u64; 6],
    /// `sigaltstack` of the thread, zero size when there is none.
    pub altstack: proto::AltStack,
    /// Blocked signals.
    pub sigmask: u64,
}

/// A module mapped in the host after the boot.
#[derive(Clone, Debug, Default)]
pub struct BootModule {
    /// Path of the file.
    pub path: PathBuf,
    /// Load bias.
    pub base: Addr,
    /// ELF build-id; empty when the file has none.
    pub build_id: Vec<u8>,
    /// From its first to its last mapped byte.
    pub start: Addr,
    /// One past its last mapped byte.
    pub end: Addr,
    /// The new program itself.
    pub is_exe: bool,
    /// The dynamic linker.
    pub is_interp: bool,
    /// The same file (build-id) was mapped at the same base in the old process.
    pub same_as_old: bool,
}

/// A descriptor of the new version and the old one whose object it got.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdMatch {
    /// Number in the new version (final).
    pub new_fd: Fd,
    /// Number in the old version.
    pub old_fd: Fd,
    /// What it is, for people: `listener 127.0.0.1:7000`, `epoll`, `/var/log/x`.
    pub what: String,
    /// The old object sits at `new_fd` now; false: a fresh object of the same kind (epoll).
    pub old_object: bool,
}

/// An epoll object that the new version made, with what it registered.
#[derive(Clone, Debug, Default)]
pub struct BootEpoll {
    /// Its descriptor number (final).
    pub fd: Fd,
    /// The old epoll descriptor it takes over; `None`: only new has it.
    pub old_fd: Option<Fd>,
    /// Its registrations now.
    pub watches: Vec<proto::EpollWatch>,
}

/// A POSIX timer of the booted host.
#[derive(Clone, Debug, Default)]
pub struct BootTimer {
    /// Its id.
    pub id: u32,
    /// clock id, SIGEV_ kind and signal.
    pub kind: (i32, i32, i32),
    /// Old has it, too, under the same id.
    pub in_old: bool,
}

/// The host after a successful boot.
#[derive(Clone, Debug, Default)]
pub struct Booted {
    /// The host's pid.
    pub pid: Pid,
    /// Path of the new program.
    pub new_path: PathBuf,
    /// Its load bias.
    pub new_base: Addr,
    /// Modules mapped now.
    pub modules: Vec<BootModule>,
    /// Every mapping of the host, ascending.
    pub vmas: Vec<proto::Vma>,
    /// Ranges that the boot mapped (new program, ld.so, libraries, boot heaps, stacks); ascending.
    pub native: Vec<Span>,
    /// Ranges kept from the old process; ascending.
    pub retained: Vec<Span>,
    /// Threads, the leader first.
    pub threads: Vec<NewThread>,
    /// Descriptors matched to old ones.
    pub fds: Vec<FdMatch>,
    /// Descriptors that only the new version has.
    pub new_only_fds: Vec<(Fd, String)>,
    /// Epoll objects made by the boot.
    pub epolls: Vec<BootEpoll>,
    /// Signal actions that the new version installed.
    pub sigactions: Vec<proto::SigAction>,
    /// The program break, unchanged by the boot.
    pub brk: Addr,
    /// The new stack of the main thread (old's reused `[stack]` mapping).
    pub stack: Option<Span>,
    /// Where argc lies on it; the argument, environment and auxiliary vectors and their strings are above.
    pub entry_stack: Addr,
    /// It is to be laid into the old process itself: thread numbers and kernel objects are old's own.
    pub in_place: bool,
    /// What the boot found worth telling.
    pub findings: Vec<proto::Finding>,
    /// POSIX timers that its start-up made.
    pub timers: Vec<BootTimer>,
    /// Interval timers that its start-up set and old does not use.
    pub new_itimers: Vec<u32>,
}

impl Booted {
    /// The mappings, cut to what the boot made, ascending: old's heap must not be taken for new's.
    #[must_use]
    pub fn native_vmas(&self) -> Vec<proto::Vma> {
        let mut out = Vec::new();
        for v in &self.vmas {
            for s in &self.native {
                let (start, end) = (v.start.max(s.start.0), v.end.min(s.end.0));
                if start < end {
                    let skipped = if v.ino == 0 { 0 } else { start - v.start };
                    out.push(proto::Vma { start, end, file_offset: v.file_offset + skipped, ..v.clone() });
                }
            }
        }
        out.sort_by_key(|v| v.start);
        out
    }
    /// The new thread that takes over `old`.
    #[must_use]
    pub fn thread_for(&self, old: Tid) -> Option<&NewThread> {
        self.threads.iter().find(|t| t.old_tid == Some(old))
    }
    /// Whether the boot made the memory at `addr`.
    #[must_use]
    pub fn is_native(&self, addr: Addr) -> bool {
        find(&self.native, addr)
    }
    /// Whether the memory at `addr` came from the old process.
    #[must_use]
    pub fn is_retained(&self, addr: Addr) -> bool {
        find(&self.retained, addr)
    }
}

fn find(spans: &[Span], addr: Addr) -> bool {
    let i = spans.partition_point(|s| s.end <= addr);
    spans.get(i).is_some_and(|s| s.contains(addr))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_half_open() {
        let b = Booted {
            native: vec![Span::new(Addr(0x1000), Addr(0x2000)), Span::new(Addr(0x5000), Addr(0x6000))],
            ..Booted::default()
        };
        assert!(b.is_native(Addr(0x1000)) && b.is_native(Addr(0x5fff)));
        assert!(!b.is_native(Addr(0x2000)) && !b.is_native(Addr(0x6000)) && !b.is_native(Addr(0)));
    }
}
