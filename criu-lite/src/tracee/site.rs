//! Where in the target a system call can be executed.

use crate::ProcessMemory;
use mcr_image::{Addr, Memory};

/// `syscall`.
const SYSCALL: &[u8] = &[0x0f, 0x05];
/// `syscall; ret`.
const SYSCALL_RET: &[u8] = &[0x0f, 0x05, 0xc3];
/// `mov $15,%rax; syscall`: libc's `__restore_rt`.
const RESTORE_RT: &[u8] = &[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];

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
            let Ok(code) = mem.bytes(m.start, len) else {
                continue;
            };
            let find =
                |pat: &[u8]| code.windows(pat.len()).position(|w| w == pat).map(|n| m.start.add(n as u64));
            any = any.or_else(|| find(SYSCALL));
            if guarded {
                ret = ret.or_else(|| find(SYSCALL_RET));
                restore = restore.or_else(|| find(RESTORE_RT));
            }
        }
        Ok(any.map(|syscall| Self { syscall, guarded: ret.zip(restore) }))
    }
}
