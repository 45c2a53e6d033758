//! System calls that a stop interrupted.
//!
//! What the kernel shows in rax of an interrupted call (include/linux/errno.h): −512 ERESTARTSYS, −513
//! ERESTARTNOINTR, −514 ERESTARTNOHAND: executed again; −516 ERESTART_RESTARTBLOCK: restart_syscall(2) (219)
//! with the remaining time kept in the kernel. epoll_wait and a few others return −EINTR on any interruption.
//!
//! What becomes of a timeout when a thread is stopped and let go (`tests/blocked.rs` holds this against the kernel):
//!
//! | call | timeout |
//! |---|---|
//! | poll, nanosleep, clock_nanosleep, futex (FUTEX_WAIT, and by a clock time FUTEX_WAIT_BITSET: condition variables) | runs on, to the nanosecond |
//! | select, pselect6, ppoll | longer by the time that the thread stood: the kernel has written the rest into the caller's memory |
//! | epoll_wait and its kin, semtimedop, rt_sigtimedwait, reads and accepts with SO_RCVTIMEO | begins anew; the kernel forgets how long they have waited |
//!
//! None of them gives a spurious EINTR. Impossible: a MSG_WAITALL that has received a part returns this part.
//! If the engine dies while calls are injected, timeouts of the first row begin anew: rt_sigreturn(2) cancels
//! them in the kernel. In a restored process all begin anew, but for those that the kernel had written to memory.

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
        let nr = if orig == libc::SYS_restart_syscall { original(mem, at, rax, regs.rsp)? } else { orig };
        return Some(Blocked { nr, args, raw_result: rax, at });
    }
    if orig < 0 && insn_at(regs.rip) && (0..1024).contains(&rax) {
        let at = Addr(regs.rip);
        let nr =
            if rax == libc::SYS_restart_syscall { original(mem, at, RESTARTBLOCK, regs.rsp)? } else { rax };
        return Some(Blocked { nr, args, raw_result: 0, at });
    }
    None
}

pub(super) fn interrupted(nr: i64, rax: i64) -> bool {
    matches!(rax, -512 | -513 | ERESTARTNOHAND | RESTARTBLOCK) || (rax == EINTR && EINTR_CALLS.contains(&nr))
}

/// What libc's syscall(2) does before its instruction: the number goes from rdi to rax, the arguments move up.
const WRAPPER: &[u8] = &[
    0x48, 0x89, 0xf8, 0x48, 0x89, 0xf7, 0x48, 0x89, 0xd6, 0x48, 0x89, 0xca, 0x4d, 0x89, 0xc2, 0x4d, 0x89,
    0xc8, 0x4c, 0x8b, 0x4c, 0x24, 0x08,
];
/// `mov $imm,%eax` and `mov $imm,%edi`.
const MOV_EAX: u8 = 0xb8;
const MOV_EDI: u8 = 0xbf;

/// The call behind restart_syscall, from the code in front of the instruction: the registers of the arguments are
/// untouched but the number is overwritten by an earlier restart.
fn original(mem: &ProcessMemory, at: Addr, rax: i64, sp: u64) -> Option<i64> {
    if rax != RESTARTBLOCK && rax != EINTR && rax != ERESTARTNOHAND && rax != -512 {
        return None;
    }
    let wrapped = mem.bytes(Addr(at.0.checked_sub(WRAPPER.len() as u64)?), WRAPPER.len()).ok()? == WRAPPER;
    if wrapped {
        // syscall(2) has not moved the stack pointer: its caller gave the number.
        number_before(mem, Addr(mem.u64(Addr(sp)).ok()?), MOV_EDI)
    } else {
        number_before(mem, at, MOV_EAX)
    }
}

/// The number of a call that has a restart block, in the `mov` of it that is nearest before an address.
fn number_before(mem: &ProcessMemory, at: Addr, mov: u8) -> Option<i64> {
    const BACK: u64 = 48;
    let code = mem.bytes(Addr(at.0.checked_sub(BACK)?), BACK as usize).ok()?;
    (0..=code.len() - 5).rev().find_map(|i| {
        let imm = i64::from(u32::from_le_bytes([code[i + 1], code[i + 2], code[i + 3], code[i + 4]]));
        (code[i] == mov && BLOCK_CALLS.contains(&imm)).then_some(imm)
    })
}
