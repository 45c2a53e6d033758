//! unix(7) sockets: pairs inside the image with the data that waits in them, listeners, bound datagram
//! sockets. A socket whose peer is outside the image is only restored by the keeper.

use super::RebuildError;
use super::objects::{Maker, name_of};
use crate::sys;
use mcr_image::proto;
use proto::fd::Object;
use std::collections::HashSet;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

/// State numbers are TCP's (net/unix/af_unix.c).
const LISTEN: u32 = 10;

pub(super) fn open(
    fd: &proto::Fd,
    u: &proto::UnixSocket,
    maker: &mut Maker<'_>,
) -> Result<OwnedFd, RebuildError> {
    if let Some(made) = maker.sockets.remove(&u.ino) {
        return Ok(made);
    }
    if u.external {
        let why = maker.keeper_gone.clone().unwrap_or_else(|| "the keeper does not hold it".to_owned());
        return Err(RebuildError::refused(
            name_of(fd),
            format!("its peer is a process outside the image: {why}"),
            "restore before the keeper's deadline, or dump both processes together",
        ));
    }
    if u.rights {
        return Err(RebuildError::refused(
            name_of(fd),
            "open files are under way in its queue (SCM_RIGHTS), and no keeper holds it",
            "restore before the keeper's deadline, or dump when the server has taken them",
        ));
    }
    if u.named_senders {
        let text = format!("{}: datagrams that wait in it lose their senders' names", name_of(fd));
        maker.warn("unix-sender", text, "restore before the keeper's deadline to keep them");
    }
    let kind = u.r#type as i32;
    let failed = |call| RebuildError::call(name_of(fd), call);
    if u.state == LISTEN || u.peer_ino == 0 {
        let made = sys::socket(libc::AF_UNIX, kind, 0).map_err(failed("socket"))?;
        buffers(&made, u);
        if !u.address.is_empty() {
            bind_again(fd, u, &made)?;
        }
        if u.state == LISTEN {
            let backlog = i32::try_from(u.backlog.max(1)).unwrap_or(i32::MAX);
            sys::listen(made.as_fd(), backlog).map_err(failed("listen"))?;
        }
        return Ok(made);
    }
    let (a, b) = sys::unix_pair(kind).map_err(failed("socketpair"))?;
    buffers(&a, u);
    if let Some(p) = find(maker.all, u.peer_ino) {
        buffers(&b, p);
    }
    if !u.address.is_empty() {
        let text = format!("{}: a connected pair gets no name again (getsockname differs)", name_of(fd));
        maker.warn("unix-name", text, "");
    }
    // Kept also when the peer's descriptor was closed: the queue is filled through it.
    maker.sockets.insert(u.peer_ino, b);
    Ok(a)
}

fn find(all: &[proto::Fd], ino: u64) -> Option<&proto::UnixSocket> {
    all.iter().find_map(|f| match &f.object {
        Some(Object::Unix(u)) if u.ino == ino => Some(u),
        _ => None,
    })
}

fn buffers(sock: &OwnedFd, u: &proto::UnixSocket) {
    // SO_SNDBUF doubles what it is given. A size that cannot be had is no reason to fail.
    for (name, size) in [(libc::SO_SNDBUFFORCE, u.sndbuf), (libc::SO_RCVBUFFORCE, u.rcvbuf)] {
        if size != 0 {
            let _ = sys::setsockopt(sock.as_fd(), libc::SOL_SOCKET, name, &(size / 2).to_ne_bytes());
        }
    }
    if u.passcred {
        let _ = sys::setsockopt(sock.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, &1u32.to_ne_bytes());
    }
}

