//! Where an ELF file's segments go: the calls that a loader makes, as data.

use mcr_image::elf::Segment;
use mcr_image::{Addr, LinkAddr};

const PAGE: u64 = 4096;
/// 2 MiB: a huge page, so that the kernel may use them.
const ALIGN: u64 = 2 << 20;
/// How far the program stays from everything else.
const DISTANCE: u64 = 4 << 30;
/// How far behind the program its start-up's own mappings begin.
const AREA: u64 = 256 << 20;
/// Programs live here (as the kernel places PIEs without randomisation, rounded).
const LOW: u64 = 0x5500_0000_0000;
const HIGH: u64 = 0x5800_0000_0000;

/// One mapping of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LoadMap {
    pub start: Addr,
    pub len: u64,
    pub prot: u32,
    /// `None`: anonymous (the bss beyond the file's last page).
    pub offset: Option<u64>,
    /// Bytes from here to the end of the mapping are cleared: a bss begins in this page.
    pub zero_from: Option<Addr>,
}

/// The mappings of a file under a load bias, ascending.
pub(super) fn plan(segments: &[Segment], bias: Addr) -> Vec<LoadMap> {
    let mut out = Vec::new();
    for s in segments {
        let start = s.vaddr.at(bias).0;
        let (page, slack) = (start & !(PAGE - 1), start & (PAGE - 1));
        let file_end = start + s.file_size;
        let mem_end = start + s.mem_size;
        let mut end = page;
        if s.file_size > 0 {
            end = file_end.next_multiple_of(PAGE);
            // To the END of the page, beyond the bss: ld.so's allocator uses the rest and expects zeros.
            let clear = s.mem_size > s.file_size && s.flags & 2 != 0 && file_end != end;
            out.push(LoadMap {
                start: Addr(page),
                len: end - page,
                prot: s.prot(),
                offset: Some(s.file_offset - slack),
                zero_from: clear.then_some(Addr(file_end)),
            });
        }
        let last = mem_end.next_multiple_of(PAGE);
        if last > end {
            out.push(LoadMap {
                start: Addr(end),
                len: last - end,
                prot: s.prot(),
                offset: None,
                zero_from: None,
            });
        }
    }
    out
}

/// A load bias for a program that spans `range`, away from everything in `taken` (start, end). The same
/// `taken` gives the same answer.
pub(super) fn fresh_bias(range: (LinkAddr, LinkAddr), taken: &[(Addr, Addr)]) -> Option<Addr> {
    let first = range.0.0 & !(PAGE - 1);
    let span = range.1.0.checked_sub(first)?.next_multiple_of(ALIGN);
    let mut base = LOW;
    while base + span <= HIGH {
        let (from, to) = (base - DISTANCE, base + span + DISTANCE);
        match taken.iter().filter(|t| t.0.0 < to && t.1.0 > from).map(|t| t.1.0).max() {
            None => return Some(Addr(base.wrapping_sub(first))),
            Some(end) => base = (end + DISTANCE).next_multiple_of(ALIGN),
        }
    }
    None
}

/// Where the start-up's own mappings begin for a program loaded at `bias`: behind it, in the free space that
/// [`fresh_bias`] found.
pub(super) fn own_area(range: (LinkAddr, LinkAddr), bias: Addr) -> Addr {
    Addr((range.1.at(bias).0 + AREA).next_multiple_of(ALIGN))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seg(vaddr: u64, mem: u64, off: u64, file: u64, flags: u32) -> Segment {
        Segment {
            vaddr: LinkAddr(vaddr),
            mem_size: mem,
            file_offset: off,
            file_size: file,
            flags,
            align: 4096,
        }
    }

    #[test]
    fn segments_become_mappings() {
        let m = plan(&[seg(0, 0x7a0, 0, 0x7a0, 4), seg(0x3dd8, 0x3000, 0x2dd8, 0x250, 6)], Addr(0x10_0000));
        assert_eq!(
            m[0],
            LoadMap { start: Addr(0x10_0000), len: 0x1000, prot: 1, offset: Some(0), zero_from: None }
        );
        assert_eq!(m[1].start, Addr(0x10_3000));
        assert_eq!((m[1].len, m[1].offset, m[1].zero_from), (0x2000, Some(0x2000), Some(Addr(0x10_4028))));
        assert_eq!(
            m[2],
            LoadMap { start: Addr(0x10_5000), len: 0x2000, prot: 3, offset: None, zero_from: None }
        );
        // A read-only segment's tail is never written; a bss without file part has no file mapping.
        assert!(plan(&[seg(0, 0x100, 0, 0x10, 4)], Addr(0))[0].zero_from.is_none());
        assert_eq!(plan(&[seg(0x1000, 0x10, 0x1000, 0, 6)], Addr(0))[0].offset, None);
    }

    #[test]
    fn the_program_keeps_its_distance() {
        let r = (LinkAddr(0), LinkAddr(0x12_3456));
        assert_eq!(fresh_bias(r, &[]), Some(Addr(LOW)));
        let old = (Addr(LOW + 0x1000), Addr(LOW + 0x9000));
        let b = fresh_bias(r, &[old]).unwrap();
        assert!(b.0 >= old.1.0 + DISTANCE && b.0.is_multiple_of(ALIGN));
        // A third one stays away from both, and a heap in between counts.
        let second = (b, b.add(0x20_0000));
        let heap = (Addr(b.0 + DISTANCE * 3 / 2), Addr(b.0 + DISTANCE * 8));
        let c = fresh_bias(r, &[old, second, heap]).unwrap();
        assert!(c.0 >= heap.1.0 + DISTANCE);
        assert_eq!(fresh_bias(r, &[(Addr(LOW), Addr(HIGH))]), None);
    }
}
