//! libc's list of open streams. libc's own data stays new's; the old version's `FILE`s, which live in
//! retained memory, are linked into it, or fflush(NULL) and exit() would lose what they buffer.
//!
//! Layout: struct _IO_FILE_plus, glibc libio/bits/types/struct_FILE.h, unchanged from 2.2 to 2.40.

use super::input::Booted;
use super::output::Refusal;
use super::overlay::Overlay;
use mcr_image::{Addr, Memory, proto};
use std::collections::HashMap;

const WRITE_BASE: u64 = 32;
const WRITE_PTR: u64 = 40;
const BUF_END: u64 = 64;
const CHAIN: u64 = 0x68;
const FILENO: u64 = 0x70;
const LOCK: u64 = 0x88;
const VTABLE: u64 = 0xd8;
const MAX_FILES: usize = 100_000;

/// Addresses of libc's exported stream objects (same in both versions: same library, same base).
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamSymbols {
    /// `_IO_list_all`.
    pub list_all: Addr,
    /// `_IO_2_1_stdin_`, `_IO_2_1_stdout_`, `_IO_2_1_stderr_`.
    pub std: [Addr; 3],
}

impl StreamSymbols {
    /// Looks the names up.
    pub fn find(symbol: impl Fn(&str) -> Option<Addr>) -> Option<Self> {
        Some(Self {
            list_all: symbol("_IO_list_all")?,
            std: [symbol("_IO_2_1_stdin_")?, symbol("_IO_2_1_stdout_")?, symbol("_IO_2_1_stderr_")?],
        })
    }
}

/// What happened to the streams.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    /// Old streams that were linked in.
    pub adopted: Vec<Addr>,
    /// Native streams that an old one takes over.
    pub superseded: Vec<Addr>,
    /// Bytes of standard output and error that old had not written yet and new will.
    pub pending: usize,
}

/// The streams of a list, in its order.
pub fn list(mem: &dyn Memory, head: Addr) -> Result<Vec<Addr>, Refusal> {
    let mut out = Vec::new();
    let mut at = mem.u64(head).map_err(|e| refuse(format!("_IO_list_all: {e}")))?;
    while at != 0 {
        if out.contains(&Addr(at)) || out.len() > MAX_FILES {
            return Err(refuse(format!("libc's list of streams loops at {at:#x}")));
        }
        out.push(Addr(at));
        at = mem.u64(Addr(at + CHAIN)).map_err(|e| refuse(format!("stream {at:#x}: {e}")))?;
    }
    Ok(out)
}

fn refuse(message: String) -> Refusal {
    Refusal::new("libc", message, "the stream list of libc cannot be joined; report this with the image")
}

/// Native and old streams on the same descriptor, which are the same file.
#[must_use]
pub fn by_descriptor(old: &dyn Memory, host: &dyn Memory, syms: &StreamSymbols) -> Vec<(Addr, Addr, u32)> {
    let (Ok(olds), Ok(news)) = (list(old, syms.list_all), list(host, syms.list_all)) else {
        return Vec::new();
    };
    let fds = |m: &dyn Memory, l: Vec<Addr>| -> HashMap<u32, Vec<Addr>> {
        let mut out: HashMap<u32, Vec<Addr>> = HashMap::new();
        for f in l.into_iter().filter(|f| !syms.std.contains(f)) {
            if let Ok(fd) = m.u32(f.add(FILENO)) {
                out.entry(fd).or_default().push(f);
            }
        }
        out
    };
    let (olds, news) = (fds(old, olds), fds(host, news));
    let mut out = Vec::new();
    for (fd, n) in news {
        if let (1, Some([o])) = (n.len(), olds.get(&fd).map(Vec::as_slice)) {
            out.push((n[0], *o, fd));
        }
    }
    out.sort();
    out
}

