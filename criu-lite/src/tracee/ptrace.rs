//! The ptrace(2) requests, one function each, and the wait.

use super::TraceError;
use crate::sys::{Alarm, interrupted};
use mcr_image::{Regs, Tid};
use nix::errno::Errno;
use std::cell::RefCell;
use std::time::{Duration, Instant};

/// Size of the kernel's sigset_t.
const SIGSET: usize = 8;
/// NT_X86_XSTATE (include/uapi/linux/elf.h).
const NT_X86_XSTATE: usize = 0x202;

/// One request with raw arguments.
pub(super) fn request(
    tid: Tid,
    name: &'static str,
    req: u32,
    addr: usize,
    data: usize,
) -> Result<i64, TraceError> {
    super::fault::point();
    // SAFETY: callers pass pointers to live buffers of the size that the request writes, or plain numbers.
    let r = unsafe { libc::ptrace(req, tid.0, addr, data) };
    if r < 0 { Err(TraceError::of(tid, name, Errno::last())) } else { Ok(r) }
}

pub(super) fn get_regs(tid: Tid) -> Result<Regs, TraceError> {
    let mut w = [0u64; 27];
    request(tid, "PTRACE_GETREGS", libc::PTRACE_GETREGS, 0, w.as_mut_ptr() as usize)?;
    Ok(Regs::from_words(&w).unwrap_or_default())
}

pub(super) fn set_regs(tid: Tid, regs: &Regs) -> Result<(), TraceError> {
    let w = regs.to_words();
    request(tid, "PTRACE_SETREGS", libc::PTRACE_SETREGS, 0, w.as_ptr() as usize)?;
    Ok(())
}

pub(super) fn get_xstate(tid: Tid) -> Result<Vec<u8>, TraceError> {
    let mut buf = vec![0u8; 16 * 1024];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    request(tid, "PTRACE_GETREGSET", libc::PTRACE_GETREGSET, NT_X86_XSTATE, (&raw mut iov) as usize)?;
    buf.truncate(iov.iov_len);
    Ok(buf)
}

pub(super) fn set_xstate(tid: Tid, state: &[u8]) -> Result<(), TraceError> {
    let iov = libc::iovec { iov_base: state.as_ptr().cast_mut().cast(), iov_len: state.len() };
    request(tid, "PTRACE_SETREGSET", libc::PTRACE_SETREGSET, NT_X86_XSTATE, (&raw const iov) as usize)?;
    Ok(())
}

pub(super) fn get_sigmask(tid: Tid) -> Result<u64, TraceError> {
    let mut m = 0u64;
    request(tid, "PTRACE_GETSIGMASK", libc::PTRACE_GETSIGMASK, SIGSET, (&raw mut m) as usize)?;
    Ok(m)
}

pub(super) fn set_sigmask(tid: Tid, mask: u64) -> Result<(), TraceError> {
    request(tid, "PTRACE_SETSIGMASK", libc::PTRACE_SETSIGMASK, SIGSET, (&raw const mask) as usize)?;
    Ok(())
}

pub(super) fn get_siginfo(tid: Tid) -> Result<[u8; 128], TraceError> {
    let mut b = [0u8; 128];
    request(tid, "PTRACE_GETSIGINFO", libc::PTRACE_GETSIGINFO, 0, b.as_mut_ptr() as usize)?;
    Ok(b)
}

/// struct ptrace_peeksiginfo_args.
#[repr(C)]
struct PeekArgs {
    off: u64,
    flags: u32,
    nr: i32,
}

/// Pending signals, of the thread or (`shared`) of the process, without taking them.
pub(super) fn peek_siginfo(tid: Tid, shared: bool) -> Result<Vec<[u8; 128]>, TraceError> {
    let mut out = Vec::new();
    loop {
        let mut buf = [[0u8; 128]; 16];
        let args = PeekArgs { off: out.len() as u64, flags: u32::from(shared), nr: 16 };
        let n = request(
            tid,
            "PTRACE_PEEKSIGINFO",
            libc::PTRACE_PEEKSIGINFO,
            (&raw const args) as usize,
            buf.as_mut_ptr() as usize,
        )?;
        out.extend_from_slice(&buf[..n as usize]);
        if n < 16 {
            return Ok(out);
        }
    }
}

/// rseq registration: (address, size, signature, flags). Linux 5.13.
pub(super) fn get_rseq(tid: Tid) -> Result<(u64, u32, u32, u32), TraceError> {
    let mut b = [0u8; 24];
    request(
        tid,
        "PTRACE_GET_RSEQ_CONFIGURATION",
        libc::PTRACE_GET_RSEQ_CONFIGURATION,
        b.len(),
        b.as_mut_ptr() as usize,
    )?;
    let w = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
    Ok((u64::from(w(0)) | u64::from(w(4)) << 32, w(8), w(12), w(16)))
}

/// PTRACE_SECCOMP_GET_METADATA (include/uapi/linux/ptrace.h; Linux 4.16).
const SECCOMP_GET_METADATA: u32 = 0x420d;

