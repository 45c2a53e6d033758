//! Calls in the booted host, and letting it go.

use super::error::{BootError, Result};
use super::host::{AGENT_LEN, Host, SCRATCH_LEN, signal_name};
use super::ptrace::{self, Stop};
use crate::rebuild::{Call, Inject};
use mcr_image::{Addr, Memory, Regs, Tid};
use nix::errno::Errno;
use std::io;
use std::time::{Duration, Instant};

/// How long a thread may take to park.
const PARK_LIMIT: Duration = Duration::from_secs(2);
/// The second half of the scratch memory holds the table of a batch.
const TABLE: u64 = SCRATCH_LEN / 2;
const ROW: u64 = 64;

/// Calls made by one thread of the host.
pub struct HostCalls<'a> {
    host: &'a Host,
    tid: Tid,
}

impl Host {
    /// System calls executed by the main thread, which must not be at the entry of a call.
    pub fn leader_calls(&mut self) -> HostCalls<'_> {
        HostCalls { tid: Tid(self.pid.0), host: self }
    }

    /// System calls executed by any of its threads, under the same condition.
    pub fn thread_calls(&mut self, tid: Tid) -> HostCalls<'_> {
        HostCalls { tid, host: self }
    }

    /// Brings every thread from its stop at a call to an event stop, where the engine's death means nothing
    /// but that the thread goes on, and takes the memory of the boot out. After this only
    /// [`Self::disarm`] and [`Self::let_go`] make sense.
    ///
    /// With `keep_scratch` the memory for calls stays until [`Self::drop_scratch`].
    pub fn park(&mut self, tids: &[Tid], keep_scratch: bool) -> Result<()> {
        if !keep_scratch {
            self.drop_scratch()?;
        }
        for &tid in tids {
            let mask = ptrace::sigmask(tid)?;
            ptrace::set_sigmask(tid, u64::MAX)?;
            ptrace::interrupt(tid)?;
            ptrace::cont(tid)?;
            loop {
                match self.waiter.one(tid, Instant::now() + PARK_LIMIT) {
                    Ok(Some(Stop::Parked)) => break,
                    Ok(Some(Stop::Syscall)) => ptrace::cont(tid)?,
                    Ok(Some(Stop::Killed(s))) => {
                        return Err(BootError::HostKilled { signal: signal_name(s) });
                    }
                    Ok(other) => {
                        return Err(BootError::Unsupported {
                            what: format!("thread {tid} of the new version did not park ({other:?})"),
                            next_step: "try again".into(),
                        });
                    }
                    Err(e) => return Err(BootError::step(format!("waiting for thread {tid}"), e)),
                }
            }
            ptrace::set_sigmask(tid, mask)?;
        }
        Ok(())
    }

    /// Takes the memory of the boot out; no calls with arguments in memory can be made any more.
    pub fn drop_scratch(&mut self) -> Result<()> {
        if self.scratch.0 != 0 {
            let args = [self.scratch.0, SCRATCH_LEN + AGENT_LEN];
            self.call(Tid(self.pid.0), "munmap", libc::SYS_munmap, &args)?;
            self.scratch = Addr(0);
        }
        Ok(())
    }

    /// From here on the new version outlives the engine.
    pub fn disarm(&self, tids: &[Tid]) -> Result<()> {
        for &tid in tids {
            ptrace::set_options(tid, ptrace::BOOT_OPTIONS & !libc::PTRACE_O_EXITKILL)?;
        }
        Ok(())
    }

    /// Lets all threads run.
    pub fn let_go(self, tids: &[Tid]) -> Result<()> {
        let mut first = Ok(());
        for &tid in tids {
            // All of them, whatever one says.
            first = first.and(ptrace::detach(tid, 0));
        }
        Ok(first?)
    }

    fn run_batch(&self, tid: Tid, calls: &[Call]) -> Result<Vec<i64>> {
        let mut out = Vec::with_capacity(calls.len());
        for part in calls.chunks((TABLE / ROW) as usize) {
            let rows: Vec<u8> = part
                .iter()
                .flat_map(|c| std::iter::once(c.nr as u64).chain(c.args).chain([0]))
                .flat_map(u64::to_le_bytes)
                .collect();
            let at = self.stage(TABLE, &rows)?;
            let saved = ptrace::regs(tid)?;
            let mask = ptrace::sigmask(tid)?;
            ptrace::set_sigmask(tid, !(1 << (libc::SIGTRAP - 1)))?;
            let rip = self.scratch.add(SCRATCH_LEN).0;
            let agent = Regs { rip, r12: at, r13: part.len() as u64, orig_rax: u64::MAX, ..saved };
            ptrace::set_regs(tid, &agent)?;
            ptrace::cont(tid)?;
            let stop = self.waiter.one(tid, Instant::now() + Duration::from_secs(20));
            if stop != Ok(Some(Stop::Signal(libc::SIGTRAP))) {
                let what = format!("a batch of {} calls in the new version ({stop:?})", part.len());
                return Err(BootError::step(what, Errno::EINTR));
            }
            ptrace::set_regs(tid, &saved)?;
            ptrace::set_sigmask(tid, mask)?;
            let done = self.mem.bytes(Addr(at), rows.len())?;
            let result = |r: &[u8]| r[56..].try_into().map(i64::from_le_bytes).unwrap_or(-1);
            out.extend(done.chunks_exact(ROW as usize).map(result));
        }
        Ok(out)
    }
}

fn to_io(e: BootError) -> io::Error {
    match e {
        BootError::Step { errno, .. } => io::Error::from_raw_os_error(errno as i32),
        e => io::Error::other(e),
    }
}

impl Inject for HostCalls<'_> {
    fn inject(&mut self, call: Call) -> io::Result<i64> {
        self.host.call_raw(self.tid, "a call", call.nr, &call.args).map_err(to_io)
    }
    fn inject_all(&mut self, calls: &[Call]) -> io::Result<Vec<i64>> {
        self.host.run_batch(self.tid, calls).map_err(to_io)
    }
    fn poke(&mut self, at: Addr, bytes: &[u8]) -> io::Result<()> {
        self.host.mem.write(at, bytes).map_err(io::Error::other)
    }
    fn peek(&mut self, at: Addr, bytes: &mut [u8]) -> io::Result<()> {
        self.host.mem.read(at, bytes).map_err(io::Error::other)
    }
    fn scratch(&mut self) -> io::Result<(Addr, usize)> {
        Ok((self.host.scratch, TABLE as usize))
    }
}
