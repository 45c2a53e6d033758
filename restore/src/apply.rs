//! Carries out a write list on the stopped host: maps, memory, registers, then the other kernel calls.

use crate::link::{KernelCall, WriteList};
use mcr_image::{Addr, Memory, Pid, Regs, Tid};
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io::IoSlice;
use std::os::unix::fs::FileExt;

/// Vectors of one process_vm_writev(2): UIO_MAXIOV.
const BATCH: usize = 1024;

/// Why a write list could not be carried out. The host is half written and must be thrown away.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Memory could not be written.
    #[error(
        "writing {len} bytes at {addr} of the host {pid}: {source}; the host is thrown away, the old process goes on"
    )]
    Write {
        /// The host.
        pid: Pid,
        /// First address.
        addr: Addr,
        /// Length.
        len: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// A call inside the host failed.
    #[error("{call} in the host {pid}: {source}; the host is thrown away, the old process goes on")]
    Call {
        /// The host.
        pid: Pid,
        /// The call with its arguments.
        call: String,
        /// What the system said.
        source: Errno,
    },
    /// The host cannot be controlled.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// What was said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What was read back is not what was written.
    #[error(
        "memory at {addr} of the host {pid} is not what was written: the host changed while it was stopped"
    )]
    Differs {
        /// The host.
        pid: Pid,
        /// First address of the write.
        addr: Addr,
    },
}

/// A stopped host, as `apply` needs it.
pub trait Stopped {
    /// Its pid.
    fn pid(&self) -> Pid;
    /// Its memory.
    fn memory(&self) -> &dyn Memory;
    /// Sets all general registers of a thread.
    fn set_regs(&mut self, tid: Tid, regs: &Regs) -> Result<(), ApplyError>;
    /// Makes a call in the leader and gives the kernel's raw result.
    fn call(&mut self, what: &str, nr: i64, args: &[u64]) -> Result<i64, ApplyError>;
    /// Puts bytes where a call's pointer argument can find them, until the next call.
    fn stage(&mut self, bytes: &[u8]) -> Result<Addr, ApplyError>;
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Runs of bytes written.
    pub writes: usize,
    /// Bytes in them.
    pub bytes: usize,
    /// Threads whose registers were set.
    pub threads: usize,
    /// Kernel calls made.
    pub calls: usize,
    /// Over all addresses and bytes written, to compare two lists within one run of the engine.
    pub digest: u64,
}

/// Executes the list. `verify` reads every byte back.
pub fn apply(host: &mut dyn Stopped, list: &WriteList, verify: bool) -> Result<Applied, ApplyError> {
    let mut done = Applied::default();
    for call in &list.calls {
        if let KernelCall::Map { start, len } = call {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let args = [start.0, *len, prot as u64, flags as u64, u64::MAX, 0];
            let r = host.call("mmap", libc::SYS_mmap, &args)?;
            if r != start.0 as i64 {
                return Err(call_error(host.pid(), format!("mmap({start}, {len})"), r));
            }
            done.calls += 1;
        }
    }
    write_memory(host.pid(), list)?;
    let mut digest = DefaultHasher::new();
    for w in &list.memory {
        digest.write_u64(w.addr.0);
        digest.write(&w.bytes);
        done.bytes += w.bytes.len();
    }
    done.writes = list.memory.len();
    done.digest = digest.finish();
    if verify {
        for w in &list.memory {
            let now = host.memory().bytes(w.addr, w.bytes.len());
            if !now.is_ok_and(|b| b == w.bytes) {
                return Err(ApplyError::Differs { pid: host.pid(), addr: w.addr });
            }
        }
    }
    for r in &list.registers {
        host.set_regs(r.tid, &r.regs)?;
        done.threads += 1;
    }
    for call in &list.calls {
        done.calls += usize::from(kernel_call(host, call)?);
    }
    Ok(done)
}

fn call_error(pid: Pid, call: String, raw: i64) -> ApplyError {
    let source = if raw < 0 { Errno::from_raw(-raw as i32) } else { Errno::EEXIST };
    ApplyError::Call { pid, call, source }
}