/// A path may have been left behind by the old process.
fn bind_again(fd: &proto::Fd, u: &proto::UnixSocket, sock: &OwnedFd) -> Result<(), RebuildError> {
    if !matches!(u.address[0], 0 | b'/') {
        return Err(RebuildError::refused(
            name_of(fd),
            format!(
                "it is bound to the relative path {}, and its directory is not known",
                String::from_utf8_lossy(&u.address)
            ),
            "restore before the keeper's deadline, or have the server bind an absolute path",
        ));
    }
    let addr = raw_address(u);
    let Err(first) = sys::bind_raw(sock.as_fd(), &addr) else {
        return Ok(());
    };
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(&u.address));
    if first.raw_os_error() == Some(libc::EADDRINUSE) && u.address[0] != 0 {
        let probe = sys::socket(libc::AF_UNIX, u.r#type as i32 | libc::SOCK_NONBLOCK, 0)
            .map_err(RebuildError::call(name_of(fd), "socket"))?;
        // Nobody listens there: it is the name of the dumped socket.
        let dead = sys::connect_raw(probe.as_fd(), &addr)
            .is_err_and(|e| e.raw_os_error() == Some(libc::ECONNREFUSED));
        if dead && std::fs::remove_file(path).is_ok() {
            return sys::bind_raw(sock.as_fd(), &addr).map_err(RebuildError::call(name_of(fd), "bind"));
        }
    }
    Err(RebuildError::Call {
        object: name_of(fd),
        call: "bind of the unix socket",
        source: first,
        next: "end the process that uses this address now",
    })
}

/// Puts waiting data back, then shuts down what was shut down. Runs when every socket is open.
pub(super) fn refill(
    maker: &mut Maker<'_>,
    opened: &std::collections::BTreeMap<u32, OwnedFd>,
    kept: &HashSet<u32>,
) -> Result<(), RebuildError> {
    let mut done = HashSet::new();
    for fd in maker.all {
        let Some(Object::Unix(u)) = &fd.object else {
            continue;
        };
        if u.state == LISTEN || kept.contains(&fd.ofd) || !done.insert(u.ino) {
            continue;
        }
        if u.peer_ino == 0 {
            if !u.queue_lengths.is_empty() && !u.address.is_empty() {
                let writer = sender_to(fd, u)?;
                send_queue(fd, u, &writer)?;
            }
            continue;
        }
        let by_ino = |ino: u64| {
            let ofd =
                maker.all.iter().find(|f| matches!(&f.object, Some(Object::Unix(x)) if x.ino == ino))?;
            opened.get(&ofd.ofd)
        };
        let writer = by_ino(u.peer_ino).or_else(|| maker.sockets.get(&u.peer_ino));
        if let (Some(writer), false) = (writer, u.queue.is_empty() && u.queue_lengths.is_empty()) {
            send_queue(fd, u, writer)?;
        }
    }
    for fd in maker.all {
        let (Some(Object::Unix(u)), false) = (&fd.object, kept.contains(&fd.ofd)) else {
            continue;
        };
        let how = match u.shutdown {
            1 => libc::SHUT_RD,
            2 => libc::SHUT_WR,
            3 => libc::SHUT_RDWR,
            _ => continue,
        };
        if let Some(s) = opened.get(&fd.ofd) {
            sys::shutdown(s.as_fd(), how).map_err(RebuildError::call(name_of(fd), "shutdown"))?;
        }
    }
    Ok(())
}

/// A socket that sends to a bound one.
fn sender_to(fd: &proto::Fd, u: &proto::UnixSocket) -> Result<OwnedFd, RebuildError> {
    let failed = |call| RebuildError::call(name_of(fd), call);
    let sock = sys::socket(libc::AF_UNIX, u.r#type as i32, 0).map_err(failed("socket"))?;
    sys::connect_raw(sock.as_fd(), &raw_address(u)).map_err(failed("connect to refill its queue"))?;
    Ok(sock)
}

/// `sun_path` from the image to a struct sockaddr_un.
fn raw_address(u: &proto::UnixSocket) -> Vec<u8> {
    let mut addr = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    addr.extend_from_slice(&u.address);
    if u.address.first().is_some_and(|b| *b != 0) {
        addr.push(0);
    }
    addr
}

fn send_queue(fd: &proto::Fd, u: &proto::UnixSocket, writer: &OwnedFd) -> Result<(), RebuildError> {
    use nix::sys::socket::{MsgFlags, send};
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let fail = |e| RebuildError::call(name_of(fd), "sending the socket's waiting data back")(e);
    let mut rest = &u.queue[..];
    if u.r#type as i32 == libc::SOCK_STREAM {
        while !rest.is_empty() {
            let n = send(writer.as_raw_fd(), rest, flags).map_err(fail)?;
            rest = &rest[n..];
        }
        return Ok(());
    }
    for &len in &u.queue_lengths {
        let len = (len as usize).min(rest.len());
        send(writer.as_raw_fd(), &rest[..len], flags).map_err(fail)?;
        rest = &rest[len..];
    }
    Ok(())
}
