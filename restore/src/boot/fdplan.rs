//! Descriptor numbers: which number a fresh object of the new version may keep, which old object it stands
//! for, and whether everything fits at the end. Pure: no process is touched.

use mcr_image::proto;
use mcr_image::proto::fd::Object;
use std::collections::{BTreeMap, BTreeSet};

/// What a descriptor refers to, as far as matching needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File {
        dev: u64,
        ino: u64,
    },
    Pipe {
        write_end: bool,
    },
    Socket {
        family: i32,
        kind: i32,
        connected: bool,
    },
    /// An end of a socketpair(2) whose other end is in the same process.
    Pair {
        kind: i32,
    },
    Epoll,
    EventFd,
    TimerFd,
    SignalFd,
    /// netlink(7), raw(7); all 0: inotify(7).
    Foreign {
        family: i32,
        kind: i32,
        protocol: i32,
    },
    Other,
}

/// A descriptor of the old process.
#[derive(Clone, Debug)]
pub(super) struct OldFd {
    pub kind: Kind,
    /// The address that it is bound to, in [`address`]'s form, for sockets that a start-up binds.
    pub bound: Option<Vec<u8>>,
    /// For people.
    pub what: String,
}

const TCP_LISTEN: u32 = 10;
const TCP_CLOSE: u32 = 7;
const UNIX_CONNECTED: u32 = 1;

/// The part of a socket address that identifies it: family, then port and host, or the path.
pub(super) fn address(raw: &[u8]) -> Vec<u8> {
    let family = raw.get(..2).map_or(0, |b| i32::from(u16::from_le_bytes([b[0], b[1]])));
    let part = |r: std::ops::Range<usize>| raw.get(r).unwrap_or_default().to_vec();
    let mut out = raw.get(..2).unwrap_or_default().to_vec();
    match family {
        libc::AF_INET => out.extend(part(2..8)),
        // Port, address, scope; not the flow label.
        libc::AF_INET6 => {
            out.extend(part(2..4));
            out.extend(part(8..28.min(raw.len())));
        }
        libc::AF_UNIX => out.extend(unix_name(raw.get(2..).unwrap_or_default())),
        _ => out.extend_from_slice(raw.get(2..).unwrap_or_default()),
    }
    out
}

/// sun_path: a path ends at its NUL, an abstract name starts with one and has its full length.
fn unix_name(path: &[u8]) -> &[u8] {
    if path.first() == Some(&0) {
        return path;
    }
    &path[..path.iter().position(|&b| b == 0).unwrap_or(path.len())]
}

/// A socket address for people.
pub(super) fn describe(raw: &[u8]) -> String {
    let family = raw.get(..2).map_or(0, |b| i32::from(u16::from_le_bytes([b[0], b[1]])));
    let port = || raw.get(2..4).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
    match family {
        libc::AF_INET if raw.len() >= 8 => {
            format!("{}.{}.{}.{}:{}", raw[4], raw[5], raw[6], raw[7], port())
        }
        libc::AF_INET6 if raw.len() >= 24 => {
            let octets: [u8; 16] = raw[8..24].try_into().unwrap_or_default();
            format!("[{}]:{}", std::net::Ipv6Addr::from(octets), port())
        }
        libc::AF_UNIX => {
            let n = String::from_utf8_lossy(unix_name(&raw[2..])).into_owned();
            n.strip_prefix('\0').map_or_else(|| format!("unix:{n}"), |a| format!("unix:@{a}"))
        }
        _ => format!("address family {family}"),
    }
}

