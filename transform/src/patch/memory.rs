//! The old memory with a patch laid over it.

use mcr_image::{Addr, Memory, MemoryError, Region, proto};

/// Reads as the memory that the patch describes: its new regions and its writes over `base`. Words that are
/// only known after the boot (relocations) still show their old value.
pub struct PatchedMemory<'a> {
    base: &'a dyn Memory,
    /// (start, bytes), ascending and disjoint: where writes overlap, the later one has won.
    over: Vec<(u64, Vec<u8>)>,
    regions: Vec<Region>,
}

impl<'a> PatchedMemory<'a> {
    /// Lays `patch` over `base`.
    #[must_use]
    pub fn new(base: &'a dyn Memory, patch: &proto::Patch) -> Self {
        let regions = patch.regions.iter().map(|r| (r.start, r.content.clone()));
        let writes = patch.writes.iter().map(|w| (w.addr, w.content.clone()));
        let over = disjoint(regions.chain(writes).collect());
        let region = |r: &proto::NewRegion| Region {
            start: Addr(r.start),
            end: Addr(r.start + r.content.len() as u64),
            prot: 3,
            name: String::new(),
        };
        let mut regions = base.regions();
        regions.extend(patch.regions.iter().map(region));
        regions.sort_by_key(|r| r.start);
        Self { base, over, regions }
    }

    /// What lies over the old memory: (start, bytes), ascending and disjoint.
    pub(crate) fn laid_over(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.over.iter().map(|o| (o.0, &o.1[..]))
    }
}

/// Joins overlapping runs of bytes; where they overlap, the later one in the list wins.
fn disjoint(list: Vec<(u64, Vec<u8>)>) -> Vec<(u64, Vec<u8>)> {
    let mut order: Vec<(usize, (u64, Vec<u8>))> = list.into_iter().enumerate().collect();
    order.sort_by_key(|(i, o)| (o.0, *i));
    let mut out: Vec<(u64, Vec<u8>)> = Vec::with_capacity(order.len());
    let mut group: Vec<(usize, (u64, Vec<u8>))> = Vec::new();
    let mut end = 0;
    let mut close = |group: &mut Vec<(usize, (u64, Vec<u8>))>, end: u64| match group.len() {
        0 => {}
        1 => out.extend(group.pop().map(|g| g.1)),
        _ => {
            let start = group[0].1.0;
            let mut all = vec![0; (end - start) as usize];
            group.sort_by_key(|g| g.0);
            for (_, (at, raw)) in group.drain(..) {
                all[(at - start) as usize..][..raw.len()].copy_from_slice(&raw);
            }
            out.push((start, all));
        }
    };
    for o in order.into_iter().filter(|o| !o.1.1.is_empty()) {
        if o.1.0 >= end {
            close(&mut group, end);
        }
        end = end.max(o.1.0 + o.1.1.len() as u64);
        group.push(o);
    }
    close(&mut group, end);
    out
}

impl Memory for PatchedMemory<'_> {
    fn read(&self, addr: Addr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let end = addr.0 + buf.len() as u64;
        let first = self.over.partition_point(|o| o.0 + o.1.len() as u64 <= addr.0);
        let hit = |o: &(u64, Vec<u8>)| o.0 < end;
        let covered = self.over.get(first).is_some_and(|o| o.0 <= addr.0 && end <= o.0 + o.1.len() as u64);
        if !covered {
            self.base.read(addr, buf)?;
        }
        for o in self.over[first..].iter().take_while(|o| hit(o)) {
            let (lo, hi) = (o.0.max(addr.0), (o.0 + o.1.len() as u64).min(end));
            let from = &o.1[(lo - o.0) as usize..(hi - o.0) as usize];
            buf[(lo - addr.0) as usize..(hi - addr.0) as usize].copy_from_slice(from);
        }
        Ok(())
    }
    fn regions(&self) -> Vec<Region> {
        self.regions.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_later_write_wins() {
        let list = vec![(100, vec![1; 8]), (104, vec![2; 2]), (200, vec![3; 4]), (108, vec![4; 1])];
        let out = disjoint(list);
        assert_eq!(out, [(100, vec![1, 1, 1, 1, 2, 2, 1, 1]), (108, vec![4]), (200, vec![3; 4])]);
    }
}
