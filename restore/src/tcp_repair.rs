//! One TCP connection taken out of the kernel and put into another (TCP_REPAIR, net/ipv4/tcp.c, Linux 3.5).
//!
//! **Peers are held off without a firewall.** A socket that is *held* has the one-instruction filter `ret #0`:
//! the kernel drops every segment for it unanswered, so its peer retransmits and nothing moves. The filter dies
//! with the socket, so there is no rule that could be left behind. [`settle`] then waits until no processor is
//! still delivering a segment that passed before the filter was there: only then is a record true.
//!
//! A socket in repair mode refuses ordinary use and, when it is closed, vanishes without FIN or RST. That is
//! why nothing here is ever done to a socket that a living server uses: see [`crate::portable`].
//!
//! **Known limit**: a connection with a large send queue (measured: 300 000 bytes that the peer did not read), made
//! again while the link to the peer was down, stood still for more than 60 s after the link came up; the cause is
//! not known. More than [`MOST_OUTWARDS`] bytes are therefore refused by name.

use crate::sys;
use mcr_image::proto;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

/// States of include/net/tcp_states.h that a record can be taken of.
pub const ESTABLISHED: u32 = 1;
/// The connection is gone.
pub const CLOSE: u32 = 7;
/// The peer has sent its end, we have not.
pub const CLOSE_WAIT: u32 = 8;
/// A listener.
pub const LISTEN: u32 = 10;

const OFF: i32 = 0;
const ON: i32 = 1;
const RECV_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;
const NO_QUEUE: i32 = 0;
const TCP_REPAIR_WINDOW: i32 = 29;
const SIOCINQ: u64 = 0x541b;
const SIOCOUTQ: u64 = 0x5411;
const SIOCOUTQNSD: u64 = 0x894b;
const OPT_TIMESTAMPS: u8 = 1;
const OPT_SACK: u8 = 2;
const OPT_WSCALE: u8 = 4;
/// Pieces in which queues are put back: one skb each.
const PIECE: usize = 32 << 10;
/// Added to the connection's clock beside the time that has passed: two machines' clocks differ.
const CLOCK_SLACK_MS: u64 = 2000;

/// Why a connection could not be taken or made.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// A call failed.
    #[error("{call}: {source}")]
    Call {
        /// The call.
        call: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The connection is in a state that is not carried.
    #[error("{0}")]
    Unsupported(String),
}

fn call(call: &'static str) -> impl FnOnce(io::Error) -> RepairError {
    move |source| RepairError::Call { call, source }
}

fn set(sock: BorrowedFd<'_>, name: i32, value: i32, what: &'static str) -> Result<(), RepairError> {
    sys::setsockopt(sock, libc::IPPROTO_TCP, name, &value.to_ne_bytes()).map_err(call(what))
}

fn get(sock: BorrowedFd<'_>, level: i32, name: i32, what: &'static str) -> Result<i32, RepairError> {
    let b = sys::getsockopt(sock, level, name, 4).map_err(call(what))?;
    Ok(b.try_into().map_or(0, i32::from_ne_bytes))
}

fn queue(sock: BorrowedFd<'_>, which: i32) -> Result<(), RepairError> {
    set(sock, libc::TCP_REPAIR_QUEUE, which, "setsockopt TCP_REPAIR_QUEUE")
}

/// More bytes than this in a send queue are not recorded.
pub const MOST_OUTWARDS: usize = 64 << 10;

/// The state of include/net/tcp_states.h.
pub fn state(sock: BorrowedFd<'_>) -> Result<u32, RepairError> {
    let info =
        sys::getsockopt(sock, libc::IPPROTO_TCP, libc::TCP_INFO, 8).map_err(call("getsockopt TCP_INFO"))?;
    Ok(info.first().copied().unwrap_or(0).into())
}

/// Connections that wait in a listener's queue (of a listener `tcpi_unacked` counts them).
pub fn not_accepted(sock: BorrowedFd<'_>) -> Result<u32, RepairError> {
    let info =
        sys::getsockopt(sock, libc::IPPROTO_TCP, libc::TCP_INFO, 28).map_err(call("getsockopt TCP_INFO"))?;
    Ok(info.get(24..28).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes))
}

/// The filter that [`hold`] attaches: `ret #0`, as the kernel stores it.
const DROP_ALL: u64 = 0x06;

