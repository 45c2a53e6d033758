//! The host from the tracer's side: memory, injected calls, and small helpers to look at it.

use super::error::{BootError, Result};
use super::ptrace::{self, Stop, Waiter};
use crate::sys;
use mcr_criu_lite::procfs::maps::{self, MapsLine};
use mcr_criu_lite::{ProcessMemory, pidfd_getfd, pidfd_open};
use mcr_image::{Addr, Memory, Pid, Regs, Tid, proto};
use nix::errno::Errno;
use nix::sys::socket::{UnixAddr, getpeername, getsockname};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long an injected call may take before the host is given up.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Room for arguments of injected calls.
pub(super) const SCRATCH_LEN: u64 = 64 << 10;

/// Room for the agent's code, right behind.
pub(super) const AGENT_LEN: u64 = 4096;

/// A stopped process that is to become the new version.
pub struct Host {
    pub(super) pid: Pid,
    pub(super) mem: ProcessMemory,
    pub(super) waiter: Waiter,
    /// A `syscall` instruction of the vdso: it stays mapped whatever is unmapped.
    site: Addr,
    /// Memory for the arguments of injected calls; zero before it is mapped.
    pub(super) scratch: Addr,
}

impl Host {
    /// Takes over a stopped, seized, single-threaded tracee of the calling thread.
    pub fn attach(pid: Pid) -> Result<Self> {
        let mem = ProcessMemory::open(pid).map_err(|e| BootError::io(format!("/proc/{pid}/mem"), e))?;
        let waiter = Waiter::new().map_err(|e| BootError::step("timer for the boot's deadline", e))?;
        ptrace::set_options(Tid(pid.0), ptrace::BOOT_OPTIONS)?;
        let mut host = Self { pid, mem, waiter, site: Addr(0), scratch: Addr(0) };
        host.site = host.find_site()?;
        Ok(host)
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &ProcessMemory {
        &self.mem
    }

    pub(super) fn maps(&self) -> Result<Vec<MapsLine>> {
        maps::read(self.pid).map_err(|e| BootError::io(format!("/proc/{}/maps", self.pid), e))
    }

    fn find_site(&self) -> Result<Addr> {
        let vdso = self.maps()?.into_iter().find(|m| m.name == b"[vdso]");
        let Some(v) = vdso else {
            return Err(BootError::Unsupported {
                what: format!("process {} has no vdso", self.pid),
                next_step: "boot the kernel without vdso=0".into(),
            });
        };
        let code = self.mem.bytes(v.start, v.end.since(v.start) as usize)?;
        match code.windows(2).position(|w| w == [0x0f, 0x05]) {
            Some(n) => Ok(v.start.add(n as u64)),
            None => Err(BootError::Unsupported {
                what: "the vdso holds no `syscall` instruction".into(),
                next_step: "please report the kernel version".into(),
            }),
        }
    }

    /// Waits for the next stop of one thread, which must come soon.
    fn next_stop(&self, tid: Tid, what: &str) -> Result<Stop> {
        match self.waiter.one(tid, Instant::now() + CALL_LIMIT) {
            Ok(Some(Stop::Killed(s))) => Err(BootError::HostKilled { signal: signal_name(s) }),
            Ok(Some(s)) => Ok(s),
            Ok(None) => Err(BootError::step(format!("{what} in thread {tid}"), Errno::ETIMEDOUT)),
            Err(e) => Err(BootError::step(format!("waiting for thread {tid}"), e)),
        }
    }

    /// Runs a stopped thread to its next stop at a system call. Signals must be blocked.
    pub(super) fn to_syscall_stop(&self, tid: Tid, what: &str) -> Result<()> {
        ptrace::resume(tid, 0)?;
        loop {
            match self.next_stop(tid, what)? {
                Stop::Syscall => return Ok(()),
                // Left over from the attach; nothing to deliver.
                Stop::Parked => ptrace::resume(tid, 0)?,
                other => {
                    return Err(BootError::Unsupported {
                        what: format!(
                            "thread {tid} stopped at {other:?} while the engine made the call {what}"
                        ),
                        next_step: "try again; if it happens again, please report it".into(),
                    });
                }
            }
        }
    }

    /// Makes a call in a stopped thread that is not at the entry of another one. All its registers and its
    /// signal mask are put back.
    pub(super) fn call(&self, tid: Tid, what: &str, nr: i64, args: &[u64]) -> Result<u64> {
        let r = self.call_raw(tid, what, nr, args)?;
        if (-4095..0).contains(&r) {
            return Err(BootError::step(format!("{what} in the new version"), Errno::from_raw(-r as i32)));
        }
        Ok(r as u64)
    }

    /// As [`Self::call`], with the kernel's raw result.
    pub(crate) fn call_raw(&self, tid: Tid, what: &str, nr: i64, args: &[u64]) -> Result<i64> {
        let saved = ptrace::regs(tid)?;
        let mask = ptrace::sigmask(tid)?;
        ptrace::set_sigmask(tid, u64::MAX)?;
        let mut r = saved;
        let arg = |i: usize| args.get(i).copied().unwrap_or(0);
        (r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9) = (arg(0), arg(1), arg(2), arg(3), arg(4), arg(5));
        r.rax = nr as u64;
        r.orig_rax = u64::MAX;
        r.rip = self.site.0;
        ptrace::set_regs(tid, &r)?;
        self.to_syscall_stop(tid, what)?;
        self.to_syscall_stop(tid, what)?;
        let result = ptrace::regs(tid)?.rax as i64;
        ptrace::set_regs(tid, &saved)?;
        ptrace::set_sigmask(tid, mask)?;
        Ok(result)
    }

    /// Sets all general registers of a stopped thread.
    pub(crate) fn set_thread_regs(&self, tid: Tid, regs: &Regs) -> Result<()> {
        Ok(ptrace::set_regs(tid, regs)?)
    }

    /// Puts bytes into the scratch memory at `offset` and gives their address.
    pub(crate) fn stage(&self, offset: u64, bytes: &[u8]) -> Result<u64> {
        if self.scratch.0 == 0 || offset + bytes.len() as u64 > SCRATCH_LEN {
            return Err(BootError::step("arguments of a call made in the new version", Errno::E2BIG));
        }
        self.mem.write(self.scratch.add(offset), bytes)?;
        Ok(self.scratch.0 + offset)
    }

    /// The descriptors it has, ascending.
    pub(super) fn fd_numbers(&self) -> Result<Vec<i32>> {
        let dir = format!("/proc/{}/fd", self.pid);
        let mut out: Vec<i32> = std::fs::read_dir(&dir)
            .map_err(|e| BootError::io(&dir, e))?
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        out.sort_unstable();
        Ok(out)
    }

    /// What an epoll descriptor watches.
    pub fn watches(&self, fd: mcr_image::Fd) -> Result<Vec<proto::EpollWatch>> {
        self.epoll_watches(fd.0)
    }

    /// Its highest descriptor number, -1 without any.
    pub fn highest_fd(&self) -> Result<i32> {
        Ok(self.fd_numbers()?.last().copied().unwrap_or(-1))
    }

    /// /proc/PID/fd/N: opening it opens the same file again.
    pub(super) fn fd_path(&self, fd: i32) -> PathBuf {
        format!("/proc/{}/fd/{fd}", self.pid).into()
    }

    /// What a socket of the host is.
    pub(super) fn socket_kind(&self, fd: i32) -> Result<SocketKind> {
        let ask = || -> std::io::Result<SocketKind> {
            let pidfd = pidfd_open(self.pid.0)?;
            let s = pidfd_getfd(pidfd.as_fd(), fd)?;
            let option = |name| {
                let value = sys::getsockopt(s.as_fd(), libc::SOL_SOCKET, name, 4)?;
                let value =
                    value.try_into().map_err(|_| std::io::Error::other("an option that is no int"))?;
                std::io::Result::Ok(i32::from_ne_bytes(value))
            };
            let family = option(libc::SO_DOMAIN)?;
            let (kind, protocol) = (option(libc::SO_TYPE)?, option(libc::SO_PROTOCOL)?);
            let unnamed = |a: nix::Result<UnixAddr>| a.is_ok_and(|a| a.is_unnamed());
            let fd = s.as_raw_fd();
            let pair = family == libc::AF_UNIX && unnamed(getsockname(fd)) && unnamed(getpeername(fd));
            Ok(SocketKind { family, kind, protocol, pair })
        };
        ask().map_err(|e| BootError::io(format!("looking at descriptor {fd} of the new version"), e))
    }

    /// What a descriptor is, as /proc shows it.
    pub(super) fn fd_link(&self, fd: i32) -> Option<String> {
        Some(std::fs::read_link(self.fd_path(fd)).ok()?.to_string_lossy().into_owned())
    }

    /// The registrations of an epoll descriptor, from fdinfo.
    pub(super) fn epoll_watches(&self, fd: i32) -> Result<Vec<proto::EpollWatch>> {
        let path = format!("/proc/{}/fdinfo/{fd}", self.pid);
        let text = std::fs::read_to_string(&path).map_err(|e| BootError::io(&path, e))?;
        Ok(parse_watches(&text))
    }

    /// Mappings in the form of the image.
    pub(super) fn vmas(&self) -> Result<Vec<proto::Vma>> {
        Ok(self.maps()?.iter().map(to_vma).collect())
    }

    /// State letter of a thread (proc(5), stat).
    pub(super) fn thread_state(&self, tid: Tid) -> Option<char> {
        let s = std::fs::read_to_string(format!("/proc/{}/task/{tid}/stat", self.pid)).ok()?;
        s.rsplit_once(") ")?.1.chars().next()
    }

    /// Kills it and waits until every thread is gone.
    pub fn kill(&self) {
        // Its pid cannot be reused: it is our tracee until we reap it.
        let _ =
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid.0), nix::sys::signal::Signal::SIGKILL);
        let end = Instant::now() + CALL_LIMIT;
        let mut tids: Vec<Tid> = self.tids();
        tids.retain(|t| t.0 != self.pid.0);
        tids.push(Tid(self.pid.0)); // The leader is reported last.
        for tid in tids {
            loop {
                match self.waiter.one(tid, end) {
                    Ok(Some(Stop::Exited(_) | Stop::Killed(_)) | None) | Err(_) => break,
                    Ok(Some(_)) => {}
                }
            }
        }
    }

    /// Threads as /proc shows them.
    pub(super) fn tids(&self) -> Vec<Tid> {
        let mut out: Vec<Tid> = std::fs::read_dir(format!("/proc/{}/task", self.pid))
            .into_iter()
            .flatten()
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok().map(Tid))
            .collect();
        out.sort_unstable();
        out
    }
}

