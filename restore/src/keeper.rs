//! The keeper: a small process that holds the sockets of a dumped tree between dump and restore.
//!
//! A TCP connection lives as long as one open file refers to it. The engine copies the dumped process's
//! sockets with pidfd_getfd(2) while it is frozen and hands the copies to the keeper; the process can then end
//! and its peers see nothing: no FIN, no RST, queued data stays in the kernel. At restore the sockets come
//! back over SCM_RIGHTS.
//!
//! The keeper is this program again (`/proc/self/exe`) with the hidden subcommand [`SUBCOMMAND`]:
//!
//! ```text
//! mcr keeper --name NAME --deadline-s SECONDS --fd N
//! ```
//!
//! `N` is an inherited SOCK_SEQPACKET socket over which the descriptors arrive. It listens on the abstract
//! unix socket `NAME`, speaks only to root or its own user (SO_PEERCRED), and ends when a restore has
//! confirmed that it runs, when it is told to drop everything, or at its deadline. A restore that fails
//! half-way loses nothing: until it confirms, the keeper keeps its own copies.

use crate::sys;
use mcr_image::proto;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, connect, getsockopt,
    listen, recv, send, socket, sockopt,
};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The hidden subcommand of the CLI that runs [`keeper_main`].
pub const SUBCOMMAND: &str = "keeper";
/// How long a keeper waits for a restore, unless told otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(300);
/// Bytes of one entry in a batch: ofd (u32), inode (u64).
const ENTRY: usize = 12;

/// Why the keeper could not be started, reached or believed.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// A call on the way failed.
    #[error("keeper: {call}: {source}")]
    Call {
        /// The call and what it was for.
        call: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody listens on the keeper's socket.
    #[error(
        "the keeper of this image's connections (@{name}) is gone: its deadline passed, another restore took \
         them, or the machine was restarted. Listening sockets can be restored with --drop-connections"
    )]
    Gone {
        /// The abstract socket's name.
        name: String,
    },
    /// The other end broke the protocol.
    #[error("keeper @{name}: unexpected answer: {what}")]
    Protocol {
        /// The abstract socket's name.
        name: String,
        /// What was wrong.
        what: String,
    },
    /// The process behind the socket is not ours to trust.
    #[error("keeper @{name} belongs to uid {uid}, not to root or to us: not used")]
    Stranger {
        /// The abstract socket's name.
        name: String,
        /// Who owns it.
        uid: u32,
    },
}

fn call<E: Into<io::Error>>(call: &'static str) -> impl FnOnce(E) -> KeeperError {
    move |e| KeeperError::Call { call, source: e.into() }
}

/// One open file to keep: its id in the image, its inode, and our copy of it.
#[derive(Debug)]
pub struct Kept {
    /// `Fd.ofd` in the image.
    pub ofd: u32,
    /// Inode, for people and as a cross-check.
    pub ino: u64,
    /// The open file.
    pub fd: OwnedFd,
}

/// How to start a keeper.
#[derive(Clone, Debug)]
pub struct KeeperOptions {
    /// Program to run with [`SUBCOMMAND`]; `/proc/self/exe` unless set.
    pub program: PathBuf,
    /// When to close everything.
    pub deadline: Duration,
}

impl Default for KeeperOptions {
    fn default() -> Self {
        Self { program: PathBuf::from("/proc/self/exe"), deadline: DEFAULT_DEADLINE }
    }
}

/// The abstract socket's name for an image.
#[must_use]
pub fn socket_name(image_id: &str) -> String {
    format!("mcr-keeper-{image_id}")
}

/// A keeper that this process started.
#[derive(Debug)]
pub struct Keeper {
    name: String,
    child: Child,
}

impl Keeper {
    /// Starts a keeper for `image_id` and hands it `kept`. Returns once it listens. The caller's copies are
    /// closed by dropping `kept`.
    pub fn start(image_id: &str, kept: Vec<Kept>, options: &KeeperOptions) -> Result<Self, KeeperError> {
        // Inherited by the keeper.
        sys::raise_open_files();
        let name = socket_name(image_id);
        let (ours, theirs) =
            sys::unix_pair(libc::SOCK_SEQPACKET).map_err(call("socketpair for the hand-over"))?;
        sys::fcntl(theirs.as_fd(), libc::F_SETFD, 0)
            .map_err(call("fcntl F_SETFD of the hand-over socket"))?;
        let child = Command::new(&options.program)
            .arg(SUBCOMMAND)
            .args(["--name", &name])
            .args(["--deadline-s", &options.deadline.as_secs().max(1).to_string()])
            .args(["--fd", &theirs.as_raw_fd().to_string()])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(call("starting the keeper process"))?;
        drop(theirs);
        let mut keeper = Self { name, child };
        match keeper.hand_over(ours.as_fd(), &kept) {
            Ok(()) => Ok(keeper),
            Err(e) => {
                keeper.kill();
                Err(e)
            }
        }
    }

