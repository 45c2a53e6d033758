//! A process changes into another one at the same pid, atomically, whatever becomes of the engine.
//!
//! All threads are held in ptrace event stops. A *staging area* is mapped in the target that holds a small
//! piece of code (the stub), two contexts for each thread (the old one, rewound, and the new one) and the lists
//! of what is to be done. Then every thread's registers are set to the stub, and the engine lets go. From there
//! on the process changes itself, and the engine may be killed at any instant.
//!
//! # Protocol
//! One word decides:
//!
//! | state | who sets it | a stub that begins to run |
//! |---|---|---|
//! | PREP | the engine, while it sets registers | knows that the engine is dead: sets ABORT, old context |
//! | ARMED | the engine, when every thread stands at the stub | goes to work |
//! | COMMIT | the leader, when everything has succeeded | new context |
//! | ABORT | the leader, when everything is taken back | old context |
//!
//! The leader is the first thread of the plan. Phases, each ended by a barrier where threads take part:
//!
//! 1. every thread's `before` calls;
//! 2. the leader: process-wide `calls`; every page of the write list is made present and writable
//!    (MADV_POPULATE_WRITE, so that a missing page is an error and not a SIGSEGV); the write list, by swapping
//!    bytes, so that it becomes its own undo list; the new threads;
//! 3. every thread's `calls`;
//! 4. COMMIT: threads take their new contexts; the leader carries out `after`, unmaps the lists and goes, too.
//!
//! A failed call goes back the same way: 3 undone by the threads, 2 by the leader in reverse, ABORT, 1 undone by
//! the threads, old contexts.
//!
//! # The way out
//! Signals stay blocked from the stub's first instruction until a context is restored by rt_sigreturn(2), which
//! does it all at once: registers, vector state, mask. A signal that came meanwhile and has a handler ends the
//! context's interrupted call with EINTR as the kernel would have done (`rewind::Class`). One case is left by
//! hand: an old context whose call goes on by restart_syscall(2), because rt_sigreturn cancels that.
//! (Which thread takes a signal for the process is up to the kernel; others may see a spurious EINTR.)
//!
//! The stub uses no stack: a signal that arrives before the mask is set, after the engine died between two
//! requests, finds the interrupted context's own stack. A new context's frame is put below the red zone of its own
//! stack at the end, so that the last thread out unmaps all but the page it stands on. After an abort nothing
//! is written anywhere; [`sweep`] unmaps what is left.
//!
//! # What a plan must see to
//! - rseq(2): while a thread is registered, the kernel writes to its structure at any time. Where the old one is
//!   overwritten, unregister in `before` and register the new one in `calls`; unmap old memory in `after`.
//! - A file is mapped by openat (undone by close), mmap with [`result_of`]`(1)` (undone by munmap) and close of
//!   `result_of(2)`; that the undo closes a closed number is harmless, because nobody else runs.
//! - After an abort the process runs; freeze it again and [`sweep`]. The same [`Frozen`](crate::Frozen) holds no
//!   thread any more.
//! - Calls must not block and must be reversible by their `undo`. munmap is not: it belongs into `after`.
//! - Pages are made writable by the plan (mprotect in `calls`, with its undo).
//! - MADV_POPULATE_WRITE is Linux 5.14.
//!
//! # Use
//! ```text
//! let staged = commit::stage(&mut frozen, &plan)?;  // may fail; drop = target as before
//! let armed = staged.arm()?;                        // registers and masks set; drop = put back
//! let outcome = armed.commit()?;                    // threads detached; waits for COMMIT or ABORT
//! ```

mod area;
mod layout;
mod outcome;
mod place;
mod plan;
mod rewind;
mod stage;
mod stub;
mod sweep;
mod wait;

pub use outcome::{CommitError, Failure, List, Outcome};
pub use plan::{Call, CommitPlan, Context, NewThread, OnError, ThreadPlan, data, result_of};
pub use stage::{Armed, Staged, stage};
pub use sweep::sweep;
