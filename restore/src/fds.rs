//! Installing descriptors in a stopped process: at their numbers, with sharing and close-on-exec.
//!
//! Open files travel over a unix socket (SCM_RIGHTS) in batches and are then moved to their numbers by dup3(2),
//! in an order that overwrites nothing that is still needed ([`plan_moves`]).

pub use crate::rebuild::remote::{Call, Inject};
use crate::sys;
use mcr_image::{Addr, Fd};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Why descriptors could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A call of the engine failed.
    #[error("installing descriptors: {call}: {source}")]
    Call {
        /// The call.
        call: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A call in the target failed.
    #[error("installing descriptors: {call} in the target: {source}{}", limit(source))]
    Inside {
        /// The call.
        call: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The target received something else than was sent.
    #[error("installing descriptors: {sent} sent, {received} received (limit of open files in the target?)")]
    Lost {
        /// Descriptors sent.
        sent: usize,
        /// Descriptors received.
        received: usize,
    },
}

fn limit(e: &io::Error) -> &'static str {
    match e.raw_os_error() {
        Some(libc::EMFILE | libc::EBADF) => "; the target's limit of open files (ulimit -n) is too low",
        _ => "",
    }
}

fn engine(call: &'static str) -> impl Fn(io::Error) -> InstallError {
    move |source| InstallError::Call { call, source }
}
fn inside(call: &'static str) -> impl Fn(io::Error) -> InstallError {
    move |source| InstallError::Inside { call, source }
}

/// One descriptor to install.
#[derive(Clone, Copy, Debug)]
pub struct Install<'a> {
    /// Its number in the target. What is open there is closed.
    pub number: Fd,
    /// The open file. The same one may be installed at many numbers.
    pub file: BorrowedFd<'a>,
    /// Close-on-exec.
    pub cloexec: bool,
}

/// One step of moving descriptors inside a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// `dup3(from, to, cloexec)`.
    Dup {
        /// Source number.
        from: RawFd,
        /// Destination number.
        to: RawFd,
        /// Close-on-exec of the destination.
        cloexec: bool,
    },
    /// `dup3(from, spare)`: breaks a circle.
    Park {
        /// Source number.
        from: RawFd,
        /// A number that nothing uses.
        spare: RawFd,
    },
    /// Only the flag changes (dup3 refuses equal numbers).
    Flag {
        /// The descriptor.
        fd: RawFd,
        /// Close-on-exec.
        cloexec: bool,
    },
    /// `close(fd)`: a source that is no destination.
    Close {
        /// The descriptor.
        fd: RawFd,
    },
}

/// Orders the moves `(from, to, cloexec)` so that no destination overwrites a source that is still to be read.
/// Destinations are distinct; a source may go to many. Afterwards no source is left open that is no destination.
/// Numbers from `spare` on must be unused: circles are broken there.
#[must_use]
pub fn plan_moves(moves: &[(RawFd, RawFd, bool)], mut spare: RawFd) -> Vec<Move> {
    let mut out = Vec::with_capacity(moves.len() * 2);
    // How many reads of each number are still to come, and the spare that took its place.
    let mut reads: BTreeMap<RawFd, usize> = BTreeMap::new();
    for (from, to, _) in moves {
        if from != to {
            *reads.entry(*from).or_default() += 1;
        }
    }
    let destinations: BTreeSet<RawFd> = moves.iter().map(|m| m.1).collect();
    let by_to: BTreeMap<RawFd, (RawFd, bool)> = moves.iter().map(|m| (m.1, (m.0, m.2))).collect();
    let mut parked: BTreeMap<RawFd, RawFd> = BTreeMap::new();
    let mut done: BTreeSet<RawFd> = BTreeSet::new();
    // A move is ready when nothing reads its destination any more; making one may make another ready.
    let mut ready: Vec<RawFd> =
        by_to.keys().copied().filter(|to| !reads.contains_key(to) && by_to[to].0 != *to).collect();
    let mut rest: Vec<RawFd> = by_to.keys().copied().filter(|to| by_to[to].0 != *to).collect();
    loop {
        while let Some(to) = ready.pop() {
            let (from, cloexec) = by_to[&to];
            done.insert(to);
            out.push(Move::Dup { from: parked.get(&from).copied().unwrap_or(from), to, cloexec });
            if let Some(n) = reads.get_mut(&from) {
                *n -= 1;
                if *n == 0 {
                    reads.remove(&from);
                    match parked.remove(&from) {
                        Some(p) => out.push(Move::Close { fd: p }),
                        None if destinations.contains(&from) => {
                            if by_to[&from].0 != from && !done.contains(&from) {
                                ready.push(from);
                            }
                        }
                        None => out.push(Move::Close { fd: from }),
                    }
                }
            }
        }
        // Only circles are left, and destinations that stay (from == to) while others read them: those need nothing.
        rest.retain(|to| !done.contains(to));
        let Some(&to) = rest.iter().find(|to| !done.contains(to)) else {
            break;
        };
        out.push(Move::Park { from: to, spare });
        parked.insert(to, spare);
        spare += 1;
        ready.push(to);
    }
    for (fd, (from, cloexec)) in &by_to {
        if fd == from {
            out.push(Move::Flag { fd: *fd, cloexec: *cloexec });
        }
    }
    out
}

