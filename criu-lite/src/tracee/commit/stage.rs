//! Stage, arm, commit.

use super::area::{Map, Mapped, map};
use super::layout::{Builder, Layout, Lists, State, control, written_pages};
use super::outcome::{CommitError, Outcome};
use super::plan::{Call, CommitPlan, Context};
use super::{place, rewind, sweep, wait};
use crate::tracee::{Stop, fault, ptrace};
use crate::{Frozen, TraceError};
use mcr_image::{Addr, Regs, Tid};
use std::borrow::Cow;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Every signal.
const ALL_SIGNALS: u64 = u64::MAX;
const PREP: u32 = 0;
const ARMED: u32 = 1;
/// Trap, direction: not for the stub.
const TF_DF: u64 = 0x500;

/// A thread as it was, and where it is parked.
struct Parked {
    tid: Tid,
    regs: Regs,
    sigmask: u64,
    /// Address of its block.
    block: u64,
}

/// What is undone when it is dropped: threads put back, then the area unmapped.
struct Held<'f> {
    frozen: &'f mut Frozen,
    area: Mapped,
    map: Map,
    /// Offset of the state word.
    word: u64,
    /// Threads that stand at the stub are the first `parked` ones.
    threads: Vec<Parked>,
    parked: usize,
    /// The process goes its own way now.
    gone: bool,
}

impl Held<'_> {
    /// Threads back to where they were stopped. The mask first: should the engine die in between, the stub
    /// takes the thread back, too.
    fn unpark(&mut self) -> Result<(), TraceError> {
        let mut first = Ok(());
        for p in &self.threads[..self.parked] {
            if let Some(t) = self.frozen.thread(p.tid) {
                first = first.and(t.set_sigmask(p.sigmask)).and(t.set_regs(&p.regs));
            }
        }
        self.parked = 0;
        first
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if self.gone {
            return;
        }
        // Disarmed before a thread is put back: a dying engine must not leave half of them.
        self.map.word(self.word).store(PREP, Ordering::SeqCst);
        // Fails only when the process is dying.
        drop(self.unpark());
        drop(self.area.unmap(self.frozen.leader()));
    }
}

/// A process with a filled staging area. Dropping it leaves the process as it was, frozen.
pub struct Staged<'f> {
    held: Held<'f>,
    layout: Layout,
    lists: Lists,
    tids: Vec<Tid>,
}

/// A process whose threads will change it as soon as they run: also when the engine ends. Dropping it disarms.
pub struct Armed<'f> {
    staged: Staged<'f>,
}

/// Maps the staging area in the target and fills it: whatever may be slow or fail for lack of memory.
pub fn stage<'f>(frozen: &'f mut Frozen, plan: &CommitPlan) -> Result<Staged<'f>, CommitError> {
    if !fault::spoiled() {
        return stage_as_is(frozen, plan);
    }
    let mut plan = plan.clone();
    if let Some(last) = plan.threads.last_mut() {
        last.calls.push(Call::new(libc::SYS_epoll_ctl, &[u64::MAX, libc::EPOLL_CTL_DEL as u64, u64::MAX, 0]));
    }
    stage_as_is(frozen, &plan)
}

fn stage_as_is<'f>(frozen: &'f mut Frozen, plan: &CommitPlan) -> Result<Staged<'f>, CommitError> {
    let pid = frozen.pid();
    let wrong = |why: String| CommitError::Plan { pid, why };
    let trace = |source| CommitError::Trace { pid, source };
    // No injection of the caller's is left open.
    for t in frozen.threads_mut() {
        t.put_back().map_err(trace)?;
    }
    check(frozen, plan).map_err(wrong)?;
    let maps = frozen
        .memory()
        .maps()
        .map_err(|source| trace(TraceError::Proc { path: format!("/proc/{pid}/maps"), source }))?;
    sweep::leave(frozen, &maps).map_err(trace)?;
    let writes = place::disjoint(&plan.writes);
    let pages = written_pages(plan, &writes, &maps);
    let held_xstate: Vec<Vec<u8>> = plan
        .threads
        .iter()
        .map(|t| frozen.thread(t.tid).ok_or(TraceError::Gone { tid: t.tid })?.xstate())
        .collect::<Result<_, _>>()
        .map_err(trace)?;
    let new = plan.threads.iter().map(|t| &t.becomes).chain(plan.new_threads.iter().map(|t| &t.becomes));
    let xlen = held_xstate.first().map_or(0, Vec::len);
    let like = frozen.leader().regs().map_err(trace)?;
    for c in new {
        check_context(c, &like, xlen).map_err(wrong)?;
    }
    let layout = Layout::new(plan, pages.len(), &writes, xlen as u64);
    let at = place::address(&maps, &place::claimed(plan, &pages), layout.len)
        .ok_or_else(|| wrong(format!("no gap of {} bytes between its mappings", layout.len)))?;
    let (area, map) = map(frozen, Addr(at), layout.len, layout.control)?;
    let word = layout.control + control::STATE;
    let mut held = Held { frozen, area, map, word, threads: Vec::new(), parked: 0, gone: false };

    let mut b = Builder::new(held.map.bytes(), area.at, &layout, &plan.data);
    b.code();
    let lists = b.lists(plan, &pages, &writes).map_err(wrong)?;
    b.control(plan, &lists);
    for (n, (t, xstate)) in plan.threads.iter().zip(&held_xstate).enumerate() {
        let tracee = held.frozen.thread(t.tid).ok_or(trace(TraceError::Gone { tid: t.tid }))?;
        let (regs, sigmask) = (tracee.regs().map_err(trace)?, tracee.sigmask().map_err(trace)?);
        let (old, class) = rewind::old(t.tid, &regs, tracee.memory());
        b.block(n, u32::from(n != 0), &lists.threads[n], 0);
        b.old_context(n, &State { regs: old, class, xstate: Cow::Borrowed(xstate), sigmask });
        b.new_context(n, &state(&t.becomes, t.sigmask));
        held.threads.push(Parked { tid: t.tid, regs, sigmask, block: area.at.0 + layout.block(n) });
    }
    for (i, t) in plan.new_threads.iter().enumerate() {
        let n = plan.threads.len() + i;
        b.block(n, 2, &lists.threads[n], t.tid_word.map_or(0, |a| a.0));
        b.new_context(n, &state(&t.becomes, t.sigmask));
    }
    let tids = plan.threads.iter().map(|t| t.tid).collect();
    Ok(Staged { held, layout, lists, tids })
}

