//! System calls that have no safe wrapper elsewhere. One function a call, errors as errno.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Tells every waiting operation of this process to give up and put things back. For a SIGINT/SIGTERM
/// handler: async-signal-safe.
pub fn set_interrupted() {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// Whether [`set_interrupted`] was called.
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// -1 to the errno.
pub(crate) fn check(r: i64) -> Result<i64, Errno> {
    if r < 0 { Err(Errno::last()) } else { Ok(r) }
}

/// pidfd_open(2) (5.3).
pub fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: plain numbers go in.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// pidfd_getfd(2) (5.6): a duplicate of the target's descriptor, close-on-exec.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: plain numbers go in.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// kcmp(2) KCMP_FILE: how the open file descriptions of two descriptors compare, in an order that holds until the
/// next boot. Equal: they share one.
pub(crate) fn kcmp_file(pid1: i32, fd1: i32, pid2: i32, fd2: i32) -> Result<std::cmp::Ordering, Errno> {
    // SAFETY: plain numbers go in. 0 = KCMP_FILE.
    match check(unsafe { libc::syscall(libc::SYS_kcmp, pid1, pid2, 0, fd1, fd2) })? {
        0 => Ok(std::cmp::Ordering::Equal),
        1 => Ok(std::cmp::Ordering::Less),
        _ => Ok(std::cmp::Ordering::Greater),
    }
}

/// A per-thread timer whose signal makes blocking calls of this thread return EINTR.
pub(crate) struct Alarm {
    timer: libc::timer_t,
}

extern "C" fn nothing(_: i32) {}

impl Alarm {
    const SIGNAL: i32 = 50;

    /// A disarmed timer for the calling thread.
    pub(crate) fn new() -> Result<Self, Errno> {
        // SAFETY: all-zero is a valid sigaction/sigevent; the handler does nothing and is async-signal-safe.
        // No SA_RESTART: waits must return.
        unsafe {
            let mut sa: libc::sigaction = std::mem::zeroed();
            sa.sa_sigaction = nothing as *const () as usize;
            check(i64::from(libc::sigaction(Self::SIGNAL, &sa, std::ptr::null_mut())))?;
            let mut ev: libc::sigevent = std::mem::zeroed();
            ev.sigev_notify = libc::SIGEV_THREAD_ID;
            ev.sigev_signo = Self::SIGNAL;
            ev.sigev_notify_thread_id = libc::gettid();
            let mut timer: libc::timer_t = std::ptr::null_mut();
            check(i64::from(libc::timer_create(libc::CLOCK_MONOTONIC, &mut ev, &mut timer)))?;
            Ok(Self { timer })
        }
    }

    /// First signal after `first`, then every 5 ms (a signal that comes just before the wait is not lost).
    pub(crate) fn arm(&self, first: Duration) {
        let first = first.max(Duration::from_micros(1));
        self.set(first, Duration::from_millis(5));
    }

    /// No more signals.
    pub(crate) fn disarm(&self) {
        self.set(Duration::ZERO, Duration::ZERO);
    }

    fn set(&self, first: Duration, every: Duration) {
        let ts =
            |d: Duration| libc::timespec { tv_sec: d.as_secs() as i64, tv_nsec: i64::from(d.subsec_nanos()) };
        let spec = libc::itimerspec { it_value: ts(first), it_interval: ts(every) };
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

/// Puts the calling thread at SCHED_FIFO until dropped. Lack of the privilege is ignored.
pub(crate) struct RealTime {
    before: Option<(i32, libc::sched_param)>,
}

impl RealTime {
    /// Raises the calling thread.
    pub(crate) fn enter() -> Self {
        // SAFETY: pid 0 is the calling thread; the structs are valid.
        unsafe {
            let policy = libc::sched_getscheduler(0);
            let mut param: libc::sched_param = std::mem::zeroed();
            if policy < 0 || libc::sched_getparam(0, &mut param) != 0 {
                return Self { before: None };
            }
            let fifo = libc::sched_param { sched_priority: 50 };
            if libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &fifo) != 0 {
                return Self { before: None };
            }
            Self { before: Some((policy, param)) }
        }
    }

    /// Whether it was permitted.
    pub(crate) fn is_on(&self) -> bool {
        self.before.is_some()
    }
}

impl Drop for RealTime {
    fn drop(&mut self) {
        if let Some((policy, param)) = self.before {
            // SAFETY: values that the kernel gave us.
            unsafe { libc::sched_setscheduler(0, policy, &param) };
        }
    }
}

/// get_robust_list(2): head and length.
pub(crate) fn get_robust_list(tid: i32) -> Result<(u64, u64), Errno> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both are live words.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) })?;
    Ok((head, len))
}

/// Scheduling policy and real-time priority.
pub(crate) fn scheduler(tid: i32) -> (u32, u32) {
    // SAFETY: a live struct; errors leave zeros.
    unsafe {
        let mut p: libc::sched_param = std::mem::zeroed();
        let policy = libc::sched_getscheduler(tid).max(0);
        libc::sched_getparam(tid, &mut p);
        (policy as u32, p.sched_priority.max(0) as u32)
    }
}

/// getpriority(2).
pub(crate) fn nice(tid: i32) -> i32 {
    // SAFETY: plain numbers. The raw call returns 20 - nice.
    let r = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid) };
    if r > 0 { 20 - r as i32 } else { 0 }
}

/// sched_getaffinity(2), as many bytes as the kernel writes.
pub(crate) fn affinity(tid: i32) -> Vec<u8> {
    let mut buf = vec![0u8; 1024];
    // SAFETY: a live buffer of its length.
    let n = unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, buf.len(), buf.as_mut_ptr()) };
    buf.truncate(n.max(0) as usize);
    buf
}

/// PAGEMAP_SCAN (Linux 6.7) over a pagemap file: ranges of pages that are in memory or swapped out. `not` is
/// a set of PAGE_IS_* that they must not have.
pub(crate) fn pagemap_scan(
    pagemap: &std::fs::File,
    start: u64,
    end: u64,
    not: u64,
    out: &mut Vec<(u64, u64)>,
) -> Result<(), Errno> {
    use linux_raw_sys::general::{page_region, pm_scan_arg};
    /// _IOWR('f', 16, struct pm_scan_arg).
    const PAGEMAP_SCAN: u64 = 0xc060_6610;
    /// PAGE_IS_PRESENT | PAGE_IS_SWAPPED.
    const HAS_CONTENT: u64 = 1 << 3 | 1 << 4;
    let mut at = start;
    // SAFETY: plain numbers in every field.
    let mut regions: Vec<page_region> = vec![unsafe { std::mem::zeroed() }; 512];
    while at < end {
        // SAFETY: plain numbers in every field; the vector outlives the call.
        let n = unsafe {
            let mut arg: pm_scan_arg = std::mem::zeroed();
            arg.size = size_of::<pm_scan_arg>() as u64;
            arg.start = at;
            arg.end = end;
            arg.vec = regions.as_mut_ptr() as u64;
            arg.vec_len = regions.len() as u64;
            arg.category_inverted = not;
            arg.category_mask = not;
            arg.category_anyof_mask = HAS_CONTENT;
            arg.return_mask = HAS_CONTENT;
            let n = check(i64::from(libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg)))?;
            at = if arg.walk_end > at { arg.walk_end } else { end };
            n
        };
        for r in &regions[..n as usize] {
            match out.last_mut() {
                Some(last) if last.1 == r.start => last.1 = r.end,
                _ => out.push((r.start, r.end)),
            }
        }
    }
    Ok(())
}
