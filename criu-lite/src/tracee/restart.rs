//! System calls that a stop interrupted.
//!
//! What the kernel shows in rax of an interrupted call (include/linux/errno.h): −512 ERESTARTSYS, −513
//! ERESTARTNOINTR, −514 ERESTARTNOHAND: executed again; −516 ERESTART_RESTARTBLOCK: restart_syscall(2) (219)
//! with the remaining time kept in the kernel. epoll_wait and a few others return −EINTR on any interruption.

use crate::ProcessMemory;
use mcr_image::{Addr, Memory, Regs};

/// Size of a `syscall` instruction.
pub(super) const INSN: u64 = 2;
pub(super) const EINTR: i64 = -4;
pub(super) const ERESTARTNOHAND: i64 = -514;
const RESTARTBLOCK: i64 = -516;

const IO_PGETEVENTS: i64 = 333;

/// Calls that give EINTR when a thread is stopped (signal(7), "Interruption of system calls and library
/// functions by stop signals", and fs/eventpoll.c).
const EINTR_CALLS: &[i64] = &[
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    IO_PGETEVENTS,
    libc::SYS_io_uring_enter,
    // With SO_RCVTIMEO or SO_SNDTIMEO; nothing was transferred, or the count would be returned.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
];

/// Calls that use a restart block.
const BLOCK_CALLS: &[i64] =
    &[libc::SYS_poll, libc::SYS_nanosleep, libc::SYS_futex, libc::SYS_clock_nanosleep];

/// The call that a stopped thread is blocked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// The original call, never 219.
    pub nr: i64,
    /// Its arguments.
    pub args: [u64; 6],
    /// What rax showed; 0 where the thread is about to execute the call.
    pub raw_result: i64,
    /// Address of the `syscall` instruction.
    pub at: Addr,
}

impl Blocked {
    /// The registers with which the thread executes the call from its beginning.
    #[must_use]
    pub fn rewound(&self, regs: &Regs) -> Regs {
        Regs { rip: self.at.0, rax: self.nr as u64, orig_rax: u64::MAX, ..*regs }
    }
}

/// The call that a thread in an event stop with these registers was interrupted in, or is about to execute
/// (rip on a `syscall` instruction). `None`: it runs in user mode, or its call is complete.
#[must_use]
pub fn blocked_call(regs: &Regs, mem: &ProcessMemory) -> Option<Blocked> {
    let args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
    let insn_at = |a: u64| {
        let mut b = [0u8; 2];
        mem.read(Addr(a), &mut b).is_ok() && b == [0x0f, 0x05]
    };
    let (orig, rax) = (regs.orig_rax as i64, regs.rax as i64);
    if orig >= 0 && interrupted(orig, rax) {
        let at = Addr(regs.rip.wrapping_sub(INSN));
        let nr = if orig == libc::SYS_restart_syscall { original(mem, at, rax)? } else { orig };
        return Some(Blocked { nr, args, raw_result: rax, at });
    }
    if orig < 0 && insn_at(regs.rip) && (0..1024).contains(&rax) {
        let at = Addr(regs.rip);
        let nr = if rax == libc::SYS_restart_syscall { original(mem, at, RESTARTBLOCK)? } else { rax };
        return Some(Blocked { nr, args, raw_result: 0, at });
    }
    None
}

pub(super) fn interrupted(nr: i64, rax: i64) -> bool {
    matches!(rax, -512 | -513 | ERESTARTNOHAND | RESTARTBLOCK) || (rax == EINTR && EINTR_CALLS.contains(&nr))
}

/// The call behind restart_syscall, from the `mov $nr,%eax` before the instruction: the registers of the
/// arguments are untouched but the number is overwritten by an earlier restart.
fn original(mem: &ProcessMemory, at: Addr, rax: i64) -> Option<i64> {
    if rax != RESTARTBLOCK && rax != EINTR && rax != ERESTARTNOHAND && rax != -512 {
        return None;
    }
    const BACK: u64 = 48;
    let code = mem.bytes(Addr(at.0.checked_sub(BACK)?), BACK as usize).ok()?;
    // `b8 imm32` nearest to the instruction with the number of a call that has a restart block.
    (0..=code.len() - 5).rev().find_map(|i| {
        let imm = i64::from(u32::from_le_bytes([code[i + 1], code[i + 2], code[i + 3], code[i + 4]]));
        (code[i] == 0xb8 && BLOCK_CALLS.contains(&imm)).then_some(imm)
    })
}
