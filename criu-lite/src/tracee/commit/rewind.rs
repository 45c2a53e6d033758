//! The old context of a thread, such that it goes on as if it had not been stopped.

use super::super::ptrace;
use super::super::restart::{self, ERESTARTNOHAND, INSN};
use crate::ProcessMemory;
use mcr_image::{Addr, Memory, Regs, Tid};

/// What a signal with a handler does to the call that a context is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Class {
    /// It is in no call.
    Free = 0,
    /// The call ends with EINTR, unless the handler was set with SA_RESTART.
    Sys = 1,
    /// The call is executed again always.
    NoIntr = 2,
    /// The call ends with EINTR always.
    NoHand = 3,
    /// Like that; undisturbed it goes on by restart_syscall(2) with the time that is left.
    Block = 4,
}

/// −ERESTARTSYS, −ERESTARTNOINTR, −ERESTART_RESTARTBLOCK (include/linux/errno.h).
const SYS: i64 = -512;
const NOINTR: i64 = -513;
const BLOCK: i64 = -516;

/// Calls that a signal handler ends always (signal(7)).
const ALWAYS: &[i64] = &[
    libc::SYS_pause,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_msgsnd,
    libc::SYS_msgrcv,
    libc::SYS_io_getevents,
    libc::SYS_io_uring_enter,
];

/// Blocking calls that SA_RESTART restarts.
const RESTARTED: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_futex,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_flock,
];

/// The class of a thread that is about to execute call `nr`.
fn about(nr: i64) -> Class {
    if nr == libc::SYS_restart_syscall {
        Class::Block
    } else if ALWAYS.contains(&nr) {
        Class::NoHand
    } else if RESTARTED.contains(&nr) {
        Class::Sys
    } else {
        Class::Free
    }
}

/// Registers as ptrace shows them, to registers that can be set in user mode.
pub(super) fn rewind(regs: &Regs, at_call: impl FnOnce(Addr) -> bool) -> (Regs, Class) {
    let (nr, rax) = (regs.orig_rax as i64, regs.rax as i64);
    let free = Regs { orig_rax: u64::MAX, ..*regs };
    let again = Regs { rip: regs.rip.wrapping_sub(INSN), rax: nr as u64, ..free };
    if nr >= 0 && restart::interrupted(nr, rax) {
        let class = match rax {
            // A restarted call that was interrupted again keeps its restart block.
            _ if nr == libc::SYS_restart_syscall => Class::Block,
            SYS => Class::Sys,
            NOINTR => Class::NoIntr,
            BLOCK => Class::Block,
            ERESTARTNOHAND => Class::NoHand,
            _ => about(nr),
        };
        let rax = if class == Class::Block { libc::SYS_restart_syscall as u64 } else { nr as u64 };
        return (Regs { rax, ..again }, class);
    }
    if at_call(Addr(regs.rip)) { (free, about(rax)) } else { (free, Class::Free) }
}

/// The old context of a stopped thread.
pub(super) fn old(tid: Tid, regs: &Regs, mem: &ProcessMemory) -> (Regs, Class) {
    let (mut to, class) = rewind(regs, |at| {
        let mut b = [0u8; 2];
        mem.read(at, &mut b).is_ok() && b == [0x0f, 0x05]
    });
    if class == Class::Free
        && let Some(abort) = rseq_abort(tid, to.rip, mem)
    {
        to.rip = abort;
    }
    (to, class)
}

/// The state of a new context.
pub(super) fn new(regs: &Regs, at_call: bool) -> (Regs, Class) {
    let (mut to, class) = rewind(regs, |_| at_call);
    // There is no restart block for it: the call begins anew.
    if class == Class::Block && to.rax == libc::SYS_restart_syscall as u64 && regs.orig_rax as i64 >= 0 {
        to.rax = regs.orig_rax;
    }
    (to, if class == Class::Block { Class::NoHand } else { class })
}

/// Where a thread goes on that was stopped within a restartable sequence: its abort handler (rseq(2)). The
/// kernel does this on the way back to user mode, but sees the stub's rip there.
fn rseq_abort(tid: Tid, rip: u64, mem: &ProcessMemory) -> Option<u64> {
    let (at, ..) = ptrace::get_rseq(tid).ok()?;
    let cs = mem.u64(Addr(at.checked_add(8).filter(|_| at != 0)?)).ok().filter(|&c| c != 0)?;
    let word = |n: u64| mem.u64(Addr(cs).add(n)).ok();
    let (start, len, abort) = (word(8)?, word(16)?, word(24)?);
    (rip.wrapping_sub(start) < len).then_some(abort)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupted_calls_are_rewound_by_their_class() {
        let shown =
            |nr: i64, rax: i64| Regs { orig_rax: nr as u64, rax: rax as u64, rip: 102, ..Regs::default() };
        let of = |nr, rax| {
            let (r, c) = rewind(&shown(nr, rax), |_| false);
            (r.rip, r.rax as i64, r.orig_rax as i64, c)
        };
        assert_eq!(of(0, -512), (100, 0, -1, Class::Sys));
        assert_eq!(of(271, -514), (100, 271, -1, Class::NoHand));
        assert_eq!(of(35, -516), (100, 219, -1, Class::Block));
        assert_eq!(of(219, -516), (100, 219, -1, Class::Block));
        assert_eq!(of(232, -4), (100, 232, -1, Class::NoHand));
        // A finished call, and none.
        assert_eq!(of(0, 5), (102, 5, -1, Class::Free));
        assert_eq!(of(-1, -512), (102, -512, -1, Class::Free));
        // On the instruction.
        let (r, c) = rewind(&shown(-1, 219), |_| true);
        assert_eq!((r.rip, r.rax, c), (102, 219, Class::Block));
        let (r, c) = new(&shown(35, -516), false);
        assert_eq!((r.rip, r.rax, c), (100, 35, Class::NoHand));
    }
}