/// Joins the lists: old's streams first, then those of new's that no old one takes over. `paired` says
/// what a native stream became.
#[allow(clippy::too_many_arguments)]
pub fn adopt(
    syms: &StreamSymbols,
    old: &dyn Memory,
    host: &dyn Memory,
    booted: &Booted,
    paired: impl Fn(Addr) -> Option<Addr>,
    moved: impl Fn(Addr) -> Addr,
    out: &mut Overlay<'_>,
    findings: &mut Vec<proto::Finding>,
) -> Result<Streams, Refusal> {
    let mut done = Streams::default();
    let news = list(host, syms.list_all)?;
    for f in list(old, syms.list_all)? {
        if syms.std.contains(&f) {
            continue;
        }
        let f = moved(f);
        if !booted.is_retained(f) && out.u64(f.add(CHAIN)).is_err() {
            return Err(refuse(format!("the old stream {f} lies in memory that is not kept")));
        }
        let vtable = old.u64(f.add(VTABLE)).unwrap_or(0);
        let ours = booted.modules.iter().any(|m| m.same_as_old && m.start.0 <= vtable && vtable < m.end.0);
        if !ours {
            return Err(refuse(format!("the old stream {f} has its methods at {vtable:#x}, outside libc")));
        }
        // Held by a thread outside libc's calls (flockfile): the owner's struct pthread is gone.
        if let Ok(lock) = old.u64(f.add(LOCK))
            && lock != 0
            && old.u64(Addr(lock)).is_ok_and(|v| v != 0)
        {
            findings.push(super::finding(
                proto::Severity::Warning,
                "stream-locked",
                format!("the stream {f} was locked (flockfile) in the old process; its lock is released"),
                "",
            ));
            out.write(Addr(lock), &[0; 16]);
        }
        done.adopted.push(f);
    }
    let kept: Vec<Addr> = news
        .iter()
        .copied()
        .filter(|f| match paired(*f) {
            Some(o) if done.adopted.contains(&o) => {
                done.superseded.push(*f);
                false
            }
            _ => true,
        })
        .collect();
    let joined: Vec<Addr> = done.adopted.iter().chain(&kept).copied().collect();
    if joined != news {
        let mut at = syms.list_all;
        for f in &joined {
            out.write_u64(at, f.0);
            at = f.add(CHAIN);
        }
        out.write_u64(at, 0);
    }
    for &f in &done.superseded {
        let n = pending(host, f).len();
        if n > 0 {
            findings.push(super::finding(
                proto::Severity::Info,
                "stream-startup-output",
                format!(
                    "{n} bytes that the new version wrote at start-up into a stream old has open are dropped"
                ),
                "",
            ));
        }
    }
    for (i, name) in [(1, "stdout"), (2, "stderr")] {
        done.pending += hand_over(syms.std[i], name, old, host, out, findings);
    }
    Ok(done)
}

/// What a stream has buffered for writing.
fn pending(mem: &dyn Memory, f: Addr) -> Vec<u8> {
    let (Ok(base), Ok(ptr)) = (mem.u64(f.add(WRITE_BASE)), mem.u64(f.add(WRITE_PTR))) else {
        return Vec::new();
    };
    if base == 0 || ptr <= base || ptr - base > 1 << 20 {
        return Vec::new();
    }
    mem.bytes(Addr(base), (ptr - base) as usize).unwrap_or_default()
}

/// Old's unwritten standard output goes in front of new's, if new's buffer has the room.
fn hand_over(
    f: Addr,
    name: &str,
    old: &dyn Memory,
    host: &dyn Memory,
    out: &mut Overlay<'_>,
    findings: &mut Vec<proto::Finding>,
) -> usize {
    let mut data = pending(old, f);
    let n = data.len();
    if n == 0 {
        return 0;
    }
    data.extend(pending(host, f));
    let word = |o: u64| host.u64(f.add(o)).unwrap_or(0);
    let (base, end) = (word(WRITE_BASE), word(BUF_END));
    if base != 0 && word(WRITE_PTR) >= base && end > base + data.len() as u64 {
        out.write(Addr(base), &data);
        out.write_u64(f.add(WRITE_PTR), base + data.len() as u64);
        return n;
    }
    findings.push(super::finding(
        proto::Severity::Warning,
        "stream-output-lost",
        format!("{n} bytes that the old version had buffered in {name} and not written are lost"),
        name,
    ));
    0
}

#[cfg(test)]
mod tests {
    use super::super::input::{BootModule, Span};
    use super::super::overlay::test::Runs;
    use super::*;

