//! The new version laid into the old process itself: pid, parent, descriptors and timers stay by themselves.
//!
//! The rehearsal has booted the new version in a copy of the old process. Here that boot is taken as data: its
//! own mappings, its threads' contexts, what the kernel keeps for them. [`plan`] compares it with the old
//! process as it is now and says what has to be mapped, written and called for the old process to become what
//! the linked copy would be. It touches nothing; `mcr_criu_lite::tracee::commit` carries it out, whole or not
//! at all.

mod kernel;
pub mod leftovers;
mod memory;
mod program;
mod timers;
mod view;

pub use memory::{MemoryPlan, MemoryPlanError, NewMap, Sides};
pub use view::Laid;

use crate::boot::{BootOutcome, Fate};
use crate::link::{Booted, MemWrite, Span, WriteList};
use mcr_criu_lite::tracee::commit::{CommitPlan, Context, NewThread, ThreadPlan};
use mcr_image::{Addr, Memory, Pid, Regs, Tid, proto};
use std::collections::{HashMap, HashSet};

/// The old process is not what it was at the rehearsal; another rehearsal may help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stale {
    /// Something lies where the new version needs memory.
    #[error("{:#x}..{:#x}, where the new version has to lie, holds {holder} now", span.start.0, span.end.0)]
    Place {
        /// The range.
        span: Span,
        /// What is there.
        holder: String,
    },
    /// A descriptor number was taken.
    #[error("descriptor {0}, which the new version uses, was opened since the rehearsal")]
    Descriptor(i32),
    /// Threads came or went, or rest elsewhere.
    #[error("the old version's threads are not where they were at the rehearsal: {0}")]
    Threads(String),
}

/// What the new version is laid into, and what is laid.
pub struct Input<'a> {
    /// The old process, frozen, as it is now.
    pub old: &'a proto::Process,
    /// What becomes of each of its mappings.
    pub fates: &'a [Fate],
    /// Its memory.
    pub old_memory: &'a dyn Memory,
    /// The booted copy.
    pub outcome: &'a BootOutcome,
    /// The copy's process.
    pub host: Pid,
    /// Its memory, as booted.
    pub host_memory: &'a dyn Memory,
    /// What link wants.
    pub list: &'a WriteList,
    /// Memory that nothing points into any more.
    pub unreferenced: &'a [Span],
    /// Signal actions that the new version will have.
    pub actions: &'a [proto::SigAction],
}

/// The plan, and what people should know of it.
pub struct InPlace {
    /// For the commit.
    pub commit: CommitPlan,
    /// Findings.
    pub findings: Vec<proto::Finding>,
    /// Which of the `after` calls sets /proc/PID/exe.
    pub exe_call: usize,
    /// Bytes that the commit writes.
    pub bytes: usize,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryPlanError),
    /// Another rehearsal may help.
    #[error(transparent)]
    Stale(#[from] Stale),
    /// Not possible in place.
    #[error("{what}; use --new-pid, which gives the new version a process of its own")]
    Unsupported {
        /// What cannot be done.
        what: String,
    },
}

/// The booted copy's description with the old process's present mappings for those that it had at the rehearsal.
#[must_use]
pub fn refreshed(outcome: &BootOutcome, old: &proto::Process, fates: &[Fate]) -> Booted {
    let mut booted = outcome.booted.clone();
    let mut vmas = booted.native_vmas();
    booted.retained.clear();
    for (v, _) in old.vmas.iter().zip(fates).filter(|(_, f)| matches!(f, Fate::Keep | Fate::CopyReadOnly)) {
        vmas.push(v.clone());
        booted.retained.push(Span::new(Addr(v.start), Addr(v.end)));
    }
    vmas.sort_by_key(|v| v.start);
    booted.vmas = vmas;
    booted.in_place = true;
    // The heap may have grown since the start-up was told where it ends: libc would cut it off there.
    if let Some(mm) = &old.mm {
        booted.brk = Addr(mm.brk);
    }
    booted
}

