//! From a running process to an image: freeze, quiesce, collect, read the memory, and end it or let it go.
//!
//! With `leave_running` the memory is read from a copy-on-write child after the process was let go; the pause
//! is then freeze, quiesce, collect and one fork.

use crate::collect::{CollectError, Collected};
use crate::freeze::{FreezeError, FreezeOptions, Frozen, reap_hidden};
use crate::quiesce::{QuiesceError, QuiesceOptions};
use crate::snapshot::Plan;
use crate::{ProcessMemory, TraceError, modules};
use mcr_image::proto::{self, EmbeddedFile, Phase, VmaKind};
use mcr_image::{Addr, ImageError, ImageWriter, Memory, MemoryError, Pid, RecordKind, WriterOptions};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How to dump.
#[derive(Clone, Debug)]
pub struct DumpOptions {
    /// The process goes on afterwards; otherwise it ends once the image is safely on disk.
    pub leave_running: bool,
    /// For every thread to become quiescent.
    pub timeout: Duration,
    /// zstd level; 0 stores everything as it is.
    pub level: i32,
}

impl Default for DumpOptions {
    fn default() -> Self {
        let level = WriterOptions::default().level;
        Self { leave_running: false, timeout: Duration::from_secs(5), level }
    }
}

/// Why there is no image. The process runs on as before.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// It cannot be frozen.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// No quiescent point.
    #[error(transparent)]
    Quiesce(#[from] QuiesceError),
    /// Something that images do not hold.
    #[error(transparent)]
    Collect(#[from] CollectError),
    /// A tracing request failed.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The image cannot be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Memory cannot be read.
    #[error("process {pid}: {source}; it runs on")]
    Memory {
        /// The process.
        pid: Pid,
        /// Why.
        source: MemoryError,
    },
    /// A file cannot be read.
    #[error("process {pid}: {what}: {source}; it runs on")]
    Io {
        /// The process.
        pid: Pid,
        /// File and call.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// What the caller does while the process stands still.
    #[error("process {pid}: {text}; it runs on")]
    Hook {
        /// The process.
        pid: Pid,
        /// What it said.
        text: String,
    },
}

/// What the caller adds to the image while the process stands still: who keeps its connections.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// Name of the keeper's socket.
    pub socket: String,
    /// When it lets go, in Unix seconds.
    pub deadline_unix_s: u64,
}

/// Called with the frozen process's data, before it ends.
pub type OnFrozen<'h> = dyn FnMut(&str, &mut Collected) -> Result<Kept, String> + 'h;

/// A written image.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct DumpReport {
    /// The process.
    pub pid: i32,
    /// Random name of the image.
    pub image_id: String,
    /// It was left running.
    pub left_running: bool,
    /// How long the process stood still; for a process that ended: until it ended.
    pub frozen_us: u64,
    /// Whether the engine ran at real-time priority meanwhile.
    pub real_time: bool,
    /// What was done when.
    pub phases: Vec<Phase>,
    /// Length of the image.
    pub image_bytes: u64,
    /// Pages stored.
    pub pages: u64,
    /// Pages that were all zero.
    pub zero_pages: u64,
}

struct Clock {
    origin: Instant,
    last: Instant,
    phases: Vec<Phase>,
}

impl Clock {
    fn lap(&mut self, name: &str, frozen: bool) {
        self.lap_until(name, frozen, Instant::now());
    }

    fn lap_until(&mut self, name: &str, frozen: bool, now: Instant) {
        self.phases.push(Phase {
            name: name.to_owned(),
            start_us: (self.last - self.origin).as_micros() as u64,
            duration_us: (now - self.last).as_micros() as u64,
            frozen,
        });
        self.last = now;
    }
}