/// Whether the socket is held.
pub fn is_held(sock: BorrowedFd<'_>) -> bool {
    sys::socket_filter(sock).is_ok_and(|f| f == [DROP_ALL])
}

/// From now on every segment for this socket is dropped unanswered, until [`flow`]. A socket with a filter of
/// the server's own is refused.
pub fn hold(sock: BorrowedFd<'_>) -> Result<(), RepairError> {
    match sys::socket_filter(sock) {
        Ok(f) if f.is_empty() => sys::attach_drop_all(sock).map_err(call("setsockopt SO_ATTACH_FILTER")),
        Ok(f) if f == [DROP_ALL] => Ok(()),
        Ok(_) | Err(_) => Err(RepairError::Unsupported("it has a socket filter of its own".to_owned())),
    }
}

/// Waits until segments that passed before [`hold`] have arrived in their queues.
pub fn settle() -> Result<(), RepairError> {
    sys::membarrier_global().map_err(call("membarrier MEMBARRIER_CMD_GLOBAL"))
}

/// Undoes [`hold`] and leaves repair mode. `reuse` is the server's SO_REUSEADDR, which repair mode has
/// overwritten. A socket that is not held stays as it is.
pub fn flow(sock: BorrowedFd<'_>, reuse: bool) -> Result<(), RepairError> {
    if is_held(sock) {
        sys::setsockopt(sock, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &0i32.to_ne_bytes())
            .map_err(call("setsockopt SO_DETACH_FILTER"))?;
    }
    if get(sock, libc::IPPROTO_TCP, libc::TCP_REPAIR, "getsockopt TCP_REPAIR")? == ON {
        // Sends a window probe: the peer's answer tells us what we missed.
        set(sock, libc::TCP_REPAIR, OFF, "setsockopt TCP_REPAIR off")?;
        sys::setsockopt(sock, libc::SOL_SOCKET, libc::SO_REUSEADDR, &i32::from(reuse).to_ne_bytes())
            .map_err(call("setsockopt SO_REUSEADDR"))?;
    }
    Ok(())
}

/// Takes the connection's state. The socket must be held and [`settle`]d; it stays in repair mode, so that
/// closing it from now on is silent.
pub fn record(sock: BorrowedFd<'_>) -> Result<proto::TcpRepair, RepairError> {
    set(sock, libc::TCP_REPAIR, ON, "setsockopt TCP_REPAIR (needs CAP_NET_ADMIN)")?;
    let info =
        sys::getsockopt(sock, libc::IPPROTO_TCP, libc::TCP_INFO, 8).map_err(call("getsockopt TCP_INFO"))?;
    let [state, _, _, _, _, options, wscale, _] =
        <[u8; 8]>::try_from(info).map_err(|_| RepairError::Unsupported("a short TCP_INFO".into()))?;
    let fin = u32::from(u32::from(state) == CLOSE_WAIT);
    if !matches!(u32::from(state), ESTABLISHED | CLOSE_WAIT) {
        return Err(RepairError::Unsupported(format!("its TCP state is {}", name_of_state(state.into()))));
    }
    let word = |name, what| get(sock, libc::IPPROTO_TCP, name, what);
    let size = |request, what| {
        sys::ioctl_int(sock, request).map(|n| usize::try_from(n).unwrap_or(0)).map_err(call(what))
    };
    let inq = size(SIOCINQ, "ioctl SIOCINQ")?;
    let outq = size(SIOCOUTQ, "ioctl SIOCOUTQ")?;
    if outq > MOST_OUTWARDS {
        return Err(RepairError::Unsupported(format!(
            "{outq} bytes wait to be read by its peer, and more than {MOST_OUTWARDS} are not carried"
        )));
    }
    let unsent = size(SIOCOUTQNSD, "ioctl SIOCOUTQNSD")?;
    queue(sock, RECV_QUEUE)?;
    // The peer's FIN has a number of its own; it is sent to the new socket as one.
    let rcv_seq = (word(libc::TCP_QUEUE_SEQ, "getsockopt TCP_QUEUE_SEQ")? as u32).wrapping_sub(fin);
    let recv_queue = peek(sock, inq, "recv MSG_PEEK of the receive queue")?;
    queue(sock, SEND_QUEUE)?;
    let snd_seq = word(libc::TCP_QUEUE_SEQ, "getsockopt TCP_QUEUE_SEQ")? as u32;
    let send_queue = peek(sock, outq, "recv MSG_PEEK of the send queue")?;
    queue(sock, NO_QUEUE)?;
    let window = sys::getsockopt(sock, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, 20)
        .map_err(call("getsockopt TCP_REPAIR_WINDOW"))?;
    let w =
        |i: usize| window.get(i * 4..i * 4 + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes);
    let has = |bit| options & bit != 0;
    Ok(proto::TcpRepair {
        snd_seq,
        rcv_seq,
        send_queue,
        recv_queue,
        unsent: unsent as u32,
        mss_clamp: word(libc::TCP_MAXSEG, "getsockopt TCP_MAXSEG")? as u32,
        snd_wscale: if has(OPT_WSCALE) { u32::from(wscale & 15) } else { 0 },
        rcv_wscale: if has(OPT_WSCALE) { u32::from(wscale >> 4) } else { 0 },
        wscale: has(OPT_WSCALE),
        sack: has(OPT_SACK),
        timestamps: has(OPT_TIMESTAMPS),
        timestamp: word(libc::TCP_TIMESTAMP, "getsockopt TCP_TIMESTAMP")? as u32,
        snd_wl1: w(0),
        snd_wnd: w(1),
        max_window: w(2),
        rcv_wnd: w(3) + fin,
        rcv_wup: w(4).wrapping_sub(fin),
        taken_unix_ms: now_ms(),
    })
}

