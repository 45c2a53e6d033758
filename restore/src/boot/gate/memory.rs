//! brk and mmap: the break stays old's, and libraries that old has go to the place where old has them.

use super::{After, Call, Decision, Gate};
use crate::boot::error::{BootError, Result};
use crate::boot::host::Host;
use mcr_image::elf::ElfFile;
use mcr_image::{Addr, Module};
use std::sync::Arc;

impl Gate<'_> {
    pub(super) fn memory_entry(&mut self, host: &Host, call: &Call, name: &str) -> Result<Option<Decision>> {
        Ok(match name {
            // Asked for 0, brk(2) tells where the break is: glibc, not given what it wanted, takes its heap by
            // mmap, and old's heap stays old's.
            "brk" => Some(Decision::Instead { nr: call.nr, args: [0; 6], then: None }),
            "mmap" => self.mmap(host, call)?,
            "munmap" | "mremap" => Some(Decision::Then(After::Mapped)),
            _ => None,
        })
    }

    /// Away from where old's next mapping will be: what the start-up maps may have to be mapped in the old
    /// process, too, which has gone on by then. A hint only, as mmap(2) takes it.
    fn in_own_area(&mut self, call: &Call) -> Decision {
        let mut args = call.args;
        args[0] = self.area.0;
        self.area = Addr((self.area.0 + args[1]).next_multiple_of(4096) + 4096);
        Decision::Instead { nr: call.nr, args, then: Some(After::Mapped) }
    }

    fn mmap(&mut self, host: &Host, call: &Call) -> Result<Option<Decision>> {
        let [addr, _, prot, flags, fd, offset] = call.args;
        let fixed = (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE) as u64;
        if flags & libc::MAP_ANONYMOUS as u64 != 0 {
            let free = addr == 0 && flags & (fixed | (libc::MAP_32BIT | libc::MAP_GROWSDOWN) as u64) == 0;
            return Ok(free.then(|| self.in_own_area(call)));
        }
        if addr != 0 || flags & fixed != 0 || offset != 0 {
            let executable = prot & libc::PROT_EXEC as u64 != 0;
            return Ok(executable.then_some(Decision::Then(After::Mapped)));
        }
        let Some(link) = host.fd_link(fd as i32) else {
            return Ok(None);
        };
        let file = link.rsplit('/').next().unwrap_or_default();
        if !file.contains(".so") {
            return Ok(None);
        }
        let Ok(elf) = ElfFile::open(host.fd_path(fd as i32)) else {
            return Ok(None);
        };
        let soname = elf.soname();
        let same_name = |m: &&Arc<Module>| m.name() == file || (soname.is_some() && m.elf.soname() == soname);
        let old = self.spec.old_modules.modules().iter().filter(|m| !m.is_exe()).find(same_name);
        let Some(old) = old else {
            self.note("library-added", format!("the new version loads {link}, which the old one does not"));
            return Ok(Some(self.in_own_area(call)));
        };
        if old.build_id() != elf.build_id() || (elf.build_id().is_none() && old.elf.bytes() != elf.bytes()) {
            return Err(BootError::LibraryChanged {
                path: link,
                old: old.elf.build_id_hex(),
                new: elf.build_id_hex(),
            });
        }
        // Its place is reserved by us and holds nothing else, so it is replaced.
        let mut args = call.args;
        args[0] = old.start.0;
        args[3] |= libc::MAP_FIXED as u64;
        let then = Some(After::Library { at: old.start, path: link });
        Ok(Some(Decision::Instead { nr: call.nr, args, then }))
    }
}
