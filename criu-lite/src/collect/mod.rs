//! What the kernel keeps for a frozen process, one file a kind of object: the same stems as
//! `image/schema/*.proto` and `restore/src/rebuild/*.rs`.

mod epoll;
mod eventfd;
mod file;
mod pipe;
mod process;
mod signalfd;
mod tcp;
mod timerfd;
mod timers;
mod unix;
mod unsupported;
mod vma;

use crate::procfs::fdinfo::FdInfo;
use crate::quiesce::ThreadState;
use crate::{Frozen, TraceError, sys};
use mcr_image::proto::{self, fd::Object};
use mcr_image::{Addr, Memory, ModuleMap, Pid, Tid};
use nix::errno::Errno;
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::Arc;

pub use file::sha_key;
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

/// Where the collector gets what only the process itself can say.
pub(crate) struct Inside<'a> {
    frozen: &'a mut Frozen,
    page: Addr,
}

impl Inside<'_> {
    /// Executes system calls in a thread of the target: (number, arguments) → raw result.
    fn calls(&mut self, tid: Tid, calls: &[(i64, [u64; 6])]) -> Result<Vec<i64>, TraceError> {
        let t = self.frozen.thread(tid).ok_or(TraceError::Gone { tid })?;
        calls.iter().map(|(nr, args)| t.syscall_raw(*nr, args)).collect()
    }
    /// A writable page in the target that the calls may use.
    fn page(&self) -> Addr {
        self.page
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
        let process = &self.process;
        self.fds.retain(|n, _| {
            let object = process.fds.iter().find(|f| f.number == *n).and_then(|f| f.object.as_ref());
            matches!(object, Some(proto::fd::Object::File(f)) if f.mode & libc::S_IFMT == libc::S_IFREG)
        });
    }
}

impl Frozen {
    /// Everything that the kernel keeps for the process, without page contents. `states` are what
    /// [`Frozen::quiesce`] returned (they give the threads' frames). A resource that images cannot hold is
    /// [`CollectError::Unsupported`], by name.
    pub fn collect(&mut self, states: &[ThreadState]) -> Result<Collected, CollectError> {
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
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let page =
            self.leader().syscall(libc::SYS_mmap, &[0, 4096, prot, flags, u64::MAX, 0]).map_err(trace)?;
        let pidfd = self.pidfd().try_clone_to_owned().map_err(io("its pidfd", "dup"))?;
        let view =
            View { pid, pidfd: pidfd.as_fd(), memory: memory.as_ref(), modules: &modules, vmas: &vmas };
        let result = (|| {
            let threads = crate::threads::collect(self, states, Addr(page)).map_err(trace)?;
            collect(&view, &mut Inside { frozen: self, page: Addr(page) }, threads)
        })();
        // Also after an error: the page is not the server's.
        let gone = self.leader().syscall(libc::SYS_munmap, &[page, 4096]).map_err(trace);
        let shared = self.leader().pending(true).map_err(trace);
        self.leader().put_back().map_err(trace)?;
        let (mut process, fds) = result?;
        gone?;
        process.shared_pending =
            shared?.into_iter().map(|b| proto::SigInfo { siginfo: b.to_vec() }).collect();
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
) -> Result<(proto::Process, HashMap<u32, OwnedFd>), CollectError> {
    let (fds, dups) = descriptors(view)?;
    let mut p = process::collect(view, inside, threads)?;
    p.itimers = timers::interval(view, inside)?;
    p.posix_timers = timers::posix(view, inside)?;
    p.vmas = view.vmas.to_vec();
    p.modules = view.modules.to_proto();
    p.fds = fds;
    Ok((p, dups))
}

/// All descriptors, ascending, and our duplicates of them by number.
pub fn descriptors(view: &View<'_>) -> Result<(Vec<proto::Fd>, HashMap<u32, OwnedFd>), CollectError> {
    let dir = view.proc("fd");
    let name = dir.display().to_string();
    let mut numbers: Vec<u32> = std::fs::read_dir(&dir)
        .map_err(view.io(&name, "readdir"))?
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    raise_limit(numbers.len());
    let net = NetTables::default();
    let mut out = Vec::with_capacity(numbers.len());
    let mut dups = HashMap::with_capacity(numbers.len());
    for number in numbers {
        let label = format!("descriptor {number}");
        let dup = sys::pidfd_getfd(view.pidfd, number as i32).map_err(view.errno(&label, "pidfd_getfd"))?;
        let path = view.proc(&format!("fdinfo/{number}"));
        let info = FdInfo::parse(&std::fs::read(path).map_err(view.io(&label, "reading fdinfo"))?);
        let link = view.link(&format!("fd/{number}"))?;
        let stat = nix::sys::stat::fstat(&dup).map_err(view.errno(&label, "fstat"))?;
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
            b"anon_inode:[timerfd]" => Object::Timerfd(timerfd::collect(o)),
            b"anon_inode:[signalfd]" => Object::Signalfd(signalfd::collect(o)),
            l if l.starts_with(b"anon_inode:") => {
                return Err(view.unsupported(
                    o.name(),
                    "images do not hold this kind of object yet",
                    "have the server close it, or restart the server without the feature that opens it",
                ));
            }
            _ => Object::File(file::collect(view, o)?),
        },
    })
}

/// Socket tables that are read at most once.
#[derive(Default)]
struct NetTables {
    unix: std::cell::OnceCell<HashMap<u64, unix::Entry>>,
}

impl NetTables {
    fn socket(&self, view: &View<'_>, o: &Open<'_>) -> Result<Object, CollectError> {
        let domain = tcp::int_option(o.dup.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN).unwrap_or(-1);
        let kind = tcp::int_option(o.dup.as_fd(), libc::SOL_SOCKET, libc::SO_TYPE).unwrap_or(-1);
        let protocol = tcp::int_option(o.dup.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL).unwrap_or(-1);
        Ok(match (domain, kind, protocol) {
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => {
                Object::Tcp(tcp::collect(view, o, domain)?)
            }
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, _) => {
                Object::Udp(tcp::collect_udp(view, o, domain, protocol)?)
            }
            (libc::AF_UNIX, _, _) => {
                let table = self.unix.get_or_init(unix::table);
                Object::Unix(unix::collect(view, o, kind, table)?)
            }
            _ => {
                return Err(view.unsupported(
                    format!(
                        "descriptor {} (socket, family {domain}, type {kind}, protocol {protocol})",
                        o.number
                    ),
                    "only TCP, UDP and unix sockets are carried",
                    "have the server close it",
                ));
            }
        })
    }
}

/// Gives descriptors of one open file description the same `ofd`. kcmp(2) only among candidates that look alike.
fn share(pid: Pid, fds: &mut [proto::Fd]) {
    let mut groups: HashMap<(String, u32, i64), Vec<usize>> = HashMap::new();
    let mut next = 0;
    for i in 0..fds.len() {
        let key = (fds[i].link.clone(), fds[i].flags, fds[i].pos);
        let peers = groups.entry(key).or_default();
        let same = peers.iter().copied().find(|&j| {
            sys::kcmp_file(pid.0, fds[i].number as i32, pid.0, fds[j].number as i32).unwrap_or(false)
        });
        match same {
            Some(j) => fds[i].ofd = fds[j].ofd,
            None => {
                fds[i].ofd = next;
                next += 1;
                peers.push(i);
            }
        }
    }
}

fn raw(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}