fn kernel_call(host: &mut dyn Stopped, call: &KernelCall) -> Result<bool, ApplyError> {
    match call {
        KernelCall::Map { .. } => Ok(false),
        KernelCall::EpollCtl { epoll, op, fd, events, data } => {
            // struct epoll_event is packed on x86-64: 4 + 8 bytes.
            let mut event = events.to_le_bytes().to_vec();
            event.extend_from_slice(&data.to_le_bytes());
            let at = host.stage(&event)?;
            let mut ctl = |op: i32| {
                host.call("epoll_ctl", libc::SYS_epoll_ctl, &[epoll.0 as u64, op as u64, fd.0 as u64, at.0])
            };
            let mut r = ctl(*op)?;
            // A registration goes away with its file and may have been made by a duplicate.
            if r == -i64::from(libc::ENOENT) && *op == libc::EPOLL_CTL_MOD {
                r = ctl(libc::EPOLL_CTL_ADD)?;
            } else if r == -i64::from(libc::EEXIST) && *op == libc::EPOLL_CTL_ADD {
                r = ctl(libc::EPOLL_CTL_MOD)?;
            }
            let gone = *op == libc::EPOLL_CTL_DEL && matches!(-r as i32, libc::ENOENT | libc::EBADF);
            if r < 0 && !gone {
                return Err(call_error(
                    host.pid(),
                    format!("epoll_ctl({epoll}, {op}, {fd}, {events:#x})"),
                    r,
                ));
            }
            Ok(true)
        }
        KernelCall::PosixTimer { timer } => posix_timer(host, timer).map(|()| true),
        KernelCall::SetItimer { which, value_us, interval_us } => {
            let mut b = Vec::with_capacity(32);
            for us in [interval_us, value_us] {
                b.extend_from_slice(&(us / 1_000_000).to_le_bytes());
                b.extend_from_slice(&(us % 1_000_000).to_le_bytes());
            }
            let at = host.stage(&b)?;
            let r = host.call("setitimer", libc::SYS_setitimer, &[u64::from(*which), at.0, 0])?;
            if r < 0 {
                return Err(call_error(host.pid(), format!("setitimer({which}, {value_us} us)"), r));
            }
            Ok(true)
        }
    }
}

/// PR_TIMER_CREATE_RESTORE_IDS (include/uapi/linux/prctl.h, Linux 6.15): timer_create(2) takes the id from its
/// result word.
pub(crate) const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;

fn posix_timer(host: &mut dyn Stopped, t: &mcr_image::proto::PosixTimer) -> Result<(), ApplyError> {
    const NS: u64 = 1_000_000_000;
    let pid = host.pid();
    let name = format!("POSIX timer {}", t.id);
    let id = u64::from(t.id);
    // What the start-up made in its place. EINVAL: nothing.
    host.call("timer_delete", libc::SYS_timer_delete, &[id])?;
    // struct sigevent (value, signo, notify, tid), the id, struct itimerspec.
    let mut b = vec![0u8; 72];
    b[..8].copy_from_slice(&t.sigval.to_le_bytes());
    b[8..12].copy_from_slice(&t.signo.to_le_bytes());
    b[12..16].copy_from_slice(&t.notify.to_le_bytes());
    b[16..20].copy_from_slice(&t.notify_tid.to_le_bytes());
    b[64..68].copy_from_slice(&t.id.to_le_bytes());
    for word in [t.interval_ns / NS, t.interval_ns % NS, t.value_ns / NS, t.value_ns % NS] {
        b.extend_from_slice(&word.to_le_bytes());
    }
    let at = host.stage(&b)?.0;
    let restore = |host: &mut dyn Stopped, on: u64| {
        host.call("prctl", libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS, on, 0, 0, 0])
    };
    let check = |call: &str, r: i64| match r {
        0.. => Ok(()),
        r => Err(call_error(pid, format!("{call} of {name}"), r)),
    };
    check("prctl PR_TIMER_CREATE_RESTORE_IDS (Linux 6.15)", restore(host, 1)?)?;
    let args = [i64::from(t.clockid) as u64, at, at + 64];
    let made = host.call("timer_create", libc::SYS_timer_create, &args)?;
    check("prctl PR_TIMER_CREATE_RESTORE_IDS", restore(host, 0)?)?;
    check("timer_create", made)?;
    if t.value_ns != 0 {
        let r = host.call("timer_settime", libc::SYS_timer_settime, &[id, 0, at + 72, 0])?;
        check("timer_settime", r)?;
    }
    Ok(())
}

/// Small runs in batches by process_vm_writev(2); what it cannot write (read-only pages) through
/// /proc/PID/mem.
fn write_memory(pid: Pid, list: &WriteList) -> Result<(), ApplyError> {
    let path = format!("/proc/{}/mem", pid.0);
    let mem = File::options().read(true).write(true).open(&path).map_err(|e| ApplyError::Write {
        pid,
        addr: Addr(0),
        len: 0,
        source: e,
    })?;
    let target = nix::unistd::Pid::from_raw(pid.0);
    let mut rest = &list.memory[..];
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let local: Vec<IoSlice<'_>> = batch.iter().map(|w| IoSlice::new(&w.bytes)).collect();
        let remote: Vec<RemoteIoVec> =
            batch.iter().map(|w| RemoteIoVec { base: w.addr.0 as usize, len: w.bytes.len() }).collect();
        let mut written = process_vm_writev(target, &local, &remote).unwrap_or(0);
        let mut whole = 0;
        while whole < batch.len() && written >= batch[whole].bytes.len() {
            written -= batch[whole].bytes.len();
            whole += 1;
        }
        if whole < batch.len() {
            let w = &batch[whole];
            mem.write_all_at(&w.bytes, w.addr.0).map_err(|source| ApplyError::Write {
                pid,
                addr: w.addr,
                len: w.bytes.len(),
                source,
            })?;
            whole += 1;
        }
        rest = &rest[whole..];
    }
    Ok(())
}