/// Does the thread have a seccomp filter? `None`: this program may not ask (CAP_SYS_ADMIN).
pub(super) fn has_seccomp_filter(tid: Tid) -> Option<bool> {
    let mut b = [0u64; 2];
    match request(tid, "PTRACE_SECCOMP_GET_METADATA", SECCOMP_GET_METADATA, 16, b.as_mut_ptr() as usize) {
        Ok(_) => Some(true),
        // EINVAL: another mode than filters. ENOENT: no first filter.
        Err(e) if matches!(e.errno(), Some(Errno::EINVAL | Errno::ENOENT)) => Some(false),
        Err(_) => None,
    }
}

/// What the tracee sits in: 0 none, 1 entry, 2 exit, 3 seccomp (PTRACE_GET_SYSCALL_INFO, Linux 5.3).
pub(super) fn syscall_op(tid: Tid) -> Result<u8, TraceError> {
    let mut b = [0u8; 88];
    request(tid, "PTRACE_GET_SYSCALL_INFO", libc::PTRACE_GET_SYSCALL_INFO, b.len(), b.as_mut_ptr() as usize)?;
    Ok(b[0])
}

thread_local! {
    static ALARM: RefCell<Option<Alarm>> = const { RefCell::new(None) };
}

/// waitpid(2) for one tracee. With a deadline the wait ends there with [`TraceError::Timeout`].
pub(super) fn wait(tid: Tid, deadline: Option<Instant>) -> Result<i32, TraceError> {
    let mut status = 0;
    // Most waits are over within microseconds: try before a timer is set up.
    for _ in 0..3 {
        if let Some(s) = wait_once(tid, libc::WNOHANG, &mut status)? {
            return Ok(s);
        }
        std::thread::yield_now();
    }
    ALARM.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Some(Alarm::new().map_err(|e| TraceError::of(tid, "timer_create", e))?);
        }
        let look = Instant::now() + LOOK_AFTER;
        let first = deadline.map_or(look, |d| d.min(look));
        if let Some(a) = slot {
            a.arm(first.saturating_duration_since(Instant::now()));
        }
        let r = loop {
            match wait_once(tid, 0, &mut status) {
                Ok(Some(s)) => break Ok(s),
                Ok(None) if interrupted() => break Err(TraceError::Interrupted),
                Ok(None) if deadline.is_some_and(|d| Instant::now() >= d) => {
                    break Err(TraceError::Timeout { tid });
                }
                Ok(None) => reap_dead(tid),
                Err(e) => break Err(e),
            }
        };
        if let Some(a) = slot {
            a.disarm();
        }
        r
    })
}

/// After so long a wait is looked at: the process may be dying.
const LOOK_AFTER: Duration = Duration::from_millis(10);

/// Reaps dead threads of the same process that we trace: the exit of a leader is not reported before all its
/// traced threads are reaped. Whoever holds one of them finds it gone.
fn reap_dead(tid: Tid) {
    let Ok(dir) = std::fs::read_dir(format!("/proc/{tid}/task")) else { return };
    for other in dir.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok()) {
        // Only the dead: waitid(2) takes stops of tracees whatever its options say.
        if other != tid.0 && is_dead(tid, other) {
            // SAFETY: all-zero is a valid siginfo_t, and it is live.
            unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let flags = libc::WEXITED | libc::WNOHANG | libc::__WALL;
                libc::waitid(libc::P_PID, other as u32, &mut info, flags);
            }
        }
    }
}

fn is_dead(tid: Tid, other: i32) -> bool {
    let stat = std::fs::read(format!("/proc/{tid}/task/{other}/stat")).unwrap_or_default();
    let state = stat.iter().rposition(|&b| b == b')').and_then(|n| stat.get(n + 2));
    matches!(state, Some(b'Z' | b'X'))
}

/// Waits for the end of a thread that is being killed, also when this program was told to stop.
pub(crate) fn reap(tid: Tid, deadline: Option<Instant>) -> Result<(), TraceError> {
    loop {
        match wait(tid, deadline) {
            Ok(s) if libc::WIFEXITED(s) || libc::WIFSIGNALED(s) => return Ok(()),
            Err(TraceError::Gone { .. }) => return Ok(()),
            Ok(_) | Err(TraceError::Interrupted) if deadline.is_none_or(|d| Instant::now() < d) => {}
            Ok(_) => return Err(TraceError::Timeout { tid }),
            Err(e) => return Err(e),
        }
    }
}

/// `None`: nothing yet, or interrupted by a signal.
pub(super) fn wait_once(tid: Tid, flags: i32, status: &mut i32) -> Result<Option<i32>, TraceError> {
    super::fault::point();
    // SAFETY: status is a live int.
    let r = unsafe { libc::waitpid(tid.0, status, libc::__WALL | flags) };
    match r {
        0 => Ok(None),
        r if r > 0 => Ok(Some(*status)),
        _ => match Errno::last() {
            Errno::EINTR => Ok(None),
            Errno::ECHILD => Err(TraceError::Gone { tid }),
            e => Err(TraceError::of(tid, "waitpid", e)),
        },
    }
}
