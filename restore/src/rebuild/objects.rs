//! Makes every open file description of an image in the engine: nothing of the target is touched yet, so a
//! failure here costs nothing.

use super::{RebuildError, epoll, eventfd, file, foreign, pipe, signalfd, tcp, timerfd, unix};
use crate::keeper::Kept;
use crate::sys;
use mcr_image::proto;
use proto::fd::Object;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};

/// Content of files that the image embeds, by key.
pub type Content<'a> = dyn Fn(&str) -> Option<Vec<u8>> + 'a;

/// Status flags that open(2) takes and F_SETFL cannot change.
const SETFL: i32 = libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME;

/// The image's open file descriptions, open in the engine.
#[derive(Debug, Default)]
pub struct OpenFiles {
    /// By `Fd.ofd`.
    pub by_ofd: BTreeMap<u32, OwnedFd>,
    /// What the user should know.
    pub findings: Vec<proto::Finding>,
    /// Files shared by descriptors and mappings, by (device, inode) in the dumped system.
    pub shared: HashMap<(u64, u64), OwnedFd>,
    /// Connections that were made from their records, by ofd.
    pub recreated: HashSet<u32>,
}

impl OpenFiles {
    /// The last step before the process runs: connections that are held still go on.
    pub fn let_flow(&self, fds: &[proto::Fd]) -> Result<(), RebuildError> {
        let mut seen = HashSet::new();
        for fd in fds.iter().filter(|f| matches!(f.object, Some(Object::Tcp(_)))) {
            if let Some(sock) = self.by_ofd.get(&fd.ofd)
                && seen.insert(fd.ofd)
            {
                tcp::let_flow(fd, sock, self.recreated.contains(&fd.ofd))?;
            }
        }
        Ok(())
    }
}

/// What the makers of the single kinds work with.
pub(super) struct Maker<'a> {
    pub(super) content: &'a Content<'a>,
    pub(super) all: &'a [proto::Fd],
    pub(super) drop_connections: bool,
    pub(super) keeper_gone: Option<String>,
    pub(super) shared: HashMap<(u64, u64), OwnedFd>,
    pub(super) pipes: HashMap<u64, pipe::Ends>,
    pub(super) sockets: HashMap<u64, OwnedFd>,
    pub(super) findings: Vec<proto::Finding>,
    pub(super) recreated: HashSet<u32>,
}

impl Maker<'_> {
    pub(super) fn warn(&mut self, code: &str, message: String, next: &str) {
        self.findings.push(finding(proto::Severity::Warning, code, message, next));
    }
}

/// A finding without a path or an address.
pub(super) fn finding(severity: proto::Severity, code: &str, message: String, next: &str) -> proto::Finding {
    proto::Finding {
        severity: severity.into(),
        code: code.to_owned(),
        message,
        next_step: next.to_owned(),
        ..Default::default()
    }
}

/// How `fd N (link)` is named in messages.
pub(super) fn name_of(fd: &proto::Fd) -> String {
    if fd.link.is_empty() { format!("fd {}", fd.number) } else { format!("fd {} ({})", fd.number, fd.link) }
}

/// Opens everything in `fds`. `kept` are the keeper's open files by ofd: they are used as they are.
/// `keeper_gone` says why there are none although the image expects some.
pub fn open_all(
    fds: &[proto::Fd],
    content: &Content<'_>,
    mut kept: HashMap<u32, Kept>,
    keeper_gone: Option<String>,
    drop_connections: bool,
) -> Result<OpenFiles, RebuildError> {
    let mut maker = Maker {
        content,
        all: fds,
        drop_connections,
        keeper_gone,
        shared: HashMap::new(),
        pipes: HashMap::new(),
        sockets: HashMap::new(),
        findings: Vec::new(),
        recreated: HashSet::new(),
    };
    let mut by_ofd: BTreeMap<u32, OwnedFd> = BTreeMap::new();
    let from_keeper: HashSet<u32> = kept.keys().copied().collect();
    for fd in fds {
        if by_ofd.contains_key(&fd.ofd) {
            continue;
        }
        if let Some(k) = kept.remove(&fd.ofd) {
            by_ofd.insert(fd.ofd, k.fd);
            continue;
        }
        let opened = open_one(fd, &mut maker)?;
        status_flags(fd, &opened)?;
        by_ofd.insert(fd.ofd, opened);
    }
    // After everything is open: data that waits in pipes and sockets.
    pipe::refill(&mut maker)?;
    unix::refill(&mut maker, &by_ofd, &from_keeper)?;
    Ok(OpenFiles { by_ofd, findings: maker.findings, shared: maker.shared, recreated: maker.recreated })
}

fn open_one(fd: &proto::Fd, maker: &mut Maker<'_>) -> Result<OwnedFd, RebuildError> {
    match &fd.object {
        Some(Object::File(f)) => file::open(fd, f, maker),
        Some(Object::Pipe(p)) => pipe::open(fd, p, maker),
        Some(Object::Unix(u)) => unix::open(fd, u, maker),
        Some(Object::Tcp(t)) => tcp::open(fd, t, maker),
        Some(Object::Udp(u)) => tcp::open_udp(fd, u, maker),
        Some(Object::Epoll(_)) => epoll::open(fd),
        Some(Object::Eventfd(e)) => eventfd::open(fd, e),
        Some(Object::Timerfd(t)) => timerfd::open(fd, t),
        Some(Object::Signalfd(s)) => signalfd::open(fd, s),
        Some(Object::Foreign(_)) => foreign::open(fd),
        None => Err(RebuildError::refused(
            name_of(fd),
            "this version of mcr does not know the kind of this open file",
            "restore with the version that dumped it",
        )),
    }
}

/// Status flags that can be set afterwards.
fn status_flags(fd: &proto::Fd, opened: &OwnedFd) -> Result<(), RebuildError> {
    let want = i64::from(fd.flags as i32 & SETFL);
    let has =
        sys::fcntl(opened.as_fd(), libc::F_GETFL, 0).map_err(RebuildError::call(name_of(fd), "F_GETFL"))?;
    if has & i64::from(libc::O_PATH) != 0 || has & i64::from(SETFL) == want {
        return Ok(());
    }
    sys::fcntl(opened.as_fd(), libc::F_SETFL, want)
        .map_err(RebuildError::call(name_of(fd), "fcntl F_SETFL"))?;
    Ok(())
}
