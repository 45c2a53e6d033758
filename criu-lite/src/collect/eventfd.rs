//! eventfd(2): fdinfo shows `eventfd-count` (hexadecimal) and, since Linux 5.2, `eventfd-semaphore`.

use super::Open;
use mcr_image::proto;

pub(super) fn collect(o: &Open<'_>) -> proto::EventFd {
    proto::EventFd {
        count: o.info.hex("eventfd-count").unwrap_or(0),
        semaphore: o.info.dec("eventfd-semaphore").unwrap_or(0) != 0,
    }
}
