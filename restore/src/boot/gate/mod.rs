//! Which calls of a start-up are executed, which are answered, and what is put right afterwards. One file a
//! family of calls.

mod files;
mod memory;
mod process;
mod sockets;
pub(in crate::boot) mod timers;

use super::error::{BootError, Result};
use super::fdplan::{FdPlan, Kind};
use super::host::{Host, SocketKind, finding};
use super::{BootSpec, exec::Loaded};
use mcr_image::{Addr, Memory, Tid, proto, syscalls};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// A call at its entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub tid: Tid,
    pub nr: i64,
    pub args: [u64; 6],
}

impl Call {
    fn fd(&self, i: usize) -> i32 {
        self.args[i] as i32
    }
    fn flag(&self, i: usize, flag: i32) -> bool {
        self.args[i] & flag as u64 != 0
    }
}

/// What to do with a call.
#[derive(Debug)]
pub(super) enum Decision {
    /// Execute it.
    Run,
    /// Execute it and look at the result.
    Then(After),
    /// Execute another one in its place.
    Instead { nr: i64, args: [u64; 6], then: Option<After> },
    /// Do not execute it, return this.
    Answer(i64),
    /// The program ends.
    Ends(i32),
    /// The program makes a process.
    Forks(String),
    /// The boot cannot go on.
    Refuse(Box<BootError>),
}

/// What to do when a call has been executed.
#[derive(Clone, Debug)]
pub(super) enum After {
    /// It returned a descriptor.
    NewFd { cloexec: bool },
    /// It wrote two descriptors to this address.
    TwoFds { at: Addr, cloexec: bool },
    /// It returned our pid; the program is to see the one that it will have.
    Pid,
    /// A library had to land here.
    Library { at: Addr, path: String },
    /// The mappings changed.
    Mapped,
    /// Giving up privileges that old has given up already is no failure.
    Privilege,
    /// A signal action was set.
    SigAction { signo: u32, action: Addr },
    /// A descriptor was duplicated.
    Duplicate { from: i32, moves: bool, cloexec: bool },
    /// A descriptor was closed.
    Closed { fd: i32 },
    /// The name of a socket whose bind was not executed: addresses of the result and of its length.
    SockName { old: i32, addr: Addr, len: Addr },
    /// A word of the arguments was changed for the call.
    PutBack { at: Addr, word: u32 },
    /// A pid file was replaced by memory.
    PidFile { path: PathBuf },
}

/// State of the gates during one boot.
pub(super) struct Gate<'a> {
    pub spec: &'a BootSpec<'a>,
    pub fds: FdPlan,
    /// Regular files that old has open, by (dev, ino).
    old_files: BTreeMap<(u64, u64), String>,
    pub sigactions: BTreeMap<u32, proto::SigAction>,
    pub findings: Vec<proto::Finding>,
    /// Tail of what was written to descriptors 1 and 2.
    output: Vec<u8>,
    /// Pid files that were redirected, with the descriptor that has the new content.
    pub pid_files: Vec<(PathBuf, i32)>,
    /// POSIX timers that the start-up made.
    pub timers: Vec<crate::link::BootTimer>,
    /// Interval timers that it set and old does not use.
    pub new_itimers: Vec<u32>,
    /// Where the next mapping goes.
    pub area: Addr,
    /// Mappings changed since the last look.
    pub maps_changed: bool,
}

const OUTPUT_TAIL: usize = 4096;

impl<'a> Gate<'a> {
    pub(super) fn new(spec: &'a BootSpec<'a>, loaded: &Loaded) -> Self {
        let mut old_files = BTreeMap::new();
        for f in &spec.old.fds {
            if let Some(proto::fd::Object::File(file)) = &f.object
                && file.mode & libc::S_IFMT == libc::S_IFREG
                && !file.memfd
            {
                old_files.insert((file.dev, file.ino), file.path.clone());
            }
        }
        Self {
            spec,
            fds: FdPlan::new(&spec.old.fds),
            old_files,
            sigactions: BTreeMap::new(),
            findings: loaded.findings.clone(),
            output: Vec::new(),
            pid_files: Vec::new(),
            timers: Vec::new(),
            new_itimers: Vec::new(),
            area: loaded.area,
            maps_changed: true,
        }
    }

