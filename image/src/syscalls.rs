//! System calls of x86-64: names, and which of them block, on what, for how long, and whether they consume input.

mod names;

pub use names::NAMES;

/// A call that can wait for long, as it matters to quiescence and to the boot of a new version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocking {
    /// The call's name.
    pub name: &'static str,
    /// Index of the argument that is a descriptor it waits on.
    pub fd_arg: Option<usize>,
    /// How its timeout is given.
    pub timeout: Timeout,
    /// A completed call takes input away (bytes, a connection, a signal, a child's status, a count), so that
    /// one that returned cannot simply be executed again.
    pub consumes_input: bool,
    /// Index of an argument that points to memory the kernel writes results to.
    pub result_arg: Option<usize>,
}

/// How a blocking call is told for how long it may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timeout {
    /// It cannot be told (a socket option may still limit it).
    Never,
    /// Milliseconds in this argument, negative: forever.
    Millis(usize),
    /// Pointer to a relative `struct timespec`, null: forever.
    Timespec(usize),
    /// Pointer to a relative `struct timeval` that the kernel updates, null: forever.
    Timeval(usize),
    /// futex(2): pointer to a `struct timespec`; relative for FUTEX_WAIT, absolute for FUTEX_WAIT_BITSET and PI.
    Futex(usize),
    /// clock_nanosleep(2): pointer in this argument, absolute if the flags argument has TIMER_ABSTIME.
    ClockSleep(usize),
    /// Absolute `struct timespec`, null: forever.
    AbsoluteTimespec(usize),
}

/// The name of a call; `None` for a number that no header names.
#[must_use]
pub fn name(nr: i64) -> Option<&'static str> {
    let i = NAMES.binary_search_by_key(&nr, |e| i64::from(e.0)).ok()?;
    Some(NAMES[i].1)
}

/// The number of a call.
#[must_use]
pub fn number(name: &str) -> Option<i64> {
    NAMES.iter().find(|e| e.1 == name).map(|e| i64::from(e.0))
}

/// `futex` operations that wait, out of the second argument (without FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME).
#[must_use]
pub fn futex_waits(op: u64) -> bool {
    // WAIT, LOCK_PI, WAIT_BITSET, WAIT_REQUEUE_PI, LOCK_PI2
    matches!(op & 0x7f, 0 | 6 | 9 | 11 | 13)
}

/// Whether a call can wait, and how; for `futex` and `fcntl` ask [`blocks`] with the arguments.
#[must_use]
pub fn blocking(nr: i64) -> Option<Blocking> {
    use Timeout::{AbsoluteTimespec, ClockSleep, Futex, Millis, Never, Timespec, Timeval};
    let name = name(nr)?;
    let (fd_arg, timeout, consumes_input, result_arg) = match name {
        "read" | "recvfrom" => (Some(0), Never, true, Some(1)),
        "pread64" | "readv" | "preadv" | "preadv2" | "recvmsg" => (Some(0), Never, true, Some(1)),
        "recvmmsg" => (Some(0), Timespec(4), true, Some(1)),
        "accept" | "accept4" => (Some(0), Never, true, Some(1)),
        "write" | "writev" | "pwrite64" | "pwritev" | "pwritev2" | "sendto" | "sendmsg" | "sendmmsg" => {
            (Some(0), Never, false, None)
        }
        "connect" | "flock" | "fcntl" | "fsync" | "fdatasync" => (Some(0), Never, false, None),
        "sendfile" => (Some(0), Never, true, None),
        "splice" | "tee" => (Some(0), Never, true, None),
        "poll" => (None, Millis(2), false, Some(0)),
        "ppoll" => (None, Timespec(2), false, Some(0)),
        "select" => (None, Timeval(4), false, Some(1)),
        "pselect6" => (None, Timespec(4), false, Some(1)),
        // Edge-triggered and one-shot watches are consumed by a call that returned.
        "epoll_wait" | "epoll_pwait" => (Some(0), Millis(3), true, Some(1)),
        "epoll_pwait2" => (Some(0), Timespec(3), true, Some(1)),
        "nanosleep" => (None, Timespec(0), false, Some(1)),
        "clock_nanosleep" => (None, ClockSleep(2), false, Some(3)),
        "pause" => (None, Never, false, None),
        "rt_sigsuspend" => (None, Never, false, None),
        "rt_sigtimedwait" => (None, Timespec(2), true, Some(1)),
        "wait4" => (None, Never, true, Some(1)),
        "waitid" => (None, Never, true, Some(2)),
        "futex" => (None, Futex(3), false, None),
        "futex_waitv" => (None, AbsoluteTimespec(3), false, None),
        "futex_wait" => (None, AbsoluteTimespec(4), false, None),
        "semop" => (None, Never, true, None),
        "semtimedop" => (None, Timespec(3), true, None),
        "msgrcv" => (None, Never, true, Some(1)),
        "msgsnd" => (None, Never, false, None),
        "mq_timedreceive" => (Some(0), AbsoluteTimespec(4), true, Some(1)),
        "mq_timedsend" => (Some(0), AbsoluteTimespec(4), false, None),
        "io_getevents" => (None, Timespec(4), true, Some(3)),
        "io_pgetevents" => (None, Timespec(4), true, Some(3)),
        "io_uring_enter" => (Some(0), Never, true, None),
        "restart_syscall" => (None, Never, false, None),
        _ => return None,
    };
    Some(Blocking { name, fd_arg, timeout, consumes_input, result_arg })
}