/// The last `len` bytes of a queue: a segment that is acknowledged in part is still whole in the send queue.
fn peek(sock: BorrowedFd<'_>, len: usize, what: &'static str) -> Result<Vec<u8>, RepairError> {
    use nix::sys::socket::{MsgFlags, recv};
    if len == 0 {
        return Ok(Vec::new());
    }
    let mut b = vec![0u8; len + (64 << 10)];
    let n = recv(sock.as_raw_fd(), &mut b, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)
        .map_err(|e| call(what)(e.into()))?;
    b.truncate(n);
    if n < len {
        let why = format!("{what}: {n} of {len} bytes (urgent data, or a peek offset, is not carried)");
        return Err(RepairError::Unsupported(why));
    }
    Ok(b.split_off(n - len))
}

/// Makes `sock`, a fresh socket with its options set, the connection of `t`: connected, with both queues, held
/// and in repair mode until [`resume`].
pub fn recreate(sock: BorrowedFd<'_>, t: &proto::TcpSocket, r: &proto::TcpRepair) -> Result<(), RepairError> {
    hold(sock)?;
    set(sock, libc::TCP_REPAIR, ON, "setsockopt TCP_REPAIR (needs CAP_NET_ADMIN)")?;
    for (which, end, len) in
        [(RECV_QUEUE, r.rcv_seq, r.recv_queue.len()), (SEND_QUEUE, r.snd_seq, r.send_queue.len())]
    {
        queue(sock, which)?;
        let start = end.wrapping_sub(len as u32) as i32;
        set(sock, libc::TCP_QUEUE_SEQ, start, "setsockopt TCP_QUEUE_SEQ")?;
    }
    // A queue may be longer than the buffer that the server has by now asked for.
    for (name, len) in
        [(libc::SO_RCVBUFFORCE, r.recv_queue.len()), (libc::SO_SNDBUFFORCE, r.send_queue.len())]
    {
        let room = i32::try_from(len.saturating_mul(3) + (1 << 20)).unwrap_or(i32::MAX);
        sys::setsockopt(sock, libc::SOL_SOCKET, name, &room.to_ne_bytes())
            .map_err(call("setsockopt SO_RCVBUFFORCE/SO_SNDBUFFORCE"))?;
    }
    sys::bind_raw(sock, &t.local).map_err(call(
        "bind (the connection's own address must be on this machine, and no other socket may have the connection)",
    ))?;
    sys::connect_raw(sock, &t.peer)
        .map_err(call("connect in repair mode (there must be a route to the peer)"))?;
    let mut options: Vec<(u32, u32)> = vec![(2, r.mss_clamp)];
    if r.wscale {
        options.push((3, r.snd_wscale | r.rcv_wscale << 16));
    }
    if r.sack {
        options.push((4, 0));
    }
    if r.timestamps {
        options.push((8, 0));
    }
    let bytes: Vec<u8> =
        options.iter().flat_map(|(code, v)| [code.to_ne_bytes(), v.to_ne_bytes()].concat()).collect();
    sys::setsockopt(sock, libc::IPPROTO_TCP, libc::TCP_REPAIR_OPTIONS, &bytes)
        .map_err(call("setsockopt TCP_REPAIR_OPTIONS"))?;
    if r.timestamps {
        let passed = now_ms().saturating_sub(r.taken_unix_ms) + CLOCK_SLACK_MS;
        // Bit 0 says that the connection's clock counts microseconds (Linux 6.7).
        let ticks = if r.timestamp & 1 == 1 { passed.saturating_mul(1000) } else { passed };
        let value = r.timestamp.wrapping_add((ticks as u32) & !1);
        set(sock, libc::TCP_TIMESTAMP, value as i32, "setsockopt TCP_TIMESTAMP")?;
    }
    fill(sock, RECV_QUEUE, &r.recv_queue)?;
    let sent = r.send_queue.len().saturating_sub(r.unsent as usize);
    fill(sock, SEND_QUEUE, &r.send_queue[..sent])?;
    queue(sock, NO_QUEUE)?;
    let window: Vec<u8> = [r.snd_wl1, r.snd_wnd, r.max_window, r.rcv_wnd, r.rcv_wup]
        .iter()
        .flat_map(|w| w.to_ne_bytes())
        .collect();
    sys::setsockopt(sock, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &window)
        .map_err(call("setsockopt TCP_REPAIR_WINDOW"))?;
    if t.state == CLOSE_WAIT {
        // The filter drops it: what would fail in `resume` fails here, where no peer has noticed anything yet.
        send_fin(t, r)?;
    }
    Ok(())
}

