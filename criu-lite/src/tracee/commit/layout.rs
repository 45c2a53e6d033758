//! The staging area's bytes.
//!
//! ```text
//! code        the stub, then a tail of 16 bytes for each thread           r-x
//! control     one page                                                    rw-
//! blocks      one for each thread: fields, two contexts, two frames       rw-
//! lists       data, calls, pages, writes; unmapped at the end             rw-
//! ```

use super::super::frame::SigFrame;
use super::place;
use super::plan::{Call, CommitPlan, OnError, as_data, as_result};
use super::rewind::Class;
use super::stub;
use mcr_image::{Addr, Regs};
use std::borrow::Cow;
use std::ops::Range;

/// Offset within a thread's block of its old context.
pub(super) const OLD: u64 = 112;
/// Of its new context.
pub(super) const NEW: u64 = OLD + 216;
/// The signal frames of a block begin here.
const FRAMES: u64 = 576;
/// Size of a call's entry.
pub(super) const ENTRY: u64 = 128;
/// What an entry holds before its call was executed: no call returns this.
pub(super) const NOT_RUN: i64 = i64::MIN;
const PAGE: u64 = 4096;

/// Offsets within the control block.
pub(super) mod control {
    pub(in super::super) const STATE: u64 = 0;
    pub(super) const NEEDED: u64 = 16;
    pub(super) const OTHERS: u64 = 20;
    pub(super) const FLAGS: u64 = 24;
    pub(in super::super) const DONE: u64 = 28;
    pub(in super::super) const FAILED: u64 = 32;
    pub(super) const CALLS: u64 = 40;
    pub(super) const AFTER: u64 = 56;
    pub(super) const WRITES: u64 = 72;
    pub(super) const PAGES: u64 = 88;
    pub(super) const LISTS: u64 = 104;
    pub(super) const NEW: u64 = 120;
    pub(super) const BLOCK: u64 = 136;
    pub(super) const ALL: u64 = 144;
    pub(super) const LEFT: u64 = 148;
    pub(super) const REST: u64 = 160;
}

/// The longest write of one entry: its length stands above the address in one word.
const CHUNK: usize = 0x8000;

/// What a write takes in the list.
fn written(bytes: &[u8]) -> u64 {
    8 * bytes.len().div_ceil(CHUNK) as u64 + (bytes.len() as u64).next_multiple_of(8)
}

/// A thread's state on one side of the commit.
pub(super) struct State<'a> {
    pub regs: Regs,
    pub class: Class,
    pub xstate: Cow<'a, [u8]>,
    pub sigmask: u64,
}

/// Where the parts of an area lie, as offsets from its beginning.
pub(super) struct Layout {
    pub control: u64,
    pub blocks: u64,
    pub block: u64,
    pub lists: u64,
    pub len: u64,
    /// Threads and new threads.
    threads: u64,
    /// Extended state.
    frame: u64,
}

impl Layout {
    /// For a plan whose pages and disjoint writes are given. `xlen`: the longest extended state.
    pub(super) fn new(plan: &CommitPlan, pages: usize, writes: &[(u64, Cow<'_, [u8]>)], xlen: u64) -> Self {
        let threads = (plan.threads.len() + plan.new_threads.len()) as u64;
        let up = |n: u64| n.next_multiple_of(PAGE);
        let control = up(stub::blob().len().next_multiple_of(16) as u64 + 16 * threads);
        let blocks = control + 256;
        let frame = SigFrame::room(xlen).next_multiple_of(64);
        let block = FRAMES + 2 * frame;
        let lists = up(blocks + threads * block);
        let own: usize = plan.threads.iter().map(|t| t.before.len() + t.calls.len()).sum();
        let new: usize = plan.new_threads.iter().map(|t| t.calls.len()).sum();
        let calls = (plan.calls.len() + plan.after.len() + own + new + pages + 1) as u64;
        let bytes: u64 = writes.iter().map(|(_, b)| written(b)).sum();
        let data = (plan.data.len() as u64).next_multiple_of(8);
        let len = up(lists + data + calls * ENTRY + bytes).max(lists + PAGE);
        Self { control, blocks, block, lists, len, threads, frame }
    }

    /// The offset of a thread's block.
    pub(super) fn block(&self, n: usize) -> u64 {
        self.blocks + n as u64 * self.block
    }
}

/// Where the entries of the lists lie, as offsets.
#[derive(Default)]
pub(super) struct Lists {
    pub calls: Range<u64>,
    pub pages: Range<u64>,
    pub after: Range<u64>,
    /// `before` and `calls` of each thread, new ones last.
    pub threads: Vec<[Range<u64>; 2]>,
    writes: Range<u64>,
}

/// Fills an area.
pub(super) struct Builder<'a> {
    pub bytes: &'a mut [u8],
    /// Where it lies in the target.
    pub base: Addr,
    pub layout: &'a Layout,
    /// Where the next list goes.
    next: u64,
    data_len: u64,
}

impl<'a> Builder<'a> {
    pub(super) fn new(bytes: &'a mut [u8], base: Addr, layout: &'a Layout, data: &[u8]) -> Self {
        let at = layout.lists as usize;
        bytes[at..at + data.len()].copy_from_slice(data);
        let data_len = data.len() as u64;
        Self { bytes, base, layout, next: layout.lists + data_len.next_multiple_of(8), data_len }
    }

