//! pipe(7) and fifo(7): both ends, capacity, packet mode and the bytes inside.

use super::RebuildError;
use super::objects::{Maker, name_of};
use crate::sys;
use mcr_image::proto;
use std::collections::hash_map::Entry;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// One pipe: its ends, which of them have been given out, and what is to be written into it.
pub(super) struct Ends {
    read: OwnedFd,
    write: OwnedFd,
    given: [bool; 2],
    contents: Vec<u8>,
    name: String,
}

pub(super) fn open(fd: &proto::Fd, p: &proto::Pipe, maker: &mut Maker<'_>) -> Result<OwnedFd, RebuildError> {
    if !p.fifo_path.is_empty() {
        return open_fifo(fd, p, maker);
    }
    if p.external {
        return Err(RebuildError::refused(
            name_of(fd),
            "its other end belongs to a process outside the image, and no keeper holds this end",
            "restore before the keeper's deadline, or start the server with this descriptor redirected",
        ));
    }
    let ends = match maker.pipes.entry(p.ino) {
        Entry::Occupied(o) => o.into_mut(),
        Entry::Vacant(v) => v.insert(make(fd, p)?),
    };
    if ends.contents.is_empty() {
        ends.contents.clone_from(&p.contents);
    }
    let end = if p.write_end { &ends.write } else { &ends.read };
    let given = &mut ends.given[usize::from(p.write_end)];
    if *given {
        // A second description of the same end, as opening /proc/PID/fd/N makes.
        return reopen(end, fd, p.write_end);
    }
    *given = true;
    end.try_clone().map_err(RebuildError::call(name_of(fd), "dup of a pipe's end"))
}

fn make(fd: &proto::Fd, p: &proto::Pipe) -> Result<Ends, RebuildError> {
    use nix::fcntl::OFlag;
    let mut flags = OFlag::O_CLOEXEC;
    if p.packet {
        flags |= OFlag::O_DIRECT;
    }
    let (read, write) = nix::unistd::pipe2(flags).map_err(RebuildError::call(name_of(fd), "pipe2"))?;
    if p.capacity != 0 && p.capacity != 65536 {
        sys::fcntl(read.as_fd(), libc::F_SETPIPE_SZ, i64::from(p.capacity))
            .map_err(RebuildError::call(name_of(fd), "fcntl F_SETPIPE_SZ"))?;
    }
    Ok(Ends { read, write, given: [false; 2], contents: Vec::new(), name: name_of(fd) })
}

fn reopen(end: &OwnedFd, fd: &proto::Fd, write: bool) -> Result<OwnedFd, RebuildError> {
    let path = format!("/proc/self/fd/{}", end.as_raw_fd());
    OpenOptions::new()
        .read(!write)
        .write(write)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map(OwnedFd::from)
        .map_err(RebuildError::call(name_of(fd), "opening a pipe's end again"))
        .and_then(|f| {
            let flags = i64::from(fd.flags as i32 & (libc::O_NONBLOCK | libc::O_ASYNC));
            sys::fcntl(f.as_fd(), libc::F_SETFL, flags)
                .map_err(RebuildError::call(name_of(fd), "F_SETFL"))?;
            Ok(f)
        })
}

fn open_fifo(fd: &proto::Fd, p: &proto::Pipe, maker: &mut Maker<'_>) -> Result<OwnedFd, RebuildError> {
    let name = name_of(fd);
    let both = |e: io::Error| RebuildError::Call {
        object: name.clone(),
        call: "open of the fifo",
        source: e,
        next: "the fifo must still be at its path",
    };
    if let Entry::Vacant(slot) = maker.pipes.entry(p.ino) {
        // Opened for both, so that neither end's open blocks and contents can be put in.
        let hold = OpenOptions::new().read(true).write(true).open(&p.fifo_path).map_err(both)?;
        let write = hold.try_clone().map_err(both)?;
        slot.insert(Ends {
            read: hold.into(),
            write: write.into(),
            given: [true; 2],
            contents: p.contents.clone(),
            name: name.clone(),
        });
    }
    let access = fd.flags as i32 & libc::O_ACCMODE;
    OpenOptions::new()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags(libc::O_NONBLOCK)
        .open(&p.fifo_path)
        .map(OwnedFd::from)
        .map_err(both)
}

/// Puts the contents back, once every end is open.
pub(super) fn refill(maker: &mut Maker<'_>) -> Result<(), RebuildError> {
    for ends in maker.pipes.values_mut() {
        let contents = std::mem::take(&mut ends.contents);
        if contents.is_empty() {
            continue;
        }
        let path = format!("/proc/self/fd/{}", ends.write.as_raw_fd());
        let mut into = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(RebuildError::call(ends.name.clone(), "opening the pipe to refill it"))?;
        io::Write::write_all(&mut into, &contents)
            .map_err(RebuildError::call(ends.name.clone(), "writing the pipe's contents back"))?;
    }
    Ok(())
}
