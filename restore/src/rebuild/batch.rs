//! Many calls at once in the new process, each with a name for its error.

use super::RebuildError;
use super::remote::{Call, Inject};
use std::io;

/// What a failed call is called, and whether it may fail.
struct Entry {
    object: String,
    call: &'static str,
    next: &'static str,
}

/// Collects calls and their argument data, and executes them in order.
pub(super) struct Batch<'a, I: Inject> {
    target: &'a mut I,
    base: u64,
    room: usize,
    blob: Vec<u8>,
    calls: Vec<Call>,
    entries: Vec<Entry>,
}

impl<'a, I: Inject> Batch<'a, I> {
    pub(super) fn new(target: &'a mut I) -> Result<Self, RebuildError> {
        let (base, room) =
            target.scratch().map_err(RebuildError::call("the new process", "scratch memory"))?;
        Ok(Self { target, base: base.0, room, blob: Vec::new(), calls: Vec::new(), entries: Vec::new() })
    }

    /// Puts argument data beside the calls; the address is for calls added next.
    pub(super) fn data(&mut self, bytes: &[u8]) -> u64 {
        self.blob.resize(self.blob.len().next_multiple_of(16), 0);
        let at = self.base + self.blob.len() as u64;
        self.blob.extend_from_slice(bytes);
        at
    }

    /// A NUL-terminated string as argument data.
    pub(super) fn string(&mut self, s: &str) -> u64 {
        let mut b = s.as_bytes().to_vec();
        b.push(0);
        self.data(&b)
    }

    /// Adds a call that must succeed.
    pub(super) fn add(
        &mut self,
        object: impl Into<String>,
        call: &'static str,
        nr: i64,
        args: &[u64],
        next: &'static str,
    ) -> Result<(), RebuildError> {
        self.calls.push(Call::new(nr, args));
        self.entries.push(Entry { object: object.into(), call, next });
        if self.blob.len() > self.room / 2 || self.calls.len() >= 4096 { self.run() } else { Ok(()) }
    }

    /// Executes what has been added; the first failure is the error.
    pub(super) fn run(&mut self) -> Result<(), RebuildError> {
        if self.calls.is_empty() {
            return Ok(());
        }
        let inner = |e: io::Error| RebuildError::Call {
            object: "the new process".to_owned(),
            call: "executing calls in it",
            source: e,
            next: "",
        };
        if self.blob.len() > self.room {
            return Err(inner(io::Error::other("arguments larger than the scratch memory")));
        }
        self.target.poke(mcr_image::Addr(self.base), &self.blob).map_err(inner)?;
        let results = self.target.inject_all(&self.calls).map_err(inner)?;
        for (r, e) in results.into_iter().zip(self.entries.drain(..)) {
            if let Err(source) = super::remote::result(r) {
                return Err(RebuildError::Inside { object: e.object, call: e.call, source, next: e.next });
            }
        }
        self.blob.clear();
        self.calls.clear();
        Ok(())
    }
}