/// [`blocking`], with the arguments looked at where the same number both waits and does not.
#[must_use]
pub fn blocks(nr: i64, args: &[u64; 6]) -> Option<Blocking> {
    const F_SETLKW: u64 = 7;
    const F_OFD_SETLKW: u64 = 38;
    const WNOHANG: u64 = 1;
    const MSG_DONTWAIT: u64 = 0x40;
    const IPC_NOWAIT: u64 = 0o4000;
    let b = blocking(nr)?;
    let waits = match b.name {
        "futex" => futex_waits(args[1]),
        "fcntl" => matches!(args[1], F_SETLKW | F_OFD_SETLKW),
        // A timeout of zero only asks.
        "poll" => args[2] as i32 != 0,
        "wait4" => args[2] & WNOHANG == 0,
        "waitid" => args[3] & WNOHANG == 0,
        "recvfrom" | "sendto" | "recvmmsg" | "sendmmsg" => args[3] & MSG_DONTWAIT == 0,
        "recvmsg" | "sendmsg" => args[2] & MSG_DONTWAIT == 0,
        "msgrcv" => args[4] & IPC_NOWAIT == 0,
        // No completion is waited for.
        "io_uring_enter" => args[2] != 0,
        _ => true,
    };
    waits.then_some(b)
}

/// Whether a thread that stays in this call comes back to it as a matter of course: waiting for events, for
/// work, for time, for a child or a signal. A blocked `write` or `connect` is in the middle of something.
#[must_use]
pub fn is_resting(nr: i64, args: &[u64; 6]) -> bool {
    let Some(b) = blocks(nr, args) else {
        return false;
    };
    !matches!(
        b.name,
        "write"
            | "writev"
            | "pwrite64"
            | "pwritev"
            | "pwritev2"
            | "sendto"
            | "sendmsg"
            | "sendmmsg"
            | "connect"
            | "flock"
            | "fcntl"
            | "fsync"
            | "fdatasync"
            | "sendfile"
            | "splice"
            | "tee"
            | "msgsnd"
            | "mq_timedsend"
            | "pread64"
            | "preadv"
            | "preadv2"
    )
}

/// Whether a call does nothing but wait (for readiness, time, a wake-up, a signal): a thread that is about to
/// execute it may be held right there, as if it had found nothing, whatever would be ready. `read` and `accept`
/// do not belong here: on a descriptor that does not block they are ordinary work.
#[must_use]
pub fn only_waits(nr: i64, args: &[u64; 6]) -> bool {
    blocks(nr, args).is_some_and(|b| {
        matches!(
            b.name,
            "epoll_wait"
                | "epoll_pwait"
                | "epoll_pwait2"
                | "poll"
                | "ppoll"
                | "select"
                | "pselect6"
                | "nanosleep"
                | "clock_nanosleep"
                | "pause"
                | "rt_sigsuspend"
                | "rt_sigtimedwait"
                | "futex"
                | "futex_waitv"
                | "futex_wait"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_agree() {
        assert_eq!(name(0), Some("read"));
        assert_eq!(name(232), Some("epoll_wait"));
        assert_eq!(name(435), Some("clone3"));
        assert_eq!(name(9999), None);
        assert_eq!(number("futex"), Some(202));
        assert!(NAMES.windows(2).all(|w| w[0].0 < w[1].0));
    }

    #[test]
    fn futex_waits_only_when_it_waits() {
        let futex = number("futex").unwrap();
        let blocked = |op| blocks(futex, &[0, op, 0, 0, 0, 0]).is_some();
        assert!(blocked(0x80) && blocked(0x189));
        assert!(!blocked(0x81) && !blocked(3));
        let with = |name, i: usize, v| {
            let mut args = [1; 6];
            args[i] = v;
            (number(name).unwrap(), args)
        };
        let resting = |(nr, args): (i64, [u64; 6])| is_resting(nr, &args);
        assert!(resting(with("poll", 2, u64::MAX)) && !resting(with("poll", 2, 0)));
        assert!(resting(with("wait4", 2, 0)) && !resting(with("wait4", 2, 1)));
        assert!(resting(with("recvfrom", 3, 0)) && !resting(with("recvfrom", 3, 0x40)));
        assert!(only_waits(232, &[0; 6]) && !only_waits(0, &[0; 6]));
        assert!(is_resting(232, &[0; 6]));
        assert!(!is_resting(1, &[0; 6]) && !is_resting(39, &[0; 6]));
    }
}
