//! tcp(7) and udp(7): addresses, options, backlog, through a duplicate of the descriptor.

use super::{CollectError, Open, View, raw};
use crate::sys::check;
use mcr_image::proto;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Options that are carried: (level, name).
const OPTIONS: &[(i32, i32)] = &[
    (libc::SOL_SOCKET, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_LINGER),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE),
    (libc::SOL_SOCKET, libc::SO_BROADCAST),
    (libc::SOL_SOCKET, libc::SO_PRIORITY),
    (libc::SOL_SOCKET, libc::SO_MARK),
    (libc::SOL_SOCKET, libc::SO_SNDBUF),
    (libc::SOL_SOCKET, libc::SO_RCVBUF),
    // After the two sizes: setting a size also fixes it, which this undoes where it was not fixed.
    (libc::SOL_SOCKET, SO_BUF_LOCK),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO),
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::SOL_SOCKET, libc::SO_BINDTODEVICE),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
];
/// include/uapi/asm-generic/socket.h, Linux 5.16.
const SO_BUF_LOCK: i32 = 72;
const TCP_OPTIONS: &[(i32, i32)] = &[
    (libc::IPPROTO_TCP, libc::TCP_NODELAY),
    (libc::IPPROTO_TCP, libc::TCP_CORK),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    (libc::IPPROTO_TCP, libc::TCP_QUICKACK),
    (libc::IPPROTO_TCP, libc::TCP_FASTOPEN),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION),
    (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT),
    (libc::IPPROTO_TCP, libc::TCP_SYNCNT),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2),
];

const LISTEN: u32 = 10;
const CLOSE: u32 = 7;

/// getsockopt(2) as bytes.
#[allow(unsafe_code)]
pub(super) fn option(fd: BorrowedFd<'_>, level: i32, name: i32) -> std::io::Result<Vec<u8>> {
    let mut buf = vec![0u8; 256];
    let mut len = buf.len() as libc::socklen_t;
    // SAFETY: buf and len describe a live buffer.
    check(i64::from(unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, buf.as_mut_ptr().cast(), &mut len)
    }))?;
    buf.truncate(len as usize);
    Ok(buf)
}

#[allow(unsafe_code)]
pub(super) fn int_option(fd: BorrowedFd<'_>, level: i32, name: i32) -> Option<i32> {
    let mut value = 0i32;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: value and len describe a live int.
    let r = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &mut len) };
    (r == 0 && len == 4).then_some(value)
}

fn options(fd: BorrowedFd<'_>, which: &[(i32, i32)]) -> Vec<proto::SockOpt> {
    which
        .iter()
        .filter_map(|&(level, name)| {
            Some(proto::SockOpt { level, name, value: option(fd, level, name).ok()? })
        })
        .collect()
}

/// getsockname(2) or getpeername(2) as the raw struct sockaddr; empty where there is none.
#[allow(unsafe_code)]
pub(super) fn address(o: &Open<'_>, peer: bool) -> Vec<u8> {
    let mut buf = [0u8; 128];
    let mut len = buf.len() as libc::socklen_t;
    let call = if peer { libc::getpeername } else { libc::getsockname };
    // SAFETY: buf and len describe a live buffer.
    let r = unsafe { call(raw(o.dup), buf.as_mut_ptr().cast(), &mut len) };
    if r < 0 { Vec::new() } else { buf[..(len as usize).min(buf.len())].to_vec() }
}

/// struct tcp_info starts with the state; of a listener tcpi_sacked (offset 28) is the backlog
/// (net/ipv4/tcp.c, tcp_get_info).
fn info(o: &Open<'_>) -> std::io::Result<(u32, u32)> {
    let b = option(o.dup.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO)?;
    let word = |n: usize| b.get(n..n + 4).map_or(0, |w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]]));
    Ok((b.first().copied().unwrap_or(0).into(), word(28)))
}

/// `all`: with every option, and refusing what a socket that is made again would lose.
pub(super) fn collect(
    view: &View<'_>,
    o: &Open<'_>,
    domain: i32,
    all: bool,
) -> Result<proto::TcpSocket, CollectError> {
    let (state, backlog) = info(o).map_err(|e| view.io(&o.name(), "getsockopt TCP_INFO")(e))?;
    let mut opts = Vec::new();
    if all {
        let ulp = option(o.dup.as_fd(), libc::IPPROTO_TCP, libc::TCP_ULP).unwrap_or_default();
        if ulp.iter().any(|&b| b != 0) {
            let why = "the kernel encrypts it (kTLS)";
            return Err(view.unsupported(o.name(), why, "switch kTLS off in the server"));
        }
        opts = options(o.dup.as_fd(), OPTIONS);
        opts.extend(options(o.dup.as_fd(), TCP_OPTIONS));
    }
    Ok(proto::TcpSocket {
        ino: o.stat.st_ino,
        family: domain as u32,
        state,
        local: address(o, false),
        peer: if state == LISTEN || state == CLOSE { Vec::new() } else { address(o, true) },
        backlog: if state == LISTEN { backlog } else { 0 },
        options: opts,
        v6only: domain == libc::AF_INET6
            && int_option(o.dup.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY).unwrap_or(0) != 0,
        ..Default::default()
    })
}

pub(super) fn collect_udp(
    o: &Open<'_>,
    domain: i32,
    protocol: i32,
    all: bool,
) -> Result<proto::UdpSocket, CollectError> {
    Ok(proto::UdpSocket {
        ino: o.stat.st_ino,
        family: domain as u32,
        local: address(o, false),
        peer: address(o, true),
        options: if all { options(o.dup.as_fd(), OPTIONS) } else { Vec::new() },
        r#type: libc::SOCK_DGRAM as u32,
        protocol: protocol as u32,
        ..Default::default()
    })
}
