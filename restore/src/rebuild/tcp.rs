//! tcp(7) and udp(7). Living connections come back through the keeper (`objects` asks it first); what arrives
//! here has to be made anew: listeners, unconnected sockets, and connections of which the image has a record
//! (`mcr dump --tcp-repair`). A connection with neither is refused, or replaced by an unconnected socket where
//! the user asked for that.

use super::RebuildError;
use super::objects::{Maker, name_of};
use crate::sys;
use crate::tcp_repair::{self, CLOSE, LISTEN, RepairError};
use mcr_image::proto;
use std::os::fd::{AsFd, OwnedFd};

pub(super) fn open(
    fd: &proto::Fd,
    t: &proto::TcpSocket,
    maker: &mut Maker<'_>,
) -> Result<OwnedFd, RebuildError> {
    match t.state {
        LISTEN => {
            let made = make(fd, t)?;
            bind_to(fd, &made, &t.local)?;
            let backlog = i32::try_from(t.backlog.max(1)).unwrap_or(i32::MAX);
            sys::listen(made.as_fd(), backlog).map_err(RebuildError::call(name_of(fd), "listen"))?;
            Ok(made)
        }
        CLOSE => {
            let made = make(fd, t)?;
            if port_of(&t.local) != 0 {
                bind_to(fd, &made, &t.local)?;
            }
            Ok(made)
        }
        _ if maker.drop_connections => {
            let text = format!("{}: the connection is dropped (--drop-connections)", name_of(fd));
            maker.warn("connection-dropped", text, "");
            make(fd, t)
        }
        _ if t.repair.is_some() => {
            let made = make(fd, t)?;
            let r = t.repair.as_ref().ok_or_else(|| RebuildError::Image("a TCP record".to_owned()))?;
            tcp_repair::recreate(made.as_fd(), t, r).map_err(|e| repair_failed(fd, e))?;
            maker.recreated.insert(fd.ofd);
            Ok(made)
        }
        _ => {
            let why = maker.keeper_gone.clone().unwrap_or_else(|| "the keeper does not hold it".to_owned());
            Err(RebuildError::refused(
                name_of(fd),
                format!("this connection can only come back from its keeper: {why}"),
                "listening sockets can be restored with --drop-connections; mcr dump --tcp-repair makes an image \
                 whose connections need no keeper",
            ))
        }
    }
}

fn repair_failed(fd: &proto::Fd, e: RepairError) -> RebuildError {
    match e {
        RepairError::Call { call, source } => {
            let next = "or restore without the connections: --drop-connections";
            RebuildError::Call { object: name_of(fd), call, source, next }
        }
        RepairError::Unsupported(why) => RebuildError::refused(name_of(fd), why, ""),
    }
}

/// The last step before the process runs: a connection that was held still goes on. `recreated`: it was made from
/// its record, and not fetched from the keeper.
pub(super) fn let_flow(fd: &proto::Fd, sock: &OwnedFd, recreated: bool) -> Result<(), RebuildError> {
    let Some(proto::fd::Object::Tcp(t)) = &fd.object else { return Ok(()) };
    let reuse = tcp_repair::reuse_of(t);
    let done = match &t.repair {
        Some(r) if recreated => tcp_repair::resume(sock.as_fd(), t, r, reuse),
        _ => tcp_repair::flow(sock.as_fd(), reuse),
    };
    done.map_err(|e| repair_failed(fd, e))?;
    if recreated {
        // Its queues needed more room than the server has asked for.
        let sizes = [libc::SO_SNDBUF, libc::SO_RCVBUF, SO_BUF_LOCK];
        let of_sizes = |o: &&proto::SockOpt| o.level == libc::SOL_SOCKET && sizes.contains(&o.name);
        set_options(sock, &t.options.iter().filter(of_sizes).cloned().collect::<Vec<_>>());
    }
    Ok(())
}

/// include/uapi/asm-generic/socket.h, Linux 5.16: which sizes the server has fixed.
const SO_BUF_LOCK: i32 = 72;

pub(super) fn open_udp(
    fd: &proto::Fd,
    u: &proto::UdpSocket,
    _: &mut Maker<'_>,
) -> Result<OwnedFd, RebuildError> {
    let kind = if u.r#type == 0 { libc::SOCK_DGRAM } else { u.r#type as i32 };
    let made = sys::socket(u.family as i32, kind, u.protocol as i32)
        .map_err(RebuildError::call(name_of(fd), "socket"))?;
    set_options(&made, &u.options);
    if port_of(&u.local) != 0 {
        bind_to(fd, &made, &u.local)?;
    }
    if port_of(&u.peer) != 0 {
        sys::connect_raw(made.as_fd(), &u.peer).map_err(RebuildError::call(name_of(fd), "connect"))?;
    }
    Ok(made)
}

fn make(fd: &proto::Fd, t: &proto::TcpSocket) -> Result<OwnedFd, RebuildError> {
    let made = sys::socket(t.family as i32, libc::SOCK_STREAM, 0)
        .map_err(RebuildError::call(name_of(fd), "socket"))?;
    let one = 1i32.to_ne_bytes();
    sys::setsockopt(made.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, &one)
        .map_err(RebuildError::call(name_of(fd), "setsockopt SO_REUSEADDR"))?;
    if t.family as i32 == libc::AF_INET6 {
        let only = i32::from(t.v6only).to_ne_bytes();
        sys::setsockopt(made.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, &only)
            .map_err(RebuildError::call(name_of(fd), "setsockopt IPV6_V6ONLY"))?;
    }
    set_options(&made, &t.options);
    Ok(made)
}

/// Options that the dump recorded. One that this state of the socket does not take keeps its default.
fn set_options(sock: &OwnedFd, options: &[proto::SockOpt]) {
    for o in options {
        let name = match (o.level, o.name) {
            // getsockopt shows the doubled size; the FORCE forms are not bounded by the sysctl.
            (libc::SOL_SOCKET, libc::SO_SNDBUF) => libc::SO_SNDBUFFORCE,
            (libc::SOL_SOCKET, libc::SO_RCVBUF) => libc::SO_RCVBUFFORCE,
            (_, n) => n,
        };
        let halved = name != o.name;
        let value = match <[u8; 4]>::try_from(o.value.as_slice()) {
            Ok(v) if halved => (i32::from_ne_bytes(v) / 2).to_ne_bytes().to_vec(),
            _ => o.value.clone(),
        };
        let _ = sys::setsockopt(sock.as_fd(), o.level, name, &value);
    }
}

fn bind_to(fd: &proto::Fd, sock: &OwnedFd, addr: &[u8]) -> Result<(), RebuildError> {
    sys::bind_raw(sock.as_fd(), addr).map_err(|e| RebuildError::Call {
        object: name_of(fd),
        call: "bind",
        source: e,
        next: "end the process that listens on this address now (ss -ltnp shows it)",
    })
}

/// Port of a struct sockaddr_in or sockaddr_in6 (both have it at offset 2), 0 when there is none.
fn port_of(addr: &[u8]) -> u16 {
    match addr {
        [_, _, hi, lo, ..] => u16::from_be_bytes([*hi, *lo]),
        _ => 0,
    }
}
