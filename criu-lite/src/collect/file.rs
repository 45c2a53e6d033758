//! Regular files, directories, devices, deleted files and memfds.

use super::{CollectError, Open, View};
use mcr_image::proto;
use std::os::unix::fs::MetadataExt;

/// Key under which a deleted file's content is embedded.
#[must_use]
pub fn sha_key(dev: u64, ino: u64) -> String {
    format!("deleted:{dev:x}:{ino:x}")
}

pub(super) fn collect(view: &View<'_>, o: &Open<'_>) -> Result<proto::File, CollectError> {
    let kind = o.stat.st_mode & libc::S_IFMT;
    let mut path = o.link.clone();
    let mut deleted = o.stat.st_nlink == 0;
    if path.ends_with(b" (deleted)") && deleted {
        path.truncate(path.len() - b" (deleted)".len());
    }
    let memfd = path.starts_with(b"/memfd:");
    deleted &= !memfd;
    let path = String::from_utf8(path)
        .map_err(|_| view.unsupported(o.name(), "its path is not UTF-8", "rename the file"))?;
    match kind {
        libc::S_IFREG | libc::S_IFDIR => {}
        libc::S_IFCHR => {
            let known = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];
            if !known.contains(&path.as_str()) && !path.starts_with("/dev/pts/") {
                return Err(view.unsupported(
                    o.name(),
                    "a device keeps state that cannot be read back",
                    "have the server close it",
                ));
            }
        }
        _ => {
            return Err(view.unsupported(o.name(), "unknown kind of file", "have the server close it"));
        }
    }
    if kind == libc::S_IFREG && !deleted && !memfd {
        // The path must still lead to this very file, or a restore would open another one.
        let there = std::fs::metadata(format!("/proc/{}/root{path}", view.pid)).ok();
        if !there.is_some_and(|m| m.ino() == o.stat.st_ino && m.dev() == o.stat.st_dev) {
            deleted = true;
        }
    }
    let locks = o
        .info
        .rest
        .iter()
        .filter(|(k, _)| k == b"lock")
        .filter_map(|(_, v)| lock(std::str::from_utf8(v).ok()?))
        .collect();
    Ok(proto::File {
        content_key: if (deleted || memfd) && kind == libc::S_IFREG {
            sha_key(o.stat.st_dev, o.stat.st_ino)
        } else {
            String::new()
        },
        memfd_name: path.strip_prefix("/memfd:").unwrap_or_default().to_owned(),
        memfd_seals: if memfd { seals(o) } else { 0 },
        path,
        deleted,
        memfd,
        mode: o.stat.st_mode,
        size: o.stat.st_size.max(0) as u64,
        dev: o.stat.st_dev,
        ino: o.stat.st_ino,
        rdev: o.stat.st_rdev,
        locks,
    })
}

fn seals(o: &Open<'_>) -> u32 {
    nix::fcntl::fcntl(o.dup, nix::fcntl::FcntlArg::F_GET_SEALS).unwrap_or(0).max(0) as u32
}

/// `1: FLOCK  ADVISORY  WRITE 1234 fd:01:5 0 EOF` (proc_locks(5)).
fn lock(line: &str) -> Option<proto::FileLock> {
    let w: Vec<&str> = line.split_ascii_whitespace().collect();
    let [_, kind, _, mode, _, _, start, end] = w.as_slice() else {
        return None;
    };
    Some(proto::FileLock {
        kind: (*kind).to_owned(),
        write: *mode == "WRITE",
        start: start.parse().ok()?,
        end: end.parse().unwrap_or(0),
        whole: *end == "EOF",
    })
}