    /// Starts a keeper for what a frozen process has open and is best kept as it is: sockets, pipes,
    /// terminals. Marks them as kept in `process`. `None`: there is nothing to keep.
    pub fn for_process(
        image_id: &str,
        process: &mut proto::Process,
        options: &KeeperOptions,
    ) -> Result<Option<Self>, KeeperError> {
        sys::raise_open_files();
        let pidfd = mcr_criu_lite::pidfd_open(process.pid as i32)
            .map_err(call("pidfd_open of the frozen process"))?;
        let mut kept: Vec<Kept> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for fd in &mut process.fds {
            if let Some(ino) = mark_kept(fd)
                && seen.insert(fd.ofd)
            {
                let copy = mcr_criu_lite::pidfd_getfd(pidfd.as_fd(), fd.number as i32)
                    .map_err(call("pidfd_getfd of a descriptor to keep"))?;
                kept.push(Kept { ofd: fd.ofd, ino, fd: copy });
            }
        }
        if kept.is_empty() { Ok(None) } else { Self::start(image_id, kept, options).map(Some) }
    }

    fn hand_over(&self, sock: BorrowedFd<'_>, kept: &[Kept]) -> Result<(), KeeperError> {
        send_batches(sock, kept).map_err(call("sending descriptors to the keeper"))?;
        let mut answer = [0u8; 256];
        let n = recv(sock.as_raw_fd(), &mut answer, MsgFlags::empty())
            .map_err(call("waiting for the keeper to listen"))?;
        if &answer[..n] == b"OK" {
            return Ok(());
        }
        let what = if n == 0 {
            "it ended before it listened (does this program know the `keeper` subcommand?)".to_owned()
        } else {
            String::from_utf8_lossy(&answer[..n]).into_owned()
        };
        Err(KeeperError::Protocol { name: self.name.clone(), what })
    }

    /// Name of its abstract socket, for `Meta.keeper_socket`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends a keeper that is not needed after all (the dump failed): everything is closed when this returns.
    pub fn abandon(mut self) {
        self.kill();
    }

