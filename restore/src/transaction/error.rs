//! Why an update did not happen, and what that means for the old process.

use crate::apply::ApplyError;
use crate::boot::BootError;
use crate::fds::InstallError;
use crate::inplace::{PlanError, Stale};
use crate::link::Refusal;
use crate::rebuild::RebuildError;
use mcr_criu_lite::tracee::commit::CommitError;
use mcr_criu_lite::{CollectError, FreezeError, QuiesceError, TraceError};
use mcr_image::{Addr, ElfError, Fd, ImageError, MemoryError, Pid};
use mcr_transform::TransformError;
use mcr_transform::types::TypesError;
use std::path::PathBuf;

/// An update that failed. The old process goes on in every case but [`UpdateError::Lost`].
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// The new program's file.
    #[error("{}: {source}; name the new build's program file", path.display())]
    NewProgram {
        /// As given.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The old program's file is not to be had.
    #[error(
        "the program file of process {pid} was not recognised among its mappings; is it an ELF program with its file still at hand?"
    )]
    OldProgram {
        /// The process.
        pid: Pid,
    },
    /// It is no program that we can update to.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// Its debug information.
    #[error(transparent)]
    Types(#[from] TypesError),
    /// The process cannot be frozen.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// It did not come to rest.
    #[error(transparent)]
    Quiesce(#[from] QuiesceError),
    /// It has something that cannot be carried.
    #[error(transparent)]
    Collect(#[from] CollectError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The plan.
    #[error(transparent)]
    Transform(#[from] TransformError),
    /// ptrace.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The process could not be rebuilt.
    #[error(transparent)]
    Rebuild(#[from] RebuildError),
    /// The new version did not start up right.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// What it made could not be joined with the old state.
    #[error("{}; {}", .0, .0.next_step)]
    Link(#[from] Refusal),
    /// Joining them failed half-way, in the copy.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Descriptors could not be installed in it.
    #[error(transparent)]
    Fds(#[from] InstallError),
    /// A call inside the booted copy.
    #[error("{what} in the new version: {source}; the old version goes on")]
    Inside {
        /// The call and its object.
        what: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Memory that a fork does not copy.
    #[error(
        "the mapping {start}–{end} {name} is marked MADV_DONTFORK or MADV_WIPEONFORK, so a live update would lose it; \
         update through an image: mcr dump, transform, restore"
    )]
    Unforkable {
        /// First address.
        start: Addr,
        /// One past the last.
        end: Addr,
        /// What is mapped.
        name: String,
    },
    /// An old descriptor has no open file in our hands.
    #[error("descriptor {fd} ({what}) of the old process is not at hand; the old version goes on, try again")]
    MissingFile {
        /// Its number.
        fd: Fd,
        /// What it is.
        what: String,
    },
    /// The snapshot's memory.
    #[error("/proc/{pid}/mem: {source}")]
    Memory {
        /// The snapshot.
        pid: Pid,
        /// What the system said.
        source: std::io::Error,
    },
    /// The copy of the rehearsal.
    #[error("reading the copy {pid}: {source}; the old version goes on, try again")]
    Copy {
        /// The copy.
        pid: Pid,
        /// Why.
        source: MemoryError,
    },
    /// The old process has changed since the rehearsal, several times over.
    #[error("{0}; the old version goes on, try again at a calmer moment or use --new-pid")]
    Stale(#[from] Stale),
    /// The new version cannot be laid into the old process.
    #[error("{0}; the old version goes on")]
    InPlace(PlanError),
    /// The commit could not be prepared.
    #[error("{0}; the old version goes on")]
    Commit(#[from] CommitError),
    /// The commit took itself back.
    #[error("process {pid}: {why}; everything was taken back, the old version goes on")]
    TakenBack {
        /// The process.
        pid: Pid,
        /// The call that failed.
        why: String,
    },
    /// The image is a plain dump.
    #[error("this image is a plain dump: make an update image of it with `mcr transform`")]
    NoPatch,
    /// The file changed since the transform.
    #[error(
        "{} is not the build that the image was transformed to (build-id {planned}); transform the dump again",
        path.display()
    )]
    OtherBuild {
        /// The program.
        path: PathBuf,
        /// The build-id in the patch.
        planned: String,
    },
    /// The user asked to stop.
    #[error("interrupted; the old version goes on")]
    Interrupted,
    /// The commit failed: the old process had been ended.
    #[error("the old version has ended and the new one (process {pid}) could not be released: {why}")]
    Lost {
        /// The new process.
        pid: Pid,
        /// What failed.
        why: String,
    },
    /// A mistake of ours.
    #[error("internal error: {0}; please report it")]
    Internal(&'static str),
}

impl UpdateError {
    /// 1 refused, old untouched; 3 failed and rolled back; 4 state lost; 5 types need a rule.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Lost { .. } => 4,
            Self::Transform(e) => e.exit_code(),
            Self::Boot(
                BootError::Ptrace(_)
                | BootError::Step { .. }
                | BootError::Memory(_)
                | BootError::HostKilled { .. },
            )
            | Self::Apply(_)
            | Self::Fds(_)
            | Self::Copy { .. }
            | Self::Commit(_)
            | Self::TakenBack { .. }
            | Self::Inside { .. }
            | Self::Trace(_)
            | Self::Interrupted
            | Self::Internal(_) => 3,
            _ => 1,
        }
    }
}
