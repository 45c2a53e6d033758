//! timerfd_create(2): clock, remaining time, interval, and expirations that nobody has read yet.

use super::RebuildError;
use super::objects::name_of;
use crate::sys;
use mcr_image::proto;
use std::os::fd::{AsFd, OwnedFd};

/// TFD_IOC_SET_TICKS, _IOW('T', 0, u64) (include/uapi/linux/timerfd.h, Linux 3.17).
const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;

pub(super) fn open(fd: &proto::Fd, t: &proto::TimerFd) -> Result<OwnedFd, RebuildError> {
    // Expired and not read yet: the kernel starts an interval timer again only when it is read.
    let value = if t.value_ns == 0 && t.ticks != 0 { t.interval_ns } else { t.value_ns };
    let made = sys::timerfd(t.clockid, value, t.interval_ns)
        .map_err(RebuildError::call(name_of(fd), "timerfd_create/timerfd_settime"))?;
    if t.ticks != 0 {
        sys::ioctl_u64(made.as_fd(), TFD_IOC_SET_TICKS, t.ticks)
            .map_err(RebuildError::call(name_of(fd), "ioctl TFD_IOC_SET_TICKS"))?;
    }
    Ok(made)
}
