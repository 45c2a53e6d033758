//! signalfd(2): the mask, from fdinfo `sigmask` (hexadecimal).

use super::Open;
use mcr_image::proto;

pub(super) fn collect(o: &Open<'_>) -> proto::SignalFd {
    proto::SignalFd { mask: o.info.hex("sigmask").unwrap_or(0) }
}
