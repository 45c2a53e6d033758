//! signalfd(2): the mask. Which process's signals are read depends on the reader, not on the maker.

use super::RebuildError;
use super::objects::name_of;
use crate::sys;
use mcr_image::proto;
use std::os::fd::OwnedFd;

pub(super) fn open(fd: &proto::Fd, s: &proto::SignalFd) -> Result<OwnedFd, RebuildError> {
    sys::signalfd(s.mask).map_err(RebuildError::call(name_of(fd), "signalfd4"))
}
