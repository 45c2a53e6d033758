//! unix(7) sockets: names, peers (sock_diag(7), UNIX_DIAG_PEER), and the bytes that wait in them, peeked.

use super::{CollectError, Open, View, raw, tcp};
use crate::sys::check;
use mcr_image::proto;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// What sock_diag says of one socket.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Entry {
    state: u32,
    peer: u64,
    backlog: u32,
}

const LISTEN: u32 = 10;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const UDIAG_SHOW_PEER: u32 = 4;
const UDIAG_SHOW_RQLEN: u32 = 0x10;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_RQLEN: u16 = 4;

/// All unix sockets of this network namespace by inode. Empty where sock_diag is not there.
pub(super) fn table() -> HashMap<u64, Entry> {
    dump().unwrap_or_default()
}

#[allow(unsafe_code)]
fn dump() -> std::io::Result<HashMap<u64, Entry>> {
    // SAFETY: plain numbers; the descriptor is fresh and owned here.
    let sock = unsafe {
        let fd = check(i64::from(libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::NETLINK_SOCK_DIAG,
        )))?;
        OwnedFd::from_raw_fd(fd as i32)
    };
    // struct nlmsghdr + struct unix_diag_req (linux/unix_diag.h).
    let mut req = Vec::new();
    req.extend(40u32.to_ne_bytes());
    req.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    req.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    req.extend([0u8; 8]);
    req.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    req.extend(u32::MAX.to_ne_bytes());
    req.extend(0u32.to_ne_bytes());
    req.extend((UDIAG_SHOW_PEER | UDIAG_SHOW_RQLEN).to_ne_bytes());
    req.extend([0u8; 8]);
    // SAFETY: req is a live buffer of its length.
    check(unsafe { libc::send(sock.as_raw_fd(), req.as_ptr().cast(), req.len(), 0) } as i64)?;
    let mut out = HashMap::new();
    let mut buf = vec![0u8; 1 << 17];
    loop {
        // SAFETY: buf is a live buffer of its length.
        let n = check(unsafe { libc::recv(sock.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), 0) } as i64)?;
        if !messages(&buf[..n as usize], &mut out) {
            return Ok(out);
        }
    }
}

fn u16_at(b: &[u8], n: usize) -> u16 {
    b.get(n..n + 2).map_or(0, |w| u16::from_ne_bytes([w[0], w[1]]))
}

fn u32_at(b: &[u8], n: usize) -> u32 {
    b.get(n..n + 4).map_or(0, |w| u32::from_ne_bytes([w[0], w[1], w[2], w[3]]))
}

/// `false` at the end of the dump.
fn messages(mut b: &[u8], out: &mut HashMap<u64, Entry>) -> bool {
    while b.len() >= 16 {
        let len = u32_at(b, 0) as usize;
        if len < 16 || len > b.len() {
            return false;
        }
        match u16_at(b, 4) {
            SOCK_DIAG_BY_FAMILY => {
                // struct unix_diag_msg: family, type, state, pad, ino, cookie[2]; then attributes.
                let m = &b[16..len];
                let mut e = Entry { state: m.get(2).copied().unwrap_or(0).into(), ..Entry::default() };
                let mut at = 16;
                while at + 4 <= m.len() {
                    let l = u16_at(m, at) as usize;
                    if l < 4 {
                        break;
                    }
                    match u16_at(m, at + 2) {
                        UNIX_DIAG_PEER => e.peer = u32_at(m, at + 4).into(),
                        UNIX_DIAG_RQLEN => e.backlog = u32_at(m, at + 8),
                        _ => {}
                    }
                    at += (l + 3) & !3;
                }
                out.insert(u32_at(m, 4).into(), e);
            }
            _ => return false, // NLMSG_DONE, NLMSG_ERROR
        }
        b = &b[((len + 3) & !3).min(b.len())..];
    }
    true
}

pub(super) fn collect(
    view: &View<'_>,
    o: &Open<'_>,
    kind: i32,
    table: &HashMap<u64, Entry>,
) -> Result<proto::UnixSocket, CollectError> {
    let e = table.get(&o.stat.st_ino).copied().unwrap_or_default();
    let name = tcp::address(o, false);
    let option = |n| tcp::int_option(o.dup.as_fd(), libc::SOL_SOCKET, n).unwrap_or(0);
    let listening = option(libc::SO_ACCEPTCONN) != 0;
    let label = o.name();
    let (queue, lengths) = if listening {
        Default::default()
    } else {
        peek(o, kind).map_err(view.io(&label, "recv MSG_PEEK"))?
    };
    Ok(proto::UnixSocket {
        ino: o.stat.st_ino,
        r#type: kind as u32,
        state: if listening { LISTEN } else { e.state },
        address: path_of(&name),
        peer_ino: e.peer,
        backlog: e.backlog,
        queue,
        queue_lengths: lengths,
        sndbuf: option(libc::SO_SNDBUF) as u32,
        rcvbuf: option(libc::SO_RCVBUF) as u32,
        passcred: option(libc::SO_PASSCRED) != 0,
        ..Default::default()
    })
}

/// sun_path: up to the NUL of a path, whole for an abstract name.
fn path_of(addr: &[u8]) -> Vec<u8> {
    let path = addr.get(2..).unwrap_or_default();
    match path.first() {
        None => Vec::new(),
        Some(0) => path.to_vec(),
        Some(_) => path.split(|&b| b == 0).next().unwrap_or_default().to_vec(),
    }
}

/// What waits to be read, left where it is. Of datagrams only one can be looked at that way.
#[allow(unsafe_code)]
fn peek(o: &Open<'_>, kind: i32) -> std::io::Result<(Vec<u8>, Vec<u32>)> {
    let mut buf = vec![0u8; 1 << 20];
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: buf is a live buffer of its length.
    let n = unsafe { libc::recv(raw(o.dup), buf.as_mut_ptr().cast(), buf.len(), flags) };
    match check(n as i64) {
        Ok(n) => buf.truncate(n as usize),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::ENOTCONN | nix::errno::Errno::EINVAL) => {
            buf.clear()
        }
        Err(e) => return Err(e.into()),
    }
    let lengths =
        if kind == libc::SOCK_STREAM || buf.is_empty() { Vec::new() } else { vec![buf.len() as u32] };
    Ok((buf, lengths))
}