/// The system calls for a plan.
fn calls_for(plan: &[Move]) -> Vec<Call> {
    let flag = |c: bool| if c { libc::O_CLOEXEC as u64 } else { 0 };
    plan.iter()
        .map(|m| match *m {
            Move::Dup { from, to, cloexec } => {
                Call::new(libc::SYS_dup3, &[from as u64, to as u64, flag(cloexec)])
            }
            Move::Park { from, spare } => Call::new(libc::SYS_dup3, &[from as u64, spare as u64, flag(true)]),
            Move::Flag { fd, cloexec } => {
                Call::new(libc::SYS_fcntl, &[fd as u64, libc::F_SETFD as u64, u64::from(cloexec)])
            }
            Move::Close { fd } => Call::new(libc::SYS_close, &[fd as u64]),
        })
        .collect()
}

fn run_plan<I: Inject>(target: &mut I, plan: &[Move]) -> Result<(), InstallError> {
    for r in target.inject_all(&calls_for(plan)).map_err(engine("running calls in the target"))? {
        crate::rebuild::remote::result(r).map_err(inside("dup3/fcntl/close"))?;
    }
    Ok(())
}

/// Moves descriptors that the target already has: `(its number, number to get, cloexec)`. Numbers from `spare`
/// on are not in use.
pub fn move_fds<I: Inject>(
    target: &mut I,
    moves: &[(RawFd, RawFd, bool)],
    spare: RawFd,
) -> Result<(), InstallError> {
    run_plan(target, &plan_moves(moves, spare))
}

/// Installs open files of the engine in a stopped process that shares no descriptor with it. `pid` is checked
/// against the peer that connects, so that nobody else gets them.
///
/// The target executes socket, connect, recvmsg, dup3 and close; its other descriptors stay as they are.
pub fn install_fds<I: Inject>(target: &mut I, pid: i32, fds: &[Install<'_>]) -> Result<(), InstallError> {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, getsockopt, listen, socket,
        sockopt,
    };
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    if fds.is_empty() {
        return Ok(());
    }
    let name = format!("mcr-fds-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|e| engine("socket")(e.into()))?;
    let addr = UnixAddr::new_abstract(name.as_bytes()).map_err(|e| engine("abstract name")(e.into()))?;
    bind(listener.as_raw_fd(), &addr).map_err(|e| engine("bind")(e.into()))?;
    listen(&listener, Backlog::MAXALLOWABLE).map_err(|e| engine("listen")(e.into()))?;

    let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
    let made = target.call(libc::SYS_socket, &[libc::AF_UNIX as u64, kind, 0]).map_err(inside("socket"))?;
    let mut channel = made as RawFd;
    let mut raw = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    raw.push(0);
    raw.extend_from_slice(name.as_bytes());
    let connected = target.call_with(libc::SYS_connect, &[Some(made), None, Some(raw.len() as u64)], &raw);
    connected.map_err(inside("connect"))?;
    let in_use = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .map_err(engine("reading /proc/PID/fd"))?
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse::<RawFd>().ok())
        .max()
        .unwrap_or(0);
    // Out of the way of every number that is to be filled, and of those that stay.
    let top = fds.iter().map(|f| f.number.0).max().unwrap_or(0).max(in_use) + 1;
    if fds.iter().any(|f| f.number.0 == channel) {
        target
            .call(libc::SYS_dup3, &[channel as u64, top as u64, libc::O_CLOEXEC as u64])
            .map_err(inside("dup3 of the channel"))?;
        target.call(libc::SYS_close, &[channel as u64]).map_err(inside("close"))?;
        channel = top;
    }
    let ours = loop {
        let fd =
            accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).map_err(|e| engine("accept")(e.into()))?;
        let fd = sys::inherited_fd(fd).map_err(engine("accept"))?;
        let peer = getsockopt(&fd, sockopt::PeerCredentials).map_err(|e| engine("SO_PEERCRED")(e.into()))?;
        if peer.pid() == pid {
            break fd;
        }
    };
    let spare = top + 1;
    // One message carries each open file once, however many numbers it gets.
    let mut by_file: BTreeMap<RawFd, Vec<&Install<'_>>> = BTreeMap::new();
    for f in fds {
        by_file.entry(f.file.as_raw_fd()).or_default().push(f);
    }
    let files: Vec<_> = by_file.into_values().collect();
    for batch in files.chunks(sys::SCM_MAX_FD) {
        send_batch(target, ours.as_fd(), channel, batch, spare)?;
    }
    target.call(libc::SYS_close, &[channel as u64]).map_err(inside("close"))?;
    Ok(())
}

