//! Pointers and values that the kernel keeps: epoll registrations, interval timers. Robust lists,
//! clear_child_tid, rseq and signal stacks are new's own: libc registered them for the new threads.

use super::input::{Booted, FdMatch};
use super::output::{KernelCall, Refusal};
use mcr_image::{Fd, Tid, proto};
use std::collections::{BTreeMap, HashMap};

const EPOLL_CTL_ADD: i32 = 1;
const EPOLL_CTL_DEL: i32 = 2;
const EPOLL_CTL_MOD: i32 = 3;

/// The watches of an old epoll descriptor.
#[must_use]
pub fn old_watches(process: &proto::Process, fd: Fd) -> &[proto::EpollWatch] {
    process
        .fds
        .iter()
        .find(|f| f.number == fd.0 as u32)
        .and_then(|f| match &f.object {
            Some(proto::fd::Object::Epoll(e)) => Some(e.watches.as_slice()),
            _ => None,
        })
        .unwrap_or(&[])
}

/// Every epoll object gets old's watches with translated data. `resolve` computes a relocation's value;
/// `redirect` translates a native data word that points at a paired start-up object.
pub fn epolls(
    process: &proto::Process,
    patch: &proto::Patch,
    booted: &Booted,
    resolve: impl Fn(&proto::Reloc) -> Result<u64, Refusal>,
    redirect: impl Fn(u64) -> Option<u64>,
    calls: &mut Vec<KernelCall>,
    findings: &mut Vec<proto::Finding>,
) -> Result<(), Refusal> {
    let changes: HashMap<_, _> = patch.epoll.iter().map(|c| ((c.epoll_fd, c.fd, c.old_data), c)).collect();
    for e in &booted.epolls {
        let native: BTreeMap<u32, &proto::EpollWatch> = e.watches.iter().map(|w| (w.fd, w)).collect();
        let from_old = e.old_fd.map_or(&[][..], |fd| old_watches(process, fd));
        // In place the object is old's, and one that only new has is made anew.
        let present: BTreeMap<u32, &proto::EpollWatch> =
            if booted.in_place { from_old.iter().map(|w| (w.fd, w)).collect() } else { native.clone() };
        let mut wanted: BTreeMap<u32, (u32, u64)> = BTreeMap::new();
        if let Some(old_fd) = e.old_fd {
            for w in from_old {
                let change = changes.get(&(old_fd.0 as u32, w.fd, w.data)).copied();
                let data = match change {
                    Some(proto::EpollData { reloc: Some(r), .. }) => resolve(r)?,
                    Some(c) => c.new_data,
                    None => w.data,
                };
                if let Some(m) = booted.fds.iter().find(|m| m.old_fd.0 as u32 == w.fd && m.new_fd != m.old_fd)
                {
                    return Err(ambiguous(old_fd, m));
                }
                wanted.insert(w.fd, (w.events, data));
            }
        }
        for (fd, w) in &native {
            if wanted.contains_key(fd) {
                continue;
            }
            let matched = booted.fds.iter().any(|m| m.new_fd.0 as u32 == *fd);
            if e.old_fd.is_some() && matched {
                // Old has the object and does not watch it (any more).
                if present.contains_key(fd) {
                    calls.push(delete(e.fd, *fd));
                }
                findings.push(super::finding(
                    proto::Severity::Info,
                    "epoll-unwatched",
                    format!("fd {fd}: the new version watches it at start-up, the old one did not; old's choice stays"),
                    "",
                ));
            } else {
                wanted.insert(*fd, (w.events, redirect(w.data).unwrap_or(w.data)));
            }
        }
        if booted.in_place {
            calls.extend(present.keys().filter(|fd| !wanted.contains_key(fd)).map(|fd| delete(e.fd, *fd)));
        }
        for (fd, (events, data)) in wanted {
            // A watch belongs to the open file, not to the number: where old's object was put at the number, the
            // boot's watch went away with the boot's own file.
            let replaced =
                !booted.in_place && booted.fds.iter().any(|m| m.new_fd.0 as u32 == fd && m.old_object);
            let op = match present.get(&fd).filter(|_| !replaced) {
                Some(w) if w.events == events && w.data == data => continue,
                Some(_) => EPOLL_CTL_MOD,
                None => EPOLL_CTL_ADD,
            };
            calls.push(KernelCall::EpollCtl { epoll: e.fd, op, fd: Fd(fd as i32), events, data });
        }
    }
    Ok(())
}

/// A watch is known by one number only (epoll_ctl(2)): whoever changes it by the other one later fails.
fn ambiguous(epoll: Fd, m: &FdMatch) -> Refusal {
    Refusal::new(
        "I2",
        format!(
            "{} is descriptor {} in the old version, where epoll {epoll} watches it, and {} in the new one: its watch \
             can have one of these numbers only",
            m.what, m.old_fd, m.new_fd
        ),
        "let the new version open its descriptors in the order of the old one",
    )
}

