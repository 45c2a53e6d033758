//! Files that have a path, deleted files, memfds: open flags, offset, contents and locks.

use super::RebuildError;
use super::objects::{Maker, name_of};
use crate::sys;
use mcr_image::proto;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Flags of open(2) that stay on the description and can be asked for again.
const OPEN_FLAGS: i32 = libc::O_APPEND
    | libc::O_NONBLOCK
    | libc::O_DIRECT
    | libc::O_NOATIME
    | libc::O_SYNC
    | libc::O_DSYNC
    | libc::O_PATH
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW;

pub(super) fn open(fd: &proto::Fd, f: &proto::File, maker: &mut Maker<'_>) -> Result<OwnedFd, RebuildError> {
    let opened = if f.memfd || f.deleted {
        let base = shared_file(f, maker.content, &mut maker.shared, &name_of(fd))?;
        open_with_flags(&format!("/proc/self/fd/{}", base.as_raw_fd()), fd.flags & !(libc::O_NOFOLLOW as u32))
            .map_err(RebuildError::call(name_of(fd), "opening the recreated file"))?
    } else {
        open_path(fd, f, maker)?
    };
    let opened = File::from(opened);
    let kind = f.mode & libc::S_IFMT;
    let path_only = fd.flags as i32 & libc::O_PATH != 0;
    if !path_only && (kind == libc::S_IFREG || kind == libc::S_IFDIR || kind == libc::S_IFBLK) && fd.pos != 0
    {
        nix::unistd::lseek(&opened, fd.pos, nix::unistd::Whence::SeekSet)
            .map_err(RebuildError::call(name_of(fd), "lseek to the saved offset"))?;
    }
    locks(fd, f, &opened)?;
    Ok(opened.into())
}

fn open_with_flags(path: &str, flags: u32) -> std::io::Result<OwnedFd> {
    let flags = flags as i32;
    let access = flags & libc::O_ACCMODE;
    let path_only = flags & libc::O_PATH != 0;
    OpenOptions::new()
        .read(access != libc::O_WRONLY || path_only)
        .write(access != libc::O_RDONLY && !path_only)
        .custom_flags(flags & OPEN_FLAGS | libc::O_NOCTTY)
        .open(path)
        .map(OwnedFd::from)
}

fn open_path(fd: &proto::Fd, f: &proto::File, maker: &mut Maker<'_>) -> Result<OwnedFd, RebuildError> {
    let opened = open_with_flags(&f.path, fd.flags).map_err(|e| RebuildError::Call {
        object: name_of(fd),
        call: "open",
        source: e,
        next: "put the file back at its path, then restore again",
    })?;
    let file = File::from(opened);
    let md = file.metadata().map_err(RebuildError::call(name_of(fd), "fstat"))?;
    if md.mode() & libc::S_IFMT != f.mode & libc::S_IFMT {
        return Err(RebuildError::refused(
            name_of(fd),
            "the path now leads to a file of another type than at the dump",
            "put the file back at its path, then restore again",
        ));
    }
    let kind = f.mode & libc::S_IFMT;
    if kind == libc::S_IFREG && f.ino != 0 && (md.dev(), md.ino()) != (f.dev, f.ino) {
        let text = format!("{}: another file is at this path now; it is used", name_of(fd));
        maker.warn("file-replaced", text, "compare the two files if the server keeps state in it");
    } else if kind == libc::S_IFREG && md.size() < f.size {
        let text = format!("{}: {} bytes at the dump, {} now", name_of(fd), f.size, md.size());
        maker.warn("file-shorter", text, "check what truncated the file after the dump");
    }
    if (kind == libc::S_IFCHR || kind == libc::S_IFBLK) && f.rdev != 0 && md.rdev() != f.rdev {
        return Err(RebuildError::refused(
            name_of(fd),
            "the path now leads to another device than at the dump",
            "start the server with this descriptor redirected to a file",
        ));
    }
    Ok(file.into())
}