fn fill(sock: BorrowedFd<'_>, which: i32, bytes: &[u8]) -> Result<(), RepairError> {
    queue(sock, which)?;
    send_all(sock, bytes, "send into a queue in repair mode")
}

fn send_all(sock: BorrowedFd<'_>, bytes: &[u8], what: &'static str) -> Result<(), RepairError> {
    use nix::sys::socket::{MsgFlags, send};
    for piece in bytes.chunks(PIECE) {
        let mut rest = piece;
        while !rest.is_empty() {
            let n = send(sock.as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)
                .map_err(|e| call(what)(e.into()))?;
            rest = &rest[n..];
        }
    }
    Ok(())
}

/// Lets a connection that [`recreate`] made go on: what was never sent is sent, and the peer's end arrives
/// again where it had arrived.
pub fn resume(
    sock: BorrowedFd<'_>,
    t: &proto::TcpSocket,
    r: &proto::TcpRepair,
    reuse: bool,
) -> Result<(), RepairError> {
    flow(sock, reuse)?;
    let sent = r.send_queue.len().saturating_sub(r.unsent as usize);
    send_all(sock, &r.send_queue[sent..], "send of what was not sent yet")?;
    if t.state == CLOSE_WAIT {
        send_fin(t, r)?;
    }
    Ok(())
}

/// Sends the peer's end to the socket, over the loopback interface.
fn send_fin(t: &proto::TcpSocket, r: &proto::TcpRepair) -> Result<(), RepairError> {
    let segment = fin_segment(t, r)?;
    let raw = sys::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW)
        .map_err(call("raw socket (needs CAP_NET_RAW)"))?;
    sys::send_to(raw.as_fd(), &segment.packet, &segment.to)
        .map_err(call("send of the peer's FIN (the loopback interface must be up: ip link set lo up)"))
}

/// A packet for a raw socket.
struct Segment {
    packet: Vec<u8>,
    to: Vec<u8>,
}

