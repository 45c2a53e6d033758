//! The heap of a process under glibc's malloc.

use super::index::Index;
use super::lists::Linking;
use super::{Arena, Chunk, ChunkState, HeapError, Segment, Tcache, arena, lists, segments, tcache};
use mcr_image::{Addr, Memory, ModuleMap, proto};

/// What a heap shares with later ones under the same libc at the same place.
#[derive(Clone, Debug)]
pub struct Known {
    /// Its main arena.
    pub main_arena: Addr,
    /// libc's version.
    pub version: String,
}

/// All chunks of a process, with the allocator's own state.
#[derive(Clone, Debug, Default)]
pub struct GlibcHeap {
    /// Every chunk, ascending.
    pub chunks: Vec<Chunk>,
    /// The ring of arenas, the main arena first; empty when malloc was never used.
    pub arenas: Vec<Arena>,
    /// Runs of chunks, ascending.
    pub segments: Vec<Segment>,
    /// The caches, in the order of the threads.
    pub tcaches: Vec<Tcache>,
    /// Links in fastbins and caches are mangled (glibc 2.32 and later); `None`: there was no such list.
    pub safe_linking: Option<bool>,
    /// "glibc-2.36", or "glibc" where the version could not be read.
    pub version: String,
    index: Index,
}

impl GlibcHeap {
    /// As [`Self::read`]; where libc has a symbol table, it has to agree about `main_arena`.
    pub fn read_checked(
        mem: &dyn Memory,
        modules: &ModuleMap,
        threads: &[proto::Thread],
        vmas: &[proto::Vma],
        known: Option<&Known>,
    ) -> Result<Self, HeapError> {
        let heap = Self::read_again(mem, threads, vmas, known)?;
        let symbol = modules.libc().and_then(|libc| libc.symbol("main_arena"));
        match (heap.arenas.first().map(|a| a.addr), symbol) {
            (Some(first), Some(second)) if first != second => Err(HeapError::TwoArenas { first, second }),
            _ => Ok(heap),
        }
    }

    /// Reads the heap from the mappings alone: `main_arena` is found by its contents.
    pub fn read(mem: &dyn Memory, threads: &[proto::Thread], vmas: &[proto::Vma]) -> Result<Self, HeapError> {
        Self::read_again(mem, threads, vmas, None)
    }

    /// As [`Self::read`], of memory with the same libc at the same place as where `known` comes from.
    pub fn read_again(
        mem: &dyn Memory,
        threads: &[proto::Thread],
        vmas: &[proto::Vma],
        known: Option<&Known>,
    ) -> Result<Self, HeapError> {
        let arenas = arena::find_arenas(mem, vmas, known.map(|k| k.main_arena))?;
        let mut found = segments::find(mem, &arenas, threads, vmas)?;
        // Stable: a few runs in order are merged, not sorted.
        found.chunks.sort_by_key(|c| c.addr);
        if let Some(w) = found.chunks.windows(2).find(|w| w[0].end() > w[1].addr) {
            return Err(HeapError::Chunk {
                chunk: w[1].addr,
                segment: "the heap".into(),
                why: format!("overlaps the chunk at {}", w[0].addr),
            });
        }
        found.segments.sort_unstable_by_key(|s| s.start);
        let mut linking = Linking::default();
        for (i, a) in arenas.iter().enumerate() {
            lists::bins(a, found.free.get_mut(i).map_or(&mut [][..], |f| &mut f[..]))?;
            lists::fastbins(mem, a, i as u16, &mut found.chunks, &mut linking)?;
        }
        let tcaches = tcache::find(mem, &arenas, threads, &mut found.chunks, &mut linking)?;
        let index = Index::new(&found.chunks, &found.segments);
        Ok(Self {
            chunks: found.chunks,
            arenas,
            segments: found.segments,
            tcaches,
            safe_linking: linking.known,
            version: known.map_or_else(|| version(mem, vmas), |k| k.version.clone()),
            index,
        })
    }