/// The one file behind all descriptors and mappings of a deleted file or memfd.
pub(super) fn shared_file<'m>(
    f: &proto::File,
    content: &super::Content<'_>,
    shared: &'m mut std::collections::HashMap<(u64, u64), OwnedFd>,
    name: &str,
) -> Result<&'m OwnedFd, RebuildError> {
    let slot = match shared.entry((f.dev, f.ino)) {
        std::collections::hash_map::Entry::Occupied(o) => return Ok(o.into_mut()),
        std::collections::hash_map::Entry::Vacant(v) => v,
    };
    let made = if f.memfd { make_memfd(f, name)? } else { make_deleted(f, name)? };
    let mut file = File::from(made);
    file.set_len(f.size).map_err(RebuildError::call(name, "ftruncate of the recreated file"))?;
    if !f.content_key.is_empty() {
        let bytes = content(&f.content_key)
            .ok_or_else(|| RebuildError::Image(format!("content {} of {name}", f.content_key)))?;
        file.write_all_at(&bytes, 0).map_err(RebuildError::call(name, "writing the recreated file"))?;
        file.flush().map_err(RebuildError::call(name, "flushing the recreated file"))?;
    }
    if f.memfd && f.memfd_seals != 0 {
        sys::fcntl(file.as_fd(), libc::F_ADD_SEALS, i64::from(f.memfd_seals))
            .map_err(RebuildError::call(name, "fcntl F_ADD_SEALS"))?;
    }
    Ok(slot.insert(file.into()))
}

fn make_memfd(f: &proto::File, name: &str) -> Result<OwnedFd, RebuildError> {
    sys::memfd(&f.memfd_name).map_err(RebuildError::call(name, "memfd_create"))
}

/// A deleted file: unnamed, in the directory where it was if that still takes one, else a memfd.
fn make_deleted(f: &proto::File, name: &str) -> Result<OwnedFd, RebuildError> {
    let base = Path::new(&f.path);
    let there = base.parent().map(|dir| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .mode(f.mode & 0o7777)
            .custom_flags(libc::O_TMPFILE)
            .open(if dir.as_os_str().is_empty() { Path::new("/") } else { dir })
    });
    if let Some(Ok(file)) = there {
        return Ok(file.into());
    }
    let stem = base.file_name().map_or_else(|| "deleted".into(), |s| s.to_string_lossy().into_owned());
    let stem: String = stem.chars().take(200).collect();
    sys::memfd(&stem).map_err(RebuildError::call(name, "memfd_create for a deleted file"))
}

/// flock(2) and open-file-description locks belong to the description and are taken here; POSIX locks belong
/// to the process and are taken by it.
fn locks(fd: &proto::Fd, f: &proto::File, file: &File) -> Result<(), RebuildError> {
    for lock in &f.locks {
        let r = match lock.kind.to_ascii_lowercase().as_str() {
            "flock" => {
                let op = if lock.write { libc::LOCK_EX } else { libc::LOCK_SH };
                sys::flock(file.as_fd(), op | libc::LOCK_NB)
            }
            "ofd" | "ofdlck" => {
                let (start, len) = lock_range(lock);
                sys::ofd_lock(file.as_fd(), lock.write, start, len)
            }
            _ => Ok(()),
        };
        r.map_err(|e| RebuildError::Call {
            object: name_of(fd),
            call: "taking the file lock again",
            source: e,
            next: "another process holds it now; end that process",
        })?;
    }
    Ok(())
}

/// Start and length as `struct flock` has them (length 0: to the end).
pub(super) fn lock_range(lock: &proto::FileLock) -> (i64, i64) {
    let start = i64::try_from(lock.start).unwrap_or(0);
    let to_the_end = lock.whole || lock.end >= i64::MAX as u64;
    let len = if to_the_end { 0 } else { i64::try_from(lock.end + 1).unwrap_or(0) - start };
    (start, len)
}