/// Dumps a process into the file `output` (`-`: standard output).
pub fn dump(
    pid: Pid,
    output: &Path,
    options: &DumpOptions,
    on_frozen: &mut OnFrozen<'_>,
) -> Result<DumpReport, DumpError> {
    let now = Instant::now();
    let mut clock = Clock { origin: now, last: now, phases: Vec::new() };
    crate::freeze::examine(pid)?;
    // A file that cannot be written is found before anything stands still.
    let mut writer =
        ImageWriter::create_with(output, WriterOptions { level: options.level, ..WriterOptions::default() })?;
    modules::preload(pid);

    let mut frozen = Frozen::seize(pid, &FreezeOptions { timeout: options.timeout })?;
    let stands_since = frozen.since();
    let real_time = frozen.is_real_time();
    clock.lap_until("prepare", false, stands_since);
    clock.lap("freeze", true);
    let states = frozen.quiesce(&QuiesceOptions { timeout: options.timeout })?;
    clock.lap("quiesce", true);
    let mut all = frozen.collect(&states)?;
    clock.lap("collect", true);
    let image_id = random_id(pid)?;
    let kept = on_frozen(&image_id, &mut all).map_err(|text| DumpError::Hook { pid, text })?;
    clock.lap("connections", true);
    describe_files(pid, &mut all.process);
    let plan =
        Plan::new(pid, &all.process.vmas).map_err(|(what, source)| DumpError::Io { pid, what, source })?;
    // What a copy-on-write child does not freeze: files and shared memory.
    contents(pid, &mut writer, &all)?;
    clock.lap("files", true);

    let written;
    let frozen_us;
    if options.leave_running {
        pages(pid, &mut writer, frozen.memory(), &plan.not_in_child)?;
        clock.lap("shared memory", true);
        let mut child = frozen.fork_hidden()?;
        // Neither the copy nor we may hold on to what the process closes from now on.
        let closed = child.syscall(libc::SYS_close_range, &[0, u64::from(u32::MAX), 0]);
        all.let_go();
        clock.lap("fork", true);
        frozen_us = frozen.thaw()?.as_micros() as u64;
        clock.lap("thaw", true);
        let (memory, child_pid) = (child.memory().clone(), child.pid());
        let result =
            closed.map_err(DumpError::from).and_then(|_| pages(pid, &mut writer, &memory, &plan.in_child));
        // Whatever happened, nothing of ours stays behind.
        let killed = child.kill();
        let reaped = reap_hidden(pid, child_pid);
        result?;
        killed?;
        // The server may have ended meanwhile; its image is good.
        if !matches!(reaped, Err(TraceError::Gone { .. } | TraceError::Died { .. })) {
            reaped?;
        }
        clock.lap("memory", false);
        let meta = meta(pid, &image_id, options, &kept, &clock);
        written = finish(writer, &meta, &all)?;
        clock.lap("write", false);
    } else {
        frozen.relax();
        let memory = frozen.memory().clone();
        pages(pid, &mut writer, &memory, &plan.not_in_child)?;
        pages(pid, &mut writer, &memory, &plan.in_child)?;
        clock.lap("memory", true);
        let meta = meta(pid, &image_id, options, &kept, &clock);
        written = finish(writer, &meta, &all)?;
        clock.lap("write", true);
        // The image is safely on disk: only now may the process end.
        frozen.kill()?;
        frozen_us = stands_since.elapsed().as_micros() as u64;
        clock.lap("end", true);
    }
    Ok(DumpReport {
        pid: pid.0,
        image_id,
        left_running: options.leave_running,
        frozen_us,
        real_time,
        phases: clock.phases,
        image_bytes: written.file_bytes,
        pages: written.pages,
        zero_pages: written.zero_pages,
    })
}

fn random_id(pid: Pid) -> Result<String, DumpError> {
    let mut b = [0u8; 16];
    let what = "reading /dev/urandom".to_owned();
    File::open("/dev/urandom")
        .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut b))
        .map_err(|source| DumpError::Io { pid, what, source })?;
    Ok(b.iter().map(|x| format!("{x:02x}")).collect())
}

