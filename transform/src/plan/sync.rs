//! Synchronisation objects of glibc (nptl), as far as an update has to understand them.

use crate::types::SyncKind;

/// Whether somebody holds it, and who (0: unknown).
pub(crate) fn held(kind: SyncKind, bytes: &[u8]) -> Option<u32> {
    let int = |at: usize| {
        bytes.get(at..at + 4).map_or(0, |b| i32::from_le_bytes(b.try_into().expect("four bytes")))
    };
    match kind {
        // struct __pthread_mutex_s: int lock; unsigned count; int owner; …
        SyncKind::Mutex => (int(0) & 0x3fff_ffff != 0).then(|| int(8).cast_unsigned()),
        // struct __pthread_rwlock_arch_t: readers (count << 3 | flags), …, cur_writer at 24.
        SyncKind::RwLock => {
            let readers = int(0).cast_unsigned() >> 3;
            (int(24) != 0 || readers != 0).then(|| int(24).cast_unsigned())
        }
        _ => None,
    }
}

/// For people and for the patch.
pub(crate) fn name(kind: SyncKind) -> &'static str {
    match kind {
        SyncKind::Mutex => "pthread_mutex_t",
        SyncKind::Cond => "pthread_cond_t",
        SyncKind::RwLock => "pthread_rwlock_t",
        SyncKind::Spin => "pthread_spinlock_t",
        SyncKind::Barrier => "pthread_barrier_t",
        SyncKind::Once => "pthread_once_t",
        SyncKind::Semaphore => "sem_t",
    }
}
