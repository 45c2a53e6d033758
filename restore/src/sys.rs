//! The few raw calls that have no safe wrapper in nix. The only module of this crate, with `rebuild::spawn`,
//! that contains `unsafe`.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

fn check(r: i64) -> io::Result<i64> {
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r) }
}

/// mallopt(3): memory that is let go stays ours. What a rehearsal has used is used again in the pause, and every page
/// that the kernel would have to give us anew costs more than what is done with it.
pub fn keep_memory() {
    // SAFETY: plain integers; no memory is passed.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

/// setsockopt(2) with any level and name.
pub fn setsockopt(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `value`, which outlives the call; the kernel only reads it.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast::<c_void>(),
            libc::socklen_t::try_from(value.len()).unwrap_or(0),
        )
    };
    check(i64::from(r)).map(drop)
}

/// getsockopt(2) as bytes, at most `len` of them.
pub fn getsockopt(fd: BorrowedFd<'_>, level: i32, name: i32, len: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; len];
    let mut n = libc::socklen_t::try_from(len).unwrap_or(0);
    // SAFETY: the pointer and the length describe `value`, which outlives the call.
    let r = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut n) };
    check(i64::from(r))?;
    value.truncate(n as usize);
    Ok(value)
}

/// ioctl(2) that answers with an int (SIOCINQ, SIOCOUTQ, SIOCOUTQNSD).
pub fn ioctl_int(fd: BorrowedFd<'_>, request: u64) -> io::Result<i32> {
    let mut value = 0i32;
    // SAFETY: the request writes one int to the pointer, which is valid.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, &raw mut value) };
    check(i64::from(r))?;
    Ok(value)
}

/// setsockopt(2) `SO_ATTACH_FILTER` with the one instruction `ret #0`: every segment is dropped unanswered.
pub fn attach_drop_all(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut drop_all = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut drop_all };
    // SAFETY: the program and its one instruction live through the call; the kernel copies them.
    let r = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    check(i64::from(r)).map(drop)
}

/// The socket's filter, one word an instruction; empty when it has none (getsockopt(2) `SO_GET_FILTER`, whose
/// length counts instructions).
pub fn socket_filter(fd: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    let get = |words: &mut [u64]| {
        let mut n = words.len() as libc::socklen_t;
        // SAFETY: the kernel writes at most `n` instructions of eight bytes, and `words` has room for them.
        let r = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_GET_FILTER,
                words.as_mut_ptr().cast(),
                &raw mut n,
            )
        };
        check(i64::from(r)).map(|_| n as usize)
    };
    let mut words = vec![0u64; get(&mut [])?];
    get(&mut words)?;
    Ok(words)
}

/// membarrier(2) `MEMBARRIER_CMD_GLOBAL`: returns after every processor has left what it was doing in the kernel
/// under read-side locks (synchronize_rcu), packets that were being received included.
pub fn membarrier_global() -> io::Result<()> {
    // SAFETY: plain numbers go in.
    check(unsafe { libc::syscall(libc::SYS_membarrier, 1, 0, 0) }).map(drop)
}

/// sendto(2) on a raw socket with a raw `struct sockaddr`.
pub fn send_to(fd: BorrowedFd<'_>, bytes: &[u8], addr: &[u8]) -> io::Result<()> {
    // SAFETY: both slices are live and described by their lengths; the kernel only reads them.
    let n = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            0,
            addr.as_ptr().cast(),
            socklen(addr),
        )
    };
    check(n as i64).map(drop)
}

/// bind(2) or connect(2) with a raw `struct sockaddr`.
pub fn bind_raw(fd: BorrowedFd<'_>, addr: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `addr.len()` bytes from a live slice.
    let r = unsafe { libc::bind(fd.as_raw_fd(), addr.as_ptr().cast(), socklen(addr)) };
    check(i64::from(r)).map(drop)
}

