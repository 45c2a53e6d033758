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
    options: bool,
) -> Result<proto::UnixSocket, CollectError> {
    let e = table.get(&o.stat.st_ino).copied().unwrap_or_default();
    let name = tcp::address(o, false);
    let option = |n| tcp::int_option(o.dup.as_fd(), libc::SOL_SOCKET, n).unwrap_or(0);
    let listening = option(libc::SO_ACCEPTCONN) != 0;
    let label = o.name();
    // A socket that is handed over itself takes its queue along.
    let queue = if listening || !options {
        Queue::default()
    } else {
        peek(o, kind).map_err(view.io(&label, "recvmsg MSG_PEEK"))?
    };
    Ok(proto::UnixSocket {
        ino: o.stat.st_ino,
        r#type: kind as u32,
        state: if listening { LISTEN } else { e.state },
        address: path_of(&name),
        peer_ino: e.peer,
        backlog: e.backlog,
        queue: queue.bytes,
        queue_lengths: queue.lengths,
        rights: queue.rights,
        named_senders: queue.named_senders,
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

/// What waits to be read.
#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    /// Of each datagram or packet.
    lengths: Vec<u32>,
    rights: bool,
    named_senders: bool,
}

/// The offset of peeks (SO_PEEK_OFF), put back when dropped: it belongs to the socket, not to our duplicate.
struct PeekOffset<'a> {
    socket: &'a OwnedFd,
    was: i32,
}

impl<'a> PeekOffset<'a> {
    fn start(socket: &'a OwnedFd) -> std::io::Result<Self> {
        let was = tcp::int_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
        let me = Self { socket, was };
        me.set(0)?;
        Ok(me)
    }

    #[allow(unsafe_code)]
    fn set(&self, to: i32) -> std::io::Result<()> {
        let (level, name, len) = (libc::SOL_SOCKET, libc::SO_PEEK_OFF, size_of::<i32>() as u32);
        // SAFETY: the value is a live int of the length given.
        let r = unsafe { libc::setsockopt(raw(self.socket), level, name, (&raw const to).cast(), len) };
        check(i64::from(r))?;
        Ok(())
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        // What was set before can be set again.
        let _ = self.set(self.was);
    }
}

/// More than the kernel lets wait in one socket.
const MOST: usize = 1 << 16;
const MOST_BYTES: usize = 1 << 30;

/// Looks at the whole queue and leaves it as it is. The kernel shows an empty datagram to one walk over the
/// queue only (`peeked` in `__skb_try_recv_from_queue`): a second dump of the same queue leaves it out.
fn peek(o: &Open<'_>, kind: i32) -> std::io::Result<Queue> {
    let mut queue = Queue::default();
    // Most are empty, and are not touched at all.
    if polled(o.dup, libc::POLLIN) {
        let _offset = PeekOffset::start(o.dup)?;
        while look(o.dup, kind, &mut queue)? {
            // The server stands still meanwhile: this must end, whatever the kernel says.
            if queue.lengths.len() > MOST || queue.bytes.len() > MOST_BYTES {
                return Err(std::io::Error::other("its queue has no end"));
            }
        }
    }
    Ok(queue)
}

/// Adds what is at the present offset. `false`: nothing was there.
fn look(socket: &OwnedFd, kind: i32, queue: &mut Queue) -> std::io::Result<bool> {
    use nix::errno::Errno;
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrLike, UnixAddr, recvmsg};
    let mut buf = vec![0u8; 1 << 20];
    let mut control = nix::cmsg_space!([i32; 253], libc::ucred);
    let mut iov = [std::io::IoSliceMut::new(&mut buf)];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let (n, rights, named) = match recvmsg::<UnixAddr>(raw(socket), &mut iov, Some(&mut control), flags) {
        Ok(m) => {
            if m.flags.contains(MsgFlags::MSG_TRUNC) {
                return Err(std::io::Error::other("a datagram of more than a megabyte"));
            }
            let mut rights = m.flags.contains(MsgFlags::MSG_CTRUNC);
            for c in m.cmsgs()? {
                if let ControlMessageOwned::ScmRights(files) = c {
                    rights = true;
                    // Looking at them opened them for us.
                    files.into_iter().for_each(|f| drop(owned(f)));
                }
            }
            let named = m.address.is_some_and(|a| a.len() > 2);
            (m.bytes, rights, named)
        }
        Err(Errno::EAGAIN | Errno::ENOTCONN | Errno::EINVAL) => return Ok(false),
        Err(e) => return Err(e.into()),
    };
    // Of a stream: its end. Else an empty datagram, or that nothing more can come.
    let hung_up = || polled(socket, libc::POLLRDHUP | libc::POLLHUP);
    if n == 0 && (kind == libc::SOCK_STREAM || hung_up()) {
        return Ok(false);
    }
    queue.rights |= rights;
    queue.bytes.extend_from_slice(&buf[..n]);
    if kind != libc::SOCK_STREAM {
        queue.named_senders |= named;
        queue.lengths.push(n as u32);
    }
    Ok(true)
}

