//! I10 and I11 over the finished write list: the host as it will be is compared with the old process. How the list
//! came about (the pairing, the patch's way through `link`) is not asked.
//!
//! - what the patch says has arrived, and nothing else in old memory has changed (`delivered`);
//! - every pointer of old's typed memory leads to the same object (`mcr_transform::verify`);
//! - a thread's own words are its own still (`threads`);
//! - a start-up object is one object of old's or none, for every word that leads to it (`twins`);
//! - what the kernel keeps for the program (epoll data, timers, the arguments of blocked calls) means the same
//!   (`kernel`).

mod delivered;
mod kernel;
mod listed;
mod placed;
mod threads;
mod twins;

use super::globals::Layout;
use super::input::NewThread;
use super::locals::Sites;
use super::output::{Refusal, WriteList};
use super::{LinkInput, heap_refusal, heap_threads, malloc_offsets};
use listed::Listed;
use mcr_image::unwind::{Frame, unwind};
use mcr_image::{Memory, Regs, Tid, proto};
use mcr_transform::Prepared;
use mcr_transform::heap::GlibcHeap;
use mcr_transform::verify::{Broken, Relations, Verifier};
use placed::Placed;

/// What was compared.
#[derive(Clone, Debug, Default)]
pub struct Checked {
    /// Typed pointers.
    pub relations: Relations,
    /// Words of threads, and of what the kernel keeps.
    pub words: usize,
    /// Bytes of the patch that were found in place.
    pub delivered: usize,
    /// What people should know.
    pub findings: Vec<proto::Finding>,
}

/// Up to this many bytes of old's heap that change are compared in the pause, too.
const CHEAP: usize = 1 << 20;

/// How much to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// What the write list changes, the threads' own words, and what the kernel keeps: for the pause.
    Words,
    /// Also everything that typed pointers reach, and the round trip.
    All,
}

/// The host as it will be.
struct Final<'a> {
    input: &'a LinkInput<'a>,
    list: &'a WriteList,
    view: &'a dyn Memory,
    layout: &'a Layout<'a>,
    sites: &'a Sites,
    verifier: &'a Verifier<'a>,
    at: Placed<'a>,
}

impl Final<'_> {
    /// General registers of a new thread.
    fn regs(&self, t: &NewThread) -> Regs {
        self.list.registers.iter().find(|r| r.tid == t.tid).map_or(t.regs, |r| r.regs)
    }

    /// Each old thread with the one that takes it over.
    fn threads(&self) -> impl Iterator<Item = (&proto::Thread, &NewThread)> {
        self.input
            .process
            .threads
            .iter()
            .filter_map(|o| Some((o, self.input.booted.thread_for(Tid(o.tid as i32))?)))
    }

    /// Where the new threads keep tcache and arena.
    fn malloc_offsets(&self, native: &GlibcHeap) -> Option<super::malloc::TlsOffsets> {
        malloc_offsets(self.input, native, self.input.patch.heap.as_ref()?, self.layout.tls_offset)
    }

    /// The new version has an object of old's (retained or moved) at an address.
    fn is_old_object(&self, a: u64) -> bool {
        self.verifier.is_object(a)
            || self.input.patch.regions.iter().any(|r| r.start <= a && a < r.start + r.content.len() as u64)
    }
}

/// I10, and with [`Depth::All`] I11: what is true of the old process will be true of the new one.
pub fn check(
    input: &LinkInput<'_>,
    list: &WriteList,
    prepared: &Prepared<'_>,
    depth: Depth,
) -> Result<Checked, Refusal> {
    let view = Listed { base: input.host, writes: &list.memory };
    let read_now;
    let heap = match input.old_heap {
        Some(h) => h,
        None => {
            read_now = GlibcHeap::read(input.old, &input.process.threads, &input.process.vmas)
                .map_err(|e| heap_refusal("old", &e.to_string()))?;
            &read_now
        }
    };
    let Some(verifier) =
        Verifier::new(prepared, input.process, input.old, input.old_modules, heap, input.patch)
    else {
        return Ok(Checked::default());
    };
    let frames: Vec<(Tid, Vec<Frame>)> = input
        .booted
        .threads
        .iter()
        .map(|t| (t.tid, unwind(input.modules, input.host, &t.regs).frames))
        .collect();
    let sites = Sites::read(input.types, input.host, input.booted.new_base, &frames);
    let layout = Layout {
        booted: input.booted,
        tls_offset: input.new_elf.tls().map_or(0, |t| t.exe_offset()),
        sites: &sites,
        old_pid: input.process.pid,
    };
    let now = Final {
        input,
        list,
        view: &view,
        layout: &layout,
        sites: &sites,
        verifier: &verifier,
        at: Placed { input, list, layout: &layout, sites: &sites, view: &view },
    };
    let native_threads = heap_threads(input.booted);
    let native = GlibcHeap::read_again(
        input.host,
        &native_threads,
        &input.booted.native_vmas(),
        heap.known().as_ref(),
    )
    .map_err(|e| heap_refusal("new", &e.to_string()))?;
    let heavy: usize = input.patch.regions.iter().map(|r| r.content.len()).sum::<usize>()
        + input.patch.writes.iter().map(|w| w.content.len()).sum::<usize>();
    let heap_too = depth == Depth::All || heavy <= CHEAP;
    let asked = delivered::asked(&now, heap_too)?;
    let mut out = Checked { delivered: delivered::check(&now, &asked, heap_too)?, ..Checked::default() };
    out.words += threads::check(&now, &native, &mut out.findings)?;
    out.words += twins::check(&now, &native, &asked.state.out, &asked.state.set)?;
    out.words += kernel::check(&now)?;
    if depth == Depth::All {
        out.relations = verifier.relations(&view, &now.at).map_err(refused)?;
        let trip = verifier.round_trip(&view, &now.at).map_err(refused)?;
        out.findings.extend(trip.finding());
    }
    Ok(out)
}

fn refused(b: Broken) -> Refusal {
    Refusal { invariant: b.invariant, message: b.message, path: b.path, next_step: b.next_step.into() }
}

const NEXT: &str =
    "the old server goes on; try again, and report this with an image of the process if it stays";

/// I10 does not hold.
fn relation(message: String, path: impl Into<String>) -> Refusal {
    Refusal::new("I10", message, NEXT).at(path)
}