    const SYMS: StreamSymbols =
        StreamSymbols { list_all: Addr(0x1000), std: [Addr(0x1100), Addr(0x1200), Addr(0x1300)] };
    const OLD: [u64; 2] = [0x8000, 0x8200];
    const NEW: [u64; 2] = [0x9000, 0x9200];

    /// stderr → stdout → stdin behind the given files.
    fn side(files: &[u64], fds: &[u32]) -> Runs {
        let mut m = Runs::default()
            .with(0x1000, vec![0; 0x1000])
            .with(0x8000, vec![0; 0x1000])
            .with(0x9000, vec![0; 0x1000]);
        let all: Vec<u64> = files.iter().copied().chain([0x1300, 0x1200, 0x1100]).collect();
        let mut at = 0x1000;
        for f in &all {
            m.put(at, *f);
            at = f + CHAIN;
        }
        for (f, fd) in files.iter().zip(fds) {
            m.put(f + FILENO, u64::from(*fd));
            m.put(f + VTABLE, 0x2000);
        }
        m
    }
    fn booted() -> Booted {
        Booted {
            retained: vec![Span::new(Addr(0x8000), Addr(0x9000))],
            modules: vec![BootModule {
                start: Addr(0x1000),
                end: Addr(0x3000),
                same_as_old: true,
                ..BootModule::default()
            }],
            ..Booted::default()
        }
    }

    #[test]
    fn old_streams_come_first_and_a_superseded_one_leaves_the_list() {
        let (old, host) = (side(&OLD, &[5, 6]), side(&NEW, &[5, 9]));
        // The host holds old's memory, too.
        let mut both = host.clone();
        both.0[1] = old.0[1].clone();
        let mut out = Overlay::new(&both);
        let mut findings = Vec::new();
        let pairs = by_descriptor(&old, &both, &SYMS);
        assert_eq!(pairs, [(Addr(NEW[0]), Addr(OLD[0]), 5)]);
        let s = adopt(
            &SYMS,
            &old,
            &both,
            &booted(),
            |f| pairs.iter().find(|p| p.0 == f).map(|p| p.1),
            |f| f,
            &mut out,
            &mut findings,
        )
        .unwrap();
        assert_eq!(s.superseded, [Addr(NEW[0])]);
        let want = [OLD[0], OLD[1], NEW[1], 0x1300, 0x1200, 0x1100].map(Addr);
        assert_eq!(list(&out, SYMS.list_all).unwrap(), want);
    }

    #[test]
    fn unwritten_output_is_handed_over_or_named() {
        let (mut old, mut host) = (side(&[], &[]), side(&[], &[]));
        old.0[1].1[..5].copy_from_slice(b"hello");
        old.put(0x1200 + WRITE_BASE, 0x8000);
        old.put(0x1200 + WRITE_PTR, 0x8005);
        {
            let mut out = Overlay::new(&host);
            let mut f = Vec::new();
            let s = adopt(&SYMS, &old, &host, &booted(), |_| None, |f| f, &mut out, &mut f).unwrap();
            assert_eq!((s.pending, f.len()), (0, 1), "no buffer in the new version");
            assert_eq!(f[0].code, "stream-output-lost");
        }
        host.0[2].1[..2].copy_from_slice(b"up");
        host.put(0x1200 + WRITE_BASE, 0x9000);
        host.put(0x1200 + WRITE_PTR, 0x9002);
        host.put(0x1200 + BUF_END, 0x9400);
        let mut out = Overlay::new(&host);
        let mut f = Vec::new();
        let s = adopt(&SYMS, &old, &host, &booted(), |_| None, |f| f, &mut out, &mut f).unwrap();
        assert_eq!((s.pending, f.len()), (5, 0));
        assert_eq!(out.bytes(Addr(0x9000), 7).unwrap(), b"helloup");
        assert_eq!(out.u64(Addr(0x1200 + WRITE_PTR)).unwrap(), 0x9007);
    }

    #[test]
    fn a_looping_list_is_refused() {
        let mut m = side(&OLD, &[5, 6]);
        m.put(OLD[1] + CHAIN, OLD[0]);
        assert!(list(&m, SYMS.list_all).unwrap_err().message.contains("loops"));
    }
}