    fn find(&mut self, severity: proto::Severity, code: &str, message: String, next_step: &str) {
        if !self.findings.iter().any(|f| f.message == message) {
            self.findings.push(finding(code, severity, message, next_step));
        }
    }
    fn note(&mut self, code: &str, message: String) {
        self.find(proto::Severity::Info, code, message, "");
    }
    fn warn(&mut self, code: &str, message: String, next_step: &str) {
        self.find(proto::Severity::Warning, code, message, next_step);
    }

    /// The end of the new version's output, as text.
    pub(super) fn output_text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    /// At the entry of a call.
    pub(super) fn entry(&mut self, host: &Host, call: &Call) -> Result<Decision> {
        let Some(name) = syscalls::name(call.nr) else {
            return Ok(Decision::Run);
        };
        if let Some(d) = self.memory_entry(host, call, name)? {
            return Ok(d);
        }
        if let Some(d) = self.file_entry(host, call, name)? {
            return Ok(d);
        }
        if let Some(d) = self.socket_entry(host, call, name)? {
            return Ok(d);
        }
        if let Some(d) = self.timer_entry(host, call, name)? {
            return Ok(d);
        }
        Ok(self.process_entry(host, call, name)?.unwrap_or(Decision::Run))
    }

    /// At the exit of a call. `Some`: the result that the program is to see.
    pub(super) fn exit(
        &mut self,
        host: &Host,
        call: &Call,
        after: &After,
        result: i64,
    ) -> Result<Option<i64>> {
        match after {
            After::NewFd { cloexec } if result >= 0 => {
                self.new_fd(host, call.tid, result as i32, *cloexec).map(Some)
            }
            After::TwoFds { at, cloexec } if result >= 0 => {
                let natural = [host.mem.u32(*at)? as i32, host.mem.u32(at.add(4))? as i32];
                let moved = self.two_fds(host, call.tid, natural, *cloexec)?;
                for (i, fd) in moved.into_iter().enumerate() {
                    host.mem.write(at.add(i as u64 * 4), &(fd as u32).to_le_bytes())?;
                }
                Ok(None)
            }
            After::Library { at, path } => {
                self.maps_changed = true;
                if result as u64 != at.0 {
                    let what =
                        format!("mapping {path} at {at}, where the old version has it (got {result:#x})");
                    return Err(BootError::step(what, nix::errno::Errno::EEXIST));
                }
                Ok(None)
            }
            After::Mapped => {
                self.maps_changed = true;
                Ok(None)
            }
            After::Privilege if result == -i64::from(libc::EPERM) => {
                let name = syscalls::name(call.nr).unwrap_or("?");
                self.note(
                    "privileges-dropped",
                    format!(
                        "{name} was answered with success: the process has already given up its privileges"
                    ),
                );
                Ok(Some(0))
            }
            After::SigAction { signo, action } if result == 0 => {
                let raw = host.mem.bytes(*action, 32)?;
                let word = |i: usize| raw[i * 8..i * 8 + 8].try_into().map(u64::from_le_bytes).unwrap_or(0);
                let a = proto::SigAction {
                    signo: *signo,
                    handler: word(0),
                    flags: word(1),
                    restorer: word(2),
                    mask: word(3),
                };
                self.sigactions.insert(*signo, a);
                Ok(None)
            }
            After::Duplicate { from, moves, cloexec } if result >= 0 => {
                let mut to = result;
                if *moves {
                    to = self.new_fd(host, call.tid, to as i32, *cloexec)?;
                }
                self.fds.duplicate(*from, to as i32);
                Ok(Some(to))
            }
            After::Pid if result == i64::from(host.pid.0) => Ok(self.spec.pid.map(|p| p.0.into())),
            After::PutBack { at, word } => {
                host.mem.write(*at, &word.to_le_bytes())?;
                Ok(None)
            }
            After::Closed { fd } => {
                self.fds.forget(*fd);
                Ok(None)
            }
            After::SockName { old, addr, len } if result == 0 => {
                self.socket_name(host, *old, *addr, *len)?;
                Ok(None)
            }
            After::PidFile { path } if result >= 0 => {
                let fd = self.new_fd(host, call.tid, result as i32, true)?;
                self.pid_files.push((path.clone(), fd as i32));
                Ok(Some(fd))
            }
            _ => Ok(None),
        }
    }