/// What a socket is.
#[derive(Clone, Copy, Debug)]
pub(super) struct SocketKind {
    pub family: i32,
    pub kind: i32,
    pub protocol: i32,
    /// An end of a socketpair(2).
    pub pair: bool,
}

fn parse_watches(text: &str) -> Vec<proto::EpollWatch> {
    text.lines()
        .filter(|l| l.starts_with("tfd:"))
        .filter_map(|l| {
            let mut w = l.split_whitespace();
            let mut field = |name: &str| {
                w.by_ref().find(|x| *x == name)?;
                w.next()
            };
            Some(proto::EpollWatch {
                fd: field("tfd:")?.parse().ok()?,
                events: u32::from_str_radix(field("events:")?, 16).ok()?,
                data: u64::from_str_radix(field("data:")?, 16).ok()?,
            })
        })
        .collect()
}

/// A line of maps as the image has it (without what only smaps knows).
pub(super) fn to_vma(m: &MapsLine) -> proto::Vma {
    use proto::VmaKind as K;
    let kind = match (m.name.as_slice(), m.ino != 0, m.shared) {
        (b"[vdso]", ..) => K::VmaVdso,
        (b"[vvar]" | b"[vvar_vclock]", ..) => K::VmaVvar,
        (b"[vsyscall]", ..) => K::VmaVsyscall,
        (_, false, false) => K::VmaAnonPrivate,
        (_, false, true) => K::VmaAnonShared,
        (_, true, false) => K::VmaFilePrivate,
        (n, true, true) if n.starts_with(b"/dev/zero") => K::VmaAnonShared,
        (_, true, true) => K::VmaFileShared,
    };
    proto::Vma {
        start: m.start.0,
        end: m.end.0,
        prot: m.prot,
        kind: kind.into(),
        name: String::from_utf8_lossy(&m.name).into_owned(),
        deleted: m.deleted,
        memfd: m.name.starts_with(b"/memfd:"),
        file_offset: m.offset,
        dev: m.dev,
        ino: m.ino,
        ..Default::default()
    }
}

/// "SIGSEGV" for 11.
pub(super) fn signal_name(n: i32) -> String {
    nix::sys::signal::Signal::try_from(n).map_or_else(|_| format!("signal {n}"), |s| s.as_str().to_owned())
}

/// A finding of the boot.
pub(super) fn finding(
    code: &str,
    severity: proto::Severity,
    message: String,
    next_step: &str,
) -> proto::Finding {
    proto::Finding {
        severity: severity.into(),
        code: code.into(),
        message,
        next_step: next_step.into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epoll_registrations_are_read() {
        let text = "pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t7\ntfd:        6 events:       19 data: deadbeefcafe0001  pos:0 ino:2f sdev:8\ntfd:       12 events: 80000001 data:                c  pos:0 ino:2f sdev:8\n";
        let w = parse_watches(text);
        assert_eq!(w.len(), 2);
        assert_eq!((w[0].fd, w[0].events, w[0].data), (6, 0x19, 0xdead_beef_cafe_0001));
        assert_eq!((w[1].fd, w[1].events, w[1].data), (12, 0x8000_0001, 12));
    }
}
