//! What the kernel keeps for a frozen process, one file a kind of object: the same stems as
//! `image/schema/*.proto` and `restore/src/rebuild/*.rs`.

mod epoll;
mod eventfd;
mod file;
mod foreign;
mod pipe;
mod process;
mod signalfd;
mod table;
mod tcp;
mod timerfd;
mod timers;
mod unix;
mod unsupported;
mod vma;

use crate::procfs::fdinfo::FdInfo;
use crate::quiesce::ThreadState;
use crate::tracee::{Area, Call};
use crate::{Frozen, TraceError, sys};
use mcr_image::proto::{self, fd::Object};
use mcr_image::{Addr, FastMap, Memory, ModuleMap, Pid, Tid};
use nix::errno::Errno;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;

pub use file::sha_key;
pub(crate) use vma::Known;
pub use vma::map as vmas;

/// Something that cannot be carried, by name.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// A resource that images do not hold.
    #[error("process {pid}: {object} cannot be carried: {why}; {next}")]
    Unsupported {
        /// The process.
        pid: Pid,
        /// The object: descriptor number and what it is.
        object: String,
        /// Why not.
        why: String,
        /// What the user can do.
        next: String,
    },
    /// A call failed.
    #[error("process {pid}: {call} on {object}: {source}")]
    Call {
        /// The process.
        pid: Pid,
        /// The object.
        object: String,
        /// The call.
        call: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A ptrace operation failed.
    #[error("process {pid}: {source}")]
    Trace {
        /// The process.
        pid: Pid,
        /// Why.
        #[source]
        source: TraceError,
    },
}

/// How much to look at.
#[derive(Clone, Copy, Debug)]
pub struct CollectOptions<'a> {
    /// Every option of every socket. Not needed where the open sockets themselves are handed over.
    pub socket_options: bool,
    /// What was collected of the same process before. A socket that is among these at the same number (it is the same
    /// inode) is not asked again, and not duplicated: its state is as old as these are. For changes of a process whose
    /// sockets stay where they are.
    pub known: &'a [proto::Fd],
    /// Also objects that no image holds: the process keeps them, or is handed them as they are.
    pub foreign: bool,
}

impl Default for CollectOptions<'_> {
    fn default() -> Self {
        Self { socket_options: true, known: &[], foreign: false }
    }
}

impl CollectOptions<'_> {
    /// For an update of a living process: its open files are handed over as they are.
    #[must_use]
    pub fn live() -> Self {
        Self { socket_options: false, known: &[], foreign: true }
    }
}

/// Where the collector gets what only the process itself can say.
pub(crate) struct Inside<'a> {
    frozen: &'a mut Frozen,
    area: Area,
}

/// Calls that are executed in one go.
const BATCH: usize = 2048;
/// Bytes that they may use.
const DATA: usize = 256 << 10;

impl Inside<'_> {
    /// Executes system calls in a thread of the target: (number, arguments) → raw result.
    pub(crate) fn calls(&mut self, tid: Tid, calls: &[(i64, [u64; 6])]) -> Result<Vec<i64>, TraceError> {
        if calls.is_empty() {
            return Ok(Vec::new());
        }
        let t = self.frozen.thread(tid).ok_or(TraceError::Gone { tid })?;
        let mut batch: Vec<Call> = calls.iter().map(|(nr, args)| Call::new(*nr, args)).collect();
        t.run_agent(&self.area, &mut batch)?;
        Ok(batch.iter().map(|c| c.result).collect())
    }
    /// Many calls cost little more than one.
    fn in_batches(&mut self, tid: Tid) -> Result<bool, TraceError> {
        let t = self.frozen.thread(tid).ok_or(TraceError::Gone { tid })?;
        t.runs_agent(&self.area)
    }
    /// Writable memory in the target that the calls may use.
    pub(crate) fn page(&self) -> Addr {
        self.area.data()
    }
    /// The process.
    pub(crate) fn frozen(&mut self) -> &mut Frozen {
        self.frozen
    }
}

