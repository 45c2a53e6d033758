//! eventfd(2): the counter.

use super::RebuildError;
use super::objects::name_of;
use crate::sys;
use mcr_image::proto;
use std::os::fd::OwnedFd;

pub(super) fn open(fd: &proto::Fd, e: &proto::EventFd) -> Result<OwnedFd, RebuildError> {
    let made = sys::eventfd(e.semaphore).map_err(RebuildError::call(name_of(fd), "eventfd2"))?;
    if e.count != 0 {
        nix::unistd::write(&made, &e.count.to_ne_bytes())
            .map_err(RebuildError::call(name_of(fd), "write of the eventfd's count"))?;
    }
    Ok(made)
}