    pub(super) fn put(&mut self, at: u64, v: u64) {
        self.bytes[at as usize..at as usize + 8].copy_from_slice(&v.to_le_bytes());
    }

    fn put32(&mut self, at: u64, v: u32) {
        self.bytes[at as usize..at as usize + 4].copy_from_slice(&v.to_le_bytes());
    }

    fn address(&self, offset: u64) -> u64 {
        self.base.0 + offset
    }

    fn put_range(&mut self, at: u64, r: &Range<u64>) {
        self.put(at, self.address(r.start));
        self.put(at + 8, self.address(r.end));
    }

    /// The stub's code.
    pub(super) fn code(&mut self) {
        let code = stub::blob();
        self.bytes[..code.len()].copy_from_slice(code);
    }

    /// All lists. An error says which argument is wrong.
    pub(super) fn lists(
        &mut self,
        plan: &CommitPlan,
        pages: &[(u64, u64)],
        writes: &[(u64, Cow<'_, [u8]>)],
    ) -> Result<Lists, String> {
        const MADV_POPULATE_WRITE: u64 = 23;
        // The lists first: one call is cheaper than a fault for each of their pages.
        let (from, to) = (self.address(self.layout.lists), self.address(self.layout.len));
        let populate: Vec<Call> = [(from, to)]
            .iter()
            .chain(pages)
            .map(|&(a, b)| Call::new(libc::SYS_madvise, &[a, b - a, MADV_POPULATE_WRITE]))
            .collect();
        let mut lists = Lists {
            calls: self.calls(&plan.calls, false, "process-wide")?,
            pages: self.calls(&populate, false, "page")?,
            after: self.calls(&plan.after, true, "after")?,
            ..Lists::default()
        };
        for t in &plan.threads {
            let (before, calls) =
                (self.calls(&t.before, false, "before")?, self.calls(&t.calls, false, "thread")?);
            lists.threads.push([before, calls]);
        }
        for t in &plan.new_threads {
            lists.threads.push([0..0, self.calls(&t.calls, false, "new thread")?]);
        }
        let from = self.next;
        for (at, bytes) in writes {
            for (i, b) in bytes.chunks(CHUNK).enumerate() {
                let n = self.next;
                self.put(n, (at + (i * CHUNK) as u64) | (b.len() as u64) << 48);
                self.bytes[n as usize + 8..][..b.len()].copy_from_slice(b);
                self.next = n + 8 + (b.len() as u64).next_multiple_of(8);
            }
        }
        lists.writes = from..self.next;
        Ok(lists)
    }

    fn calls(&mut self, calls: &[Call], ignore: bool, list: &str) -> Result<Range<u64>, String> {
        let from = self.next;
        for (i, c) in calls.iter().enumerate() {
            let n = self.next;
            let arg = |a: u64, least: u64| match (as_data(a), as_result(a)) {
                (Some(off), _) if off > self.data_len => {
                    Err(format!("{list} call {i} points to byte {off} of {} bytes of data", self.data_len))
                }
                (Some(off), _) => Ok(self.address(self.layout.lists + off)),
                (_, Some(back)) if back < least || back > i as u64 => {
                    Err(format!("{list} call {i} uses the result of the call {back} before it"))
                }
                _ => Ok(a),
            };
            let mut words = vec![c.nr as u64];
            for a in c.args {
                words.push(arg(a, 1)?);
            }
            words.push(NOT_RUN as u64);
            words.push(u64::from(ignore || c.on_error == OnError::Ignore) | u64::from(c.undo.is_some()) << 1);
            let (nr, args) = c.undo.unwrap_or_default();
            words.push(nr as u64);
            for a in args {
                words.push(arg(a, 0)?);
            }
            for (k, w) in words.into_iter().enumerate() {
                self.put(n + 8 * k as u64, w);
            }
            self.next = n + ENTRY;
        }
        Ok(from..self.next)
    }

    /// The control block.
    pub(super) fn control(&mut self, plan: &CommitPlan, lists: &Lists) {
        let (c, l) = (self.layout.control, self.layout);
        let others = plan.threads.len() as u32 - 1;
        let before = plan.threads.iter().any(|t| !t.before.is_empty());
        let calls = plan.threads.iter().map(|t| &t.calls).chain(plan.new_threads.iter().map(|t| &t.calls));
        let calls = calls.into_iter().any(|c| !c.is_empty());
        self.put32(c + control::NEEDED, others);
        self.put32(c + control::OTHERS, others);
        self.put32(c + control::ALL, others + plan.new_threads.len() as u32);
        self.put32(c + control::FLAGS, u32::from(before) | u32::from(calls) << 1);
        self.put_range(c + control::CALLS, &lists.calls);
        self.put_range(c + control::AFTER, &lists.after);
        self.put_range(c + control::WRITES, &lists.writes);
        self.put_range(c + control::PAGES, &lists.pages);
        self.put(c + control::LISTS, self.address(l.lists));
        self.put(c + control::LISTS + 8, l.len - l.lists);
        self.put_range(c + control::NEW, &(l.block(plan.threads.len())..l.block(l.threads as usize)));
        self.put(c + control::BLOCK, l.block);
        self.put32(c + control::LEFT, l.threads as u32);
        self.put(c + control::REST, self.address(l.control));
        self.put(c + control::REST + 8, l.len - l.control);
    }

    /// The fields of block `n` that are not contexts.
    pub(super) fn block(&mut self, n: usize, role: u32, own: &[Range<u64>; 2], tid_word: u64) {
        let at = self.layout.block(n);
        self.put(at, self.address(self.layout.control));
        self.put(at + 8, u64::from(role));
        self.put_range(at + 16, &own[0]);
        self.put_range(at + 32, &own[1]);
        self.put(at + 48, tid_word);
    }

    /// The old context of block `n`: a frame in the block, and the registers for the way by hand.
    pub(super) fn old_context(&mut self, n: usize, state: &State<'_>) {
        let (at, top) = (self.layout.block(n) + OLD, self.layout.block(n) + FRAMES + self.layout.frame);
        let r = &state.regs;
        let frame = SigFrame::below(self.address(top), r, &state.xstate, state.sigmask, Addr(0));
        let off = frame.at.since(self.base);
        self.bytes[off as usize..][..frame.bytes.len()].copy_from_slice(&frame.bytes);
        let tail = stub::blob().len().next_multiple_of(16) as u64 + 16 * n as u64;
        self.head(at, frame.at.0, state);
        self.put(at + 64, self.address(tail));
        let words = [
            r.eflags, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15, r.rip,
        ];
        for (k, w) in words.into_iter().enumerate() {
            self.put(at + 72 + 8 * k as u64, w);
        }
        let code = stub::tail(self.address(tail), self.address(at + 200), self.address(at + 208));
        self.bytes[tail as usize..tail as usize + 16].copy_from_slice(&code);
    }

    /// The new context of block `n`: a frame for its own stack, kept in the block until then.
    pub(super) fn new_context(&mut self, n: usize, state: &State<'_>) {
        let (at, slot) = (self.layout.block(n) + NEW, self.layout.block(n) + FRAMES + self.layout.frame);
        let frame = SigFrame::new(&state.regs, &state.xstate, state.sigmask, Addr(0));
        // The same offset within 64 bytes, which is what XSAVE state is aligned to.
        let off = slot + (frame.at.0.wrapping_sub(self.address(slot)) & 63);
        self.bytes[off as usize..][..frame.bytes.len()].copy_from_slice(&frame.bytes);
        let here = self.address(off);
        self.head(at, here, state);
        let end = frame.at.0 + frame.bytes.len() as u64;
        let page = frame.at.0 & !(PAGE - 1);
        let fp = &frame.bytes[SigFrame::FP as usize..][..8];
        let fp = u64::from_le_bytes(fp.try_into().unwrap_or_default());
        let words = [
            frame.at.0,
            frame.bytes.len() as u64,
            page,
            end.next_multiple_of(PAGE) - page,
            if fp == 0 { 0 } else { fp - frame.at.0 + here },
        ];
        for (k, w) in words.into_iter().enumerate() {
            self.put(at + 80 + 8 * k as u64, w);
        }
    }

    /// What both kinds of context begin with.
    fn head(&mut self, at: u64, frame: u64, state: &State<'_>) {
        let words = [
            frame,
            state.class as u64,
            state.sigmask,
            0,
            state.regs.fs_base,
            state.regs.gs_base,
            frame + SigFrame::RIP,
            frame + SigFrame::RAX,
        ];
        for (k, w) in words.into_iter().enumerate() {
            self.put(at + 8 * k as u64, w);
        }
    }
}

/// The pages that a plan writes to: those of the writes and of the tids of new threads.
pub(super) fn written_pages(
    plan: &CommitPlan,
    writes: &[(u64, Cow<'_, [u8]>)],
    maps: &[crate::procfs::maps::MapsLine],
) -> Vec<(u64, u64)> {
    let mut runs = place::page_runs(writes.iter().map(|(a, b)| (*a, *a + b.len() as u64)), maps);
    for at in plan.new_threads.iter().filter_map(|t| t.tid_word) {
        runs.extend(place::page_runs(std::iter::once((at.0, at.0 + 4)), maps));
    }
    runs
}