    fn kill(&mut self) {
        // Both fail only when it has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Gets copies of everything the keeper `name` holds. It goes on holding until [`Fetched::confirm`].
    pub fn fetch(name: &str) -> Result<Fetched, KeeperError> {
        let sock = connect_to(name)?;
        send(sock.as_raw_fd(), b"F", MsgFlags::MSG_NOSIGNAL).map_err(call("asking the keeper"))?;
        let kept = recv_batches(sock.as_fd())
            .map_err(|e| KeeperError::Protocol { name: name.to_owned(), what: e.to_string() })?;
        let fds = kept.into_iter().map(|k| (k.ofd, k)).collect();
        Ok(Fetched { fds, sock })
    }

    /// Tells the keeper `name`, whoever started it, to close everything and end.
    pub fn drop_all(name: &str) -> Result<(), KeeperError> {
        let sock = connect_to(name)?;
        send(sock.as_raw_fd(), b"D", MsgFlags::MSG_NOSIGNAL).map_err(call("telling the keeper to end"))?;
        let mut b = [0u8; 1];
        // It closes before it answers by ending: end-of-file is the confirmation.
        recv(sock.as_raw_fd(), &mut b, MsgFlags::empty()).map_err(call("waiting for the keeper's end"))?;
        Ok(())
    }

    /// How many open files the keeper `name` holds and for how long still.
    pub fn status(name: &str) -> Result<(u32, Duration), KeeperError> {
        let sock = connect_to(name)?;
        send(sock.as_raw_fd(), b"S", MsgFlags::MSG_NOSIGNAL).map_err(call("asking the keeper"))?;
        let mut b = [0u8; 12];
        let n =
            recv(sock.as_raw_fd(), &mut b, MsgFlags::empty()).map_err(call("reading the keeper's answer"))?;
        let (count, left) = b.split_at(4);
        match (n, count.try_into(), left.try_into()) {
            (12, Ok(c), Ok(l)) => Ok((u32::from_le_bytes(c), Duration::from_secs(u64::from_le_bytes(l)))),
            _ => Err(KeeperError::Protocol { name: name.to_owned(), what: format!("{n} bytes of status") }),
        }
    }
}

/// What a keeper handed out.
#[derive(Debug)]
pub struct Fetched {
    /// The open files by `Fd.ofd`.
    pub fds: HashMap<u32, Kept>,
    sock: OwnedFd,
}

impl Fetched {
    /// The restore has succeeded: the keeper lets go of its copies and ends.
    pub fn confirm(self) {
        // If it has gone meanwhile there is nothing left to let go of.
        if send(self.sock.as_raw_fd(), b"A", MsgFlags::MSG_NOSIGNAL).is_ok() {
            // It ends by closing: then its copies are closed, too.
            let limit = nix::sys::time::TimeVal::new(1, 0);
            let _ =
                nix::sys::socket::setsockopt(&self.sock, nix::sys::socket::sockopt::ReceiveTimeout, &limit);
            let _ = nix::sys::socket::recv(self.sock.as_raw_fd(), &mut [0; 1], MsgFlags::empty());
        }
    }
}

/// The inode of an open file that the keeper is to hold, marked as kept where the schema can say so.
fn mark_kept(fd: &mut proto::Fd) -> Option<u64> {
    use proto::fd::Object;
    match fd.object.as_mut()? {
        Object::Tcp(t) => {
            t.kept = true;
            Some(t.ino)
        }
        Object::Udp(u) => {
            u.kept = true;
            Some(u.ino)
        }
        Object::Unix(u) => {
            u.kept = true;
            Some(u.ino)
        }
        Object::Pipe(p) => Some(p.ino),
        // A pseudo terminal's other end belongs to somebody else.
        Object::File(f) if f.path.starts_with("/dev/pts/") => Some(f.ino),
        _ => None,
    }
}

fn connect_to(name: &str) -> Result<OwnedFd, KeeperError> {
    let sock = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
        .map_err(call("socket to reach the keeper"))?;
    let addr = UnixAddr::new_abstract(name.as_bytes()).map_err(call("keeper's socket name"))?;
    connect(sock.as_raw_fd(), &addr).map_err(|_| KeeperError::Gone { name: name.to_owned() })?;
    let peer = getsockopt(&sock, sockopt::PeerCredentials).map_err(call("SO_PEERCRED of the keeper"))?;
    if peer.uid() != 0 && peer.uid() != nix::unistd::geteuid().as_raw() {
        return Err(KeeperError::Stranger { name: name.to_owned(), uid: peer.uid() });
    }
    Ok(sock)
}

fn send_batches(sock: BorrowedFd<'_>, kept: &[Kept]) -> io::Result<()> {
    for batch in kept.chunks(sys::SCM_MAX_FD) {
        let mut bytes = Vec::with_capacity(1 + batch.len() * ENTRY);
        bytes.push(b'B');
        for k in batch {
            bytes.extend_from_slice(&k.ofd.to_le_bytes());
            bytes.extend_from_slice(&k.ino.to_le_bytes());
        }
        let fds: Vec<RawFd> = batch.iter().map(|k| k.fd.as_raw_fd()).collect();
        sys::send_fds(sock, &bytes, &fds)?;
    }
    sys::send_fds(sock, b"E", &[])
}

fn recv_batches(sock: BorrowedFd<'_>) -> io::Result<Vec<Kept>> {
    let mut kept = Vec::new();
    let mut buf = vec![0u8; 1 + sys::SCM_MAX_FD * ENTRY];
    loop {
        let (n, fds) = sys::recv_fds(sock, &mut buf)?;
        match buf.first() {
            Some(b'E') if n == 1 => return Ok(kept),
            Some(b'B') if n == 1 + fds.len() * ENTRY => {
                for (fd, e) in fds.into_iter().zip(buf[1..n].chunks_exact(ENTRY)) {
                    let (ofd, ino) = e.split_at(4);
                    kept.push(Kept {
                        ofd: u32::from_le_bytes(ofd.try_into().map_err(io::Error::other)?),
                        ino: u64::from_le_bytes(ino.try_into().map_err(io::Error::other)?),
                        fd,
                    });
                }
            }
            _ => {
                return Err(io::Error::other(format!(
                    "{n} bytes with {} descriptors in a hand-over (descriptor limit reached?)",
                    fds.len()
                )));
            }
        }
    }
}

/// Body of the hidden subcommand; `args` are those after `keeper`. The return value is the exit status.
#[must_use]
pub fn keeper_main<S: AsRef<str>>(args: &[S]) -> i32 {
    let mut name = None;
    let mut deadline = DEFAULT_DEADLINE;
    let mut fd = None;
    for pair in args.chunks(2) {
        match (pair[0].as_ref(), pair.get(1).map(AsRef::as_ref)) {
            ("--name", Some(v)) => name = Some(v.to_owned()),
            ("--deadline-s", Some(v)) => match v.parse() {
                Ok(s) => deadline = Duration::from_secs(s),
                Err(_) => return 2,
            },
            ("--fd", Some(v)) => fd = v.parse::<RawFd>().ok(),
            _ => return 2,
        }
    }
    let (Some(name), Some(fd)) = (name, fd) else {
        return 2;
    };
    let Ok(handover) = sys::inherited_fd(fd) else {
        return 2;
    };
    match serve(&name, Instant::now() + deadline, handover) {
        Ok(()) => 0,
        Err(_) => 3,
    }
}

fn serve(name: &str, deadline: Instant, handover: OwnedFd) -> io::Result<()> {
    // Not hit by the terminal's signals, and holding nobody's pipe open. setsid fails for a group leader only.
    let _ = nix::unistd::setsid();
    let mine = handover.as_raw_fd();
    sys::close_all_but(mine)?;
    let kept = recv_batches(handover.as_fd())?;
    let listener = match listen_on(name) {
        Ok(l) => l,
        Err(e) => {
            let text = format!("listening on @{name}: {e}");
            let _ = send(mine, text.as_bytes(), MsgFlags::MSG_NOSIGNAL);
            return Err(e);
        }
    };
    send(mine, b"OK", MsgFlags::MSG_NOSIGNAL)?;
    drop(handover);
    loop {
        if !wait_readable(listener.as_fd(), deadline)? {
            return Ok(());
        }
        let Ok(raw) = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) else {
            continue;
        };
        let peer = sys::inherited_fd(raw)?;
        if attend(&peer, &kept, deadline).unwrap_or(false) {
            // Unreachable first, then let go: whoever sees a connection end finds no keeper either.
            drop(listener);
            drop(kept);
            return Ok(());
        }
    }
}