/// What [`Frozen::collect`] found.
pub struct Collected {
    /// The process.
    pub process: proto::Process,
    /// Our duplicates of its descriptors, by number.
    pub fds: HashMap<u32, OwnedFd>,
    /// Its ELF modules.
    pub modules: Arc<ModuleMap>,
}

impl Collected {
    /// Closes our duplicates of everything but regular files. To be called before the process runs on: an
    /// epoll registration lives as long as the open file, so while somebody else holds a duplicate, a server
    /// that closes a connection would go on being told of it, with a pointer to what it has freed.
    pub fn let_go(&mut self) {
        for f in &self.process.fds {
            let regular =
                matches!(&f.object, Some(Object::File(f)) if f.mode & libc::S_IFMT == libc::S_IFREG);
            if !regular {
                self.fds.remove(&f.number);
            }
        }
    }
}

impl Frozen {
    /// Everything that the kernel keeps for the process, without page contents. `states` are what
    /// [`Frozen::quiesce`] returned (they give the threads' frames). A resource that images cannot hold is
    /// [`CollectError::Unsupported`], by name.
    pub fn collect(&mut self, states: &[ThreadState]) -> Result<Collected, CollectError> {
        self.collect_with(states, &CollectOptions::default())
    }

    /// Like [`Frozen::collect`], looking at as much as the options say.
    pub fn collect_with(
        &mut self,
        states: &[ThreadState],
        options: &CollectOptions<'_>,
    ) -> Result<Collected, CollectError> {
        let pid = self.pid();
        let trace = |source| CollectError::Trace { pid, source };
        let io = |object: &str, call| {
            let object = object.to_owned();
            move |source| CollectError::Call { pid, object, call, source }
        };
        unsupported::check(pid)?;
        let modules = self.modules().map_err(io("its mappings", "reading"))?;
        let vmas = self.vmas().map_err(io("its mappings", "reading"))?;
        let memory = self.memory().clone();
        self.share_site().map_err(trace)?;
        let area = self.leader().map_agent(BATCH, DATA as u64).map_err(trace)?;
        let pidfd = self.pidfd().try_clone_to_owned().map_err(io("its pidfd", "dup"))?;
        let view =
            View { pid, pidfd: pidfd.as_fd(), memory: memory.as_ref(), modules: &modules, vmas: &vmas };
        let mut inside = Inside { frozen: self, area };
        let result = crate::threads::collect(&mut inside, states)
            .map_err(trace)
            .and_then(|threads| collect(&view, &mut inside, threads, options));
        // Also after an error: the memory is not the server's.
        let gone = self.leader().unmap_agent(area).map_err(trace);
        self.leader().put_back().map_err(trace)?;
        let (process, fds) = result?;
        gone?;
        Ok(Collected { process, fds, modules })
    }
}

/// The frozen process from outside.
pub struct View<'a> {
    /// Its pid.
    pub pid: Pid,
    /// A pidfd of it.
    pub pidfd: BorrowedFd<'a>,
    /// Its memory.
    pub memory: &'a dyn Memory,
    /// What it has mapped.
    pub modules: &'a ModuleMap,
    /// Its mappings.
    pub vmas: &'a [proto::Vma],
}

impl View<'_> {
    fn unsupported(&self, object: String, why: &str, next: &str) -> CollectError {
        CollectError::Unsupported { pid: self.pid, object, why: why.into(), next: next.into() }
    }

    fn io<'b>(
        &'b self,
        object: &'b str,
        call: &'static str,
    ) -> impl FnOnce(std::io::Error) -> CollectError + 'b {
        move |source| CollectError::Call { pid: self.pid, object: object.to_owned(), call, source }
    }

    fn errno<'b>(&'b self, object: &'b str, call: &'static str) -> impl FnOnce(Errno) -> CollectError + 'b {
        move |e| CollectError::Call { pid: self.pid, object: object.to_owned(), call, source: e.into() }
    }

    fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.pid))
    }

    fn link(&self, file: &str) -> Result<Vec<u8>, CollectError> {
        let path = self.proc(file);
        let name = path.display().to_string();
        Ok(std::fs::read_link(&path).map_err(self.io(&name, "readlink"))?.into_os_string().into_vec())
    }
}