impl Stopped for crate::boot::Host {
    fn pid(&self) -> Pid {
        crate::boot::Host::pid(self)
    }
    fn memory(&self) -> &dyn Memory {
        crate::boot::Host::memory(self)
    }
    fn set_regs(&mut self, tid: Tid, regs: &Regs) -> Result<(), ApplyError> {
        self.set_thread_regs(tid, regs).map_err(|e| ApplyError::Host {
            what: format!("setting the registers of thread {tid}"),
            source: Box::new(e),
        })
    }
    fn call(&mut self, what: &str, nr: i64, args: &[u64]) -> Result<i64, ApplyError> {
        let leader = Tid(crate::boot::Host::pid(self).0);
        self.call_raw(leader, what, nr, args)
            .map_err(|e| ApplyError::Host { what: what.to_owned(), source: Box::new(e) })
    }
    fn stage(&mut self, bytes: &[u8]) -> Result<Addr, ApplyError> {
        crate::boot::Host::stage(self, 0, bytes)
            .map(Addr)
            .map_err(|e| ApplyError::Host { what: "staging arguments".into(), source: Box::new(e) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::MemWrite;
    use mcr_image::{MemoryError, Region};

    /// This process: its memory can be written by the same calls.
    struct Myself {
        memory: Own,
        calls: Vec<(i64, Vec<u64>)>,
        answers: Vec<i64>,
    }
    struct Own(File);
    impl Memory for Own {
        fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
            self.0.read_exact_at(buf, addr.0).map_err(|source| MemoryError::Io {
                addr,
                len: buf.len(),
                source,
            })
        }
        fn regions(&self) -> Vec<Region> {
            Vec::new()
        }
    }
    impl Stopped for Myself {
        fn pid(&self) -> Pid {
            Pid(std::process::id() as i32)
        }
        fn memory(&self) -> &dyn Memory {
            &self.memory
        }
        fn set_regs(&mut self, _: Tid, _: &Regs) -> Result<(), ApplyError> {
            Ok(())
        }
        fn call(&mut self, _: &str, nr: i64, args: &[u64]) -> Result<i64, ApplyError> {
            self.calls.push((nr, args.to_vec()));
            Ok(self.answers.pop().unwrap_or(0))
        }
        fn stage(&mut self, _: &[u8]) -> Result<Addr, ApplyError> {
            Ok(Addr(0x1000))
        }
    }
    fn myself() -> Myself {
        let memory = Own(File::open("/proc/self/mem").unwrap());
        Myself { memory, calls: Vec::new(), answers: Vec::new() }
    }

    static READ_ONLY: [u8; 4096 * 3] = [5; 4096 * 3];

    #[test]
    fn many_small_writes_and_read_only_pages_arrive() {
        let target = vec![0u8; 100_000];
        let base = target.as_ptr() as u64;
        let page = (READ_ONLY.as_ptr() as u64 + 4096) & !4095;
        let mut list = WriteList::default();
        for i in 0..5000u64 {
            list.memory
                .push(MemWrite { addr: Addr(base + 16 * i), bytes: (i as u32 | 1).to_le_bytes().to_vec() });
        }
        list.memory.push(MemWrite { addr: Addr(page), bytes: vec![6; 8] });
        let mut host = myself();
        let done = apply(&mut host, &list, true).unwrap();
        assert_eq!((done.writes, done.bytes), (5001, 20_008));
        let got = host.memory.bytes(Addr(base + 16 * 4999), 4).unwrap();
        assert_eq!(got, (4999u32 | 1).to_le_bytes());
        assert_ne!(done.digest, apply(&mut host, &WriteList::default(), true).unwrap().digest);
    }

    #[test]
    fn an_unwritable_place_is_named() {
        let list =
            WriteList { memory: vec![MemWrite { addr: Addr(0x10), bytes: vec![1] }], ..WriteList::default() };
        let e = apply(&mut myself(), &list, false).unwrap_err();
        assert!(e.to_string().contains("1 bytes at 0x10"), "{e}");
    }

    #[test]
    fn a_watch_that_exists_is_changed_instead_of_added() {
        let list = WriteList {
            calls: vec![KernelCall::EpollCtl {
                epoll: mcr_image::Fd(4),
                op: libc::EPOLL_CTL_ADD,
                fd: mcr_image::Fd(7),
                events: 1,
                data: 9,
            }],
            ..WriteList::default()
        };
        let mut host = myself();
        host.answers = vec![0, -i64::from(libc::EEXIST)];
        assert_eq!(apply(&mut host, &list, false).unwrap().calls, 1);
        assert_eq!(host.calls.iter().map(|c| c.1[1]).collect::<Vec<_>>(), [1, 3]);
        host.answers = vec![-i64::from(libc::EBADF)];
        assert!(apply(&mut host, &list, false).is_err());
    }
}
