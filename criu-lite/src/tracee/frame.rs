//! A signal frame below the target's stack pointer that holds its interrupted context.
//!
//! While a call is injected, the return address of the injected `syscall; ret` is libc's `__restore_rt` and
//! the stack pointer is at this frame: should the engine die now, the call ends, `ret` goes to
//! rt_sigreturn(2), and the thread continues where it was interrupted. Layout: struct rt_sigframe,
//! arch/x86/include/asm/sigframe.h; struct sigcontext_64 and _fpx_sw_bytes, uapi/asm/sigcontext.h.

use mcr_image::{Addr, Regs};

const UC_SIZE: u64 = 8 + 8 + 24 + 256 + 8;
const SIGINFO_SIZE: u64 = 128;
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
/// UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS.
const UC_FLAGS: u64 = 7;
/// An invalid ss_flags: rt_sigreturn then leaves the alternate stack as it is.
const SS_KEEP: u64 = 0xdead;

/// The bytes of a frame and where they belong.
pub(super) struct SigFrame {
    /// The stack pointer during injections; holds the address of `__restore_rt`.
    pub at: Addr,
    /// From `at` upwards.
    pub bytes: Vec<u8>,
}

impl SigFrame {
    /// A frame for a context, placed below its red zone.
    pub(super) fn new(regs: &Regs, xstate: &[u8], sigmask: u64, restorer: Addr) -> Self {
        Self::below(regs.rsp - 128, regs, xstate, sigmask, restorer)
    }

    /// Where a frame holds rip, from its beginning.
    pub(super) const RIP: u64 = 8 + 40 + 16 * 8;
    /// Where it holds rax.
    pub(super) const RAX: u64 = 8 + 40 + 13 * 8;

    /// Where it holds the address of the extended state.
    pub(super) const FP: u64 = 8 + 40 + 184;

    /// Room that a frame with this much extended state takes below its top at most.
    pub(super) const fn room(xlen: u64) -> u64 {
        xlen + 64 + 64 + 64 + 8 + UC_SIZE + SIGINFO_SIZE + 16
    }

    /// A frame that ends below `top`. Without extended state the vector registers are reset.
    pub(super) fn below(top: u64, regs: &Regs, xstate: &[u8], sigmask: u64, restorer: Addr) -> Self {
        let xlen = xstate.len() as u64;
        let fp = ((top & !63) - xlen - 64) & !63;
        let at = (fp - 8 - UC_SIZE - SIGINFO_SIZE) & !15;
        let mut b = vec![0u8; (fp + xlen + 4 - at) as usize];
        let mut put = |off: u64, v: u64| b[off as usize..off as usize + 8].copy_from_slice(&v.to_le_bytes());
        put(0, restorer.0);
        let uc = 8;
        put(uc, UC_FLAGS);
        put(uc + 24, SS_KEEP);
        let mc = uc + 40;
        let words = [
            regs.r8,
            regs.r9,
            regs.r10,
            regs.r11,
            regs.r12,
            regs.r13,
            regs.r14,
            regs.r15,
            regs.rdi,
            regs.rsi,
            regs.rbp,
            regs.rbx,
            regs.rdx,
            regs.rax,
            regs.rcx,
            regs.rsp,
            regs.rip,
            regs.eflags,
        ];
        for (i, w) in words.into_iter().enumerate() {
            put(mc + i as u64 * 8, w);
        }
        put(mc + 144, (regs.cs & 0xffff) | (regs.ss & 0xffff) << 48);
        put(mc + 184, if xlen == 0 { 0 } else { fp });
        put(mc + 256, sigmask);
        let f = (fp - at) as usize;
        b[f..f + xstate.len()].copy_from_slice(xstate);
        if xstate.len() >= 576 {
            let features: [u8; 8] = xstate[464..472].try_into().unwrap_or_default();
            b[f + 464..f + 512].fill(0);
            b[f + 464..f + 468].copy_from_slice(&FP_XSTATE_MAGIC1.to_le_bytes());
            b[f + 468..f + 472].copy_from_slice(&(xlen as u32 + 4).to_le_bytes());
            b[f + 472..f + 480].copy_from_slice(&features);
            b[f + 480..f + 484].copy_from_slice(&(xlen as u32).to_le_bytes());
            b[f + xstate.len()..].copy_from_slice(&FP_XSTATE_MAGIC2.to_le_bytes());
        }
        Self { at: Addr(at), bytes: b }
    }
}
