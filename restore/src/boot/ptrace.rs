//! ptrace(2) as the boot needs it: every thread of the host is traced by the calling thread, every system
//! call stops twice, and one wait serves all threads.

use mcr_image::{Regs, Tid};
use nix::errno::Errno;
use std::time::{Duration, Instant};

/// NT_X86_XSTATE (include/uapi/linux/elf.h).
const NT_X86_XSTATE: usize = 0x202;
/// Size of the kernel's sigset_t.
const SIGSET: usize = 8;

/// A ptrace request that failed.
#[derive(Debug, thiserror::Error)]
#[error("thread {tid}: {request}: {errno}")]
pub struct PtraceError {
    /// The thread.
    pub tid: Tid,
    /// The request.
    pub request: &'static str,
    /// What the kernel said.
    pub errno: Errno,
}

type Result<T> = std::result::Result<T, PtraceError>;

fn request(tid: Tid, name: &'static str, req: libc::c_uint, addr: usize, data: usize) -> Result<i64> {
    // SAFETY: callers pass plain numbers or pointers to live buffers of the size that the request uses.
    let r = unsafe { libc::ptrace(req, tid.0, addr, data) };
    if r < 0 { Err(PtraceError { tid, request: name, errno: Errno::last() }) } else { Ok(r) }
}

pub(super) fn regs(tid: Tid) -> Result<Regs> {
    let mut w = [0u64; 27];
    request(tid, "PTRACE_GETREGS", libc::PTRACE_GETREGS, 0, w.as_mut_ptr() as usize)?;
    Ok(Regs::from_words(&w).unwrap_or_default())
}

pub(super) fn set_regs(tid: Tid, regs: &Regs) -> Result<()> {
    let w = regs.to_words();
    request(tid, "PTRACE_SETREGS", libc::PTRACE_SETREGS, 0, w.as_ptr() as usize).map(drop)
}

pub(super) fn sigmask(tid: Tid) -> Result<u64> {
    let mut m = 0u64;
    request(tid, "PTRACE_GETSIGMASK", libc::PTRACE_GETSIGMASK, SIGSET, (&raw mut m) as usize)?;
    Ok(m)
}

pub(super) fn set_sigmask(tid: Tid, mask: u64) -> Result<()> {
    request(tid, "PTRACE_SETSIGMASK", libc::PTRACE_SETSIGMASK, SIGSET, (&raw const mask) as usize).map(drop)
}

/// The initial floating-point and vector state: everything in its reset value, as after execve(2).
pub(super) fn reset_xstate(tid: Tid) -> Result<()> {
    let mut buf = xstate(tid)?;
    let len = buf.len();
    // Software-reserved bytes 464..512 describe the layout; everything else starts from zero.
    for (i, b) in buf.iter_mut().enumerate() {
        if !(464..512).contains(&i) {
            *b = 0;
        }
    }
    buf[0..2].copy_from_slice(&0x037fu16.to_le_bytes()); // FCW
    buf[24..28].copy_from_slice(&0x1f80u32.to_le_bytes()); // MXCSR
    if len >= 520 {
        buf[512..520].copy_from_slice(&3u64.to_le_bytes()); // XSTATE_BV: x87 and SSE are given, the rest is initial
    }
    let iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: len };
    request(tid, "PTRACE_SETREGSET", libc::PTRACE_SETREGSET, NT_X86_XSTATE, (&raw const iov) as usize)
        .map(drop)
}

/// The extended registers, in the layout of XSAVE.
pub(super) fn xstate(tid: Tid) -> Result<Vec<u8>> {
    let mut buf = vec![0u8; 16 * 1024];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    request(tid, "PTRACE_GETREGSET", libc::PTRACE_GETREGSET, NT_X86_XSTATE, (&raw mut iov) as usize)?;
    buf.truncate(iov.iov_len);
    Ok(buf)
}

