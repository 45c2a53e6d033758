//! Where separate debug information lies: build-id directories, `.gnu_debuglink`, `.gnu_debugaltlink` (dwz).

use super::{ElfFile, c_string, half, section};
use std::path::{Path, PathBuf};

/// Directories searched for debug files, first match wins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DebugDirs {
    /// As gdb's `debug-file-directory`.
    pub dirs: Vec<PathBuf>,
}

impl Default for DebugDirs {
    fn default() -> Self {
        Self { dirs: vec![PathBuf::from("/usr/lib/debug")] }
    }
}

impl DebugDirs {
    /// The user's directories first, then the system's.
    #[must_use]
    pub fn with_user(user: impl IntoIterator<Item = PathBuf>) -> Self {
        let mut dirs: Vec<_> = user.into_iter().collect();
        dirs.extend(Self::default().dirs);
        Self { dirs }
    }

    /// `.build-id/xx/yyyy.debug` (and `xx/yyyy.debug` below a user's directory).
    fn by_build_id(&self, id: &[u8]) -> Vec<PathBuf> {
        let Some((first, rest)) = id.split_first().filter(|(_, r)| !r.is_empty()) else {
            return Vec::new();
        };
        let rest: String = rest.iter().map(|b| format!("{b:02x}")).collect();
        let tail = format!("{first:02x}/{rest}.debug");
        self.dirs.iter().flat_map(|d| [d.join(".build-id").join(&tail), d.join(&tail)]).collect()
    }

    fn open(path: &Path, id: Option<&[u8]>) -> Option<ElfFile> {
        let f = ElfFile::open(path).ok()?;
        // A debug file of another build would be worse than none.
        (id.is_none() || f.build_id() == id).then_some(f)
    }

    /// The file with `elf`'s debug information, if it is elsewhere.
    #[must_use]
    pub fn companion(&self, elf: &ElfFile) -> Option<ElfFile> {
        let id = elf.build_id();
        let mut candidates = id.map(|id| self.by_build_id(id)).unwrap_or_default();
        let link = section::data(elf, ".gnu_debuglink").ok().flatten();
        let mut crc = None;
        if let Some(name) =
            link.as_deref().and_then(|d| c_string(d, 0)).and_then(|n| std::str::from_utf8(n).ok())
        {
            let at = (name.len() + 1).next_multiple_of(4);
            crc = link.as_deref().and_then(|d| half(d, at));
            let plain = !name.is_empty() && !name.contains('/');
            if let Some(dir) = elf.path().parent().filter(|_| plain) {
                candidates.push(dir.join(name));
                candidates.push(dir.join(".debug").join(name));
                for d in &self.dirs {
                    candidates.push(d.join(dir.strip_prefix("/").unwrap_or(dir)).join(name));
                    candidates.push(d.join(name));
                }
            }
        }
        candidates.iter().filter(|p| p.as_path() != elf.path()).find_map(|p| {
            let f = Self::open(p, id).filter(ElfFile::has_dwarf)?;
            // Without a build-id the checksum of the link has to do.
            (id.is_some() || crc == Some(crc32fast::hash(f.bytes()))).then_some(f)
        })
    }

    /// The supplementary file that dwz moved shared debug information to (`.gnu_debugaltlink`).
    #[must_use]
    pub fn alternate(&self, elf: &ElfFile) -> Option<ElfFile> {
        let link = elf.section_data(".gnu_debugaltlink").ok().flatten()?;
        let name = c_string(&link, 0)?;
        let id = link.get(name.len() + 1..)?;
        let name = Path::new(std::str::from_utf8(name).ok()?);
        let holder = elf.companion().map_or(elf.path(), |c| c.path());
        let beside = holder.parent().map(|d| d.join(name));
        beside.into_iter().chain(self.by_build_id(id)).find_map(|p| Self::open(&p, Some(id)))
    }
}
