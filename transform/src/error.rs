//! Why a transform ends without a patch.

use crate::heap::HeapError;
use crate::types::TypesError;
use mcr_image::{ElfError, ImageError, MemoryError, proto};
use std::fmt;

/// The update is refused: nothing was touched, and every reason is named.
#[derive(Clone, Debug, Default)]
pub struct Refusal {
    /// What stands in the way, most important first.
    pub reasons: Vec<proto::Finding>,
    /// Everything else that was found.
    pub findings: Vec<proto::Finding>,
    /// All that is missing are rules about types (exit code 5).
    pub needs_rules: bool,
}

impl Refusal {
    /// 1 refused, 5 types need a rule.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        if self.needs_rules { 5 } else { 1 }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, r) in self.reasons.iter().take(20).enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{}: {}", r.code, r.message)?;
            if !r.path.is_empty() {
                write!(f, " (at {})", r.path)?;
            }
            if !r.next_step.is_empty() {
                write!(f, "\n  next: {}", r.next_step)?;
            }
        }
        if self.reasons.len() > 20 {
            write!(f, "\n… and {} more", self.reasons.len() - 20)?;
        }
        Ok(())
    }
}

/// Why a transform failed.
#[derive(Debug, thiserror::Error)]
pub enum TransformError {
    /// It can be done, but not proven right.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The image does not hold the program it was dumped from.
    #[error("the image holds no file for {path} (key {key}): dump the process again")]
    NoProgram {
        /// Path of the program.
        path: String,
        /// Key of the embedded file.
        key: String,
    },
    /// An ELF file.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// Debug information.
    #[error(transparent)]
    Types(#[from] TypesError),
    /// The heap.
    #[error(transparent)]
    Heap(#[from] HeapError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl TransformError {
    /// 5 when all that is missing are rules about types, else 1: nothing was touched.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Refused(r) => r.exit_code(),
            _ => 1,
        }
    }
}