fn state(c: &Context, sigmask: u64) -> State<'_> {
    let (regs, class) = rewind::new(&c.regs, c.at_call);
    State { regs, class, xstate: Cow::Borrowed(&c.xstate), sigmask }
}

/// Does the plan name exactly the process's threads?
fn check(frozen: &Frozen, plan: &CommitPlan) -> Result<(), String> {
    let mut have: Vec<Tid> = frozen.threads().iter().map(crate::Tracee::tid).collect();
    let mut named: Vec<Tid> = plan.threads.iter().map(|t| t.tid).collect();
    have.sort_unstable();
    named.sort_unstable();
    if have != named {
        return Err(format!("it names the threads {named:?}, the process has {have:?}"));
    }
    for t in frozen.threads() {
        if t.state() != Some(Stop::Event) {
            return Err(format!("thread {} is not in an event stop ({:?})", t.tid(), t.state()));
        }
        if !plan.filters_allow && filtered(t.tid()) {
            return Err(format!(
                "thread {} has a seccomp filter, which may kill it for the calls of the change; update into a new \
                 pid instead",
                t.tid()
            ));
        }
    }
    Ok(())
}

/// Is the thread under seccomp(2)?
fn filtered(tid: Tid) -> bool {
    ptrace::has_seccomp_filter(tid).unwrap_or_else(|| {
        let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
        status.lines().find_map(|l| l.strip_prefix("Seccomp:")).is_some_and(|v| v.trim() != "0")
    })
}

/// Would the kernel take this context? After the point of no return nothing can be refused any more.
fn check_context(c: &Context, like: &Regs, xlen: usize) -> Result<(), String> {
    const END: u64 = 0x7fff_ffff_f000;
    let r = &c.regs;
    if (r.cs, r.ss) != (like.cs, like.ss) {
        return Err(format!("a new context has segments {:#x} and {:#x}", r.cs, r.ss));
    }
    for (what, v) in [("rip", r.rip), ("fs_base", r.fs_base), ("gs_base", r.gs_base)] {
        if v >= END || (v == 0 && what == "rip") {
            return Err(format!("a new context has {what} {v:#x}"));
        }
    }
    if !(0x10000..END).contains(&r.rsp) {
        return Err(format!("a new context has rsp {:#x}", r.rsp));
    }
    // rt_sigreturn(2) ends the process with SIGSEGV over a size that is not this machine's.
    if !c.xstate.is_empty() && c.xstate.len() != xlen {
        return Err(format!("a new context has {} bytes of extended state, not {xlen}", c.xstate.len()));
    }
    Ok(())
}

impl<'f> Staged<'f> {
    /// Where the area lies, and its length.
    #[must_use]
    pub fn area(&self) -> (Addr, u64) {
        (self.held.area.at, self.held.area.len)
    }

    /// Sets every thread's registers to the stub, then its signal mask, and last the state word: from that
    /// store on the process changes when its threads run, with or without the engine.
    pub fn arm(mut self) -> Result<Armed<'f>, CommitError> {
        let pid = self.held.frozen.pid();
        let entry = self.held.area.at.0;
        let control = entry + self.layout.control;
        for i in 0..self.held.threads.len() {
            let p = &self.held.threads[i];
            let stub = Regs {
                rip: entry,
                rax: 0,
                orig_rax: u64::MAX,
                r14: control,
                r15: p.block,
                eflags: p.regs.eflags & !TF_DF,
                ..p.regs
            };
            let t = self.held.frozen.thread(p.tid).ok_or(CommitError::Ended { pid })?;
            t.set_regs(&stub).map_err(|source| CommitError::Trace { pid, source })?;
            self.held.parked = i + 1;
            let t = self.held.frozen.thread(self.held.threads[i].tid).ok_or(CommitError::Ended { pid })?;
            t.set_sigmask(ALL_SIGNALS).map_err(|source| CommitError::Trace { pid, source })?;
        }
        fault::point();
        self.held.map.word(self.held.word).store(ARMED, Ordering::SeqCst);
        fault::point();
        Ok(Armed { staged: self })
    }
}

impl Armed<'_> {
    /// Lets all threads go and waits for the verdict. The process runs untraced afterwards, new or old; the
    /// [`Frozen`] holds no threads any more.
    pub fn commit(self) -> Result<Outcome, CommitError> {
        let Staged { mut held, layout, lists, tids } = self.staged;
        let began = Instant::now();
        held.gone = true;
        let pid = held.frozen.pid();
        let released = held.frozen.release();
        wait::verdict(held.frozen, &held.map, layout.control + control::DONE, began)?;
        released.map_err(|source| CommitError::Trace { pid, source })?;
        Ok(wait::read(&held.map, &layout, &lists, &tids, held.area, began.elapsed()))
    }
}
