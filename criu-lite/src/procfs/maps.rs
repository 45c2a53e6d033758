//! /proc/PID/maps, proc_pid_maps(5).

use super::{cut, dec, hex};
use mcr_image::{Addr, Pid};

/// One line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapsLine {
    /// First address.
    pub start: Addr,
    /// One past the last address.
    pub end: Addr,
    /// `PROT_*`.
    pub prot: u32,
    /// `s` rather than `p`.
    pub shared: bool,
    /// Offset in the file.
    pub offset: u64,
    /// Device, as `makedev(major, minor)`.
    pub dev: u64,
    /// Inode, 0 for anonymous memory.
    pub ino: u64,
    /// Path or `[name]`, unescaped, without " (deleted)"; empty for anonymous memory.
    pub name: Vec<u8>,
    /// The path ended in " (deleted)" and the inode is set.
    pub deleted: bool,
}

/// Reads and parses the map of a process.
pub fn read(pid: Pid) -> std::io::Result<Vec<MapsLine>> {
    parse(&std::fs::read(format!("/proc/{pid}/maps"))?)
        .map_err(|line| std::io::Error::other(format!("/proc/{pid}/maps: cannot read the line {line:?}")))
}

/// Parses a whole file; the error is the line that is not understood.
pub fn parse(text: &[u8]) -> Result<Vec<MapsLine>, String> {
    text.split(|&b| b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| line(l).ok_or_else(|| String::from_utf8_lossy(l).into_owned()))
        .collect()
}

/// Parses one line without its newline.
#[must_use]
pub fn line(l: &[u8]) -> Option<MapsLine> {
    let (range, rest) = cut(l, b' ')?;
    let (start, end) = cut(range, b'-')?;
    let (perms, rest) = cut(rest, b' ')?;
    let (offset, rest) = cut(rest, b' ')?;
    let (dev, rest) = cut(rest, b' ')?;
    let (ino, rest) = cut(rest, b' ').unwrap_or((rest, b""));
    let (major, minor) = cut(dev, b':')?;
    let &[r, w, x, s] = perms else { return None };
    let bit = |c: u8, on: u8, v: i32| if c == on { v as u32 } else { 0 };
    // The kernel pads with blanks up to a column and then writes the name: only the padding is stripped.
    let skip = rest.iter().position(|&c| c != b' ').unwrap_or(rest.len());
    let ino = dec(ino)?;
    let mut name = unescape(&rest[skip..]);
    let deleted = ino != 0 && name.ends_with(b" (deleted)");
    if deleted {
        name.truncate(name.len() - b" (deleted)".len());
    }
    Some(MapsLine {
        start: Addr(hex(start)?),
        end: Addr(hex(end)?),
        prot: bit(r, b'r', libc::PROT_READ) | bit(w, b'w', libc::PROT_WRITE) | bit(x, b'x', libc::PROT_EXEC),
        shared: s == b's',
        offset: hex(offset)?,
        dev: libc::makedev(u32::try_from(hex(major)?).ok()?, u32::try_from(hex(minor)?).ok()?),
        ino,
        name,
        deleted,
    })
}

/// Undoes the kernel's escaping of newlines (`\012`).
fn unescape(b: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(b.len());
    let mut i = 0;
    while i < b.len() {
        if b[i..].starts_with(b"\\012") {
            out.push(b'\n');
            i += 4;
        } else {
            out.push(b[i]);
            i += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_names_survive() {
        let text = b"7f00-8f00 rw-p 00001000 fd:01 12                         /tmp/\xff  x \n8f00-9f00 r-xs 00000000 00:01 9                          /memfd:a (deleted)\n9f00-af00 ---p 00000000 00:00 0 \naf00-bf00 rw-p 00000000 00:00 0                          [heap]\n";
        let m = parse(text).unwrap();
        assert_eq!(m[0].name, b"/tmp/\xff  x ");
        assert_eq!((m[0].dev, m[0].ino, m[0].offset), (libc::makedev(0xfd, 1), 12, 0x1000));
        assert!(m[1].deleted && m[1].shared && m[1].name == b"/memfd:a");
        assert_eq!((m[2].prot, m[2].name.len()), (0, 0));
        assert_eq!(m[3].name, b"[heap]");
        assert!(parse(b"zz\n").is_err());
    }

    #[test]
    fn own_map_is_read_whole() {
        let pid = Pid(std::process::id() as i32);
        let m = read(pid).unwrap();
        assert!(m.iter().any(|l| l.name == b"[stack]"));
        assert!(m.windows(2).all(|w| w[0].end <= w[1].start));
    }
}