fn listen_on(name: &str) -> io::Result<OwnedFd> {
    let sock = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(sock.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    listen(&sock, Backlog::new(8)?)?;
    Ok(sock)
}

fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let ms = u32::try_from(left.as_millis() + 1).unwrap_or(u32::MAX).min(i32::MAX as u32);
        let mut set = [PollFd::new(fd, PollFlags::POLLIN)];
        match poll(&mut set, PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)) {
            Ok(0) | Err(nix::Error::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(e.into()),
        }
    }
}

/// One peer; `true` when the keeper's work is done.
fn attend(peer: &OwnedFd, kept: &[Kept], deadline: Instant) -> io::Result<bool> {
    let cred = getsockopt(peer, sockopt::PeerCredentials)?;
    if cred.uid() != 0 && cred.uid() != nix::unistd::geteuid().as_raw() {
        return Ok(false);
    }
    loop {
        if !wait_readable(peer.as_fd(), deadline)? {
            return Ok(true);
        }
        let mut command = [0u8; 1];
        let n = recv(peer.as_raw_fd(), &mut command, MsgFlags::empty())?;
        match (n, command[0]) {
            (1, b'F') => send_batches(peer.as_fd(), kept)?,
            (1, b'A' | b'D') => return Ok(true),
            (1, b'S') => {
                let mut b = u32::try_from(kept.len()).unwrap_or(u32::MAX).to_le_bytes().to_vec();
                let left = deadline.saturating_duration_since(Instant::now()).as_secs();
                b.extend_from_slice(&left.to_le_bytes());
                send(peer.as_raw_fd(), &b, MsgFlags::MSG_NOSIGNAL)?;
            }
            _ => return Ok(false),
        }
    }
}