    /// A fresh descriptor: moves it if its number belongs to something else in old.
    fn new_fd(&mut self, host: &Host, tid: Tid, fd: i32, cloexec: bool) -> Result<i64> {
        let Some((kind, link)) = kind_of(host, fd) else {
            return Ok(fd.into());
        };
        // The dynamic linker opens, maps and closes: such numbers are free again at once.
        if link.contains(".so.") || link.ends_with(".so") {
            return Ok(fd.into());
        }
        let Some(place) = self.fds.relocation(fd, &kind, |n| host.fd_link(n).is_some()) else {
            return Ok(fd.into());
        };
        let moved = move_fd(host, tid, fd, place, cloexec)?;
        self.fds.set_aside(fd, &kind, moved as i32);
        Ok(moved)
    }

    /// The two ends of a fresh pipe or pair.
    fn two_fds(
        &mut self,
        host: &Host,
        tid: Tid,
        [first, second]: [i32; 2],
        cloexec: bool,
    ) -> Result<[i64; 2]> {
        if !self.fds.is_inherited(first) {
            return Ok([self.new_fd(host, tid, first, cloexec)?, self.new_fd(host, tid, second, cloexec)?]);
        }
        // The kernel may have put the second one where the first one belongs.
        let aside = move_fd(host, tid, second, self.fds.above() + 1, cloexec)? as i32;
        let moved = self.new_fd(host, tid, first, cloexec)?;
        let Some((kind, _)) = kind_of(host, aside) else { return Ok([moved, aside.into()]) };
        let place = self.fds.second(first, &kind, |n| host.fd_link(n).is_some());
        Ok([moved, move_fd(host, tid, aside, place, cloexec)?])
    }
}

/// To the first free number from `to` on.
fn move_fd(host: &Host, tid: Tid, fd: i32, to: i32, cloexec: bool) -> Result<i64> {
    let cmd = if cloexec { libc::F_DUPFD_CLOEXEC } else { libc::F_DUPFD };
    let moved = host.call(tid, "fcntl(F_DUPFD)", libc::SYS_fcntl, &[fd as u64, cmd as u64, to as u64])?;
    host.call(tid, "close", libc::SYS_close, &[fd as u64])?;
    Ok(moved as i64)
}

/// What a descriptor of the host is, and how /proc shows it.
pub(super) fn kind_of(host: &Host, fd: i32) -> Option<(Kind, String)> {
    let link = host.fd_link(fd)?;
    let kind = match link.as_str() {
        "anon_inode:[eventpoll]" => Kind::Epoll,
        "anon_inode:[eventfd]" => Kind::EventFd,
        "anon_inode:[timerfd]" => Kind::TimerFd,
        "anon_inode:[signalfd]" => Kind::SignalFd,
        l if l.starts_with("pipe:") => {
            Kind::Pipe { write_end: crate::fds::open_flags(host.pid.0, fd) & 3 == libc::O_WRONLY }
        }
        l if l.starts_with("socket:") => match host.socket_kind(fd) {
            Ok(SocketKind { kind, pair: true, .. }) => Kind::Pair { kind },
            Ok(SocketKind { family, kind, protocol, .. })
                if family == libc::AF_NETLINK || kind == libc::SOCK_RAW =>
            {
                Kind::Foreign { family, kind, protocol }
            }
            Ok(SocketKind { family, kind, .. }) => Kind::Socket { family, kind, connected: false },
            Err(_) => Kind::Other,
        },
        "anon_inode:inotify" => Kind::Foreign { family: 0, kind: 0, protocol: 0 },
        l if l.starts_with("anon_inode:") => Kind::Other,
        _ => {
            let m = std::fs::metadata(host.fd_path(fd)).ok()?;
            Kind::File { dev: m.dev(), ino: m.ino() }
        }
    };
    Some((kind, link))
}
