//! What can be wrong with an image file.

use std::path::PathBuf;

/// Why an image cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A call of the system failed.
    #[error("{call} {path}: {source}{hint}")]
    Io {
        /// The call.
        call: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
        /// What to do next; empty, or starting with "; ".
        hint: &'static str,
    },
    /// The file does not start like an image.
    #[error(
        "not an mcr image: it starts with {found}; images start with \"MCRIMG\" (written by `mcr dump PID -o FILE`)"
    )]
    NotAnImage {
        /// Its first bytes, escaped.
        found: String,
    },
    /// Written in another format.
    #[error(
        "image format {major}.{minor} cannot be read: this mcr reads format {ours}; use the mcr that wrote the image, or dump again"
    )]
    OtherVersion {
        /// Major version of the file.
        major: u16,
        /// Minor version of the file.
        minor: u16,
        /// The major version this build reads.
        ours: u16,
    },
    /// Of another machine.
    #[error("the image is of ELF machine {machine}; this mcr handles x86-64 (62)")]
    OtherArch {
        /// ELF `e_machine`.
        machine: u32,
    },
    /// The file ends too early.
    #[error(
        "the image is truncated: it ends at offset {len:#x}, in {record} that starts at offset {offset:#x}; copy or dump it again"
    )]
    Truncated {
        /// The record that is cut off.
        record: String,
        /// Where it starts.
        offset: u64,
        /// Length of the file.
        len: u64,
    },
    /// Content that cannot be right.
    #[error("the image is damaged: {record} at offset {offset:#x}: {what}")]
    Corrupt {
        /// The record.
        record: String,
        /// Where it starts.
        offset: u64,
        /// What is wrong with it.
        what: String,
    },
    /// A whole record is missing.
    #[error("the image has no {record} record; it was not written by `mcr dump`")]
    Missing {
        /// Kind of the record.
        record: &'static str,
    },
    /// The caller gave the writer something that an image cannot hold.
    #[error("cannot write {what}")]
    Input {
        /// What, and why not.
        what: String,
    },
}

impl ImageError {
    pub(crate) fn io(call: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        let hint = match source.raw_os_error() {
            Some(28) => "; no space is left there: give another place with -o",
            Some(122) => "; the disk quota is used up: give another place with -o",
            Some(30) => "; that file system is read-only: give another place with -o",
            Some(13) => "; images are readable by their owner alone (mode 0600)",
            _ => "",
        };
        Self::Io { call, path: path.into(), source, hint }
    }
}
