//! epoll(7). The object is made by the engine; the registrations are made by the new process itself, because
//! the kernel keys them by (open file, descriptor number).

use super::RebuildError;
use super::batch::Batch;
use super::objects::name_of;
use super::remote::Remote;
use mcr_image::proto;
use std::os::fd::OwnedFd;

pub(super) fn open(fd: &proto::Fd) -> Result<OwnedFd, RebuildError> {
    use nix::sys::epoll::{Epoll, EpollCreateFlags};
    Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
        .map(|e| e.0)
        .map_err(RebuildError::call(name_of(fd), "epoll_create1"))
}

/// Makes the registrations, from inside.
pub(super) fn watch(leader: &mut Remote, fds: &[proto::Fd]) -> Result<(), RebuildError> {
    let mut batch = Batch::new(leader)?;
    let mut seen = std::collections::HashSet::new();
    for fd in fds {
        let Some(proto::fd::Object::Epoll(e)) = &fd.object else {
            continue;
        };
        if !seen.insert(fd.ofd) {
            continue;
        }
        for w in &e.watches {
            // struct epoll_event is packed: events, data.
            let mut ev = [0u8; 12];
            ev[..4].copy_from_slice(&w.events.to_le_bytes());
            ev[4..].copy_from_slice(&w.data.to_le_bytes());
            let at = batch.data(&ev);
            batch.add(
                format!("{}: its watch on fd {}", name_of(fd), w.fd),
                "epoll_ctl ADD",
                libc::SYS_epoll_ctl,
                &[u64::from(fd.number), libc::EPOLL_CTL_ADD as u64, u64::from(w.fd), at],
                "a watch can outlive the descriptor it was made with; such a set cannot be made again",
            )?;
        }
    }
    batch.run()
}
