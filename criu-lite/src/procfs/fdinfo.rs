//! /proc/PID/fdinfo/N, proc_pid_fdinfo(5): `key:\tvalue` lines, some keys more than once.

use super::{cut, dec, hex, trim};

/// A parsed fdinfo file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdInfo {
    /// File offset.
    pub pos: i64,
    /// Open flags, with O_CLOEXEC where the descriptor has it.
    pub flags: u32,
    /// All other lines.
    pub rest: Vec<(Vec<u8>, Vec<u8>)>,
}

impl FdInfo {
    /// Parses a whole file. Lines without a colon are kept with an empty key.
    #[must_use]
    pub fn parse(text: &[u8]) -> Self {
        let mut out = Self::default();
        for line in text.split(|&b| b == b'\n').filter(|l| !l.is_empty()) {
            let (key, value) = cut(line, b':').map_or((&b""[..], line), |(k, v)| (trim(k), trim(v)));
            let text = std::str::from_utf8(value).unwrap_or("");
            match key {
                b"pos" => out.pos = text.parse().unwrap_or(0),
                b"flags" => out.flags = u32::from_str_radix(text, 8).unwrap_or(0),
                _ => out.rest.push((key.to_vec(), value.to_vec())),
            }
        }
        out
    }

    /// First value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        self.rest.iter().find(|(k, _)| k == key.as_bytes()).map(|(_, v)| v.as_slice())
    }

    /// A decimal value.
    #[must_use]
    pub fn dec(&self, key: &str) -> Option<u64> {
        self.get(key).and_then(dec)
    }

    /// A hexadecimal value.
    #[must_use]
    pub fn hex(&self, key: &str) -> Option<u64> {
        self.get(key).and_then(hex)
    }

    /// A pair like `(1, 500000000)`: seconds and nanoseconds.
    #[must_use]
    pub fn time(&self, key: &str) -> Option<u64> {
        let text = std::str::from_utf8(self.get(key)?).ok()?;
        let (s, ns) = text.trim_matches(['(', ')']).split_once(',')?;
        Some(s.trim().parse::<u64>().ok()? * 1_000_000_000 + ns.trim().parse::<u64>().ok()?)
    }

    /// Lines `tfd: N events: HEX data: HEX …` of an epoll: (fd, events, data).
    #[must_use]
    pub fn watches(&self) -> Vec<(u32, u32, u64)> {
        self.rest
            .iter()
            .filter(|(k, _)| k == b"tfd")
            .filter_map(|(_, v)| {
                let mut words = std::str::from_utf8(v).ok()?.split_ascii_whitespace();
                let fd = words.next()?.parse().ok()?;
                let (mut events, mut data) = (None, None);
                while let Some(w) = words.next() {
                    match w {
                        "events:" => events = u32::from_str_radix(words.next()?, 16).ok(),
                        "data:" => data = u64::from_str_radix(words.next()?, 16).ok(),
                        _ => {}
                    }
                }
                Some((fd, events?, data?))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epoll_and_timer_lines() {
        let f = FdInfo::parse(
            b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\ntfd:        7 events:       19 data: 55d0000000a0  pos:0 ino:3d sdev:9\ntfd:        8 events: 80000001 data:                8\n",
        );
        assert_eq!(f.flags, 0o2_000_002);
        assert_eq!(f.watches(), vec![(7, 0x19, 0x55d0_0000_00a0), (8, 0x8000_0001, 8)]);
        let t = FdInfo::parse(b"clockid: 1\nticks: 3\nit_value: (1, 5)\nit_interval: (0, 50000000)\n");
        assert_eq!((t.dec("ticks"), t.time("it_value")), (Some(3), Some(1_000_000_005)));
        assert_eq!(t.time("it_interval"), Some(50_000_000));
    }
}