/// What the image knows about a descriptor.
pub(super) fn old_fd(fd: &proto::Fd) -> OldFd {
    let socket = |family: i32, kind: i32, connected| Kind::Socket { family, kind, connected };
    let (kind, bound, what) = match &fd.object {
        Some(Object::File(f)) => (Kind::File { dev: f.dev, ino: f.ino }, None, f.path.clone()),
        Some(Object::Pipe(p)) => (Kind::Pipe { write_end: p.write_end }, None, fd.link.clone()),
        Some(Object::Unix(u)) => {
            let connected = u.state == UNIX_CONNECTED && u.peer_ino != 0 || u.external;
            let mut raw = (libc::AF_UNIX as u16).to_le_bytes().to_vec();
            raw.extend_from_slice(&u.address);
            let named = !(u.address.is_empty() || connected && u.r#type == libc::SOCK_STREAM as u32);
            let what = if named { describe(&raw) } else { fd.link.clone() };
            (socket(libc::AF_UNIX, u.r#type as i32, connected), named.then(|| address(&raw)), what)
        }
        Some(Object::Tcp(t)) => {
            let listening = t.state == TCP_LISTEN;
            let what =
                format!("{} {}", if listening { "listener" } else { "connection" }, describe(&t.local));
            let connected = !listening && t.state != TCP_CLOSE;
            (
                socket(t.family as i32, libc::SOCK_STREAM, connected),
                listening.then(|| address(&t.local)),
                what,
            )
        }
        Some(Object::Udp(u)) => {
            let has_port = u.local.get(2..4).is_some_and(|p| p != [0, 0]);
            let kind = if u.r#type == 0 { libc::SOCK_DGRAM } else { u.r#type as i32 };
            let what = format!("socket {}", describe(&u.local));
            (socket(u.family as i32, kind, !u.peer.is_empty()), has_port.then(|| address(&u.local)), what)
        }
        Some(Object::Epoll(_)) => (Kind::Epoll, None, "epoll".into()),
        Some(Object::Eventfd(_)) => (Kind::EventFd, None, "eventfd".into()),
        Some(Object::Timerfd(_)) => (Kind::TimerFd, None, "timerfd".into()),
        Some(Object::Signalfd(_)) => (Kind::SignalFd, None, "signalfd".into()),
        Some(Object::Foreign(f)) => {
            let kind =
                Kind::Foreign { family: f.family as i32, kind: f.r#type as i32, protocol: f.protocol as i32 };
            (kind, None, fd.link.clone())
        }
        None => (Kind::Other, None, fd.link.clone()),
    };
    OldFd { kind, bound, what }
}

/// Descriptors that may have been open when old was started: not close-on-exec, and either files or ends of
/// pipes and socket pairs whose other end somebody else has.
fn inherited(fds: &[proto::Fd]) -> BTreeSet<i32> {
    let other_end = |p: &proto::Pipe| {
        fds.iter().any(
            |f| matches!(&f.object, Some(Object::Pipe(o)) if o.ino == p.ino && o.write_end != p.write_end),
        )
    };
    let here = |ino: u64| fds.iter().any(|f| matches!(&f.object, Some(Object::Unix(u)) if u.ino == ino));
    fds.iter()
        .filter(|f| f.number > 2 && !f.cloexec)
        .filter(|f| match &f.object {
            Some(Object::File(_)) => true,
            Some(Object::Pipe(p)) => !p.fifo_path.is_empty() || !other_end(p),
            // A connection that a listener accepted has the listener's name.
            Some(Object::Unix(u)) => u.state == UNIX_CONNECTED && u.address.is_empty() && !here(u.peer_ino),
            _ => false,
        })
        .map(|f| f.number as i32)
        .collect()
}

/// Ends of the process's own socket pairs: connected to each other, and neither has a name.
fn pairs(fds: &[proto::Fd]) -> Vec<(i32, i32)> {
    let unnamed = || {
        fds.iter().filter_map(|f| match &f.object {
            Some(Object::Unix(u)) if u.state == UNIX_CONNECTED && u.address.is_empty() => Some((f.number, u)),
            _ => None,
        })
    };
    unnamed()
        .filter(|(_, u)| unnamed().any(|(_, o)| o.ino == u.peer_ino && o.peer_ino == u.ino))
        .map(|(n, u)| (n as i32, u.r#type as i32))
        .collect()
}

/// Whether a fresh object may sit at an old one's number, to be replaced by it at the end.
fn fits(new: &Kind, old: &Kind) -> bool {
    match (new, old) {
        (Kind::Socket { family: a, kind: x, .. }, Kind::Socket { family: b, kind: y, connected }) => {
            a == b && x == y && !connected
        }
        (Kind::Other, _) => false,
        _ => new == old,
    }
}

/// The plan of one boot.
#[derive(Debug, Default)]
pub(super) struct FdPlan {
    pub old: BTreeMap<i32, OldFd>,
    /// Bound sockets of the new version: its number to the old one's.
    bound: BTreeMap<i32, i32>,
    /// Numbers that old may have been started with: a start-up in an empty table has to count them as taken.
    inherited: BTreeSet<i32>,
    /// Files of the new version that were moved out of the way: their numbers, to those that old's start-up had for
    /// them.
    aside: BTreeMap<i32, i32>,
    /// First number above all of old's.
    above: i32,
}

/// The verdict over the final descriptor table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Settled {
    /// (new number, old number).
    pub matched: Vec<(i32, i32)>,
    /// Numbers that only the new version has.
    pub new_only: Vec<i32>,
    /// New objects that sit at the number of an unrelated old object.
    pub conflicts: Vec<i32>,
    /// Old bound sockets that the new version did not ask for.
    pub unclaimed: Vec<i32>,
}

impl FdPlan {
    pub(super) fn new(fds: &[proto::Fd]) -> Self {
        let mut old: BTreeMap<i32, OldFd> = fds.iter().map(|f| (f.number as i32, old_fd(f))).collect();
        for (number, kind) in pairs(fds) {
            old.entry(number).and_modify(|o| o.kind = Kind::Pair { kind });
        }
        let above = old.keys().next_back().map_or(3, |n| n + 1).max(3);
        Self { old, inherited: inherited(fds), above, ..Self::default() }
    }

    /// Where a fresh object that the kernel put at `natural` has to move: `None`, it can stay. `taken` tells
    /// which numbers the new version uses now.
    pub(super) fn relocation(&self, natural: i32, kind: &Kind, taken: impl Fn(i32) -> bool) -> Option<i32> {
        if natural <= 2 {
            return None;
        }
        let free = |number: i32| {
            let old = self.old.get(&number);
            let same_file = matches!(kind, Kind::File { .. }) && old.is_some_and(|o| fits(kind, &o.kind));
            let passed = self.inherited.contains(&number) && !same_file;
            !passed && (number == natural || !taken(number))
        };
        // The number that it would have got beside the descriptors that old was started with; first as if the files
        // that were moved away were where the kernel put them.
        let beside = (natural..).find(|n| free(*n) && !self.aside.values().any(|a| a == n));
        let alone = (natural..).find(|n| free(*n));
        let fitting = |n: &i32| self.old.get(n).is_some_and(|o| fits(kind, &o.kind));
        let number = [beside, alone].into_iter().flatten().find(fitting).or(alone).unwrap_or(natural);
        if self.old.contains_key(&number) && !fitting(&number) {
            return Some(self.above);
        }
        (number != natural).then_some(number)
    }

    /// A fresh object was moved from `natural` to `to`, above all of old's numbers. A file may be open only for a
    /// while, as it was when old started: until it is closed the numbers of others count it where it was.
    pub(super) fn set_aside(&mut self, natural: i32, kind: &Kind, to: i32) {
        if matches!(kind, Kind::File { .. }) && to >= self.above {
            let held = |n: &i32| self.inherited.contains(n) || self.aside.values().any(|a| a == n);
            let number = (natural..).find(|n| !held(n)).unwrap_or(natural);
            self.aside.insert(to, number);
        }
    }

    /// Where the second of two fresh objects has to move whose first the kernel put at `first`, a number that old was
    /// started with: the next one free behind those. It must be out of the way while the first one moves.
    pub(super) fn second(&self, first: i32, kind: &Kind, taken: impl Fn(i32) -> bool) -> i32 {
        let free = (first..).find(|n| !self.inherited.contains(n) && !taken(*n)).unwrap_or(self.above);
        match self.old.get(&free) {
            Some(o) if !fits(kind, &o.kind) => self.above,
            _ => free,
        }
    }

    /// First number above all of old's.
    pub(super) fn above(&self) -> i32 {
        self.above
    }

    /// Whether old may have been started with this number.
    pub(super) fn is_inherited(&self, number: i32) -> bool {
        self.inherited.contains(&number)
    }

    /// The old socket for a bind to `addr`, preferring the same number; remembers the match.
    pub(super) fn bind(&mut self, fd: i32, kind: i32, addr: &[u8]) -> Option<i32> {
        let wanted = address(addr);
        let used: Vec<i32> = self.bound.values().copied().collect();
        let fits = |o: &OldFd| {
            let same_kind = matches!(o.kind, Kind::Socket { kind: k, .. } if k == kind);
            same_kind && o.bound.as_deref() == Some(&wanted)
        };
        let same = self.old.get(&fd).filter(|o| fits(o)).map(|_| fd).filter(|n| !used.contains(n));
        let found =
            same.or_else(|| self.old.iter().find(|(n, o)| fits(o) && !used.contains(n)).map(|(n, _)| *n))?;
        self.bound.insert(fd, found);
        Some(found)
    }

    /// The old socket behind a new one that was bound.
    pub(super) fn bound(&self, fd: i32) -> Option<i32> {
        self.bound.get(&fd).copied()
    }

    /// The descriptor was closed or replaced.
    pub(super) fn forget(&mut self, fd: i32) {
        self.bound.remove(&fd);
        self.aside.remove(&fd);
    }

    /// Another number for the same object.
    pub(super) fn duplicate(&mut self, from: i32, to: i32) {
        self.aside.remove(&to);
        match self.bound.get(&from).copied() {
            Some(old) => self.bound.insert(to, old),
            None => self.bound.remove(&to),
        };
    }

    /// Addresses that old is bound to, for messages.
    pub(super) fn addresses(&self) -> String {
        let v: Vec<&str> = self.old.values().filter(|o| o.bound.is_some()).map(|o| o.what.as_str()).collect();
        if v.is_empty() { "none".into() } else { v.join(", ") }
    }

    /// Matches the descriptors that new has in the end.
    pub(super) fn settle(&self, new: &[(i32, Kind)]) -> Settled {
        let mut out = Settled::default();
        for (n, kind) in new.iter().filter(|(n, _)| *n > 2) {
            let fresh_socket = matches!(kind, Kind::Socket { .. });
            match (self.bound(*n), self.old.get(n)) {
                (Some(old), None) => out.matched.push((*n, old)),
                (Some(old), Some(_)) if old == *n => out.matched.push((*n, *n)),
                (None, Some(o)) if fits(kind, &o.kind) && !(fresh_socket && o.bound.is_some()) => {
                    out.matched.push((*n, *n));
                }
                (_, Some(_)) => out.conflicts.push(*n),
                (None, None) => out.new_only.push(*n),
            }
        }
        let claimed = |n: &i32| out.matched.iter().any(|m| m.1 == *n);
        out.unclaimed =
            self.old.iter().filter(|(n, o)| o.bound.is_some() && !claimed(n)).map(|(n, _)| *n).collect();
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(port: u16) -> Vec<u8> {
        let mut v = vec![2, 0];
        v.extend(port.to_be_bytes());
        v.extend([127, 0, 0, 1]);
        v.extend([0; 8]);
        v
    }
    fn fd(n: u32, o: Object) -> proto::Fd {
        proto::Fd { number: n, object: Some(o), ..Default::default() }
    }
    fn tcp(state: u32, port: u16) -> Object {
        Object::Tcp(proto::TcpSocket { family: 2, state, local: v4(port), ..Default::default() })
    }
    fn old() -> FdPlan {
        FdPlan::new(&[
            fd(0, Object::File(proto::File { dev: 1, ino: 1, ..Default::default() })),
            fd(3, Object::File(proto::File { dev: 1, ino: 9, ..Default::default() })),
            fd(4, Object::Epoll(proto::Epoll::default())),
            fd(5, tcp(TCP_LISTEN, 7000)),
            fd(6, tcp(1, 7000)),
        ])
    }
    const SOCK: Kind = Kind::Socket { family: 2, kind: libc::SOCK_STREAM, connected: false };

    #[test]
    fn numbers_of_other_objects_are_left_alone() {
        let p = old();
        let free = |_| false;
        assert_eq!(p.relocation(3, &Kind::File { dev: 1, ino: 9 }, free), None);
        assert_eq!(p.relocation(3, &Kind::File { dev: 1, ino: 8 }, free), Some(7));
        assert_eq!(p.relocation(4, &Kind::Epoll, free), None);
        assert_eq!(p.relocation(4, &Kind::EventFd, free), Some(7));
        assert_eq!(p.relocation(5, &SOCK, free), None);
        // A client's connection must not be taken for a fresh socket.
        assert_eq!(p.relocation(6, &SOCK, free), Some(7));
        assert_eq!(p.relocation(7, &Kind::Other, free), None);
    }

    /// A log that is opened first, kept while the start-up goes on, and closed when the real one is open: whether
    /// that is the same file or another one.
    #[test]
    fn a_file_that_is_open_for_a_while_shifts_nothing() {
        let log = || Object::File(proto::File { dev: 1, ino: 9, ..Default::default() });
        for first in [8, 9] {
            let mut p = FdPlan::new(&[
                fd(3, Object::Epoll(proto::Epoll::default())),
                proto::Fd { cloexec: true, ..fd(4, log()) },
                fd(5, tcp(TCP_LISTEN, 7000)),
                fd(6, tcp(1, 7000)),
            ]);
            let file = |ino| Kind::File { dev: 1, ino };
            assert_eq!(p.relocation(3, &file(first), |_| false), Some(7));
            p.set_aside(3, &file(first), 7);
            // Something that is made and closed again where this one should be.
            assert_eq!(p.relocation(3, &Kind::Epoll, |n| n == 7), None);
            assert_eq!(p.relocation(3, &file(9), |n| n == 7), Some(4));
            assert_eq!(p.relocation(3, &SOCK, |n| matches!(n, 4 | 7)), Some(5));
            p.forget(7);
            assert_eq!(p.relocation(3, &Kind::Epoll, |n| matches!(n, 4 | 5)), None);
        }
    }

    /// What stays open is one that only the new version has: it shifts nothing, either.
    #[test]
    fn a_file_that_stays_shifts_nothing() {
        let mut p =
            FdPlan::new(&[fd(3, tcp(TCP_LISTEN, 7000)), fd(4, Object::Epoll(proto::Epoll::default()))]);
        let file = Kind::File { dev: 1, ino: 8 };
        assert_eq!(p.relocation(3, &file, |_| false), Some(5));
        p.set_aside(3, &file, 5);
        assert_eq!(p.relocation(3, &SOCK, |n| n == 5), None);
        assert_eq!(p.relocation(4, &Kind::Epoll, |n| matches!(n, 3 | 5)), None);
        // Others are not taken for what is open for a while only.
        let mut p = FdPlan::new(&[fd(3, tcp(TCP_LISTEN, 7000)), fd(4, tcp(TCP_LISTEN, 7001))]);
        assert_eq!(p.relocation(3, &Kind::EventFd, |_| false), Some(5));
        p.set_aside(3, &Kind::EventFd, 5);
        assert_eq!(p.relocation(3, &SOCK, |n| n == 5), None);
    }

    #[test]
    fn numbers_that_old_was_started_with_are_passed_over() {
        let pipe =
            |n, ino, write_end| fd(n, Object::Pipe(proto::Pipe { ino, write_end, ..Default::default() }));
        let p = FdPlan::new(&[
            pipe(3, 1, false),
            fd(4, tcp(TCP_LISTEN, 7000)),
            fd(5, Object::File(proto::File { dev: 1, ino: 9, ..Default::default() })),
            fd(6, Object::Epoll(proto::Epoll::default())),
            pipe(7, 2, false),
            pipe(8, 2, true),
            fd(9, tcp(1, 7000)),
        ]);
        let free = |_| false;
        assert_eq!(p.relocation(3, &SOCK, free), Some(4));
        assert_eq!(p.relocation(3, &Kind::File { dev: 1, ino: 9 }, |n| n == 4), Some(5));
        assert_eq!(p.relocation(3, &Kind::Epoll, |n| n == 4), Some(6));
        // An end of a fresh pipe is not the inherited one.
        assert_eq!(p.relocation(3, &Kind::Pipe { write_end: false }, |n| matches!(n, 4 | 6)), Some(7));
        // What old has not stays apart.
        assert_eq!(p.relocation(3, &Kind::EventFd, free), Some(10));
        assert_eq!(p.relocation(2, &Kind::EventFd, free), None);
    }

    #[test]
    fn listeners_match_by_address() {
        let mut p = old();
        assert_eq!(p.bind(5, libc::SOCK_STREAM, &v4(7001)), None);
        assert_eq!(p.bind(5, libc::SOCK_DGRAM, &v4(7000)), None);
        assert_eq!(p.bind(5, libc::SOCK_STREAM, &v4(7000)), Some(5));
        assert_eq!(p.bind(9, libc::SOCK_STREAM, &v4(7000)), None, "claimed already");
        let s = p.settle(&[
            (0, Kind::Other),
            (3, Kind::File { dev: 1, ino: 9 }),
            (4, Kind::Epoll),
            (5, SOCK),
            (8, Kind::EventFd),
        ]);
        assert_eq!(s.matched, [(3, 3), (4, 4), (5, 5)]);
        assert_eq!((s.new_only.as_slice(), s.conflicts.len(), s.unclaimed.len()), ([8].as_slice(), 0, 0));
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let mut p = old();
        // The listener at another number, and something foreign at an old number.
        assert_eq!(p.bind(9, libc::SOCK_STREAM, &v4(7000)), Some(5));
        let s = p.settle(&[(4, Kind::EventFd), (5, SOCK), (9, SOCK)]);
        assert_eq!(s.conflicts, [4, 5]);
        assert_eq!(s.matched, [(9, 5)]);
        let s = old().settle(&[]);
        assert_eq!(s.unclaimed, [5]);
    }

    #[test]
    fn addresses_are_compared_by_what_counts() {
        let mut a = v4(80);
        a[9] = 3;
        assert_eq!(address(&a), address(&v4(80)));
        assert_eq!(address(b"\x01\0/run/x\0junk"), address(b"\x01\0/run/x"));
        assert_ne!(address(b"\x01\0\0a\0"), address(b"\x01\0\0a"));
        assert_eq!(describe(&v4(80)), "127.0.0.1:80");
        assert_eq!(describe(b"\x01\0\0abc"), "unix:@abc");
        assert_eq!(describe(&[]), "address family 0");
    }
}
