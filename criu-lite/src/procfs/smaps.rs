//! VmFlags of /proc/PID/smaps, proc_pid_smaps(5). The kernel walks the page tables for this file: some 30 ms for a
//! GiB of small pages.

use super::maps::{self, MapsLine};
use mcr_image::Pid;

/// Every mapping with its two-letter VmFlags, unknown ones too.
pub fn read(pid: Pid) -> std::io::Result<Vec<(MapsLine, Vec<String>)>> {
    Ok(parse(&std::fs::read(format!("/proc/{pid}/smaps"))?))
}

fn parse(text: &[u8]) -> Vec<(MapsLine, Vec<String>)> {
    let mut out: Vec<(MapsLine, Vec<String>)> = Vec::new();
    for l in text.split(|&b| b == b'\n') {
        if let Some(flags) = l.strip_prefix(b"VmFlags:") {
            if let (Some(last), Ok(flags)) = (out.last_mut(), std::str::from_utf8(flags)) {
                last.1 = flags.split_ascii_whitespace().map(str::to_owned).collect();
            }
        } else if l.first().is_some_and(|c| c.is_ascii_hexdigit() && !c.is_ascii_uppercase())
            && let Some(m) = maps::line(l)
        {
            out.push((m, Vec::new()));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_smaps() {
        let f = read(Pid(std::process::id() as i32)).unwrap();
        assert!(f.len() > 5);
        assert!(f.iter().any(|(_, v)| v.iter().any(|x| x == "gd")), "a stack grows down");
    }
}