/// What has to be done to the old process.
pub fn plan(input: &Input<'_>) -> Result<InPlace, PlanError> {
    let booted = &input.outcome.booted;
    let leader = booted.threads.first().ok_or_else(|| unsupported("the new version has no thread"))?;
    let regs = |tid: Tid, booted: Regs| {
        input.list.registers.iter().find(|r| r.tid == tid).map_or(booted, |r| r.regs)
    };
    let fated: Vec<_> = input.old.vmas.iter().zip(input.fates.iter().copied()).collect();
    let old_pid = Pid(input.old.pid as i32);
    let mut memory = memory::plan(&Sides {
        old: &fated,
        old_memory: input.old_memory,
        old_pages: &|s| pages(old_pid, s),
        native: &booted.native_vmas(),
        host_memory: input.host_memory,
        host_pages: &|s| pages(input.host, s),
        stack_pointer: Addr(regs(leader.tid, leader.regs).rsp),
        list: input.list,
    })?;

    memory.gone.extend(leftovers::present(input.unreferenced, &input.old.vmas));
    let mut findings = Vec::new();
    let mut commit = CommitPlan::default();
    kernel::actions(input, &mut commit);
    let numbers = kernel::descriptors(input, &mut commit)?;
    kernel::epolls(input, &mut commit);
    let exe_call = program::lay(input, &memory, numbers.lowest() as u64, &mut commit)?;
    timers::timers(input, &mut commit)?;
    let retained = |a: Addr| {
        fated
            .iter()
            .any(|(v, f)| v.start <= a.0 && a.0 < v.end && matches!(f, Fate::Keep | Fate::CopyReadOnly))
    };
    let mut writes = memory.fills;
    writes.extend(memory.writes);
    thread_ids(input, &writes, &mut findings).into_iter().for_each(|w| writes.push(w));
    let bytes = writes.iter().map(|w| w.bytes.len()).sum();
    commit.writes.extend(writes.into_iter().map(|w| (w.addr, w.bytes)));

    for (t, k) in booted.threads.iter().zip(&input.outcome.kernel) {
        let becomes = Context { regs: regs(t.tid, t.regs), xstate: k.xstate.clone(), at_call: true };
        match t.old_tid {
            Some(tid) => {
                let old = input.old.threads.iter().find(|o| o.tid == tid.0 as u32);
                let old = old.ok_or_else(|| Stale::Threads(format!("thread {tid} is gone")))?;
                let (before, calls) = kernel::thread(t, k, Some(old), retained, &mut commit);
                commit.threads.push(ThreadPlan { tid, becomes, sigmask: t.sigmask, before, calls });
            }
            None => {
                let (_, calls) = kernel::thread(t, k, None, retained, &mut commit);
                let tid_word = (k.tid_address.0 != 0).then_some(k.tid_address);
                commit.new_threads.push(NewThread { becomes, sigmask: t.sigmask, calls, tid_word });
            }
        }
    }
    if let Some(t) =
        input.old.threads.iter().find(|o| !commit.threads.iter().any(|t| t.tid.0 as u32 == o.tid))
    {
        return Err(Stale::Threads(format!("thread {} has no counterpart", t.tid)).into());
    }
    Ok(InPlace { commit, findings, exe_call, bytes })
}

fn unsupported(what: impl Into<String>) -> PlanError {
    PlanError::Unsupported { what: what.into() }
}

fn pages(pid: Pid, s: Span) -> std::io::Result<Vec<Span>> {
    let pages = mcr_criu_lite::own_pages(pid, s.start, s.end)?;
    Ok(pages.into_iter().map(|(a, b)| Span::new(a, b)).collect())
}

/// Threads keep the old ones' numbers: where the start-up wrote its own, glibc's `struct pthread` and the owners
/// of mutexes that are held, old's have to stand.
fn thread_ids(input: &Input<'_>, writes: &[MemWrite], findings: &mut Vec<proto::Finding>) -> Vec<MemWrite> {
    let mut out = Vec::new();
    let mut numbers = HashMap::new();
    let mut places = HashSet::new();
    for (t, k) in input.outcome.booted.threads.iter().zip(&input.outcome.kernel) {
        let Some(old) = t.old_tid.filter(|_| k.tid_address.0 != 0) else { continue };
        let bytes = old.0.to_le_bytes().to_vec();
        out.push(MemWrite { addr: k.tid_address, bytes: bytes.clone() });
        places.insert(k.tid_address);
        numbers.insert(t.tid.0, bytes);
    }
    // Nearly no word is one of these.
    let (Some(first), Some(last)) = (numbers.keys().min().copied(), numbers.keys().max().copied()) else {
        return out;
    };
    for w in writes {
        let skew = (4 - w.addr.0 % 4) as usize % 4;
        for (n, word) in w.bytes[skew.min(w.bytes.len())..].as_chunks::<4>().0.iter().enumerate() {
            let number = i32::from_le_bytes(*word);
            if number < first || last < number {
                continue;
            }
            let Some(bytes) = numbers.get(&number) else { continue };
            let i = skew + 4 * n;
            let at = w.addr.add(i as u64);
            if places.contains(&at) {
                continue;
            }
            // pthread_mutex_t: lock, count, owner.
            let lock = i.checked_sub(8).map(|l| &w.bytes[l..l + 4]);
            if lock.is_some_and(|l| matches!(l[0], 1 | 2) && l[1..] == [0, 0, 0]) {
                out.push(MemWrite { addr: at, bytes: bytes.clone() });
            } else if number > 0xffff {
                findings.push(crate::link::finding(
                    proto::Severity::Info,
                    "thread-id",
                    format!(
                        "the word at {at} may be the number of thread {number} at its start-up; it stays"
                    ),
                    "",
                ));
            }
        }
    }
    out
}
