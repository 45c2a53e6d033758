//! Where in the target a system call can be executed.

use crate::ProcessMemory;
use crate::procfs::maps::MapsLine;
use mcr_image::{Addr, Memory};
use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

/// `syscall`.
const SYSCALL: &[u8] = &[0x0f, 0x05];
/// `syscall; ret`.
const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];
/// `mov $15,%rax; syscall`: libc's `__restore_rt`.
const RESTORE_RT: &[u8] = &[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];

/// Where the instructions are in a mapping.
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    syscall: Option<u64>,
    ret: Option<u64>,
    restore: Option<u64>,
}

/// What was found in mapped files, by device, inode, offset and length.
type Known = HashMap<(u64, u64, u64, u64), Found>;

fn cache() -> &'static Mutex<Known> {
    static CACHE: OnceLock<Mutex<Known>> = OnceLock::new();
    CACHE.get_or_init(Mutex::default)
}

fn key(m: &MapsLine) -> (u64, u64, u64, u64) {
    (m.dev, m.ino, m.offset, m.end.since(m.start))
}

/// What was found there before, if it is still there: files and memory change.
fn known(mem: &ProcessMemory, m: &MapsLine) -> Option<Found> {
    let found = *cache().lock().ok()?.get(&key(m))?;
    let is = |at: Option<u64>, pattern: &[u8]| {
        at.is_none_or(|n| mem.bytes(m.start.add(n), pattern.len()).is_ok_and(|b| b == pattern))
    };
    (is(found.syscall, SYSCALL) && is(found.ret, SYSCALL_RET) && is(found.restore, RESTORE_RT))
        .then_some(found)
}

fn search(mem: &ProcessMemory, m: &MapsLine, len: usize) -> Option<Found> {
    let code = mem.bytes(m.start, len).ok()?;
    let find = |p: &[u8]| code.windows(p.len()).position(|w| w == p).map(|n| n as u64);
    let found = Found { syscall: find(SYSCALL), ret: find(SYSCALL_RET), restore: find(RESTORE_RT) };
    if m.ino != 0
        && let Ok(mut known) = cache().lock()
    {
        known.insert(key(m), found);
    }
    Some(found)
}

/// Instructions found in the target.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// A `syscall` instruction, in the vdso where there is one (it survives when libraries are unmapped).
    pub syscall: Addr,
    /// A `syscall; ret` and a `__restore_rt`: with both an injection survives the engine's death.
    pub guarded: Option<(Addr, Addr)>,
}

impl Site {
    /// Searches the executable mappings. `guarded`: look through libc too.
    pub fn find(mem: &ProcessMemory, guarded: bool) -> std::io::Result<Option<Self>> {
        let maps = mem.maps()?;
        let exec = |m: &&crate::procfs::maps::MapsLine| {
            m.prot & libc::PROT_EXEC as u32 != 0 && m.name != b"[vsyscall]"
        };
        let mut order: Vec<_> = maps.iter().filter(exec).collect();
        let rank = |name: &[u8]| match name {
            b"[vdso]" => 0,
            n if n.rsplit(|&b| b == b'/').next().is_some_and(|f| f.starts_with(b"libc.")) => 1,
            _ => 2,
        };
        order.sort_by_key(|m| rank(&m.name));
        let (mut any, mut ret, mut restore) = (None, None, None);
        for m in order {
            if any.is_some() && (!guarded || (ret.is_some() && restore.is_some())) {
                break;
            }
            // Large programs are not worth reading whole: libc comes before them and has everything.
            let len = m.end.since(m.start).min(8 << 20) as usize;
            let Some(found) = known(mem, m).or_else(|| search(mem, m, len)) else {
                continue;
            };
            let at = |offset: Option<u64>| offset.map(|n| m.start.add(n));
            any = any.or_else(|| at(found.syscall));
            if guarded {
                ret = ret.or_else(|| at(found.ret));
                restore = restore.or_else(|| at(found.restore));
            }
        }
        Ok(any.map(|syscall| Self { syscall, guarded: ret.zip(restore) }))
    }
}