/// One descriptor while it is looked at.
struct Open<'a> {
    number: u32,
    info: FdInfo,
    /// readlink of /proc/PID/fd/N.
    link: Vec<u8>,
    stat: nix::sys::stat::FileStat,
    /// Our duplicate of it.
    dup: &'a OwnedFd,
}

impl Open<'_> {
    fn name(&self) -> String {
        format!("descriptor {} ({})", self.number, String::from_utf8_lossy(&self.link))
    }
}

/// Everything but the threads and the memory. `threads` come from whoever froze them.
fn collect(
    view: &View<'_>,
    inside: &mut Inside<'_>,
    threads: Vec<proto::Thread>,
    options: &CollectOptions<'_>,
) -> Result<(proto::Process, HashMap<u32, OwnedFd>), CollectError> {
    let (fds, dups) = descriptors(view, inside, options)?;
    let mut p = process::collect(view, inside, threads)?;
    // A timer that expires while it is looked at either still has its time, or its signal is pending: both or
    // neither would double or lose it. Nobody takes signals now, so this ends when every timer has expired.
    loop {
        let before = Pending::read(view, inside)?;
        (p.itimers, p.posix_timers) = timers::collect(view, inside)?;
        let after = Pending::read(view, inside)?;
        if before.same_signals(&after) {
            after.put(&mut p);
            break;
        }
    }
    p.vmas = view.modules.cut(view.vmas);
    p.modules = view.modules.to_proto();
    p.fds = fds;
    Ok((p, dups))
}

/// Signals that wait, of the process and of each thread.
struct Pending {
    shared: Vec<[u8; 128]>,
    threads: Vec<(Tid, Vec<[u8; 128]>)>,
}

impl Pending {
    fn read(view: &View<'_>, inside: &mut Inside<'_>) -> Result<Self, CollectError> {
        let trace = |source| CollectError::Trace { pid: view.pid, source };
        let shared = inside.frozen.leader().pending(true).map_err(trace)?;
        let tids: Vec<Tid> = inside.frozen.threads().iter().map(|t| t.tid()).collect();
        let one = |tid| {
            let t = inside.frozen.thread(tid).ok_or(TraceError::Gone { tid })?;
            Ok((tid, t.pending(false)?))
        };
        let threads = tids.into_iter().map(one).collect::<Result<_, TraceError>>().map_err(trace)?;
        Ok(Self { shared, threads })
    }

    /// By number and by what sent them; the count of overruns may differ.
    fn same_signals(&self, other: &Self) -> bool {
        let head = |v: &[[u8; 128]]| v.iter().map(|s| s[..20].to_vec()).collect::<Vec<_>>();
        let all = |p: &Self| p.threads.iter().map(|(t, v)| (*t, head(v))).collect::<Vec<_>>();
        head(&self.shared) == head(&other.shared) && all(self) == all(other)
    }

    fn put(self, p: &mut proto::Process) {
        let infos =
            |v: Vec<[u8; 128]>| v.into_iter().map(|b| proto::SigInfo { siginfo: b.to_vec() }).collect();
        p.shared_pending = infos(self.shared);
        for (tid, list) in self.threads {
            if let Some(t) = p.threads.iter_mut().find(|t| t.tid == tid.0 as u32) {
                t.pending = infos(list);
            }
        }
    }
}

