//! What can go wrong when types are read.

use mcr_image::elf::ElfError;

/// Why a type model could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TypesError {
    /// The ELF file itself.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// No `.debug_info`.
    #[error(
        "{path} has no debug information (build-id {build_id}); build it with -g, install its debug package, \
         or name the directory that holds its debug file with --debug-dir"
    )]
    NoDwarf {
        /// The file.
        path: String,
        /// In hex, or "none".
        build_id: String,
    },
    /// dwz moved a part to another file, which is missing.
    #[error(
        "{path}: a part of its debug information is in a supplementary file (.gnu_debugaltlink) that was not \
         found; install the debug package it came with, or name the directory with --debug-dir"
    )]
    NoSupplement {
        /// The file.
        path: String,
    },
    /// Split DWARF.
    #[error("{path}: its debug information is split ({dwo}); build it without -gsplit-dwarf")]
    Split {
        /// The file.
        path: String,
        /// The name of the first .dwo file.
        dwo: String,
    },
    /// A DWARF version that is not read.
    #[error("{path} has DWARF {version} debug information; build it with -gdwarf-5 or -gdwarf-4")]
    Version {
        /// The file.
        path: String,
        /// As in the unit's header.
        version: u16,
    },
    /// The debug information is damaged.
    #[error("{path}: debug information is damaged at {at}: {what}; build the program again, or get it again")]
    Damaged {
        /// The file.
        path: String,
        /// Section and offset.
        at: String,
        /// What gimli said.
        what: String,
    },
}
