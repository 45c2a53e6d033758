//! Where things lie: the staging area's address, the write list without overlaps, the pages it touches.

use super::plan::{Call, CommitPlan};
use crate::procfs::maps::MapsLine;
use mcr_image::Addr;
use std::borrow::Cow;

/// The lowest and the highest address that the area may have.
const LOW: u64 = 1 << 20;
const HIGH: u64 = 0x7fff_ffff_f000;
const PAGE: u64 = 4096;

/// Ranges that a plan may map or write, whatever is there now. `pages`: those that it writes to.
pub(super) fn claimed(plan: &CommitPlan, pages: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = plan.keep_clear.iter().map(|(a, b)| (a.0, b.0)).collect();
    out.extend_from_slice(pages);
    let threads = plan.threads.iter().flat_map(|t| t.before.iter().chain(&t.calls));
    let lists = plan.calls.iter().chain(&plan.after).chain(threads);
    let calls = lists.chain(plan.new_threads.iter().flat_map(|t| &t.calls));
    for (nr, a) in calls.flat_map(|c: &Call| [Some((c.nr, c.args)), c.undo]).flatten() {
        match nr {
            libc::SYS_mmap if a[3] & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE) as u64 != 0 => {
                out.push((a[0], a[0].saturating_add(a[1])));
            }
            libc::SYS_mremap if a[3] & libc::MREMAP_FIXED as u64 != 0 => {
                out.push((a[4], a[4].saturating_add(a[2])));
            }
            libc::SYS_munmap => out.push((a[0], a[0].saturating_add(a[1]))),
            _ => {}
        }
    }
    out
}

/// The middle of the widest gap between mappings and claimed ranges: nothing grows to there.
pub(super) fn address(maps: &[MapsLine], claimed: &[(u64, u64)], len: u64) -> Option<u64> {
    let mut used: Vec<(u64, u64)> = maps.iter().map(|m| (m.start.0, m.end.0)).collect();
    used.extend_from_slice(claimed);
    used.push((HIGH, u64::MAX));
    used.sort_unstable();
    let (mut best, mut from) = ((0, 0), LOW);
    for (start, end) in used {
        let start = start.min(HIGH);
        if start > from && start - from > best.1 {
            best = (from, start - from);
        }
        from = from.max(end);
    }
    let at = (best.0 + best.1 / 2) & !(PAGE - 1);
    (best.1 / 2 > len + PAGE).then_some(at)
}

/// The writes in address order without overlaps: where some overlap, later ones lie over earlier ones.
pub(super) fn disjoint(writes: &[(Addr, Vec<u8>)]) -> Vec<(u64, Cow<'_, [u8]>)> {
    let tidy = writes.windows(2).all(|w| w[0].0.0 + w[0].1.len() as u64 <= w[1].0.0);
    if tidy {
        let some = writes.iter().filter(|w| !w.1.is_empty());
        return some.map(|(a, b)| (a.0, Cow::Borrowed(b.as_slice()))).collect();
    }
    let mut order: Vec<usize> = (0..writes.len()).filter(|&i| !writes[i].1.is_empty()).collect();
    order.sort_by_key(|&i| writes[i].0);
    let end = |i: usize| writes[i].0.0 + writes[i].1.len() as u64;
    let mut out = Vec::with_capacity(order.len());
    let mut rest = order.as_slice();
    while let Some(&first) = rest.first() {
        // A cluster of writes of which each overlaps the union of those before it.
        let start = writes[first].0.0;
        let (mut to, mut n) = (end(first), 1);
        while let Some(&i) = rest.get(n).filter(|&&i| writes[i].0.0 < to) {
            to = to.max(end(i));
            n += 1;
        }
        if n == 1 {
            out.push((start, Cow::Borrowed(writes[first].1.as_slice())));
        } else {
            let mut bytes = vec![0; (to - start) as usize];
            let mut cluster = rest[..n].to_vec();
            cluster.sort_unstable();
            for i in cluster {
                let at = (writes[i].0.0 - start) as usize;
                bytes[at..at + writes[i].1.len()].copy_from_slice(&writes[i].1);
            }
            out.push((start, Cow::Owned(bytes)));
        }
        rest = &rest[n..];
    }
    out
}

/// Page runs of ranges in address order. Small holes are bridged where one mapping covers them.
pub(super) fn page_runs(ranges: impl Iterator<Item = (u64, u64)>, maps: &[MapsLine]) -> Vec<(u64, u64)> {
    const BRIDGE: u64 = 8 * PAGE;
    let mut out: Vec<(u64, u64)> = Vec::new();
    let mut map = 0;
    for (start, end) in ranges {
        let (start, end) = (start & !(PAGE - 1), (end + PAGE - 1) & !(PAGE - 1));
        while maps.get(map).is_some_and(|m| m.end.0 <= start) {
            map += 1;
        }
        let covered = maps.get(map).map_or(u64::MAX, |m| m.start.0);
        match out.last_mut() {
            Some(last) if start <= last.1 || (start - last.1 <= BRIDGE && covered <= last.1) => {
                last.1 = last.1.max(end);
            }
            _ => out.push((start, end)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn w(at: u64, b: &[u8]) -> (Addr, Vec<u8>) {
        (Addr(at), b.to_vec())
    }

    #[test]
    fn overlapping_writes_become_disjoint_and_later_ones_win() {
        let writes = [w(8, b"dddd"), w(0, b"aaaa"), w(2, b"bb"), w(3, b"ccc"), w(20, b""), w(12, b"e")];
        let got = disjoint(&writes);
        let flat: Vec<(u64, &[u8])> = got.iter().map(|(a, b)| (*a, b.as_ref())).collect();
        assert_eq!(flat, [(0, &b"aabccc"[..]), (8, &b"dddd"[..]), (12, &b"e"[..])]);
    }

    #[test]
    fn the_area_keeps_clear_of_what_the_plan_maps() {
        let mut plan = CommitPlan::default();
        let free = address(&[], &[], 1 << 20).unwrap();
        let flags = libc::MAP_FIXED as u64;
        plan.calls.push(Call::new(libc::SYS_mmap, &[free - (1 << 30), 1 << 31, 3, flags]));
        let at = address(&[], &claimed(&plan, &[]), 1 << 20).unwrap();
        assert!(at + (1 << 20) <= free - (1 << 30) || at >= free + (1 << 30), "{at:#x}");
        assert_eq!(address(&[], &[(0, HIGH - 8192)], 1 << 20), None);
    }

    #[test]
    fn page_runs_are_whole_pages_and_do_not_repeat() {
        let runs = page_runs([(10, 20), (4000, 4100), (8191, 8193), (40960, 40961)].into_iter(), &[]);
        assert_eq!(runs, [(0, 12288), (40960, 45056)]);
    }
}
