//! Dumps a real process for the tests: frozen, collected, all its memory read, its sockets handed to a keeper,
//! ended.

use libtest_mimic::Failed;
use mcr_criu_lite::{FreezeOptions, Frozen, QuiesceOptions};
use mcr_image::{Addr, Image, ImageWriter, Memory, Pid, RecordKind, proto};
use mcr_restore::keeper::{Keeper, KeeperOptions};
use proto::VmaKind;
use std::path::Path;

/// Dumps and ends `pid`; the image is in `dir`.
pub fn dump(pid: i32, dir: &Path, image_id: &str) -> Result<Image, Failed> {
    let mut frozen = Frozen::seize(Pid(pid), &FreezeOptions::default())?;
    let states = frozen.quiesce(&QuiesceOptions::default())?;
    let collected = frozen.collect(&states)?;
    let mut process = collected.process;
    let keeper = Keeper::for_process(image_id, &mut process, &KeeperOptions::default())?;
    let path = dir.join("image.mcr");
    let mut w = ImageWriter::create(&path)?;
    let meta = proto::Meta {
        root_pid: pid as u32,
        image_id: image_id.to_owned(),
        keeper_socket: keeper.as_ref().map(|k| k.name().to_owned()).unwrap_or_default(),
        ..Default::default()
    };
    w.put(RecordKind::Meta, &meta)?;
    w.put(RecordKind::Process, &process)?;
    let memory = frozen.memory().clone();
    for v in &process.vmas {
        let stored = match v.kind() {
            VmaKind::VmaAnonPrivate | VmaKind::VmaFilePrivate | VmaKind::VmaAnonShared => true,
            VmaKind::VmaFileShared => v.memfd || v.deleted,
            VmaKind::VmaVdso => true,
            _ => false,
        };
        let mut at = v.start;
        while stored && at < v.end {
            let len = (v.end - at).min(1 << 18);
            match memory.bytes(Addr(at), len as usize) {
                Ok(b) => w.pages(Addr(at), &b)?,
                // Unreadable pages one by one: past the end of a file, or without a page.
                Err(_) => {
                    for page in (at..at + len).step_by(4096) {
                        if let Ok(b) = memory.bytes(Addr(page), 4096) {
                            w.pages(Addr(page), &b)?;
                        }
                    }
                }
            }
            at += len;
        }
    }
    for fd in &process.fds {
        let Some(proto::fd::Object::File(f)) = &fd.object else { continue };
        if f.content_key.is_empty() || w.has_file(&f.content_key) {
            continue;
        }
        let content = std::fs::read(format!("/proc/{pid}/fd/{}", fd.number))?;
        let info = proto::EmbeddedFile {
            path: f.path.clone(),
            size: content.len() as u64,
            embedded: true,
            key: f.content_key.clone(),
            ..Default::default()
        };
        w.file(&info, &content)?;
    }
    w.finish()?;
    frozen.kill()?;
    Ok(Image::open(&path)?)
}
