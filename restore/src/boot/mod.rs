//! Booting the new version inside the host.
//!
//! The host already holds the old version's memory at its addresses. [`boot`] takes the old program out of
//! it, maps the new one and runs its start-up with every system call watched: calls that would touch what
//! the old version still uses are answered instead of executed (`gate`), threads that reach the place
//! where an old thread rests are held there (`hold`). What comes out is a process whose threads all stand
//! just before their blocking call, not having eaten any input, ready to be linked with the old state.

mod error;
mod exec;
mod fdplan;
mod finish;
mod gate;
mod hold;
mod host;
mod load;
#[allow(unsafe_code)]
mod ptrace;
mod release;
mod run;
mod stack;

pub use error::{BootError, Where};
pub(crate) use exec::exe_link;
pub use exec::{Fate, MmMap, fates};
pub use host::Host;
pub use ptrace::PtraceError;
pub use release::HostCalls;

use crate::link::{Booted, Span};
use mcr_image::ModuleMap;
use mcr_image::elf::ElfFile;
use mcr_image::{Addr, Memory, Pid, Tid, proto};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What to boot.
pub struct BootSpec<'a> {
    /// The new program.
    pub new: Arc<ElfFile>,
    /// Its absolute path, as the process sees it.
    pub new_path: PathBuf,
    /// The old process.
    pub old: &'a proto::Process,
    /// Its modules.
    pub old_modules: &'a ModuleMap,
    /// Arguments for the new program, the first included.
    pub argv: Vec<Vec<u8>>,
    /// Its environment.
    pub envp: Vec<Vec<u8>>,
    /// The bytes of AT_RANDOM, if not to be read through old's auxiliary vector.
    pub random: Option<[u8; 16]>,
    /// Ranges to map before the program starts: `Patch.regions`.
    pub reserve: Vec<Span>,
    /// The pid that the new version will have, where that is not the host's: it is told this one.
    pub pid: Option<Pid>,
    /// How long the start-up may take.
    pub timeout: Duration,
}

/// A thread of the old version and where it rests.
#[derive(Clone, Debug)]
pub(crate) struct OldThread {
    pub tid: Tid,
    pub signature: Vec<String>,
    pub call: String,
    /// Stack and thread control block of a pthread; `None` for the main thread, or when not recognised.
    pub block: Option<Span>,
}

/// A successful boot.
pub struct BootOutcome {
    /// For `link`.
    pub booted: Booted,
    /// The new version's modules.
    pub modules: ModuleMap,
    /// The end of what it wrote to standard output and error.
    pub output: String,
    /// Pid files that still hold old's process id, as the engine sees them.
    pub pid_files: Vec<PathBuf>,
    /// What the kernel keeps for each thread, in the threads' order.
    pub kernel: Vec<ThreadKernel>,
    /// The program as PR_SET_MM_MAP describes it.
    pub mm: MmMap,
    /// (phase, microseconds).
    pub phases: Vec<(String, u64)>,
}

/// What the kernel keeps for a thread of the new version beside its registers.
#[derive(Clone, Debug, Default)]
pub struct ThreadKernel {
    /// The thread.
    pub tid: Tid,
    /// set_robust_list(2): head and length.
    pub robust_list: (u64, u64),
    /// rseq(2): address, size, signature; zero when not registered.
    pub rseq: (u64, u32, u32),
    /// set_tid_address(2): for glibc the thread's `tid` in its `struct pthread`.
    pub tid_address: Addr,
    /// Extended registers, as PTRACE_GETREGSET gives them (NT_X86_XSTATE).
    pub xstate: Vec<u8>,
}

/// Boots the new version. On failure the host is left as it is, to be killed by the caller.
pub fn boot(host: &mut Host, spec: &BootSpec<'_>) -> Result<BootOutcome, BootError> {
    let started = Instant::now();
    let old_threads = old_threads(host.memory(), spec.old);
    let loaded = exec::userland_exec(host, spec)?;
    let timers = !spec.old.posix_timers.is_empty();
    if timers {
        gate::timers::choose_ids(host, true)?;
    }
    let exec_us = started.elapsed().as_micros() as u64;
    let run = run::Runner::new(host, spec, &old_threads, loaded).run()?;
    let run_us = started.elapsed().as_micros() as u64 - exec_us;
    let mut outcome = finish::finish(host, spec, run)?;
    if timers {
        gate::timers::choose_ids(host, false)?;
    }
    let all_us = started.elapsed().as_micros() as u64;
    outcome.phases = vec![
        ("exec".into(), exec_us),
        ("start-up".into(), run_us),
        ("hold".into(), all_us - exec_us - run_us),
    ];
    Ok(outcome)
}

fn old_threads(memory: &dyn Memory, old: &proto::Process) -> Vec<OldThread> {
    old.threads
        .iter()
        .map(|t| {
            let rsp = t.regs.get(19).copied().unwrap_or(0);
            let block =
                (t.tid != old.pid).then(|| exec::pthread_block(memory, Addr(t.fs_base), Addr(rsp))).flatten();
            let nr = t.syscall.as_ref().map_or(-1, |s| s.nr);
            OldThread {
                tid: Tid(t.tid as i32),
                signature: mcr_image::unwind::proto_signature(&t.frames),
                call: mcr_image::syscalls::name(nr).unwrap_or("").to_owned(),
                block,
            }
        })
        .collect()
}

/// The pid of a host.
impl Host {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }
}