/// All descriptors, ascending, and our duplicates of them by number.
fn descriptors(
    view: &View<'_>,
    inside: &mut Inside<'_>,
    options: &CollectOptions<'_>,
) -> Result<(Vec<proto::Fd>, HashMap<u32, OwnedFd>), CollectError> {
    let known = Before::new(options.known);
    if known.sockets.len() < MANY {
        let numbers = known.listed(view)?;
        return look(view, inside, options, numbers, &FastMap::default());
    }
    // The kernel writes a line for each watch: meanwhile the process is asked about its sockets.
    std::thread::scope(|s| {
        let epolls = s.spawn(|| epolls(view, options.known));
        let numbers = known.asked(view, inside)?;
        let infos = epolls.join().unwrap_or_default();
        look(view, inside, options, numbers, &infos)
    })
}

/// Looks at each descriptor. `infos`: what was read of some meanwhile.
fn look(
    view: &View<'_>,
    inside: &mut Inside<'_>,
    options: &CollectOptions<'_>,
    numbers: Vec<Number<'_>>,
    infos: &FastMap<u32, FdInfo>,
) -> Result<(Vec<proto::Fd>, HashMap<u32, OwnedFd>), CollectError> {
    raise_limit(numbers.iter().filter(|n| n.known.is_none()).count());
    let mut opened = Vec::with_capacity(numbers.len());
    let failed = |number: u32, call| move |e| view.errno(&format!("descriptor {number}"), call)(e);
    for &Number { number, known, .. } in &numbers {
        if let Some(k) = known {
            opened.push(Seen::Known(k));
            continue;
        }
        let dup = sys::pidfd_getfd(view.pidfd, number as i32).map_err(failed(number, "pidfd_getfd"))?;
        let stat = nix::sys::stat::fstat(&dup).map_err(failed(number, "fstat"))?;
        opened.push(Seen::Open(dup, stat));
    }
    let both = numbers.iter().zip(&opened);
    let sockets: Vec<u32> =
        both.filter(|(n, o)| n.cloexec.is_none() && o.is_socket()).map(|(n, _)| n.number).collect();
    let mut cloexec = cloexec(view, inside, &sockets)?.into_iter();
    let net = NetTables { options: options.socket_options, foreign: options.foreign, ..NetTables::default() };
    let mut out = Vec::with_capacity(numbers.len());
    let mut dups = HashMap::with_capacity(numbers.len());
    for (Number { number, cloexec: told, .. }, seen) in numbers.into_iter().zip(opened) {
        let socket = seen.is_socket();
        let mut close = || told.or_else(|| cloexec.next()) == Some(true);
        let (dup, stat) = match seen {
            Seen::Open(dup, stat) => (dup, stat),
            Seen::Known(k) => {
                out.push(proto::Fd { cloexec: close(), ..k.clone() });
                continue;
            }
        };
        let (info, link) = if socket {
            // What fdinfo and the link would say: two files of /proc less for each of thousands of connections.
            let flags = nix::fcntl::fcntl(&dup, nix::fcntl::FcntlArg::F_GETFL)
                .map_err(failed(number, "fcntl F_GETFL"))?;
            let close = if close() { libc::O_CLOEXEC } else { 0 };
            let flags = (flags & !libc::O_CLOEXEC | close) as u32;
            (FdInfo { flags, ..FdInfo::default() }, format!("socket:[{}]", stat.st_ino).into_bytes())
        } else {
            let label = format!("descriptor {number}");
            let info = match infos.get(&number) {
                Some(i) => i.clone(),
                None => fdinfo(view, number).map_err(view.io(&label, "reading fdinfo"))?,
            };
            (info, view.link(&format!("fd/{number}"))?)
        };
        let open = Open { number, info, link, stat, dup: &dup };
        let object = object(view, &open, &net)?;
        out.push(proto::Fd {
            number,
            cloexec: open.info.flags & libc::O_CLOEXEC as u32 != 0,
            flags: open.info.flags & !(libc::O_CLOEXEC as u32),
            pos: open.info.pos,
            link: String::from_utf8_lossy(&open.link).into_owned(),
            object: Some(object),
            ..Default::default()
        });
        dups.insert(number, dup);
    }
    share(view.pid, &mut out);
    Ok((out, dups))
}