/// The peer's FIN, which it has sent once and will not send again: from the peer's address to ours.
fn fin_segment(t: &proto::TcpSocket, r: &proto::TcpRepair) -> Result<Segment, RepairError> {
    let short = || RepairError::Unsupported("the image has no address of this connection".into());
    let (from, from_port) = ip_and_port(&t.peer).ok_or_else(short)?;
    let (to, to_port) = ip_and_port(&t.local).ok_or_else(short)?;
    let mut tcp = Vec::with_capacity(20);
    tcp.extend_from_slice(&from_port);
    tcp.extend_from_slice(&to_port);
    tcp.extend_from_slice(&r.rcv_seq.to_be_bytes());
    tcp.extend_from_slice(&r.snd_seq.wrapping_sub(r.send_queue.len() as u32).to_be_bytes());
    // Five words of header, FIN and ACK, the window that the peer has announced.
    let window = u16::try_from(r.snd_wnd >> r.snd_wscale.min(14)).unwrap_or(u16::MAX);
    tcp.extend_from_slice(&[5 << 4, 0x11]);
    tcp.extend_from_slice(&window.to_be_bytes());
    tcp.extend_from_slice(&[0; 4]);
    let mut sum = [&from[..], &to[..]].concat();
    sum.extend_from_slice(&[0, libc::IPPROTO_TCP as u8, 0, 20]);
    sum.extend_from_slice(&tcp);
    tcp[16..18].copy_from_slice(&checksum(&sum).to_be_bytes());
    if from.len() != 4 {
        return Err(RepairError::Unsupported("its peer has ended it, which is carried for IPv4 only".into()));
    }
    let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, libc::IPPROTO_TCP as u8, 0, 0];
    let mut addr = (libc::AF_INET as u16).to_ne_bytes().to_vec();
    addr.extend_from_slice(&[0, 0]);
    addr.extend_from_slice(&to);
    addr.resize(16, 0);
    packet.extend_from_slice(&from);
    packet.extend_from_slice(&to);
    packet.extend_from_slice(&tcp);
    Ok(Segment { packet, to: addr })
}

/// Address and port, in network order, of a sockaddr_in or sockaddr_in6; a mapped address is an IPv4 one.
fn ip_and_port(addr: &[u8]) -> Option<(Vec<u8>, [u8; 2])> {
    let family = i32::from(u16::from_ne_bytes(addr.get(..2)?.try_into().ok()?));
    let port = addr.get(2..4)?.try_into().ok()?;
    let ip = match family {
        libc::AF_INET => addr.get(4..8)?.to_vec(),
        libc::AF_INET6 => {
            let ip = addr.get(8..24)?;
            let mapped = ip[..10].iter().all(|b| *b == 0) && ip[10..12] == [0xff, 0xff];
            if mapped { ip[12..].to_vec() } else { ip.to_vec() }
        }
        _ => return None,
    };
    Some((ip, port))
}

/// The internet checksum of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// The name that ss(8) uses.
#[must_use]
pub fn name_of_state(state: u32) -> &'static str {
    match state {
        1 => "ESTAB",
        2 => "SYN-SENT",
        3 => "SYN-RECV",
        4 => "FIN-WAIT-1",
        5 => "FIN-WAIT-2",
        6 => "TIME-WAIT",
        7 => "CLOSED",
        8 => "CLOSE-WAIT",
        9 => "LAST-ACK",
        10 => "LISTEN",
        11 => "CLOSING",
        _ => "unknown",
    }
}

/// Whether the connection runs over IPv4 (also through an IPv6 socket).
#[must_use]
pub fn is_ipv4(t: &proto::TcpSocket) -> bool {
    ip_and_port(&t.local).is_some_and(|(ip, _)| ip.len() == 4)
}

/// The server's SO_REUSEADDR, as the dump recorded it.
#[must_use]
pub fn reuse_of(t: &proto::TcpSocket) -> bool {
    t.options.iter().any(|o| {
        o.level == libc::SOL_SOCKET && o.name == libc::SO_REUSEADDR && o.value.iter().any(|b| *b != 0)
    })
}

/// Held sockets; dropping it lets them flow again, unless [`Held::keep`] was called.
#[derive(Debug, Default)]
pub struct Held {
    sockets: Vec<(OwnedFd, bool)>,
}

impl Held {
    /// Holds one more.
    pub fn add(&mut self, sock: OwnedFd, reuse: bool) -> Result<(), RepairError> {
        hold(sock.as_fd())?;
        self.sockets.push((sock, reuse));
        Ok(())
    }

    /// They stay held for whoever else has them; closing ours changes nothing.
    pub fn keep(mut self) {
        self.sockets.clear();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for (sock, reuse) in &self.sockets {
            // Nothing better is left to do when this fails; a restore tries it again.
            let _ = flow(sock.as_fd(), *reuse);
        }
    }
}