/// connect(2) with a raw `struct sockaddr`.
pub fn connect_raw(fd: BorrowedFd<'_>, addr: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `addr.len()` bytes from a live slice.
    let r = unsafe { libc::connect(fd.as_raw_fd(), addr.as_ptr().cast(), socklen(addr)) };
    check(i64::from(r)).map(drop)
}

fn socklen(addr: &[u8]) -> libc::socklen_t {
    libc::socklen_t::try_from(addr.len()).unwrap_or(0)
}

/// socket(2) with plain numbers; always close-on-exec.
pub fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let r = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    owned(check(i64::from(r))?)
}

/// socketpair(2) of unix sockets; always close-on-exec.
pub fn unix_pair(kind: i32) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut v: [RawFd; 2] = [-1; 2];
    // SAFETY: `v` has room for the two descriptors that the kernel writes.
    let r = unsafe { libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, v.as_mut_ptr()) };
    check(i64::from(r))?;
    Ok((owned(i64::from(v[0]))?, owned(i64::from(v[1]))?))
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just handed this descriptor to us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// fcntl(2) with an integer argument.
pub fn fcntl(fd: BorrowedFd<'_>, cmd: i32, arg: i64) -> io::Result<i64> {
    // SAFETY: only used with commands whose argument is an integer; the callers are in this crate.
    check(i64::from(unsafe { libc::fcntl(fd.as_raw_fd(), cmd, arg) }))
}

/// fcntl(2) `F_SETOWN_EX`.
pub fn set_owner(fd: BorrowedFd<'_>, pid: i32) -> io::Result<()> {
    fcntl(fd, libc::F_SETOWN, i64::from(pid)).map(drop)
}

/// fcntl(2) with a `struct flock` (`F_OFD_SETLK`).
pub fn ofd_lock(fd: BorrowedFd<'_>, write: bool, start: i64, len: i64) -> io::Result<()> {
    let lock = libc::flock {
        l_type: if write { libc::F_WRLCK as i16 } else { libc::F_RDLCK as i16 },
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: `lock` is a complete struct flock that lives through the call.
    check(i64::from(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })).map(drop)
}

/// listen(2).
pub fn listen(fd: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    // SAFETY: no pointers are passed.
    check(i64::from(unsafe { libc::listen(fd.as_raw_fd(), backlog) })).map(drop)
}

/// shutdown(2).
pub fn shutdown(fd: BorrowedFd<'_>, how: i32) -> io::Result<()> {
    // SAFETY: no pointers are passed.
    check(i64::from(unsafe { libc::shutdown(fd.as_raw_fd(), how) })).map(drop)
}

/// flock(2).
pub fn flock(fd: BorrowedFd<'_>, op: i32) -> io::Result<()> {
    // SAFETY: no pointers are passed.
    check(i64::from(unsafe { libc::flock(fd.as_raw_fd(), op) })).map(drop)
}

/// ioctl(2) with a pointer to one 64-bit word (`TFD_IOC_SET_TICKS`).
pub fn ioctl_u64(fd: BorrowedFd<'_>, request: u64, value: u64) -> io::Result<()> {
    // SAFETY: the request reads one u64 from the pointer, which is valid.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, &raw const value) };
    check(i64::from(r)).map(drop)
}

/// signalfd4(2) for a 64-bit kernel mask.
pub fn signalfd(mask: u64) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads eight bytes from `mask`.
    let r = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8usize, libc::SFD_CLOEXEC) };
    owned(check(r)?)
}

/// eventfd2(2).
pub fn eventfd(semaphore: bool) -> io::Result<OwnedFd> {
    let flags = libc::EFD_CLOEXEC | libc::EFD_NONBLOCK | if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: no pointers are passed.
    owned(check(i64::from(unsafe { libc::eventfd(0, flags) }))?)
}

