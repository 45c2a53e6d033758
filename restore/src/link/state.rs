//! What grows while a link runs: the view of the host as it will be, registers, findings, counts.

use super::output::LinkStats;
use super::overlay::Overlay;
use mcr_image::{Addr, Regs, Tid, proto};
use std::collections::{BTreeMap, BTreeSet};

/// A place that can be written: memory or a live register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// In memory.
    Memory(Addr),
    /// A register (DWARF number) that is still live in the thread.
    Register(Tid, u16),
}

/// The link in progress.
pub struct State<'a> {
    /// The host with everything written so far.
    pub out: Overlay<'a>,
    /// Registers of each thread as they will be.
    pub regs: BTreeMap<Tid, Regs>,
    /// Registers that took an old local's value.
    pub set: BTreeSet<(Tid, u16)>,
    /// What people should know.
    pub findings: Vec<proto::Finding>,
    /// Counts.
    pub stats: LinkStats,
}

/// Mutable access to a register by DWARF number.
pub fn register(regs: &mut Regs, dwarf: u16) -> Option<&mut u64> {
    Some(match dwarf {
        0 => &mut regs.rax,
        1 => &mut regs.rdx,
        2 => &mut regs.rcx,
        3 => &mut regs.rbx,
        4 => &mut regs.rsi,
        5 => &mut regs.rdi,
        6 => &mut regs.rbp,
        7 => &mut regs.rsp,
        8 => &mut regs.r8,
        9 => &mut regs.r9,
        10 => &mut regs.r10,
        11 => &mut regs.r11,
        12 => &mut regs.r12,
        13 => &mut regs.r13,
        14 => &mut regs.r14,
        15 => &mut regs.r15,
        _ => return None,
    })
}

impl State<'_> {
    /// Puts bytes, except where `keep` (relative ranges) says that native bytes stay.
    pub fn put(&mut self, target: Target, bytes: &[u8], keep: &[proto::Range]) {
        match target {
            Target::Memory(addr) => {
                for (start, end) in gaps(bytes.len() as u64, keep) {
                    self.out.write(addr.add(start), &bytes[start as usize..end as usize]);
                }
            }
            Target::Register(tid, r) => {
                let mut word = [0u8; 8];
                let n = bytes.len().min(8);
                word[..n].copy_from_slice(&bytes[..n]);
                if let Some(w) = self.regs.get_mut(&tid).and_then(|regs| register(regs, r)) {
                    *w = u64::from_le_bytes(word);
                    self.set.insert((tid, r));
                }
            }
        }
    }

    /// A finding.
    pub fn find(&mut self, severity: proto::Severity, code: &str, message: String, path: &str) {
        self.findings.push(super::finding(severity, code, message, path));
    }
}

/// `0..len` without the ranges of `keep`.
pub fn gaps(len: u64, keep: &[proto::Range]) -> Vec<(u64, u64)> {
    let mut keep: Vec<(u64, u64)> = keep.iter().map(|r| (r.start.min(len), r.end.min(len))).collect();
    keep.sort_unstable();
    let (mut out, mut at) = (Vec::new(), 0);
    for (s, e) in keep {
        if s > at {
            out.push((at, s));
        }
        at = at.max(e);
    }
    if at < len {
        out.push((at, len));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_leave_out_kept_ranges() {
        let r = |start, end| proto::Range { start, end, why: String::new() };
        assert_eq!(gaps(16, &[]), [(0, 16)]);
        assert_eq!(gaps(16, &[r(8, 12), r(0, 4), r(2, 6)]), [(6, 8), (12, 16)]);
        assert_eq!(gaps(16, &[r(0, 99)]), []);
    }
}
