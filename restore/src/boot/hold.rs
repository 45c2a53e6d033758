//! Where threads are held: at the entry of a blocking call under a stack that old has. The call is not
//! executed, so no input is taken.

use super::host::{Host, to_vma};
use super::ptrace;
use super::{BootError, BootSpec, OldThread, Where};
use mcr_image::ModuleMap;
use mcr_image::elf::ElfFile;
use mcr_image::unwind::{Unwound, unwind};
use mcr_image::{Addr, Memory, Regs, Tid, proto, syscalls};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Stacks of the host's threads, by the modules mapped at the moment.
pub(super) struct Stacks {
    modules: Option<ModuleMap>,
    files: HashMap<(u64, u64), Option<Arc<ElfFile>>>,
}

impl Stacks {
    /// Files that old has mapped need not be read again.
    pub(super) fn new(spec: &BootSpec<'_>) -> Self {
        let mut files = HashMap::new();
        for m in spec.old_modules.modules() {
            if m.dev != 0 && !m.is_exe() && !m.deleted {
                files.insert((m.dev, m.ino), Some(Arc::clone(&m.elf)));
            }
        }
        Self { modules: None, files }
    }

    /// The mappings changed.
    pub(super) fn stale(&mut self) {
        self.modules = None;
    }

    /// The modules mapped now.
    pub(super) fn modules(&mut self, host: &Host, spec: &BootSpec<'_>) -> Result<&ModuleMap, BootError> {
        if self.modules.is_none() {
            let vmas: Vec<proto::Vma> = host.maps()?.iter().map(to_vma).collect();
            let auxv_path = format!("/proc/{}/auxv", host.pid);
            let auxv = std::fs::read(&auxv_path).map_err(|e| BootError::io(&auxv_path, e))?;
            let root = format!("/proc/{}/root", host.pid);
            let files = &mut self.files;
            let load = |v: &proto::Vma| {
                if v.name.as_bytes() == spec.new_path.as_os_str().as_encoded_bytes() {
                    return Some(Arc::clone(&spec.new));
                }
                let open = || ElfFile::open(PathBuf::from(format!("{root}{}", v.name))).ok().map(Arc::new);
                files.entry((v.dev, v.ino)).or_insert_with(open).clone()
            };
            self.modules = Some(ModuleMap::read(&vmas, &auxv, host.memory(), load));
        }
        Ok(self.modules.get_or_insert_default())
    }

    /// The stack of a thread; `regs` with rip on the instruction that it is at.
    pub(super) fn unwind(
        &mut self,
        host: &Host,
        spec: &BootSpec<'_>,
        regs: &Regs,
    ) -> Result<Unwound, BootError> {
        let modules = self.modules(host, spec)?;
        Ok(unwind(modules, host.memory(), regs))
    }

    /// For messages: where a stopped thread is.
    pub(super) fn place(&mut self, host: &Host, spec: &BootSpec<'_>, tid: Tid, call: Option<i64>) -> Where {
        let stack = ptrace::regs(tid).ok().and_then(|mut r| {
            if call.is_some() {
                r.rip -= 2;
            }
            self.stale();
            self.unwind(host, spec, &r).ok()
        });
        Where {
            tid,
            call: call
                .map(|nr| syscalls::name(nr).map_or_else(|| nr.to_string(), str::to_owned))
                .unwrap_or_default(),
            stack: stack.map(|u| readable(&u)).unwrap_or_default(),
        }
    }
}

/// Function names, innermost first.
fn readable(u: &Unwound) -> Vec<String> {
    u.frames
        .iter()
        .map(|f| match (f.base_name(), &f.module) {
            (Some(n), _) => n.to_owned(),
            (None, Some(m)) => format!("{}+{:#x}", m.name(), f.offset),
            (None, None) => format!("{:#x}", f.pc.0),
        })
        .collect()
}

/// Whether a call may be a place to rest, by its arguments alone.
pub(super) fn may_rest(host: &Host, nr: i64, args: &[u64; 6]) -> bool {
    if !syscalls::is_resting(nr, args) {
        return false;
    }
    // Reading a regular file never waits: that is start-up work.
    match syscalls::blocking(nr) {
        Some(b) if b.name.contains("read") => b.fd_arg.is_none_or(|i| {
            let meta = std::fs::metadata(host.fd_path(args[i] as i32));
            !meta.is_ok_and(|m| m.is_file() || m.is_dir())
        }),
        _ => true,
    }
}

/// A futex wait whose word is no longer what the waiter saw: executed, it would return at once.
pub(super) fn futex_moved_on(memory: &dyn Memory, nr: i64, args: &[u64; 6]) -> bool {
    const WAIT: u64 = 0;
    const WAIT_BITSET: u64 = 9;
    if nr != libc::SYS_futex || !matches!(args[1] & 0x7f, WAIT | WAIT_BITSET) {
        return false;
    }
    memory.u32(Addr(args[0])).is_ok_and(|now| now != args[2] as u32)
}

/// Pairs held threads with old ones: same signature, in order of creation. Returns for each held thread the
/// index of its old thread, and the old threads nobody took.
pub(super) fn pair(held: &[(Tid, &[String])], old: &[OldThread]) -> (Vec<Option<usize>>, Vec<usize>) {
    let mut taken = vec![false; old.len()];
    let pairs = held
        .iter()
        .map(|(_, sig)| {
            let i = old.iter().enumerate().position(|(i, o)| !taken[i] && o.signature == *sig)?;
            taken[i] = true;
            Some(i)
        })
        .collect();
    let missing = (0..old.len()).filter(|&i| !taken[i]).collect();
    (pairs, missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn old(tid: i32, sig: &[&str]) -> OldThread {
        OldThread {
            tid: Tid(tid),
            signature: sig.iter().map(|s| (*s).to_owned()).collect(),
            call: String::new(),
            block: None,
        }
    }

    #[test]
    fn threads_pair_by_stack_then_by_age() {
        let olds = [old(1, &["l+1", "loop", "main"]), old(2, &["l+2", "work"]), old(3, &["l+2", "work"])];
        let (m, w): (Vec<String>, Vec<String>) = (olds[0].signature.clone(), olds[1].signature.clone());
        let (pairs, missing) = pair(&[(Tid(10), &w), (Tid(11), &m), (Tid(12), &w), (Tid(13), &w)], &olds);
        assert_eq!(pairs, [Some(1), Some(0), Some(2), None]);
        assert!(missing.is_empty());
        let (pairs, missing) = pair(&[(Tid(10), &m)], &olds);
        assert_eq!((pairs, missing), (vec![Some(0)], vec![1, 2]));
    }
}
