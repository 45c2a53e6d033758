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
