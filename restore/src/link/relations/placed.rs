//! Where things are in a booted host, for the comparison.

use super::super::LinkInput;
use super::super::globals::Layout;
use super::super::locals::{Site, Sites};
use super::super::output::WriteList;
use super::super::state::{Target, register};
use mcr_image::{Addr, Memory, Tid, proto};
use mcr_transform::verify::{Placing, Root};

/// A booted host with a write list laid over it.
pub(super) struct Placed<'a> {
    pub input: &'a LinkInput<'a>,
    pub list: &'a WriteList,
    pub layout: &'a Layout<'a>,
    pub sites: &'a Sites,
    pub view: &'a dyn Memory,
}

impl Placed<'_> {
    fn site(&self, tid: u32, frame: u32, function: &str, variable: &str) -> Option<&Site> {
        let t = self.input.booted.thread_for(Tid(tid as i32))?;
        self.sites.find(t.tid, frame, function, variable)
    }

    fn read(&self, at: Addr, len: usize) -> Option<Vec<u8>> {
        self.view.bytes(at, len).ok()
    }
}

impl Placing for Placed<'_> {
    fn program(&self) -> Option<Addr> {
        Some(self.input.booted.new_base)
    }
    fn thread(&self, old_tid: u32) -> Option<u64> {
        self.input.booted.thread_for(Tid(old_tid as i32)).map(|t| t.fs_base.0)
    }
    fn tls(&self, old_tid: u32, offset: u64) -> Option<u64> {
        self.layout.tls(old_tid, offset, "").ok().map(|a| a.0)
    }
    fn local(&self, at: &proto::LocalAddr) -> Option<u64> {
        match self.site(at.old_tid, at.frame, &at.function, &at.variable)?.target? {
            Target::Memory(a) => Some(a.0.wrapping_add(at.offset)),
            Target::Register(..) => None,
        }
    }
    fn pid(&self, old: u32) -> Option<u32> {
        let booted = self.input.booted;
        if booted.in_place {
            return Some(old);
        }
        if old == self.input.process.pid {
            return Some(booted.pid.0 as u32);
        }
        booted.thread_for(Tid(old as i32)).map(|t| t.tid.0 as u32)
    }
    fn root(&self, root: Root) -> Option<Vec<u8>> {
        let patch = self.input.patch;
        match root {
            Root::Global(i) => {
                let g = patch.globals.get(i)?;
                self.read(self.layout.global(g.new_link_addr), g.content.len())
            }
            Root::Tls(i) => {
                let t = patch.tls.get(i)?;
                self.read(self.layout.tls(t.old_tid, t.new_tls_offset, &t.name).ok()?, t.content.len())
            }
            Root::Local(i) => {
                let l = patch.locals.get(i)?;
                let site = self.site(l.old_tid, l.frame, &l.function, &l.variable)?;
                // What did not fit was dropped, and told.
                if self.input.types.size_of(site.local.ty) != l.content.len() as u64 {
                    return None;
                }
                match site.target? {
                    Target::Memory(a) => self.read(a, l.content.len()),
                    Target::Register(tid, r) => {
                        let t = self.input.booted.threads.iter().find(|t| t.tid == tid)?;
                        let mut regs =
                            self.list.registers.iter().find(|w| w.tid == tid).map_or(t.regs, |w| w.regs);
                        let word = register(&mut regs, r)?.to_le_bytes();
                        word.get(..l.content.len().min(8)).map(<[u8]>::to_vec)
                    }
                }
            }
        }
    }
}