/// rseq registration: (address, size, signature). Linux 5.13.
pub(super) fn rseq(tid: Tid) -> Result<(u64, u32, u32)> {
    let mut b = [0u8; 24];
    let req = libc::PTRACE_GET_RSEQ_CONFIGURATION;
    request(tid, "PTRACE_GET_RSEQ_CONFIGURATION", req, b.len(), b.as_mut_ptr() as usize)?;
    let w = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
    Ok((u64::from(w(0)) | u64::from(w(4)) << 32, w(8), w(12)))
}

pub(super) fn event_message(tid: Tid) -> Result<u64> {
    let mut m = 0u64;
    request(tid, "PTRACE_GETEVENTMSG", libc::PTRACE_GETEVENTMSG, 0, (&raw mut m) as usize)?;
    Ok(m)
}

/// Runs to the next stop at a system call, delivering `signal` (0: none).
pub(super) fn resume(tid: Tid, signal: i32) -> Result<()> {
    request(tid, "PTRACE_SYSCALL", libc::PTRACE_SYSCALL, 0, signal as usize).map(drop)
}

/// Runs without stops at system calls.
pub(super) fn cont(tid: Tid) -> Result<()> {
    request(tid, "PTRACE_CONT", libc::PTRACE_CONT, 0, 0).map(drop)
}

/// Makes a running thread stop (it must have been seized).
pub(super) fn interrupt(tid: Tid) -> Result<()> {
    request(tid, "PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, 0, 0).map(drop)
}

/// Lets the thread go.
pub(super) fn detach(tid: Tid, signal: i32) -> Result<()> {
    request(tid, "PTRACE_DETACH", libc::PTRACE_DETACH, 0, signal as usize).map(drop)
}

pub(super) fn set_options(tid: Tid, options: i32) -> Result<()> {
    request(tid, "PTRACE_SETOPTIONS", libc::PTRACE_SETOPTIONS, 0, options as usize).map(drop)
}

/// The options of a booting host.
pub(super) const BOOT_OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_EXITKILL
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC;

/// What a thread that stopped with SIGTRAP|0x80 is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AtSyscall {
    Entry { nr: i64, args: [u64; 6] },
    Exit { result: i64 },
    No,
}

/// PTRACE_GET_SYSCALL_INFO (5.3): struct ptrace_syscall_info as words.
pub(super) fn syscall_info(tid: Tid) -> Result<AtSyscall> {
    let mut w = [0u64; 11];
    let size = std::mem::size_of_val(&w);
    request(tid, "PTRACE_GET_SYSCALL_INFO", libc::PTRACE_GET_SYSCALL_INFO, size, w.as_mut_ptr() as usize)?;
    Ok(match w[0] & 0xff {
        1 => AtSyscall::Entry { nr: w[3] as i64, args: [w[4], w[5], w[6], w[7], w[8], w[9]] },
        2 => AtSyscall::Exit { result: w[3] as i64 },
        _ => AtSyscall::No,
    })
}

/// A change of state of a tracee.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// At the entry or exit of a system call.
    Syscall,
    /// About to get this signal.
    Signal(i32),
    /// PTRACE_EVENT_* (fork, clone, exec …).
    Event(i32),
    /// PTRACE_EVENT_STOP: a new thread, or after an interrupt.
    Parked,
    /// Ended with this status.
    Exited(i32),
    /// Killed by this signal.
    Killed(i32),
}

fn decode(status: i32) -> Stop {
    if libc::WIFEXITED(status) {
        return Stop::Exited(libc::WEXITSTATUS(status));
    }
    if libc::WIFSIGNALED(status) {
        return Stop::Killed(libc::WTERMSIG(status));
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        128 => Stop::Parked,
        0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        0 => Stop::Signal(signal),
        event => Stop::Event(event),
    }
}

/// Waits for tracees of the calling thread, with a deadline.
pub(super) struct Waiter {
    alarm: Alarm,
}

impl Waiter {
    pub(super) fn new() -> std::result::Result<Self, Errno> {
        Ok(Self { alarm: Alarm::new()? })
    }

