//! Where an image is written to: a temporary file that is renamed when it is complete, or a stream.

use crate::ImageError;
use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A sink that counts and digests what goes through it.
pub(crate) struct Output {
    sink: Box<dyn Write + Send>,
    path: PathBuf,
    temporary: Option<Temporary>,
    digest: crc32fast::Hasher,
    written: u64,
}

struct Temporary {
    file: File,
    path: PathBuf,
}

impl Output {
    /// `-` is standard output; an existing pipe or device is written directly.
    pub fn create(path: &Path) -> Result<Self, ImageError> {
        if path.as_os_str() == "-" {
            if std::io::stdout().is_terminal() {
                return Err(ImageError::Input {
                    what: "an image to a terminal; redirect standard output, or give a file name".into(),
                });
            }
            return Ok(Self::stream(Box::new(std::io::stdout()), path));
        }
        if let Ok(meta) = std::fs::metadata(path) {
            let t = meta.file_type();
            if t.is_fifo() || t.is_char_device() {
                let f =
                    OpenOptions::new().write(true).open(path).map_err(|e| ImageError::io("open", path, e))?;
                return Ok(Self::stream(Box::new(f), path));
            }
            if !t.is_file() {
                return Err(ImageError::Input {
                    what: format!("an image to {}: it exists and is not a file", path.display()),
                });
            }
        }
        let Some(name) = path.file_name() else {
            return Err(ImageError::Input { what: format!("to {}: it names no file", path.display()) });
        };
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        loop {
            let n = COUNTER.fetch_add(1, Ordering::Relaxed);
            let mut tmp_name = std::ffi::OsString::from(".");
            tmp_name.push(name);
            tmp_name.push(format!(".{}.{n}.part", std::process::id()));
            let tmp = path.with_file_name(tmp_name);
            match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&tmp) {
                Ok(file) => {
                    let sink = Box::new(file.try_clone().map_err(|e| ImageError::io("dup", &tmp, e))?);
                    let mut out = Self::stream(sink, path);
                    out.temporary = Some(Temporary { file, path: tmp });
                    return Ok(out);
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(ImageError::io("create", tmp, e)),
            }
        }
    }

    /// Any writer; `path` is for messages.
    pub fn stream(sink: Box<dyn Write + Send>, path: &Path) -> Self {
        Self { sink, path: path.to_owned(), temporary: None, digest: crc32fast::Hasher::new(), written: 0 }
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.sink.write_all(bytes).map_err(|e| ImageError::io("write", &self.path, e))?;
        self.digest.update(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }

    pub fn written(&self) -> u64 {
        self.written
    }

    /// CRC-32 of everything written so far.
    pub fn digest(&self) -> u32 {
        self.digest.clone().finalize()
    }

    /// Makes the file durable and gives it its name.
    pub fn commit(mut self, sync: bool) -> Result<(), ImageError> {
        self.sink.flush().map_err(|e| ImageError::io("write", &self.path, e))?;
        let Some(tmp) = &self.temporary else {
            return Ok(());
        };
        if sync {
            tmp.file.sync_all().map_err(|e| ImageError::io("fsync", &self.path, e))?;
        }
        std::fs::rename(&tmp.path, &self.path).map_err(|e| ImageError::io("rename to", &self.path, e))?;
        self.temporary = None;
        if sync {
            let dir = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(dir).and_then(|d| d.sync_all()).map_err(|e| ImageError::io("fsync", dir, e))?;
        }
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // Not committed: leave nothing behind.
        if let Some(tmp) = &self.temporary {
            let _ = std::fs::remove_file(&tmp.path);
        }
    }
}