fn send_batch<I: Inject>(
    target: &mut I,
    ours: BorrowedFd<'_>,
    channel: RawFd,
    batch: &[Vec<&Install<'_>>],
    spare: RawFd,
) -> Result<(), InstallError> {
    let raw: Vec<RawFd> = batch.iter().map(|f| f[0].file.as_raw_fd()).collect();
    sys::send_fds(ours, b"F", &raw).map_err(engine("sendmsg"))?;
    let received = receive(target, channel)?;
    if received.len() != raw.len() {
        return Err(InstallError::Lost { sent: raw.len(), received: received.len() });
    }
    let moves: Vec<_> = received
        .iter()
        .zip(batch)
        .flat_map(|(have, list)| list.iter().map(|f| (*have, f.number.0, f.cloexec)))
        .collect();
    move_fds(target, &moves, spare)
}

/// recvmsg in the target; the numbers it got.
fn receive<I: Inject>(target: &mut I, channel: RawFd) -> Result<Vec<RawFd>, InstallError> {
    // struct msghdr (56 bytes), struct iovec (16), one data byte, then control data.
    const IOV: u64 = 64;
    const DATA: u64 = 80;
    const CONTROL: u64 = 96;
    let room = 16 + (sys::SCM_MAX_FD * 4).next_multiple_of(8);
    let (at, _) = target.scratch().map_err(engine("scratch memory"))?;
    let mut b = vec![0u8; CONTROL as usize + room];
    let mut put = |off: usize, v: u64| b[off..off + 8].copy_from_slice(&v.to_ne_bytes());
    put(16, at.0 + IOV);
    put(24, 1);
    put(32, at.0 + CONTROL);
    put(40, room as u64);
    put(IOV as usize, at.0 + DATA);
    put(IOV as usize + 8, 1);
    target.poke(at, &b).map_err(engine("writing the target's memory"))?;
    target
        .call(libc::SYS_recvmsg, &[channel as u64, at.0, libc::MSG_CMSG_CLOEXEC as u64])
        .map_err(inside("recvmsg"))?;
    target.peek(at, &mut b).map_err(engine("reading the target's memory"))?;
    let word = |off: usize| b.get(off..off + 8).and_then(|w| w.try_into().ok()).map_or(0, u64::from_ne_bytes);
    // struct cmsghdr: length, level, type.
    let used = word(40) as usize;
    let len = (word(CONTROL as usize) as usize).min(used);
    let list = b.get(CONTROL as usize + 16..CONTROL as usize + len.max(16)).unwrap_or(&[]);
    Ok(list.chunks_exact(4).map(|c| RawFd::from_ne_bytes([c[0], c[1], c[2], c[3]])).collect())
}

/// Copies of a stopped process's open files (pidfd_getfd(2)).
pub fn take_copies(pid: i32, numbers: &[Fd]) -> io::Result<Vec<OwnedFd>> {
    let pidfd = mcr_criu_lite::pidfd_open(pid)?;
    numbers.iter().map(|n| Ok(mcr_criu_lite::pidfd_getfd(pidfd.as_fd(), n.0)?)).collect()
}

/// The flags of another process's descriptor, O_CLOEXEC with them (proc_pid_fdinfo(5)); 0 if there is none.
#[must_use]
pub fn open_flags(pid: i32, fd: i32) -> i32 {
    let text = std::fs::read(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
    mcr_criu_lite::procfs::fdinfo::FdInfo::parse(&text).flags as i32
}

/// A tracee of `mcr_criu_lite` as the target of [`install_fds`], with memory for arguments that is unmapped when
/// this is dropped.
pub struct InTracee<'t> {
    scratch: mcr_criu_lite::Scratch<'t>,
}

impl<'t> InTracee<'t> {
    /// Maps the memory for arguments.
    pub fn new(tracee: &'t mut mcr_criu_lite::Tracee) -> io::Result<Self> {
        let scratch = mcr_criu_lite::Scratch::data(tracee, 16 << 10).map_err(traced)?;
        Ok(Self { scratch })
    }
}

fn traced(e: mcr_criu_lite::TraceError) -> io::Error {
    match e.errno() {
        Some(n) => n.into(),
        None => io::Error::other(e),
    }
}

impl Inject for InTracee<'_> {
    fn inject(&mut self, call: Call) -> io::Result<i64> {
        self.scratch.tracee().syscall_raw(call.nr, &call.args).map_err(traced)
    }

    fn inject_all(&mut self, calls: &[Call]) -> io::Result<Vec<i64>> {
        let mut batch: Vec<_> = calls.iter().map(|c| mcr_criu_lite::Call::new(c.nr, &c.args)).collect();
        self.scratch.tracee().syscalls_batch(&mut batch).map_err(traced)?;
        Ok(batch.into_iter().map(|c| c.result).collect())
    }

    fn poke(&mut self, at: Addr, bytes: &[u8]) -> io::Result<()> {
        self.scratch.tracee().memory().write(at, bytes).map_err(io::Error::other)
    }

    fn peek(&mut self, at: Addr, bytes: &mut [u8]) -> io::Result<()> {
        mcr_image::Memory::read(&**self.scratch.tracee().memory(), at, bytes).map_err(io::Error::other)
    }

    fn scratch(&mut self) -> io::Result<(Addr, usize)> {
        Ok((self.scratch.addr(), self.scratch.len() as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Executes a plan on a model of a descriptor table.
    fn run(moves: &[(RawFd, RawFd, bool)]) -> BTreeMap<RawFd, RawFd> {
        let mut table: BTreeMap<RawFd, RawFd> = moves.iter().map(|m| (m.0, m.0)).collect();
        for step in plan_moves(moves, 100) {
            match step {
                Move::Dup { from, to, .. } => {
                    assert_ne!(from, to);
                    let f = table[&from];
                    table.insert(to, f);
                }
                Move::Park { from, spare } => {
                    assert!(!table.contains_key(&spare));
                    let f = table[&from];
                    table.insert(spare, f);
                }
                Move::Flag { fd, .. } => assert!(table.contains_key(&fd)),
                Move::Close { fd } => assert!(table.remove(&fd).is_some()),
            }
        }
        table
    }

    fn check(moves: &[(RawFd, RawFd, bool)]) {
        let want: BTreeMap<_, _> = moves.iter().map(|m| (m.1, m.0)).collect();
        assert_eq!(run(moves), want, "{moves:?}");
    }

    #[test]
    fn moves_keep_every_file() {
        check(&[(3, 4, false), (4, 5, false)]);
        check(&[(3, 4, false), (4, 3, true)]);
        check(&[(3, 4, false), (4, 5, false), (5, 3, true)]);
        check(&[(3, 3, true), (3, 4, false), (9, 1, false)]);
        check(&[(3, 4, false), (4, 3, false), (3, 7, true), (4, 8, false)]);
        check(&[(10, 3, false), (3, 10, false), (11, 4, false), (4, 12, false), (3, 1, false)]);
    }

    #[test]
    fn all_small_permutations() {
        let n = 5;
        for code in 0..5usize.pow(5) {
            // `to` number i gets source digit i: sources repeat, destinations do not.
            let moves: Vec<_> =
                (0..n).map(|i| ((code / 5usize.pow(i)) as RawFd % 5, i as RawFd, false)).collect();
            check(&moves);
        }
    }
}