/// Whether poll(2) says one of `what` now.
#[allow(unsafe_code)]
fn polled(socket: &OwnedFd, what: i16) -> bool {
    let mut fd = libc::pollfd { fd: raw(socket), events: what, revents: 0 };
    // SAFETY: one live struct pollfd; it does not wait.
    let n = unsafe { libc::poll(&raw mut fd, 1, 0) };
    n > 0 && fd.revents & what != 0
}

#[allow(unsafe_code)]
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: recvmsg(2) has just opened it for us, and nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair,
    };
    use nix::unistd::{read, write};

    fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    fn all(socket: &OwnedFd, kind: i32) -> Queue {
        let open = Open {
            number: 0,
            info: crate::procfs::fdinfo::FdInfo::parse(b""),
            link: Vec::new(),
            stat: nix::sys::stat::fstat(socket).unwrap(),
            dup: socket,
        };
        peek(&open, kind).unwrap()
    }

    #[test]
    fn every_datagram_is_seen_and_stays() {
        for (kind, raw_kind) in
            [(SockType::Datagram, libc::SOCK_DGRAM), (SockType::SeqPacket, libc::SOCK_SEQPACKET)]
        {
            let (a, b) = pair(kind);
            assert!(all(&b, raw_kind).lengths.is_empty());
            for text in ["", "one", "", "second", "3"] {
                write(&a, text.as_bytes()).unwrap();
            }
            for lengths in [&[0, 3, 0, 6, 1][..], &[3, 6, 1]] {
                let q = all(&b, raw_kind);
                assert_eq!((q.bytes.as_slice(), q.lengths.as_slice()), (&b"onesecond3"[..], lengths));
            }
            let mut buf = [0; 16];
            assert_eq!((read(&b, &mut buf), read(&b, &mut buf)), (Ok(0), Ok(3)), "all are there still");
            let offset = tcp::int_option(b.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF);
            assert_eq!(offset, Some(-1), "as it was");
            nix::sys::socket::shutdown(raw(&b), nix::sys::socket::Shutdown::Read).unwrap();
            all(&b, raw_kind);
        }
    }

    #[test]
    fn a_stream_is_read_to_its_end_and_open_files_in_it_are_told() {
        let (a, b) = pair(SockType::Stream);
        write(&a, &[7; 100_000]).unwrap();
        assert_eq!(all(&b, libc::SOCK_STREAM).bytes.len(), 100_000);
        let (iov, file) = ([std::io::IoSlice::new(b"file")], [raw(&a)]);
        let message = [ControlMessage::ScmRights(&file)];
        sendmsg::<()>(raw(&a), &iov, &message, MsgFlags::empty(), None).unwrap();
        write(&a, b"end").unwrap();
        let q = all(&b, libc::SOCK_STREAM);
        assert_eq!((q.bytes.len(), q.rights), (100_007, true));
        drop(a);
        assert_eq!(all(&b, libc::SOCK_STREAM).bytes.len(), 100_007);
    }
}
