//! VmFlags of /proc/PID/smaps, proc_pid_smaps(5).

use super::maps;
use mcr_image::{Addr, Pid};
use std::collections::HashMap;

/// Start of a mapping → its two-letter VmFlags, unknown ones too.
pub fn vm_flags(pid: Pid) -> std::io::Result<HashMap<Addr, Vec<String>>> {
    Ok(parse(&std::fs::read(format!("/proc/{pid}/smaps"))?))
}

fn parse(text: &[u8]) -> HashMap<Addr, Vec<String>> {
    let mut out = HashMap::new();
    let mut at = None;
    for l in text.split(|&b| b == b'\n') {
        if let Some(flags) = l.strip_prefix(b"VmFlags:") {
            if let (Some(at), Ok(flags)) = (at, std::str::from_utf8(flags)) {
                out.insert(at, flags.split_ascii_whitespace().map(str::to_owned).collect());
            }
        } else if l.first().is_some_and(|c| c.is_ascii_hexdigit() && !c.is_ascii_uppercase())
            && let Some(m) = maps::line(l)
        {
            at = Some(m.start);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_smaps() {
        let f = vm_flags(Pid(std::process::id() as i32)).unwrap();
        assert!(f.len() > 5);
        assert!(f.values().any(|v| v.iter().any(|x| x == "gd")), "a stack grows down");
    }
}
