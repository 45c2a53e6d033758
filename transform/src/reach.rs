//! Which heap chunks anything still refers to, conservatively: every aligned word that lies in a chunk keeps
//! it. Computed only when a refusal depends on it; a block that nothing refers to (a leak, what the start-up
//! of an earlier update left) cannot make an update wrong.

use crate::space::{Space, Spot};
use mcr_image::{Addr, Memory, proto};
use std::cell::OnceCell;
use std::collections::HashSet;

pub(crate) struct Reach<'a> {
    memory: &'a dyn Memory,
    process: &'a proto::Process,
    space: &'a Space<'a>,
    marked: OnceCell<HashSet<usize>>,
}

impl<'a> Reach<'a> {
    pub fn new(memory: &'a dyn Memory, process: &'a proto::Process, space: &'a Space<'a>) -> Self {
        Self { memory, process, space, marked: OnceCell::new() }
    }

    /// Something live refers to the memory at `addr` (or it is no heap chunk).
    pub fn is_live(&self, addr: u64) -> bool {
        match self.space.spot(addr) {
            Spot::Chunk(i) => self.marked.get_or_init(|| self.mark()).contains(&i),
            _ => true,
        }
    }

    fn mark(&self) -> HashSet<usize> {
        const RSP: usize = 19; // struct user_regs_struct
        const RED_ZONE: u64 = 128;
        let mut marked = HashSet::new();
        let mut queue = Vec::new();
        let words = |bytes: &[u8], marked: &mut HashSet<usize>, queue: &mut Vec<usize>| {
            for w in bytes.chunks_exact(8) {
                let v = u64::from_le_bytes(w.try_into().expect("eight bytes"));
                if let Some(i) = self.space.heap.index(Addr(v))
                    && self.space.heap.chunks[i].state.in_use()
                    && marked.insert(i)
                {
                    queue.push(i);
                }
            }
        };
        for t in &self.process.threads {
            let regs: Vec<u8> = t.regs.iter().flat_map(|r| r.to_le_bytes()).collect();
            words(&regs, &mut marked, &mut queue);
        }
        for fd in &self.process.fds {
            let Some(proto::fd::Object::Epoll(e)) = &fd.object else { continue };
            let data: Vec<u8> = e.watches.iter().flat_map(|w| w.data.to_le_bytes()).collect();
            words(&data, &mut marked, &mut queue);
        }
        for v in self.process.vmas.iter().filter(|v| v.prot & 3 == 3) {
            let start = match self.space.spot(v.start) {
                Spot::Stack(t) => {
                    let sp =
                        self.process.threads.get(t).and_then(|t| t.regs.get(RSP)).copied().unwrap_or(v.start);
                    if (v.start..v.end).contains(&sp) { (sp - RED_ZONE).max(v.start) & !7 } else { v.start }
                }
                Spot::Chunk(_) | Spot::HeapGap => continue,
                _ => v.start,
            };
            let mut at = start;
            while at < v.end {
                let len = (v.end - at).min(1 << 20);
                if let Ok(b) = self.memory.bytes(Addr(at), len as usize) {
                    words(&b, &mut marked, &mut queue);
                }
                at += len;
            }
        }
        while let Some(i) = queue.pop() {
            let c = &self.space.heap.chunks[i];
            if let Ok(b) = self.memory.bytes(c.addr, c.usable as usize) {
                words(&b, &mut marked, &mut queue);
            }
        }
        marked
    }
}
