//! pipe(7), fifo(7): capacity and contents, read by tee(2) without consuming a byte.

use super::{CollectError, Open, View, raw};
use crate::sys::check;
use mcr_image::proto;
use std::io::Read;
use std::os::fd::AsRawFd;

pub(super) fn collect(view: &View<'_>, o: &Open<'_>) -> Result<proto::Pipe, CollectError> {
    let write_end = o.info.flags & libc::O_ACCMODE as u32 == libc::O_WRONLY as u32;
    let named = !o.link.starts_with(b"pipe:");
    let name = o.name();
    // SAFETY: fcntl(2) F_GETPIPE_SZ takes and returns plain numbers.
    #[allow(unsafe_code)]
    let capacity = unsafe { libc::fcntl(raw(o.dup), libc::F_GETPIPE_SZ) }.max(0) as u32;
    let contents = if write_end { Vec::new() } else { peek(o, capacity).map_err(view.io(&name, "tee"))? };
    Ok(proto::Pipe {
        ino: o.stat.st_ino,
        write_end,
        capacity,
        contents,
        fifo_path: if named { String::from_utf8_lossy(&o.link).into_owned() } else { String::new() },
        packet: o.info.flags & libc::O_DIRECT as u32 != 0,
        external: false,
    })
}

/// Copies what is in the pipe into a pipe of our own and reads that.
#[allow(unsafe_code)]
fn peek(o: &Open<'_>, capacity: u32) -> std::io::Result<Vec<u8>> {
    let (mut r, w) = std::io::pipe()?;
    // SAFETY: plain numbers; a capacity that is refused only makes the copy shorter, which is checked below.
    unsafe { libc::fcntl(w.as_raw_fd(), libc::F_SETPIPE_SZ, capacity) };
    let mut waiting = 0i32;
    // SAFETY: FIONREAD writes one int.
    check(i64::from(unsafe { libc::ioctl(raw(o.dup), libc::FIONREAD, &mut waiting) }))?;
    if waiting == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: plain numbers.
    let n = check(
        unsafe { libc::tee(raw(o.dup), w.as_raw_fd(), waiting as usize, libc::SPLICE_F_NONBLOCK) } as i64,
    )?;
    if n != i64::from(waiting) {
        return Err(std::io::Error::other(format!("{waiting} bytes wait in the pipe, {n} could be copied")));
    }
    drop(w);
    let mut out = Vec::with_capacity(waiting as usize);
    r.read_to_end(&mut out)?;
    Ok(out)
}
