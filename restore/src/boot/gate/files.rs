//! Files: nothing that old still uses is truncated, replaced, removed or locked away.

use super::{After, Call, Decision, Gate, OUTPUT_TAIL};
use crate::boot::error::Result;
use crate::boot::fdplan;
use crate::boot::host::Host;
use mcr_image::{Addr, Memory};
use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where an open's arguments are: directory, path, flags.
struct OpenArgs {
    dir: Option<usize>,
    path: usize,
    flags: usize,
}

impl Gate<'_> {
    pub(super) fn file_entry(&mut self, host: &Host, call: &Call, name: &str) -> Result<Option<Decision>> {
        let fresh = |cloexec| Some(Decision::Then(After::NewFd { cloexec }));
        let two = |cloexec| Some(Decision::Then(After::TwoFds { at: Addr(call.args[0]), cloexec }));
        Ok(match name {
            "open" => Some(self.open(host, call, &OpenArgs { dir: None, path: 0, flags: 1 })?),
            "openat" => Some(self.open(host, call, &OpenArgs { dir: Some(0), path: 1, flags: 2 })?),
            "creat" => {
                let flags = (libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC) as u64;
                let args = [call.args[0], flags, call.args[1], 0, 0, 0];
                let as_open = Call { nr: libc::SYS_open, args, ..*call };
                Some(match self.open(host, &as_open, &OpenArgs { dir: None, path: 0, flags: 1 })? {
                    Decision::Then(then) => Decision::Instead { nr: libc::SYS_open, args, then: Some(then) },
                    d => d,
                })
            }
            "openat2" | "inotify_init" | "fanotify_init" | "eventfd" | "signalfd" | "epoll_create" => {
                fresh(false)
            }
            // An existing one is changed, no number is made.
            "signalfd4" if call.fd(0) >= 0 => None,
            "signalfd4" => fresh(call.flag(3, libc::SFD_CLOEXEC)),
            "eventfd2" => fresh(call.flag(1, libc::EFD_CLOEXEC)),
            "memfd_create" => fresh(call.flag(1, libc::MFD_CLOEXEC as i32)),
            "epoll_create1" | "inotify_init1" => fresh(call.flag(0, libc::EPOLL_CLOEXEC)),
            "timerfd_create" => fresh(call.flag(1, libc::TFD_CLOEXEC)),
            "pipe" => two(false),
            "pipe2" => two(call.flag(1, libc::O_CLOEXEC)),
            "dup" => Some(Decision::Then(After::Duplicate { from: call.fd(0), moves: true, cloexec: false })),
            "dup2" | "dup3" => {
                Some(Decision::Then(After::Duplicate { from: call.fd(0), moves: false, cloexec: false }))
            }
            "fcntl" => self.fcntl(host, call),
            "close" => Some(Decision::Then(After::Closed { fd: call.fd(0) })),
            "unlink" => self.removal(host, call, None, 0, "removing")?,
            "unlinkat" => self.removal(host, call, Some(0), 1, "removing")?,
            "rename" => self.removal(host, call, None, 1, "renaming over")?,
            "renameat" | "renameat2" => self.removal(host, call, Some(2), 3, "renaming over")?,
            "truncate" => self.removal(host, call, None, 0, "truncating")?,
            "ftruncate" => self.shared_file(host, call.fd(0)).map(|path| {
                self.warn(
                    "truncate-withheld",
                    format!("truncating {path} was not done: old has it open"),
                    "",
                );
                Decision::Answer(0)
            }),
            "flock" => self.lock(host, call),
            "write" | "writev" => {
                self.capture(host, call, name);
                None
            }
            _ => None,
        })
    }

    /// Where the engine finds a file that the host names.
    fn resolve(host: &Host, dir: i32, path: &Path) -> PathBuf {
        match path.strip_prefix("/") {
            Ok(p) => PathBuf::from(format!("/proc/{}/root", host.pid)).join(p),
            Err(_) if dir == libc::AT_FDCWD => PathBuf::from(format!("/proc/{}/cwd", host.pid)).join(path),
            Err(_) => host.fd_path(dir).join(path),
        }
    }

    /// A path argument as given, and where the engine finds it.
    fn path_arg(host: &Host, call: &Call, dir: Option<usize>, path: usize) -> Result<(PathBuf, PathBuf)> {
        let raw = host.mem.cstr(Addr(call.args[path]), 4096)?;
        let shown = PathBuf::from(OsStr::from_bytes(&raw));
        let at = Self::resolve(host, dir.map_or(libc::AT_FDCWD, |i| call.fd(i)), &shown);
        Ok((shown, at))
    }

    fn open(&mut self, host: &Host, call: &Call, a: &OpenArgs) -> Result<Decision> {
        let flags = call.args[a.flags] as i32;
        let cloexec = flags & libc::O_CLOEXEC != 0;
        let plain = Decision::Then(After::NewFd { cloexec });
        if flags & libc::O_ACCMODE == libc::O_RDONLY && flags & libc::O_TRUNC == 0 {
            return Ok(plain);
        }
        let (shown, at) = Self::path_arg(host, call, a.dir, a.path)?;
        let name = shown.display();
        let Ok(meta) = std::fs::metadata(&at) else {
            if flags & libc::O_CREAT != 0 {
                self.note("file-created", format!("the start-up creates {name}"));
            }
            return Ok(plain);
        };
        if !meta.is_file() {
            return Ok(plain);
        }
        if self.is_pid_file(&at, &meta) {
            self.note(
                "pid-file",
                format!("{name} keeps the old version's process id until the new one takes over"),
            );
            let args = [call.args[a.path], u64::from(cloexec), 0, 0, 0, 0];
            let then = Some(After::PidFile { path: at });
            return Ok(Decision::Instead { nr: libc::SYS_memfd_create, args, then });
        }
        let mut wanted = flags;
        if flags & libc::O_TRUNC != 0 && meta.len() > 0 {
            wanted &= !libc::O_TRUNC;
            self.warn(
                "truncate-withheld",
                format!("{name} is opened without truncating it during the start-up"),
                "remove it by hand before the update if the new version is to start from an empty file",
            );
        }
        if flags & libc::O_EXCL != 0 && self.old_files.contains_key(&(meta.dev(), meta.ino())) {
            wanted &= !libc::O_EXCL;
            self.note("exclusive-open", format!("{name} exists because the old version made it"));
        }
        if wanted == flags {
            return Ok(plain);
        }
        let mut args = call.args;
        args[a.flags] = u64::from(wanted as u32);
        Ok(Decision::Instead { nr: call.nr, args, then: Some(After::NewFd { cloexec }) })
    }

    /// A small file whose text is old's process id.
    fn is_pid_file(&self, at: &Path, meta: &Metadata) -> bool {
        (1..=32).contains(&meta.len())
            && std::fs::read_to_string(at).is_ok_and(|t| t.trim().parse() == Ok(self.spec.old.pid))
    }

    /// The path of a regular file that old has open as well.
    fn shared_file(&self, host: &Host, fd: i32) -> Option<String> {
        let m = std::fs::metadata(host.fd_path(fd)).ok()?;
        self.old_files.get(&(m.dev(), m.ino())).cloned()
    }

    /// Removing, replacing or truncating by path.
    fn removal(
        &mut self,
        host: &Host,
        call: &Call,
        dir: Option<usize>,
        path: usize,
        what: &str,
    ) -> Result<Option<Decision>> {
        let (shown, at) = Self::path_arg(host, call, dir, path)?;
        let Ok(meta) = std::fs::symlink_metadata(&at) else {
            return Ok(None);
        };
        let raw = [&(libc::AF_UNIX as u16).to_le_bytes(), shown.as_os_str().as_bytes()].concat();
        let wanted = fdplan::address(&raw);
        let in_use = self.fds.old.values().any(|o| o.bound.as_ref() == Some(&wanted))
            || self.old_files.contains_key(&(meta.dev(), meta.ino()))
            || (meta.is_file() && self.is_pid_file(&at, &meta));
        let name = shown.display();
        if in_use {
            self.note("removal-withheld", format!("{what} {name} was not done: the old version uses it"));
            return Ok(Some(Decision::Answer(0)));
        }
        self.note("file-changed", format!("the start-up does this for real: {what} {name}"));
        Ok(None)
    }

    /// Locks that old holds on its own files are carried over with them.
    fn lock(&mut self, host: &Host, call: &Call) -> Option<Decision> {
        let path = self.shared_file(host, call.fd(0))?;
        self.note("lock-carried", format!("locking {path} was answered with success: old has it open"));
        Some(Decision::Answer(0))
    }

    fn fcntl(&mut self, host: &Host, call: &Call) -> Option<Decision> {
        let duplicate =
            |cloexec| Some(Decision::Then(After::Duplicate { from: call.fd(0), moves: true, cloexec }));
        match call.args[1] as i32 {
            libc::F_DUPFD => duplicate(false),
            libc::F_DUPFD_CLOEXEC => duplicate(true),
            libc::F_SETLK | libc::F_SETLKW | libc::F_OFD_SETLK | libc::F_OFD_SETLKW => self.lock(host, call),
            _ => None,
        }
    }

    /// Keeps the end of what is written to standard output and error.
    fn capture(&mut self, host: &Host, call: &Call, name: &str) {
        if !matches!(call.fd(0), 1 | 2) {
            return;
        }
        let mut add = |addr: u64, len: u64| {
            if let Ok(b) = host.mem.bytes(Addr(addr), (len as usize).min(OUTPUT_TAIL)) {
                self.output.extend_from_slice(&b);
            }
        };
        if name == "write" {
            add(call.args[1], call.args[2]);
        } else {
            for i in 0..call.args[2].min(16) {
                let at = Addr(call.args[1]).add(i * 16);
                if let (Ok(base), Ok(len)) = (host.mem.u64(at), host.mem.u64(at.add(8))) {
                    add(base, len);
                }
            }
        }
        let extra = self.output.len().saturating_sub(OUTPUT_TAIL);
        self.output.drain(..extra);
    }
}
