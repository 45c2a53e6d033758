//! What can be wrong with an ELF file, for us.

use std::path::PathBuf;

/// An ELF file that cannot be read, or cannot be updated from or to. The text says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// The file could not be read.
    #[error("reading {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No ELF magic.
    #[error("{path} is not an ELF file (is it a script? name the program that it starts)")]
    NotElf {
        /// The file.
        path: String,
    },
    /// A structure in the file points outside of it, or contradicts itself.
    #[error("{path}: damaged ELF file: {what}; get it again from where it was built")]
    Malformed {
        /// The file.
        path: String,
        /// Which structure.
        what: String,
    },
    /// ELFCLASS32.
    #[error("{path} is a 32-bit program; only x86-64 is supported, build it with -m64")]
    Not64Bit {
        /// The file.
        path: String,
    },
    /// Another machine or byte order.
    #[error("{path} is for another machine (e_machine {machine}); only x86-64 (62) is supported")]
    NotX8664 {
        /// The file.
        path: String,
        /// `e_machine`.
        machine: u16,
    },
    /// ET_EXEC: linked at a fixed address.
    #[error(
        "{path} is linked at a fixed address (not PIE), so the old and the new version would collide; \
         build it with -fPIE -pie"
    )]
    NotPie {
        /// The file.
        path: String,
    },
    /// No PT_INTERP.
    #[error("{path} is statically linked; build it as a dynamically linked program (without -static)")]
    Static {
        /// The file.
        path: String,
    },
    /// ET_REL, ET_CORE, a shared library.
    #[error("{path} is {what}, not a program")]
    NotAProgram {
        /// The file.
        path: String,
        /// What it is.
        what: &'static str,
    },
    /// No .debug_info here nor in a companion file.
    #[error(
        "{path} has no debug information (build-id {build_id}) and none was found in the debug directories; \
         build it with -g, install its debug package, or name the directory with --debug-dir"
    )]
    NoDwarf {
        /// The file.
        path: String,
        /// In hex, or "none".
        build_id: String,
    },
    /// A version of DWARF that is not read.
    #[error("{path} has DWARF {version} debug information; build it with -gdwarf-5 or -gdwarf-4")]
    DwarfVersion {
        /// The file.
        path: String,
        /// Of the first unit.
        version: u16,
    },
}