fn fdinfo(view: &View<'_>, number: u32) -> std::io::Result<FdInfo> {
    Ok(FdInfo::parse(&std::fs::read(view.proc(&format!("fdinfo/{number}")))?))
}

/// What there is to say of the descriptors that were epolls before. One that cannot be read is asked for again.
fn epolls(view: &View<'_>, known: &[proto::Fd]) -> FastMap<u32, FdInfo> {
    let epoll = |f: &&proto::Fd| matches!(f.object, Some(Object::Epoll(_)));
    known.iter().filter(epoll).filter_map(|f| Some((f.number, fdinfo(view, f.number).ok()?))).collect()
}

/// A descriptor that was looked at, or one of those that need not be.
enum Seen<'a> {
    Open(OwnedFd, nix::sys::stat::FileStat),
    /// A socket that was collected before.
    Known(&'a proto::Fd),
}

impl Seen<'_> {
    fn is_socket(&self) -> bool {
        match self {
            Self::Open(_, stat) => stat.st_mode & libc::S_IFMT == libc::S_IFSOCK,
            Self::Known(_) => true,
        }
    }
}

/// An open descriptor that is to be looked at.
struct Number<'a> {
    number: u32,
    /// What was collected of it, if it is the same socket still.
    known: Option<&'a proto::Fd>,
    /// Whether an execve(2) closes it, where that is known already.
    cloexec: Option<bool>,
}

/// Sockets that were collected before: their inode numbers, and what was found.
struct Before<'a> {
    sockets: FastMap<u32, (u64, &'a proto::Fd)>,
}

/// From so many sockets on the process is asked about them.
const MANY: usize = 256;

impl<'a> Before<'a> {
    fn new(known: &'a [proto::Fd]) -> Self {
        let socket = |f: &'a proto::Fd| {
            let kind = matches!(f.object, Some(Object::Tcp(_) | Object::Udp(_) | Object::Unix(_)));
            let inode = f.link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()?;
            kind.then_some((f.number, (inode, f)))
        };
        Self { sockets: known.iter().filter_map(socket).collect() }
    }

    /// The same socket still, if `inode` is its number: no two have one at once.
    fn get(&self, number: u32, inode: Option<u64>) -> Option<&'a proto::Fd> {
        self.sockets.get(&number).filter(|s| inode == Some(s.0)).map(|s| s.1)
    }

    /// All open descriptors, asked for inside the process where that is quicker.
    fn asked(&self, view: &View<'_>, inside: &mut Inside<'_>) -> Result<Vec<Number<'a>>, CollectError> {
        let Some(entries) = table::read(view, inside, &|n| self.sockets.contains_key(&n))? else {
            return self.listed(view);
        };
        let number = |e: &table::Entry| Number {
            number: e.number,
            known: self.get(e.number, e.socket),
            cloexec: Some(e.cloexec),
        };
        Ok(entries.iter().map(number).collect())
    }

    /// All open descriptors, as /proc lists them.
    fn listed(&self, view: &View<'_>) -> Result<Vec<Number<'a>>, CollectError> {
        let path = view.proc("fd");
        let name = path.display().to_string();
        let mut numbers: Vec<u32> = std::fs::read_dir(&path)
            .map_err(view.io(&name, "readdir"))?
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        numbers.sort_unstable();
        let dir = std::fs::File::open(&path).map_err(view.io(&name, "open"))?;
        let inode = |number: u32| {
            self.sockets.get(&number)?;
            let link = nix::fcntl::readlinkat(&dir, number.to_string().as_str()).ok()?;
            link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
        };
        let number = |number: u32| Number { number, known: self.get(number, inode(number)), cloexec: None };
        Ok(numbers.into_iter().map(number).collect())
    }
}