/// timerfd_create(2) and, where a time is left, timerfd_settime(2) with a relative time.
pub fn timerfd(clockid: i32, value_ns: u64, interval_ns: u64) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = owned(check(i64::from(unsafe { libc::timerfd_create(clockid, libc::TFD_CLOEXEC) }))?)?;
    if value_ns != 0 {
        let spec = libc::itimerspec { it_interval: timespec(interval_ns), it_value: timespec(value_ns) };
        // SAFETY: `spec` is complete and lives through the call; no old value is asked for.
        let r = unsafe { libc::timerfd_settime(fd.as_raw_fd(), 0, &raw const spec, std::ptr::null_mut()) };
        check(i64::from(r))?;
    }
    Ok(fd)
}

fn timespec(ns: u64) -> libc::timespec {
    libc::timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 }
}

/// memfd_create(2), close-on-exec, sealing allowed.
pub fn memfd(name: &str) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
    // SAFETY: `name` is NUL-terminated and lives through the call.
    let r = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    owned(check(i64::from(r))?)
}

/// The wait status of a process that its parent has collected (Linux 6.15; none before).
pub fn pidfd_exit_status(pidfd: BorrowedFd<'_>) -> Option<i32> {
    // struct pidfd_info: a mask, then numbers of 32 bits, the status last.
    const PIDFD_GET_INFO: libc::Ioctl = 0xc040_ff0b;
    const PIDFD_INFO_EXIT: u32 = 1 << 3;
    let mut info = [0u32; 16];
    info[0] = PIDFD_INFO_EXIT;
    // SAFETY: the request says that it reads and writes 64 bytes, and `info` has them.
    let r = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, info.as_mut_ptr()) };
    (r == 0 && info[0] & PIDFD_INFO_EXIT != 0).then_some(info[15] as i32)
}

/// Takes over a descriptor that an exec handed down by number.
pub fn inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD has no pointer argument; it only proves that the number is open.
    check(i64::from(unsafe { libc::fcntl(fd, libc::F_GETFD) }))?;
    owned(i64::from(fd))
}

/// Raises our own limit of open files as far as it goes: holding another process's files takes as many as it has.
pub fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // Allowed to everybody; if it fails all the same, the call that runs out says so.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Closes every descriptor above 2 but `keep` (close_range(2), Linux 5.9).
pub fn close_all_but(keep: RawFd) -> io::Result<()> {
    let keep = u32::try_from(keep).map_err(io::Error::other)?;
    for (first, last) in [(3, keep.saturating_sub(1)), (keep + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: only called at the start of a process of our own that owns none of these descriptors.
            check(i64::from(unsafe { libc::close_range(first, last, 0) }))?;
        }
    }
    Ok(())
}

/// Descriptors per message: the kernel's SCM_MAX_FD.
pub const SCM_MAX_FD: usize = 253;

/// Sends `bytes` with descriptors (SCM_RIGHTS, at most [`SCM_MAX_FD`]) over a unix socket.
pub fn send_fds(sock: BorrowedFd<'_>, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let iov = [io::IoSlice::new(bytes)];
    let rights = [ControlMessage::ScmRights(fds)];
    let cmsgs: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let n = sendmsg::<()>(sock.as_raw_fd(), &iov, cmsgs, MsgFlags::MSG_NOSIGNAL, None)?;
    if n == bytes.len() { Ok(()) } else { Err(io::Error::other("short message on a unix socket")) }
}

/// Receives one message with the descriptors in it; the byte count is 0 when the peer has gone.
pub fn recv_fds(sock: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut iov = [io::IoSliceMut::new(buf)];
    let mut space = nix::cmsg_space!([RawFd; SCM_MAX_FD]);
    let msg = recvmsg::<()>(sock.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let n = msg.bytes;
    let mut fds = Vec::new();
    for c in msg.cmsgs()? {
        if let ControlMessageOwned::ScmRights(list) = c {
            for fd in list {
                fds.push(owned(i64::from(fd))?);
            }
        }
    }
    Ok((n, fds))
}
