//! What the kernel keeps for each thread.

use crate::collect::Inside;
use crate::quiesce::ThreadState;
use crate::tracee::Blocked;
use crate::{TraceError, sys};
use mcr_image::{Addr, Memory, Tid, proto};
use nix::errno::Errno;

/// prctl(2): where set_tid_address(2) points.
const PR_GET_TID_ADDRESS: u64 = 40;

/// Everything of all threads. `states` come from the quiescence check.
pub(crate) fn collect(
    inside: &mut Inside<'_>,
    states: &[ThreadState],
) -> Result<Vec<proto::Thread>, TraceError> {
    let tids: Vec<Tid> = inside.frozen().threads().iter().map(|t| t.tid()).collect();
    tids.into_iter().map(|tid| one(inside, tid, states.iter().find(|s| s.tid == tid))).collect()
}

fn one(inside: &mut Inside<'_>, tid: Tid, state: Option<&ThreadState>) -> Result<proto::Thread, TraceError> {
    let page = inside.page();
    let f = inside.frozen();
    let mem = f.memory().clone();
    let t = f.thread(tid).ok_or(TraceError::Gone { tid })?;
    let regs = t.regs()?;
    let call = crate::blocked_call(&regs, &mem);
    let image_regs = match &call {
        Some(c) => c.rewound(&regs),
        None => mcr_image::Regs { orig_rax: u64::MAX, ..regs },
    };
    let xstate = t.xstate()?;
    let sigmask = t.sigmask()?;
    let rseq = t.rseq().ok().filter(|r| r.0.0 != 0);
    let calls = [
        (libc::SYS_sigaltstack, [0, page.0, 0, 0, 0, 0]),
        (libc::SYS_prctl, [PR_GET_TID_ADDRESS, page.0 + 64, 0, 0, 0, 0]),
    ];
    for ((nr, _), r) in calls.iter().zip(inside.calls(tid, &calls)?) {
        if r < 0 {
            return Err(TraceError::Syscall { tid, nr: *nr, errno: Errno::from_raw(-r as i32) });
        }
    }
    let f = inside.frozen();
    // The main thread runs further calls.
    if tid.0 != f.pid().0 {
        f.thread(tid).ok_or(TraceError::Gone { tid })?.put_back()?;
    }
    let word = |n: u64| mem.u64(page.add(n)).map_err(|source| TraceError::Memory { tid, source });
    let (sp, flags, size, clear) = (word(0)?, word(8)?, word(16)?, word(64)?);
    let (robust_list, robust_list_len) = sys::get_robust_list(tid.0).unwrap_or((0, 0));
    let (policy, priority) = sys::scheduler(tid.0);
    let comm = std::fs::read(format!("/proc/{}/task/{tid}/comm", f.pid())).unwrap_or_default();
    Ok(proto::Thread {
        tid: tid.0 as u32,
        comm: String::from_utf8_lossy(comm.strip_suffix(b"\n").unwrap_or(&comm)).into_owned(),
        regs: image_regs.to_words(),
        xstate,
        sigmask,
        // With the process's timers, see `collect`.
        pending: Vec::new(),
        // SS_ONSTACK (1) is a state, not a setting.
        altstack: Some(proto::AltStack { sp, flags: flags as u32 & !1, size }),
        robust_list,
        robust_list_len,
        rseq: rseq.map(|(a, size, signature, flags)| proto::Rseq { addr: a.0, size, signature, flags }),
        clear_child_tid: clear,
        fs_base: regs.fs_base,
        syscall: call.map(|c| proto::SyscallState {
            nr: c.nr,
            args: c.args.to_vec(),
            raw_result: c.raw_result,
            remaining_ns: remaining(&c, mem.as_ref()),
        }),
        frames: state.map(|s| s.stack.to_proto()).unwrap_or_default(),
        sched_policy: policy,
        sched_priority: priority,
        nice: sys::nice(tid.0),
        cpu_affinity: sys::affinity(tid.0),
    })
}

/// What is left of a relative timeout where the interrupted call has written it into memory. poll, futex and sleeps
/// without a place for the rest keep it in the kernel, where nobody can read it; epoll_wait, semtimedop,
/// rt_sigtimedwait and sockets with a timeout keep it nowhere.
fn remaining(c: &Blocked, mem: &dyn Memory) -> Option<u64> {
    // Seconds, and parts of them.
    let time = |at: u64, unit: u64| {
        let (s, part) = (mem.u64(Addr(at)).ok()?, mem.u64(Addr(at.wrapping_add(8))).ok()?);
        s.checked_mul(1_000_000_000)?.checked_add(part.checked_mul(unit)?)
    };
    let (at, unit) = match c.nr {
        _ if c.raw_result == 0 => return None,
        libc::SYS_nanosleep => (c.args[1], 1),
        libc::SYS_clock_nanosleep if c.args[1] & libc::TIMER_ABSTIME as u64 == 0 => (c.args[3], 1),
        libc::SYS_ppoll => (c.args[2], 1),
        libc::SYS_pselect6 => (c.args[4], 1),
        libc::SYS_select => (c.args[4], 1000),
        _ => return None,
    };
    if at == 0 { None } else { time(at, unit) }
}