    /// The next change of state of any tracee or child of the calling thread; `None` at the deadline.
    pub(super) fn any(&self, until: Instant) -> std::result::Result<Option<(Tid, Stop)>, Errno> {
        self.wait(-1, until)
    }

    /// The next change of state of one thread; `None` at the deadline.
    pub(super) fn one(&self, tid: Tid, until: Instant) -> std::result::Result<Option<Stop>, Errno> {
        Ok(self.wait(tid.0, until)?.map(|(_, s)| s))
    }

    fn wait(&self, id: i32, until: Instant) -> std::result::Result<Option<(Tid, Stop)>, Errno> {
        let flags = libc::__WALL | libc::__WNOTHREAD;
        // Most stops are a few microseconds away: try before arming a timer.
        for _ in 0..4 {
            if let Some(s) = wait_once(id, flags | libc::WNOHANG)? {
                return Ok(Some(s));
            }
            std::thread::yield_now();
        }
        self.alarm.arm(until.saturating_duration_since(Instant::now()).max(Duration::from_micros(1)));
        let r = loop {
            match wait_once(id, flags) {
                Ok(Some(s)) => break Ok(Some(s)),
                Ok(None) if Instant::now() >= until => break Ok(None),
                Ok(None) => {}
                Err(e) => break Err(e),
            }
        };
        self.alarm.arm(Duration::ZERO);
        r
    }
}

/// `None`: nothing yet, or interrupted by a signal.
fn wait_once(id: i32, flags: i32) -> std::result::Result<Option<(Tid, Stop)>, Errno> {
    let mut status = 0;
    // SAFETY: status is a live int.
    let r = unsafe { libc::waitpid(id, &mut status, flags) };
    match r {
        0 => Ok(None),
        r if r > 0 => Ok(Some((Tid(r), decode(status)))),
        _ => match Errno::last() {
            Errno::EINTR => Ok(None),
            e => Err(e),
        },
    }
}

/// A timer of the calling thread whose signal makes its blocking calls return EINTR.
struct Alarm {
    timer: libc::timer_t,
}

extern "C" fn nothing(_: i32) {}

impl Alarm {
    fn new() -> std::result::Result<Self, Errno> {
        let signal = libc::SIGRTMIN() + 16;
        // SAFETY: all-zero is a valid sigaction and sigevent; the handler does nothing and is
        // async-signal-safe. No SA_RESTART: waits must return.
        unsafe {
            let mut sa: libc::sigaction = std::mem::zeroed();
            sa.sa_sigaction = nothing as *const () as usize;
            if libc::sigaction(signal, &sa, std::ptr::null_mut()) != 0 {
                return Err(Errno::last());
            }
            let mut ev: libc::sigevent = std::mem::zeroed();
            ev.sigev_notify = libc::SIGEV_THREAD_ID;
            ev.sigev_signo = signal;
            ev.sigev_notify_thread_id = libc::gettid();
            let mut timer: libc::timer_t = std::ptr::null_mut();
            if libc::timer_create(libc::CLOCK_MONOTONIC, &mut ev, &mut timer) != 0 {
                return Err(Errno::last());
            }
            Ok(Self { timer })
        }
    }

    /// First signal after `first` (zero: disarm), then every 5 ms, so that one that comes just before the
    /// wait is not lost.
    fn arm(&self, first: Duration) {
        let spec =
            |d: Duration| libc::timespec { tv_sec: d.as_secs() as i64, tv_nsec: i64::from(d.subsec_nanos()) };
        let every = if first.is_zero() { Duration::ZERO } else { Duration::from_millis(5) };
        let spec = libc::itimerspec { it_value: spec(first), it_interval: spec(every) };
        // SAFETY: the timer lives as long as self.
        unsafe { libc::timer_settime(self.timer, 0, &spec, std::ptr::null_mut()) };
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: deleted once.
        unsafe { libc::timer_delete(self.timer) };
    }
}