/// Whether the descriptors are closed by an execve(2): a flag of the number, not of the open file.
fn cloexec(view: &View<'_>, inside: &mut Inside<'_>, numbers: &[u32]) -> Result<Vec<bool>, CollectError> {
    let get = |n: &u32| (libc::SYS_fcntl, [u64::from(*n), libc::F_GETFD as u64, 0, 0, 0, 0]);
    let calls: Vec<_> = numbers.iter().map(get).collect();
    let results = inside
        .calls(Tid(view.pid.0), &calls)
        .map_err(|source| CollectError::Trace { pid: view.pid, source })?;
    Ok(results.into_iter().map(|r| r > 0 && r & i64::from(libc::FD_CLOEXEC) != 0).collect())
}

/// Holding ten thousand connections of another process takes as many descriptors of our own.
fn raise_limit(need: usize) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < need as u64 * 2 + 256
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn object(view: &View<'_>, o: &Open<'_>, net: &NetTables) -> Result<Object, CollectError> {
    let kind = o.stat.st_mode & libc::S_IFMT;
    let link = o.link.as_slice();
    Ok(match kind {
        libc::S_IFSOCK => net.socket(view, o)?,
        libc::S_IFIFO => Object::Pipe(pipe::collect(view, o)?),
        _ => match link {
            b"anon_inode:[eventpoll]" => Object::Epoll(epoll::collect(o)),
            b"anon_inode:[eventfd]" => Object::Eventfd(eventfd::collect(o)),
            b"anon_inode:[timerfd]" => Object::Timerfd(timerfd::collect(view, o)),
            b"anon_inode:[signalfd]" => Object::Signalfd(signalfd::collect(o)),
            l if l.starts_with(b"anon_inode:") => Object::Foreign(foreign::collect(view, o, net.foreign)?),
            _ => Object::File(file::collect(view, o)?),
        },
    })
}

/// Socket tables that are read at most once.
#[derive(Default)]
struct NetTables {
    /// Read every option.
    options: bool,
    /// Let pass what no image holds.
    foreign: bool,
    unix: std::cell::OnceCell<HashMap<u64, unix::Entry>>,
}

impl NetTables {
    fn socket(&self, view: &View<'_>, o: &Open<'_>) -> Result<Object, CollectError> {
        let domain = tcp::int_option(o.dup.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN).unwrap_or(-1);
        let kind = tcp::int_option(o.dup.as_fd(), libc::SOL_SOCKET, libc::SO_TYPE).unwrap_or(-1);
        let protocol = tcp::int_option(o.dup.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL).unwrap_or(-1);
        Ok(match (domain, kind, protocol) {
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => {
                Object::Tcp(tcp::collect(view, o, domain, self.options)?)
            }
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, _) => {
                Object::Udp(tcp::collect_udp(o, domain, protocol, self.options)?)
            }
            (libc::AF_UNIX, _, _) => {
                let table = self.unix.get_or_init(unix::table);
                Object::Unix(unix::collect(view, o, kind, table, self.options)?)
            }
            _ => Object::Foreign(foreign::socket(view, o, self.foreign)?),
        })
    }
}

/// Gives descriptors of one open file description the same `ofd`. kcmp(2) only among candidates that look alike,
/// and by its order: a thousand timers look alike.
fn share(pid: Pid, fds: &mut [proto::Fd]) {
    let mut groups: FastMap<(&str, u32, i64), Vec<usize>> = FastMap::default();
    let mut ofds: Vec<u32> = Vec::with_capacity(fds.len());
    let mut next = 0;
    for (i, fd) in fds.iter().enumerate() {
        let peers = groups.entry((&fd.link, fd.flags, fd.pos)).or_default();
        let (number, is) = (fd.number as i32, |n: &usize| fds[*n].number as i32);
        let found = peers.binary_search_by(|j| {
            sys::kcmp_file(pid.0, is(j), pid.0, number).unwrap_or(std::cmp::Ordering::Less)
        });
        match found {
            Ok(at) => ofds.push(ofds[peers[at]]),
            Err(at) => {
                ofds.push(next);
                next += 1;
                peers.insert(at, i);
            }
        }
    }
    for (fd, ofd) in fds.iter_mut().zip(ofds) {
        fd.ofd = ofd;
    }
}

fn raw(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}
