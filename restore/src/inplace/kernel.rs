//! What the kernel keeps for the process and its threads, from old's to new's; each with the call that takes
//! it back.

use super::{Input, Stale};
use crate::boot::ThreadKernel;
use crate::link::{KernelCall, NewThread};
use mcr_criu_lite::tracee::commit::{Call, CommitPlan, result_of};
use mcr_image::proto::fd::Object;
use mcr_image::{Addr, proto};
use std::collections::{HashMap, HashSet};

/// RSEQ_FLAG_UNREGISTER (include/uapi/linux/rseq.h, Linux 4.18).
const RSEQ_UNREGISTER: u64 = 1;

fn action_bytes(a: Option<&proto::SigAction>) -> Vec<u8> {
    let a = a.copied().unwrap_or_default();
    [a.handler, a.flags, a.restorer, a.mask].iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Signal actions.
pub(super) fn actions(input: &Input<'_>, plan: &mut CommitPlan) {
    let of = |list: &'_ [proto::SigAction], n: u32| list.iter().find(|a| a.signo == n).copied();
    for n in 1..=64u32 {
        let (old, new) = (of(&input.old.sigactions, n), of(input.actions, n));
        let same = |a: &Option<proto::SigAction>| a.map(|a| (a.handler, a.flags, a.restorer, a.mask));
        if same(&old).unwrap_or_default() == same(&new).unwrap_or_default() {
            continue;
        }
        let set = plan.put(&action_bytes(new.as_ref()));
        let back = plan.put(&action_bytes(old.as_ref()));
        plan.calls.push(
            Call::new(libc::SYS_rt_sigaction, &[n.into(), set, 0, 8])
                .undo(libc::SYS_rt_sigaction, &[n.into(), back, 0, 8]),
        );
    }
}

fn event(plan: &mut CommitPlan, events: u32, data: u64) -> u64 {
    // struct epoll_event is packed on x86-64: 4 + 8 bytes.
    plan.put(&[&events.to_le_bytes()[..], &data.to_le_bytes()].concat())
}

/// The old epoll objects stay; the data words of their watches are the new version's.
pub(super) fn epolls(input: &Input<'_>, plan: &mut CommitPlan) {
    let mut watches = HashMap::new();
    for f in &input.old.fds {
        if let Some(Object::Epoll(e)) = &f.object {
            // The first of several on the same number: the others' descriptors were closed.
            watches.extend(e.watches.iter().rev().map(|w| ((f.number, w.fd), w)));
        }
    }
    for c in &input.list.calls {
        let KernelCall::EpollCtl { epoll, op, fd, events, data } = c else { continue };
        let now = watches.get(&(epoll.0 as u32, fd.0 as u32)).copied();
        let word = |n: i32| n as u32 as u64;
        let args = |op: i32, event: u64| [word(epoll.0), word(op), word(fd.0), event];
        let set = event(plan, *events, *data);
        let (doing, undo) = match (*op, now) {
            (libc::EPOLL_CTL_DEL, Some(w)) => {
                (args(libc::EPOLL_CTL_DEL, set), args(libc::EPOLL_CTL_ADD, event(plan, w.events, w.data)))
            }
            (libc::EPOLL_CTL_DEL, None) => continue,
            (_, Some(w)) => {
                (args(libc::EPOLL_CTL_MOD, set), args(libc::EPOLL_CTL_MOD, event(plan, w.events, w.data)))
            }
            (_, None) => (args(libc::EPOLL_CTL_ADD, set), args(libc::EPOLL_CTL_DEL, 0)),
        };
        plan.calls.push(Call::new(libc::SYS_epoll_ctl, &doing).undo(libc::SYS_epoll_ctl, &undo));
    }
}

/// Descriptor numbers that are taken when the calls run. Nobody else runs then: whatever is opened gets the lowest
/// number that is free.
pub(super) struct Numbers(HashSet<i32>);

impl Numbers {
    fn new(input: &Input<'_>) -> Self {
        let old = input.old.fds.iter().map(|f| f.number as i32);
        let epolls = |n: &i32| input.outcome.booted.epolls.iter().any(|e| e.fd.0 == *n);
        // What only the new version has is handed over before, but for epoll objects.
        let given = input.outcome.booted.new_only_fds.iter().map(|f| f.0.0).filter(|n| !epolls(n));
        Self(old.chain(given).collect())
    }

    fn take(&mut self, number: i32) -> Result<(), Stale> {
        if self.0.insert(number) { Ok(()) } else { Err(Stale::Descriptor(number)) }
    }

    /// What an open would return.
    pub(super) fn lowest(&self) -> i32 {
        (0..).find(|n| !self.0.contains(n)).unwrap_or_default()
    }
}

/// Descriptors that the new version knows by another number get both; epoll objects that only it has are made.
pub(super) fn descriptors(input: &Input<'_>, plan: &mut CommitPlan) -> Result<Numbers, Stale> {
    let booted = &input.outcome.booted;
    let mut numbers = Numbers::new(input);
    let old = |n: i32| input.old.fds.iter().find(|f| f.number == n as u32);
    let word = |n: i32| u64::from(n as u32);
    for m in booted.fds.iter().filter(|m| m.new_fd != m.old_fd) {
        numbers.take(m.new_fd.0)?;
        let cloexec = old(m.old_fd.0).is_some_and(|f| f.cloexec);
        let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
        plan.calls.push(
            Call::new(libc::SYS_dup3, &[word(m.old_fd.0), word(m.new_fd.0), flags as u64])
                .undo(libc::SYS_close, &[word(m.new_fd.0)]),
        );
    }
    for e in booted.epolls.iter().filter(|e| e.old_fd.is_none()) {
        let made = numbers.lowest();
        numbers.take(e.fd.0)?;
        let flags = libc::EPOLL_CLOEXEC as u64;
        plan.calls.push(Call::new(libc::SYS_epoll_create1, &[flags]).undo(libc::SYS_close, &[result_of(0)]));
        // dup3(2): EINVAL where both are the same.
        if made != e.fd.0 {
            plan.calls.push(
                Call::new(libc::SYS_dup3, &[result_of(1), word(e.fd.0), flags])
                    .undo(libc::SYS_close, &[word(e.fd.0)]),
            );
            plan.calls.push(Call::new(libc::SYS_close, &[result_of(2)]));
        }
    }
    Ok(numbers)
}

fn altstack(a: &proto::AltStack) -> Vec<u8> {
    // stack_t: sp, flags, size. SS_DISABLE is 2.
    let flags = if a.size == 0 { 2 } else { u64::from(a.flags & !1) };
    [a.sp, flags, a.size].iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// What one thread does for itself: before the writes, and after them.
pub(super) fn thread(
    new: &NewThread,
    kernel: &ThreadKernel,
    old: Option<&proto::Thread>,
    retained: impl Fn(Addr) -> bool,
    plan: &mut CommitPlan,
) -> (Vec<Call>, Vec<Call>) {
    let (mut before, mut calls) = (Vec::new(), Vec::new());
    if let Some(r) = old.and_then(|o| o.rseq.as_ref()).filter(|r| r.addr != 0) {
        let args = |flags| [r.addr, r.size.into(), flags, r.signature.into()];
        before.push(Call::new(libc::SYS_rseq, &args(RSEQ_UNREGISTER)).undo(libc::SYS_rseq, &args(0)));
    }
    let (addr, size, signature) = kernel.rseq;
    if addr != 0 {
        let args = |flags| [addr, size.into(), flags, signature.into()];
        calls.push(Call::new(libc::SYS_rseq, &args(0)).undo(libc::SYS_rseq, &args(RSEQ_UNREGISTER)));
    }
    let (head, len) = kernel.robust_list;
    let mut call = Call::new(libc::SYS_set_robust_list, &[head, if len == 0 { 24 } else { len }]);
    if let Some(o) = old {
        let len = if o.robust_list_len == 0 { 24 } else { o.robust_list_len };
        call = call.undo(libc::SYS_set_robust_list, &[o.robust_list, len]);
    }
    calls.push(call);
    if let Some(o) = old {
        calls.push(
            Call::new(libc::SYS_set_tid_address, &[kernel.tid_address.0])
                .undo(libc::SYS_set_tid_address, &[o.clear_child_tid]),
        );
    }
    // Old's state may point at its signal stack: where that memory stays, the stack does.
    let was = old.and_then(|o| o.altstack).unwrap_or_default();
    let stays = was.size != 0 && retained(Addr(was.sp)) && retained(Addr(was.sp + was.size - 1));
    if was != new.altstack && !stays {
        let set = plan.put(&altstack(&new.altstack));
        let back = plan.put(&altstack(&was));
        calls.push(Call::new(libc::SYS_sigaltstack, &[set, 0]).undo(libc::SYS_sigaltstack, &[back, 0]));
    }
    (before, calls)
}
