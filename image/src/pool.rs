//! Compression on all cores: frames go in, come back in the same order.

use crate::format::{RAW, ZSTD, max_raw};
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Something to store.
pub(crate) struct Job {
    pub kind: u32,
    pub desc: Vec<u8>,
    pub content: Vec<u8>,
}

/// Something ready to be written.
pub(crate) struct Packed {
    pub kind: u32,
    pub desc: Vec<u8>,
    pub encoding: u32,
    pub raw: u64,
    pub body: Vec<u8>,
    pub body_crc: u32,
    /// A buffer to use again.
    pub spare: Option<Vec<u8>>,
}

/// Compresses one job; what does not shrink by a sixteenth is stored as it is.
pub(crate) fn pack(job: Job, level: i32, ctx: Option<&mut zstd::bulk::Compressor<'_>>) -> Packed {
    let Job { kind, desc, content } = job;
    let raw = content.len() as u64;
    let packed = match ctx {
        Some(c) => c.compress(&content).ok(),
        None if level != 0 => zstd::bulk::compress(&content, level).ok(),
        None => None,
    };
    let packed = packed
        .filter(|p| p.len() < content.len() - content.len() / 16 && raw <= max_raw(kind, p.len() as u64));
    let (encoding, body, spare) = match packed {
        Some(p) => (ZSTD, p, Some(content)),
        None => (RAW, content, None),
    };
    let mut crc = crc32fast::Hasher::new();
    crc.update(&desc);
    crc.update(&body);
    Packed { kind, desc, encoding, raw, body, body_crc: crc.finalize(), spare }
}

/// Worker threads, started with the first frame.
pub(crate) struct Pool {
    level: i32,
    threads: usize,
    jobs: Option<Sender<(u64, Job)>>,
    results: Option<Receiver<(u64, Packed)>>,
    workers: Vec<JoinHandle<()>>,
    next_in: u64,
    next_out: u64,
    ready: BTreeMap<u64, Packed>,
}

impl Pool {
    pub fn new(level: i32, threads: usize) -> Self {
        Self {
            level,
            threads,
            jobs: None,
            results: None,
            workers: Vec::new(),
            next_in: 0,
            next_out: 0,
            ready: BTreeMap::new(),
        }
    }

    fn start(&mut self) {
        let (jobs_in, jobs_out) = channel::<(u64, Job)>();
        let (results_in, results_out) = channel();
        let jobs_out = Arc::new(Mutex::new(jobs_out));
        for _ in 0..self.threads {
            let (jobs, results, level) = (Arc::clone(&jobs_out), results_in.clone(), self.level);
            let work = move || {
                let mut ctx = zstd::bulk::Compressor::new(level).ok();
                loop {
                    let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((n, job)) = next else { return };
                    if results.send((n, pack(job, level, ctx.as_mut()))).is_err() {
                        return;
                    }
                }
            };
            // A thread that cannot be had is one worker fewer; with none, the caller does the work itself.
            if let Ok(h) = std::thread::Builder::new().name("mcr-compress".into()).spawn(work) {
                self.workers.push(h);
            }
        }
        self.jobs = Some(jobs_in);
        self.results = Some(results_out);
    }

    /// Takes a job. Small ones, and all when nothing is to be compressed, are done at once.
    pub fn submit(&mut self, job: Job) {
        let n = self.next_in;
        self.next_in += 1;
        if self.level == 0 || self.threads < 2 || job.content.len() < 64 << 10 {
            let packed = pack(job, self.level, None);
            self.ready.insert(n, packed);
            return;
        }
        if self.jobs.is_none() {
            self.start();
        }
        let job = match &self.jobs {
            Some(jobs) if !self.workers.is_empty() => match jobs.send((n, job)) {
                Ok(()) => return,
                Err(e) => e.0.1,
            },
            _ => job,
        };
        let packed = pack(job, self.level, None);
        self.ready.insert(n, packed);
    }

    /// The next frame in order: at once if it is ready or `wait` is set, or if too many are under way.
    /// `None`: nothing ready (or nothing left at all). `Err`: a worker died.
    pub fn next(&mut self, wait: bool) -> Result<Option<Packed>, &'static str> {
        loop {
            if let Some(p) = self.ready.remove(&self.next_out) {
                self.next_out += 1;
                return Ok(Some(p));
            }
            let under_way = self.next_in - self.next_out;
            if under_way == 0 {
                return Ok(None);
            }
            let Some(results) = &self.results else {
                return Err("frames were lost");
            };
            let got = if wait || under_way > 4 * self.threads as u64 {
                results.recv().map_err(|_| "a compression thread died")?
            } else {
                match results.try_recv() {
                    Ok(v) => v,
                    Err(_) => return Ok(None),
                }
            };
            self.ready.insert(got.0, got.1);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        self.results = None;
        for w in self.workers.drain(..) {
            let _ = w.join();
        }
    }
}
