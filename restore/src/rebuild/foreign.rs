//! Objects that no image holds. A dump refuses them; an image with one was made by hand.

use super::RebuildError;
use super::objects::name_of;
use mcr_image::proto;
use std::os::fd::OwnedFd;

pub(super) fn open(fd: &proto::Fd) -> Result<OwnedFd, RebuildError> {
    Err(RebuildError::refused(
        name_of(fd),
        "this kind of open file can only be kept by a living process",
        "update the process in place instead",
    ))
}