fn meta(pid: Pid, image_id: &str, options: &DumpOptions, kept: &Kept, clock: &Clock) -> proto::Meta {
    let uts = nix::sys::utsname::uname().ok();
    let text = |s: Option<&std::ffi::OsStr>| s.map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    proto::Meta {
        mcr_version: env!("CARGO_PKG_VERSION").to_owned(),
        created_unix_ns: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64),
        hostname: text(uts.as_ref().map(|u| u.nodename())),
        kernel_release: text(uts.as_ref().map(|u| u.release())),
        boot_id: boot_id.trim().to_owned(),
        root_pid: pid.0 as u32,
        image_id: image_id.to_owned(),
        left_running: options.leave_running,
        keeper_socket: kept.socket.clone(),
        keeper_deadline_unix_s: kept.deadline_unix_s,
        phases: clock.phases.clone(),
    }
}

/// Fills in which ELF file, and which state of it, is behind each mapping.
fn describe_files(pid: Pid, p: &mut proto::Process) {
    for v in &mut p.vmas {
        if !matches!(v.kind(), VmaKind::VmaFilePrivate | VmaKind::VmaFileShared) {
            continue;
        }
        if let Some(m) = p.modules.iter().find(|m| m.dev == v.dev && m.ino == v.ino) {
            v.module_key.clone_from(&m.key);
        }
        if let Ok(m) = std::fs::metadata(modules::path_of(pid, v)) {
            v.file_size = m.size();
            v.file_mtime_ns = m.mtime() * 1_000_000_000 + m.mtime_nsec();
        }
    }
    for m in &mut p.modules {
        m.embedded = true;
        if let Ok(s) = std::fs::metadata(format!("/proc/{pid}/root{}", m.path)) {
            m.mtime_ns = s.mtime() * 1_000_000_000 + s.mtime_nsec();
        }
    }
}

/// Pieces in which memory is read.
const CHUNK: usize = 1 << 20;

fn pages(
    pid: Pid,
    writer: &mut ImageWriter,
    memory: &ProcessMemory,
    ranges: &[(u64, u64)],
) -> Result<(), DumpError> {
    writer.set_process(pid)?;
    let mut buf = vec![0u8; CHUNK];
    for &(start, end) in ranges {
        let mut at = start;
        while at < end {
            if crate::interrupted() {
                return Err(TraceError::Interrupted.into());
            }
            let n = CHUNK.min((end - at) as usize);
            memory.read(Addr(at), &mut buf[..n]).map_err(|source| DumpError::Memory { pid, source })?;
            writer.pages(Addr(at), &buf[..n])?;
            at += n as u64;
        }
    }
    Ok(())
}

/// Embeds what cannot be opened by name again: deleted files and memfds behind descriptors.
fn contents(pid: Pid, writer: &mut ImageWriter, all: &Collected) -> Result<(), DumpError> {
    for fd in &all.process.fds {
        let Some(proto::fd::Object::File(f)) = &fd.object else { continue };
        if f.content_key.is_empty() || writer.has_file(&f.content_key) {
            continue;
        }
        let Some(dup) = all.fds.get(&fd.number) else { continue };
        let what = format!("content of descriptor {} ({})", fd.number, fd.link);
        let content = read_all(dup, f.size).map_err(|source| DumpError::Io { pid, what, source })?;
        let file = EmbeddedFile {
            path: f.path.clone(),
            size: f.size,
            dev: f.dev,
            ino: f.ino,
            embedded: true,
            key: f.content_key.clone(),
            ..EmbeddedFile::default()
        };
        writer.file(&file, &content)?;
    }
    Ok(())
}

/// Records and ELF files; then the image gets its name.
fn finish(
    mut writer: ImageWriter,
    meta: &proto::Meta,
    all: &Collected,
) -> Result<mcr_image::Written, DumpError> {
    writer.put(RecordKind::Meta, meta)?;
    writer.put(RecordKind::Process, &all.process)?;
    for m in &all.process.modules {
        if let Some(module) = all.modules.modules().iter().find(|x| x.key == m.key) {
            writer.file(m, module.elf.bytes())?;
        }
    }
    Ok(writer.finish()?)
}

/// The whole file behind a descriptor, also one that was opened for writing only.
fn read_all(fd: &std::os::fd::OwnedFd, size: u64) -> std::io::Result<Vec<u8>> {
    use std::os::fd::AsRawFd;
    let file = File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let mut out = vec![0u8; size as usize];
    file.read_exact_at(&mut out, 0)?;
    Ok(out)
}
