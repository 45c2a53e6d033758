//! An ELF core file of an image, for gdb and every other tool that reads cores.
//!
//! Sources: elf(5), core(5), fs/binfmt_elf.c, include/linux/elfcore.h (`struct elf_prstatus`,
//! `struct elf_prpsinfo`), System V ABI chapter 5.

use crate::proto::{Process, Thread, VmaKind};
use crate::{Image, ImageError, ImageMemory, Memory, MemoryError, Region, Stored, is_zero};
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

const PAGE: u64 = 4096;
const ET_CORE: u16 = 4;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NT_PRSTATUS: u32 = 1;
const NT_PRFPREG: u32 = 2;
const NT_PRPSINFO: u32 = 3;
const NT_AUXV: u32 = 6;
const NT_FILE: u32 = 0x4649_4c45;
const NT_X86_XSTATE: u32 = 0x202;
const SIGTRAP: u32 = 5;

struct Load {
    region: Region,
    /// Bytes in the core; 0 where a debugger finds them in the mapped file.
    stored: u64,
}

/// Writes the root process of an image as an ELF core. Works on a pipe; zero pages are written out.
pub fn export_core(image: &Image, out: &mut dyn Write) -> Result<(), ImageError> {
    let io = |e| ImageError::io("write", "the core file", e);
    let process = image.process();
    let memory = image.memory();
    let notes = notes(process)?;
    let loads = loads(image, process, &memory)?;
    let Ok(phnum) = u16::try_from(loads.len() + 1) else {
        return Err(ImageError::Input {
            what: format!("a core of {} mappings: 65534 are allowed", loads.len()),
        });
    };
    if phnum == u16::MAX {
        return Err(ImageError::Input { what: "a core of 65534 mappings".into() });
    }
    let notes_at = 64 + 56 * u64::from(phnum);
    let mut at = (notes_at + notes.len() as u64).next_multiple_of(PAGE);
    let mut head = elf_header(phnum);
    program_header(&mut head, [PT_NOTE, 0], [notes_at, 0, notes.len() as u64, 0, 4]);
    for l in &loads {
        let p = l.region.prot;
        let flags = (p & 1) << 2 | (p & 2) | (p & 4) >> 2;
        let size = l.region.end.since(l.region.start);
        program_header(&mut head, [PT_LOAD, flags], [at, l.region.start.0, l.stored, size, PAGE]);
        at += l.stored;
    }
    head.extend_from_slice(&notes);
    head.resize(head.len().next_multiple_of(PAGE as usize), 0);
    out.write_all(&head).map_err(io)?;
    let mut buf = Vec::new();
    for l in loads.iter().filter(|l| l.stored > 0) {
        let mut at = l.region.start;
        while at < l.region.end {
            buf.resize(l.region.end.since(at).min(256 << 10) as usize, 0);
            if memory.read(at, &mut buf).is_err() {
                // The mapped file is gone: what the image itself holds, and zeros.
                buf.fill(0);
                let end = at.add(buf.len() as u64);
                memory
                    .for_each_stored(at, end, &mut |a, s| {
                        if let Stored::Data(b) = s {
                            buf[a.since(at) as usize..][..b.len()].copy_from_slice(b);
                        }
                    })
                    .map_err(unreadable)?;
            }
            out.write_all(&buf).map_err(io)?;
            at = at.add(buf.len() as u64);
        }
    }
    out.flush().map_err(io)
}

/// Writes the core to a file with holes for its zero pages, mode 0600.
pub fn export_core_file(image: &Image, path: &Path) -> Result<(), ImageError> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(|e| ImageError::io("create", path, e))?;
    let mut out = Sparse { file, len: 0 };
    export_core(image, &mut out)?;
    out.file.set_len(out.len).map_err(|e| ImageError::io("ftruncate", path, e))
}

/// Leaves holes where a whole write is zero pages.
struct Sparse {
    file: File,
    len: u64,
}

