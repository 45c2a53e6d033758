//! epoll(7): the watches, from fdinfo.

use super::Open;
use mcr_image::proto;

pub(super) fn collect(o: &Open<'_>) -> proto::Epoll {
    let watches = o
        .info
        .watches()
        .into_iter()
        .map(|(fd, events, data)| proto::EpollWatch { fd, events, data })
        .collect();
    proto::Epoll { ino: u64::from(o.number), watches }
}