fn delete(epoll: Fd, fd: u32) -> KernelCall {
    KernelCall::EpollCtl { epoll, op: EPOLL_CTL_DEL, fd: Fd(fd as i32), events: 0, data: 0 }
}

/// Interval timers go on with what was left of them.
pub fn itimers(process: &proto::Process, calls: &mut Vec<KernelCall>) {
    for t in &process.itimers {
        calls.push(KernelCall::SetItimer {
            which: t.which,
            // No time left and a period: it has expired, and waits for its pending signal to be taken.
            value_us: if t.value_us == 0 { t.interval_us } else { t.value_us },
            interval_us: t.interval_us,
        });
    }
}

/// What the kernel kept for the old process and new set up in its own way.
pub fn differences(process: &proto::Process, booted: &Booted, findings: &mut Vec<proto::Finding>) {
    for old in &process.sigactions {
        let new = booted.sigactions.iter().find(|s| s.signo == old.signo);
        let kind = |h: u64| match h {
            0 => "the default action",
            1 => "ignored",
            _ => "a handler",
        };
        let now = new.map_or(0, |s| s.handler);
        if kind(old.handler) != kind(now) {
            findings.push(super::finding(
                proto::Severity::Warning,
                "signal-action",
                format!(
                    "signal {}: {} in the old process, {} after the new version's start-up, which stays",
                    old.signo,
                    kind(old.handler),
                    kind(now)
                ),
                "",
            ));
        }
    }
    for t in &process.threads {
        let Some(new) = booted.thread_for(Tid(t.tid as i32)) else {
            continue;
        };
        let size = t.altstack.as_ref().map_or(0, |a| a.size);
        if (size != 0) != (new.altstack.size != 0) {
            findings.push(super::finding(
                proto::Severity::Warning,
                "signal-stack",
                format!(
                    "thread {}: an alternate signal stack on one side only; the new version's setting stays",
                    t.tid
                ),
                "",
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::input::BootEpoll;
    use super::*;

    fn watch(fd: u32, data: u64) -> proto::EpollWatch {
        proto::EpollWatch { fd, events: 1, data }
    }

    #[test]
    fn watches_are_added_modified_and_dropped() {
        let process = proto::Process {
            fds: vec![proto::Fd {
                number: 4,
                object: Some(proto::fd::Object::Epoll(proto::Epoll {
                    ino: 1,
                    watches: vec![watch(3, 0xa0), watch(7, 0xb0), watch(8, 0xc0)],
                })),
                ..proto::Fd::default()
            }],
            ..proto::Process::default()
        };
        let patch = proto::Patch {
            epoll: vec![
                proto::EpollData { epoll_fd: 4, fd: 7, old_data: 0xb0, new_data: 0xb8, reloc: None },
                proto::EpollData {
                    epoll_fd: 4,
                    fd: 8,
                    old_data: 0xc0,
                    new_data: 0,
                    reloc: Some(proto::Reloc::default()),
                },
            ],
            ..proto::Patch::default()
        };
        let mut booted = Booted {
            epolls: vec![BootEpoll {
                fd: Fd(4),
                old_fd: Some(Fd(4)),
                watches: vec![watch(3, 0x11), watch(5, 0x22), watch(9, 0x33)],
            }],
            fds: vec![FdMatch { new_fd: Fd(5), old_fd: Fd(5), ..FdMatch::default() }],
            ..Booted::default()
        };
        let (mut calls, mut findings) = (Vec::new(), Vec::new());
        epolls(
            &process,
            &patch,
            &booted,
            |_| Ok(0xdead),
            |w| (w == 0x33).then_some(0x44),
            &mut calls,
            &mut findings,
        )
        .unwrap();
        let ctl = |op, fd, events, data| KernelCall::EpollCtl { epoll: Fd(4), op, fd: Fd(fd), events, data };
        assert_eq!(
            calls,
            [
                ctl(EPOLL_CTL_DEL, 5, 0, 0),
                ctl(EPOLL_CTL_MOD, 3, 1, 0xa0),
                ctl(EPOLL_CTL_ADD, 7, 1, 0xb8),
                ctl(EPOLL_CTL_ADD, 8, 1, 0xdead),
                ctl(EPOLL_CTL_MOD, 9, 1, 0x44),
            ]
        );
        // One of the watched has another number.
        booted.fds.push(FdMatch { new_fd: Fd(12), old_fd: Fd(7), ..FdMatch::default() });
        let refused =
            epolls(&process, &patch, &booted, |_| Ok(0), |_| None, &mut calls, &mut findings).unwrap_err();
        assert_eq!(refused.invariant, "I2");
    }
}
