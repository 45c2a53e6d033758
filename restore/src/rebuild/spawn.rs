//! The new process: clone3(2) with the old pid (set_tid), stopped before it does anything.
#![allow(unsafe_code)]

use super::RebuildError;
use super::remote::Remote;
use mcr_image::{Pid, Tid, proto};
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Makes sure that the ids of the image are free. The leader's pid may belong to the dumped process that has
/// ended and is about to be collected by its parent: that is waited for.
pub(super) fn ids_free(process: &proto::Process, threads: bool, wait: Duration) -> Result<(), RebuildError> {
    let pid = process.pid as i32;
    reaped(pid, wait)?;
    let others = process.threads.iter().skip(1).filter(|_| threads);
    for tid in others.map(|t| t.tid as i32) {
        if std::path::Path::new(&format!("/proc/{tid}")).exists() {
            return Err(RebuildError::IdInUse { what: "tid", id: tid, by: describe(tid) });
        }
    }
    Ok(())
}

fn reaped(pid: i32, wait: Duration) -> Result<(), RebuildError> {
    let Ok(pidfd) = mcr_criu_lite::pidfd_open(pid) else {
        // Free, or the number of a thread that is no process.
        return match std::fs::metadata(format!("/proc/{pid}")) {
            Ok(_) => Err(RebuildError::IdInUse { what: "pid", id: pid, by: describe(pid) }),
            Err(_) => Ok(()),
        };
    };
    let started = Instant::now();
    let state = |pid: i32| status_field(pid, "State").and_then(|s| s.chars().next());
    match state(pid) {
        None => return Ok(()),
        Some('Z' | 'X') => {}
        Some(_) => {
            return Err(RebuildError::IdInUse { what: "pid", id: pid, by: describe(pid) });
        }
    }
    // POLLHUP comes when the last trace of it is gone (Linux 6.9); before that kernel look again now and then.
    let deadline = started + wait;
    loop {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        if state(pid).is_none() {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let parent = status_field(pid, "PPid")
                .and_then(|p| p.trim().parse().ok())
                .map_or_else(|| "unknown".to_owned(), describe);
            return Err(RebuildError::NotReaped {
                pid: Pid(pid),
                parent,
                waited_ms: started.elapsed().as_millis() as u64,
            });
        }
        let ms = left.as_millis().clamp(1, 100) as u16;
        let mut set = [PollFd::new(pidfd.as_fd(), PollFlags::empty())];
        // Only POLLHUP and POLLERR are reported with an empty set.
        let _ = poll(&mut set, PollTimeout::from(ms));
    }
}

/// "redis-server (process 123)".
fn describe(id: i32) -> String {
    let comm = std::fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
    let tgid = status_field(id, "Tgid").unwrap_or_default();
    format!("{} (process {})", comm.trim(), tgid.trim())
}

fn status_field(id: i32, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    text.lines().find_map(|l| Some(l.strip_prefix(key)?.strip_prefix(':')?.trim().to_owned()))
}

/// struct clone_args (include/uapi/linux/sched.h), to set_tid_size.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Bytes of clone_args for a thread; `set_tid` points at the tid in the new process.
pub(super) fn thread_args(set_tid: u64) -> Vec<u8> {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let words = [flags as u64, 0, 0, 0, 0, 0, 0, 0, set_tid, 1, 0];
    words.iter().flat_map(|w: &u64| w.to_le_bytes()).collect()
}

/// Creates the process with this pid as our child and stops it. It is a copy of the engine that does nothing.
pub(super) fn spawn(pid: Pid) -> Result<Remote, RebuildError> {
    use nix::sys::signal::{SigSet, SigmaskHow};
    let object = || format!("pid {pid}");
    // The child must not run our signal handlers.
    let before = SigSet::all()
        .thread_swap_mask(SigmaskHow::SIG_SETMASK)
        .map_err(RebuildError::call(object(), "sigprocmask"))?;
    let tid = pid.0;
    let args = CloneArgs {
        exit_signal: libc::SIGCHLD as u64,
        set_tid: (&raw const tid) as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: `args` and the tid it points to are complete and live. Without CLONE_VM the child has its own copy
    // of this stack; it executes only raw system calls and never returns from here.
    let r = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    if r == 0 {
        loop {
            // SAFETY: no memory is touched; should the engine die before it traces us, so do we.
            unsafe {
                libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                libc::syscall(libc::SYS_pause);
            }
        }
    }
    let error = io::Error::last_os_error();
    // Only a bad argument could make this fail, and these are the kernel's own.
    let _ = before.thread_swap_mask(SigmaskHow::SIG_SETMASK);
    if r < 0 {
        return Err(match error.raw_os_error() {
            Some(libc::EEXIST) => RebuildError::IdInUse { what: "pid", id: pid.0, by: describe(pid.0) },
            Some(libc::EPERM) => RebuildError::Call {
                object: object(),
                call: "clone3 with set_tid",
                source: error,
                next: "choosing the pid needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN: run as root",
            },
            _ => {
                RebuildError::Call { object: object(), call: "clone3 with set_tid", source: error, next: "" }
            }
        });
    }
    let site = own_syscall_instruction().ok_or_else(|| {
        RebuildError::refused(object(), "no `syscall` instruction found in the engine's libc", "")
    });
    let held =
        site.and_then(|s| Remote::seize(Tid(pid.0), s).map_err(RebuildError::call(object(), "PTRACE_SEIZE")));
    held.inspect_err(|_| super::remote::kill_all(Tid(pid.0), &[]))
}

/// A `syscall` instruction of this program; the child has it at the same address. libc's syscall(2) wrapper is
/// the place to look.
fn own_syscall_instruction() -> Option<u64> {
    let start = libc::syscall as *const () as usize;
    // SAFETY: the function is longer than 48 bytes in every libc for this architecture, so these bytes are
    // mapped and readable.
    let code = unsafe { std::slice::from_raw_parts(start as *const u8, 48) };
    code.windows(2).position(|w| w == [0x0f, 0x05]).map(|n| (start + n) as u64)
}