impl Write for Sparse {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let part = &buf[..buf.len().min(PAGE as usize)];
        if part.len() == PAGE as usize && is_zero(part) {
            self.file.seek(SeekFrom::Current(PAGE as i64))?;
        } else {
            self.file.write_all(part)?;
        }
        self.len += part.len() as u64;
        Ok(part.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Readable regions; file mappings of which the image holds nothing are left to the file they name.
fn loads(image: &Image, process: &Process, memory: &ImageMemory) -> Result<Vec<Load>, ImageError> {
    let mut out = Vec::new();
    for region in memory.regions() {
        let size = region.end.since(region.start);
        let mut held = false;
        memory.for_each_stored(region.start, region.end, &mut |_, _| held = true).map_err(unreadable)?;
        let vma = process.vmas.iter().find(|v| v.start == region.start.0);
        let from_file = vma.is_some_and(|v| {
            matches!(v.kind(), VmaKind::VmaFilePrivate | VmaKind::VmaFileShared)
                && !v.memfd
                && !image.files().any(|f| f.key == v.module_key)
        });
        out.push(Load { stored: if from_file && !held { 0 } else { size }, region });
    }
    Ok(out)
}

fn unreadable(e: MemoryError) -> ImageError {
    ImageError::Input { what: format!("the core file: {e}") }
}

fn elf_header(phnum: u16) -> Vec<u8> {
    let mut b = b"\x7fELF\x02\x01\x01".to_vec();
    b.resize(16, 0);
    b.extend(ET_CORE.to_le_bytes());
    b.extend(62u16.to_le_bytes());
    b.extend(1u32.to_le_bytes());
    b.extend([0; 8]); // e_entry
    b.extend(64u64.to_le_bytes()); // e_phoff
    b.extend([0; 12]); // e_shoff, e_flags
    for v in [64u16, 56, phnum, 0, 0, 0] {
        b.extend(v.to_le_bytes());
    }
    b
}

/// Type and flags; offset, address, size in the file, size in memory, alignment.
fn program_header(out: &mut Vec<u8>, head: [u32; 2], body: [u64; 5]) {
    let [offset, addr, filesz, memsz, align] = body;
    out.extend(head.into_iter().flat_map(u32::to_le_bytes));
    out.extend([offset, addr, 0, filesz, memsz, align].into_iter().flat_map(u64::to_le_bytes));
}

fn note(out: &mut Vec<u8>, owner: &str, kind: u32, desc: &[u8]) {
    for v in [owner.len() as u32 + 1, desc.len() as u32, kind] {
        out.extend(v.to_le_bytes());
    }
    out.extend_from_slice(owner.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(desc);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Notes in the kernel's order: the leader's status, the process, then the other threads.
fn notes(p: &Process) -> Result<Vec<u8>, ImageError> {
    let mut out = Vec::new();
    for (n, t) in p.threads.iter().enumerate() {
        note(&mut out, "CORE", NT_PRSTATUS, &prstatus(p, t)?);
        if n == 0 {
            note(&mut out, "CORE", NT_PRPSINFO, &prpsinfo(p));
            if let Some(mm) = &p.mm {
                note(&mut out, "CORE", NT_AUXV, &mm.auxv);
            }
            note(&mut out, "CORE", NT_FILE, &files(p));
        }
        // An XSAVE area starts with the 512 bytes of FXSAVE.
        if let Some(fx) = t.xstate.get(..512) {
            note(&mut out, "CORE", NT_PRFPREG, fx);
            note(&mut out, "LINUX", NT_X86_XSTATE, &t.xstate);
        }
    }
    Ok(out)
}

fn prstatus(p: &Process, t: &Thread) -> Result<Vec<u8>, ImageError> {
    if t.regs.len() != 27 {
        return Err(ImageError::Input {
            what: format!("a core: thread {} has {} registers instead of 27", t.tid, t.regs.len()),
        });
    }
    let mut b = Vec::with_capacity(336);
    b.extend([SIGTRAP, 0, 0].into_iter().flat_map(u32::to_le_bytes)); // pr_info
    b.extend((SIGTRAP as u16).to_le_bytes()); // pr_cursig
    b.resize(16, 0);
    b.extend(0u64.to_le_bytes()); // pr_sigpend
    b.extend(t.sigmask.to_le_bytes());
    b.extend([t.tid, p.ppid, p.pgid, p.sid].into_iter().flat_map(u32::to_le_bytes));
    b.resize(112, 0); // four times
    b.extend(t.regs.iter().flat_map(|r| r.to_le_bytes()));
    b.extend(u32::from(t.xstate.len() >= 512).to_le_bytes());
    b.resize(336, 0);
    Ok(b)
}

fn prpsinfo(p: &Process) -> Vec<u8> {
    let (uid, gid) = p.creds.as_ref().map_or((0, 0), |c| (c.ruid, c.rgid));
    let mut b = vec![0, b'S', 0, 0];
    b.resize(16, 0);
    b.extend([uid, gid, p.pid, p.ppid, p.pgid, p.sid].into_iter().flat_map(u32::to_le_bytes));
    b.extend(p.comm.bytes().take(15));
    b.resize(56, 0);
    b.extend(p.cmdline.iter().take(79).map(|c| if *c == 0 { b' ' } else { *c }));
    b.resize(136, 0);
    b
}

/// NT_FILE: count, page size, (start, end, offset in pages) each, then the names.
fn files(p: &Process) -> Vec<u8> {
    let mapped = || {
        p.vmas.iter().filter(|v| {
            matches!(v.kind(), VmaKind::VmaFilePrivate | VmaKind::VmaFileShared) && v.name.starts_with('/')
        })
    };
    let mut b = Vec::new();
    b.extend((mapped().count() as u64).to_le_bytes());
    b.extend(PAGE.to_le_bytes());
    for v in mapped() {
        b.extend([v.start, v.end, v.file_offset / PAGE].into_iter().flat_map(u64::to_le_bytes));
    }
    for v in mapped() {
        b.extend_from_slice(v.name.as_bytes());
        b.push(0);
    }
    b
}
