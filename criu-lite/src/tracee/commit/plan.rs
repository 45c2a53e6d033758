//! What a commit does: the types that its caller fills in.

use crate::{TraceError, Tracee, blocked_call};
use mcr_image::{Addr, Regs, Tid};

/// Upper half of an argument that is an offset into [`CommitPlan::data`].
const DATA: u64 = 0xda7a_5afe << 32;
/// Upper half of an argument that is another call's result.
pub(super) const RESULT: u64 = 0x5e5a_11ed << 32;

/// Argument of a call: the address of byte `offset` of [`CommitPlan::data`] inside the target.
/// [`CommitPlan::put`] gives these.
#[must_use]
pub const fn data(offset: u32) -> u64 {
    DATA | offset as u64
}

/// Argument of a call: what the call `back` places before it in its own list returned. `result_of(1)` is the
/// call just before; in an undo, `result_of(0)` is the call that is undone.
#[must_use]
pub const fn result_of(back: u32) -> u64 {
    RESULT | back as u64
}

/// The offset if `arg` was made by [`data`].
pub(super) const fn as_data(arg: u64) -> Option<u64> {
    if arg & !0xffff_ffff == DATA { Some(arg & 0xffff_ffff) } else { None }
}

/// The distance if `arg` was made by [`result_of`].
pub(super) const fn as_result(arg: u64) -> Option<u64> {
    if arg & !0xffff_ffff == RESULT { Some(arg & 0xffff_ffff) } else { None }
}

/// What to do when a call fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// Take everything back: the process stays what it was.
    #[default]
    Abort,
    /// Go on. The result is in the outcome.
    Ignore,
}

/// One system call that the commit carries out inside the target. It must not block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub nr: i64,
    /// Its arguments: numbers, addresses in the target, [`data`] or [`result_of`].
    pub args: [u64; 6],
    /// What to do when it fails.
    pub on_error: OnError,
    /// The call that takes it back when the commit aborts later. Not executed if the call itself failed.
    pub undo: Option<(i64, [u64; 6])>,
}

impl Call {
    /// A call whose failure aborts the commit and that needs no undo.
    #[must_use]
    pub fn new(nr: i64, args: &[u64]) -> Self {
        Self { nr, args: pad(args), ..Self::default() }
    }

    /// With the call that takes it back.
    #[must_use]
    pub fn undo(mut self, nr: i64, args: &[u64]) -> Self {
        self.undo = Some((nr, pad(args)));
        self
    }

    /// Its failure is only recorded.
    #[must_use]
    pub fn ignore(mut self) -> Self {
        self.on_error = OnError::Ignore;
        self
    }
}

fn pad(args: &[u64]) -> [u64; 6] {
    let mut a = [0; 6];
    for (to, from) in a.iter_mut().zip(args) {
        *to = *from;
    }
    a
}

/// The whole user state of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// Registers with fs_base and gs_base. Either `rip` is on a `syscall` instruction with the number in `rax`
    /// and `orig_rax` = −1 (the call is then executed), or as the kernel shows an interrupted call
    /// (`orig_rax` ≥ 0, −ERESTART… in `rax`): it is executed from its beginning.
    pub regs: Regs,
    /// The XSAVE image as PTRACE_GETREGSET NT_X86_XSTATE gives it; empty for the initial state.
    pub xstate: Vec<u8>,
    /// `rip` is on a `syscall` instruction: a signal that comes while the commit runs ends the call with EINTR
    /// where the kernel would have done so.
    pub at_call: bool,
}

impl Context {
    /// What a stopped thread would go on with, of this process or of another one in the same address space.
    pub fn read(t: &Tracee) -> Result<Self, TraceError> {
        let regs = t.regs()?;
        Ok(Self { regs, xstate: t.xstate()?, at_call: blocked_call(&regs, t.memory()).is_some() })
    }
}

/// What one thread becomes.
#[derive(Clone, Debug, Default)]
pub struct ThreadPlan {
    /// The thread; its tid stays.
    pub tid: Tid,
    /// Its state after the commit.
    pub becomes: Context,
    /// Its signal mask after the commit.
    pub sigmask: u64,
    /// Carried out by that thread before the process-wide calls and the writes: rseq unregister where the old
    /// structure is overwritten or unmapped.
    pub before: Vec<Call>,
    /// Carried out by that thread after the writes, before the point of no return: rseq register,
    /// set_robust_list, set_tid_address, sigaltstack.
    pub calls: Vec<Call>,
}

/// A thread that only the new version has. It is made inside the target and held until the commit.
#[derive(Clone, Debug, Default)]
pub struct NewThread {
    /// Its state after the commit.
    pub becomes: Context,
    /// Its signal mask after the commit.
    pub sigmask: u64,
    /// Carried out by that thread after the writes, before the point of no return.
    pub calls: Vec<Call>,
    /// Where its tid is written before the commit (`struct pthread.tid`), and what the kernel clears when it
    /// ends (CLONE_CHILD_CLEARTID). Old bytes come back on an abort.
    pub tid_word: Option<Addr>,
}

/// Everything that a commit does.
#[derive(Clone, Debug, Default)]
pub struct CommitPlan {
    /// One for each thread of the process. The first one carries out the process-wide parts; any thread may be
    /// that.
    pub threads: Vec<ThreadPlan>,
    /// Threads that are added.
    pub new_threads: Vec<NewThread>,
    /// Process-wide calls before the writes: mmap of the new version's memory, epoll_ctl, rt_sigaction, dup3.
    pub calls: Vec<Call>,
    /// Memory to write, later entries over earlier ones. Every page must be writable when `calls` are done;
    /// otherwise the commit aborts.
    pub writes: Vec<(Addr, Vec<u8>)>,
    /// By the first thread after the point of no return; errors are recorded only: munmap of the old program,
    /// prctl(PR_SET_MM_MAP), PR_SET_NAME. The other threads run on meanwhile.
    pub after: Vec<Call>,
    /// Bytes that calls point to (paths, structures), and where they may write results.
    pub data: Vec<u8>,
    /// Ranges where the staging area must not lie, beside the mappings, the writes and the fixed addresses of
    /// mmap and mremap calls.
    pub keep_clear: Vec<(Addr, Addr)>,
    /// The caller knows that the target's seccomp filters allow every call of the plan and of the stub (futex,
    /// madvise, munmap, clone, arch_prctl, rt_sig…). Otherwise a thread with a filter is a refusal.
    pub filters_allow: bool,
}

impl CommitPlan {
    /// Adds bytes for calls to point to (8-aligned); the result is an argument of a call.
    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        self.data.resize(self.data.len().next_multiple_of(8), 0);
        let at = self.data.len();
        self.data.extend_from_slice(bytes);
        data(at as u32)
    }
}
