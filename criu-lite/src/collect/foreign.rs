//! Objects that no image holds: only for changes of a living process, which keeps them.

use super::{CollectError, Open, View, tcp};
use mcr_image::proto;
use std::os::fd::AsFd;

/// How /proc/PID/fd shows inotify(7).
const INOTIFY: &[u8] = b"anon_inode:inotify";

/// What is known of a descriptor that is none of the kinds which images hold. `kept`: its object stays.
pub(super) fn collect(view: &View<'_>, o: &Open<'_>, kept: bool) -> Result<proto::Foreign, CollectError> {
    if o.link == INOTIFY && kept {
        return Ok(proto::Foreign::default());
    }
    Err(view.unsupported(
        o.name(),
        "images do not hold this kind of object yet",
        "have the server close it, or restart the server without the feature that opens it",
    ))
}

/// The same for a socket.
pub(super) fn socket(view: &View<'_>, o: &Open<'_>, kept: bool) -> Result<proto::Foreign, CollectError> {
    let option = |name| tcp::int_option(o.dup.as_fd(), libc::SOL_SOCKET, name).unwrap_or(-1);
    let [family, kind, protocol] = [libc::SO_DOMAIN, libc::SO_TYPE, libc::SO_PROTOCOL].map(option);
    let raw = matches!(family, libc::AF_INET | libc::AF_INET6) && kind == libc::SOCK_RAW;
    // Others may be mapped (packet(7)), or stand for connections.
    if kept && (family == libc::AF_NETLINK || raw) {
        return Ok(proto::Foreign { family: family as u32, r#type: kind as u32, protocol: protocol as u32 });
    }
    Err(view.unsupported(
        format!("descriptor {} (socket, family {family}, type {kind}, protocol {protocol})", o.number),
        "images hold TCP, UDP and unix sockets only; netlink and raw ones are kept by an update in place",
        "have the server close it",
    ))
}
