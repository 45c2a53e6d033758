//! Compiles C snippets and reads their types.

use mcr_image::elf::{DebugDirs, ElfFile};
use mcr_transform::types::TypeModel;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// A directory with programs in it.
pub struct Workshop {
    dir: TempDir,
}

impl Workshop {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let p = self.dir.path().join(name);
        std::fs::write(&p, text).unwrap();
        p
    }
    /// Links `sources` (name, text) to a program.
    pub fn build(&self, program: &str, sources: &[(&str, &str)], flags: &[&str]) -> PathBuf {
        let out = self.dir.path().join(program);
        for (n, t) in sources {
            self.write(n, t);
        }
        let output = Command::new("gcc")
            .current_dir(self.dir.path())
            .args(["-pie", "-fPIE", "-w", "-o"])
            .arg(&out)
            .args(flags)
            .args(sources.iter().map(|s| s.0))
            .arg("-lpthread")
            .output()
            .expect("gcc");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        out
    }
}

pub fn load(p: &Path) -> TypeModel {
    let elf = ElfFile::open(p).unwrap();
    TypeModel::load(&elf, &DebugDirs::default()).unwrap()
}
