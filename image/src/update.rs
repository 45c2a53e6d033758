//! From a dump to an update image.

use crate::format::RecordKind;
use crate::proto::{EmbeddedFile, FrameDesc, Patch, Process};
use crate::{Image, ImageError, ImageWriter, WriterOptions, Written};
use prost::Message;
use std::path::Path;

impl Image {
    /// Writes an update image: every record of this image byte for byte (also those that this version does
    /// not know), and the patch in place of one that is there already.
    pub fn write_update(&self, out: &Path, patch: &Patch) -> Result<Written, ImageError> {
        self.write_update_with(out, patch, &[])
    }

    /// The same, with more files embedded (the new program, say).
    pub fn write_update_with(
        &self,
        out: &Path,
        patch: &Patch,
        files: &[(EmbeddedFile, &[u8])],
    ) -> Result<Written, ImageError> {
        let mut w = ImageWriter::create_with(out, WriterOptions::default())?;
        for (entry, bytes) in self.raw_records() {
            if entry.kind == RecordKind::Patch as u32 {
                continue;
            }
            let key = match FrameDesc::decode(&*entry.desc) {
                Ok(d) if entry.kind == RecordKind::File as u32 => d.key,
                _ => String::new(),
            };
            w.raw_record(entry, bytes, &key)?;
        }
        for (file, content) in files {
            w.file(file, content)?;
        }
        w.put(RecordKind::Patch, patch)?;
        w.finish()
    }

    /// Writes this image with another record of its root process; everything else byte for byte. `out` may be
    /// the image's own path: it is replaced as a whole, or not at all.
    pub fn write_process(&self, out: &Path, process: &Process) -> Result<Written, ImageError> {
        let mut w = ImageWriter::create_with(out, WriterOptions::default())?;
        let mut replaced = false;
        for (entry, bytes) in self.raw_records() {
            if !replaced && entry.kind == RecordKind::Process as u32 {
                replaced = true;
                w.put(RecordKind::Process, process)?;
                continue;
            }
            let key = match FrameDesc::decode(&*entry.desc) {
                Ok(d) if entry.kind == RecordKind::File as u32 => d.key,
                _ => String::new(),
            };
            w.raw_record(entry, bytes, &key)?;
        }
        w.finish()
    }
}