    /// What [`Self::read_again`] may start from; `None` when malloc was never used.
    #[must_use]
    pub fn known(&self) -> Option<Known> {
        self.arenas.first().map(|a| Known { main_arena: a.addr, version: self.version.clone() })
    }

    /// The chunk whose usable bytes contain `addr`, whatever its state.
    #[must_use]
    pub fn find(&self, addr: Addr) -> Option<&Chunk> {
        self.index(addr).map(|i| &self.chunks[i])
    }

    /// Index in `chunks` of the chunk that contains `addr`.
    #[must_use]
    pub fn index(&self, addr: Addr) -> Option<usize> {
        // Most words that are asked for are no addresses at all.
        if addr < self.chunks.first()?.addr || addr >= self.chunks.last()?.end() {
            return None;
        }
        let i = self.index.up_to(&self.chunks, &self.segments, addr.0).checked_sub(1)?;
        (addr < self.chunks[i].end()).then_some(i)
    }

    /// Index of the chunk in use that starts at `addr`; `None` says nothing. It takes no look at `chunks`.
    #[must_use]
    pub(crate) fn used_at(&self, addr: Addr) -> Option<usize> {
        self.index.used_at(&self.segments, addr.0)
    }

    /// The run of chunks that contains `addr`.
    #[must_use]
    pub fn segment(&self, addr: Addr) -> Option<&Segment> {
        let after = self.segments.partition_point(|s| s.start <= addr);
        let s = self.segments.get(after.checked_sub(1)?)?;
        (addr < s.end).then_some(s)
    }

    /// Chunks that the program holds.
    pub fn in_use(&self) -> impl Iterator<Item = &Chunk> {
        self.chunks.iter().filter(|c| c.state.in_use())
    }

    /// For the image.
    #[must_use]
    pub fn info(&self) -> proto::HeapInfo {
        let (mut chunks_in_use, mut bytes_in_use, mut chunks_free) = (0, 0, 0);
        for c in &self.chunks {
            if c.state.in_use() {
                chunks_in_use += 1;
                bytes_in_use += c.usable;
            } else if !matches!(c.state, ChunkState::Top | ChunkState::Allocator) {
                chunks_free += 1;
            }
        }
        proto::HeapInfo {
            allocator: self.version.clone(),
            main_arena: self.arenas.first().map_or(0, |a| a.addr.0),
            main_arena_size: super::ARENA_SIZE,
            arenas: self.arenas.iter().map(|a| a.addr.0).collect(),
            tcaches: self
                .tcaches
                .iter()
                .map(|t| proto::Tcache {
                    old_tid: t.tid.0 as u32,
                    tcache: t.addr.0,
                    thread_arena: t.arena.0,
                    tcache_tls_offset: t.tcache_tls_offset as u64,
                    arena_tls_offset: t.arena_tls_offset as u64,
                })
                .collect(),
            chunks_in_use,
            bytes_in_use,
            chunks_free,
        }
    }
}

/// libc's banner ("GNU C Library ... version 2.36.") is in its read-only data.
fn version(mem: &dyn Memory, vmas: &[proto::Vma]) -> String {
    const BANNER: &[u8] = b"GNU C Library (";
    let file = |v: &&proto::Vma| {
        v.name.rsplit('/').next().is_some_and(|n| n.starts_with("libc.so") || n.starts_with("libc-2"))
    };
    for v in vmas.iter().filter(file).filter(|v| v.prot == 1) {
        let Ok(raw) = mem.bytes(Addr(v.start), (v.end - v.start) as usize) else {
            continue;
        };
        let Some(at) = find_bytes(&raw, BANNER) else {
            continue;
        };
        let text = String::from_utf8_lossy(&raw[at..(at + 160).min(raw.len())]).into_owned();
        if let Some((_, rest)) = text.split_once("version ") {
            let number: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
            return format!("glibc-{}", number.trim_end_matches('.'));
        }
    }
    "glibc".into()
}

fn find_bytes(hay: &[u8], needle: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(n) = hay[from..].iter().position(|&b| b == needle[0]) {
        let at = from + n;
        if hay[at..].starts_with(needle) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}
