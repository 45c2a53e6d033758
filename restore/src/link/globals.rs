//! Globals and thread-locals that take old's value, and words whose value depends on the boot.

use super::input::Booted;
use super::locals::Sites;
use super::output::Refusal;
use super::state::{State, Target};
use mcr_image::{Addr, Tid, proto};
use proto::place::In;
use proto::reloc::Target as To;

/// Where things of the new program are.
pub struct Layout<'a> {
    /// The booted host.
    pub booted: &'a Booted,
    /// Distance from a thread pointer down to the program's TLS block; 0: it has none.
    pub tls_offset: u64,
    /// Variables of the quiescent frames.
    pub sites: &'a Sites,
    /// The old process's pid.
    pub old_pid: u32,
}

impl Layout<'_> {
    /// Address of a global of the new program.
    #[must_use]
    pub fn global(&self, link_addr: u64) -> Addr {
        self.booted.new_base.add(link_addr)
    }

    /// Address of a thread-local of the new program in the thread that takes over `old_tid`.
    pub fn tls(&self, old_tid: u32, offset: u64, what: &str) -> Result<Addr, Refusal> {
        let t = self.thread(old_tid, what)?;
        if self.tls_offset == 0 {
            return Err(Refusal::new(
                "I6",
                format!("{what}: the new program has no thread-local storage"),
                "give a rule that drops the thread-local variable",
            ));
        }
        Ok(Addr(t.fs_base.0.wrapping_sub(self.tls_offset).wrapping_add(offset)))
    }

    fn thread(&self, old_tid: u32, what: &str) -> Result<&super::NewThread, Refusal> {
        self.booted.thread_for(Tid(old_tid as i32)).ok_or_else(|| {
            Refusal::new(
                "I1",
                format!("{what} names thread {old_tid}, which no thread of the new version takes over"),
                "see `mcr quiesce` for the threads of both versions",
            )
        })
    }

    /// The value of a relocation, and its size in bytes.
    pub fn value(&self, r: &proto::Reloc) -> Result<(u64, usize), Refusal> {
        let what = if r.symbol.is_empty() { "a relocation" } else { r.symbol.as_str() };
        Ok(match &r.target {
            Some(To::NewLinkAddr(a)) => (self.global(*a).0, 8),
            Some(To::ThreadOf(tid)) => (self.thread(*tid, what)?.fs_base.0, 8),
            Some(To::Tls(t)) => (self.tls(t.old_tid, t.offset, what)?.0, 8),
            Some(To::Local(l)) => {
                let t = self.thread(l.old_tid, what)?;
                match self.sites.find(t.tid, l.frame, &l.function, &l.variable).and_then(|s| s.target) {
                    Some(Target::Memory(a)) => (a.0.wrapping_add(l.offset), 8),
                    _ => {
                        return Err(Refusal::new(
                            "I6",
                            format!(
                                "{what}: old memory points at local {}::{}, which has no address in the new version",
                                l.function, l.variable
                            ),
                            "the variable was dropped or lives in a register now; build the new version so that it stays in memory",
                        )
                        .at(format!("{}::{}", l.function, l.variable)));
                    }
                }
            }
            Some(To::Pid(p)) if self.booted.in_place => (p.old_tid.into(), 4),
            Some(To::Pid(p)) if p.old_tid == self.old_pid => (self.booted.pid.0 as u64, 4),
            Some(To::Pid(p)) => (self.thread(p.old_tid, what)?.tid.0 as u64, 4),
            None => {
                return Err(Refusal::new(
                    "I6",
                    format!("{what}: the patch names no target"),
                    "make the update image again with this version of mcr",
                ));
            }
        })
    }
}

/// Writes the globals and thread-locals of the patch. Returns where each thread-local went.
pub fn write(patch: &proto::Patch, at: &Layout<'_>, state: &mut State<'_>) -> Result<Vec<Addr>, Refusal> {
    for g in &patch.globals {
        state.put(Target::Memory(at.global(g.new_link_addr)), &g.content, &g.keep_native);
        state.stats.globals += 1;
    }
    let mut tls = Vec::with_capacity(patch.tls.len());
    for v in &patch.tls {
        let a = at.tls(v.old_tid, v.new_tls_offset, &v.name)?;
        state.put(Target::Memory(a), &v.content, &v.keep_native);
        tls.push(a);
    }
    Ok(tls)
}

/// Resolves and writes every relocation of the patch.
pub fn relocate(
    patch: &proto::Patch,
    at: &Layout<'_>,
    locals: &[Option<Target>],
    tls: &[Addr],
    state: &mut State<'_>,
) -> Result<(), Refusal> {
    for r in &patch.relocs {
        let (value, size) = at.value(r)?;
        let Some(place) = &r.place else { continue };
        let broken = || {
            Refusal::new(
                "I6",
                format!("relocation {:?} has no valid place", r.symbol),
                "make the update image again with this version of mcr",
            )
        };
        let target = match place.r#in.as_ref().ok_or_else(broken)? {
            In::Addr(a) => Target::Memory(Addr(*a)),
            In::Global(i) => {
                Target::Memory(at.global(patch.globals.get(*i as usize).ok_or_else(broken)?.new_link_addr))
            }
            In::Tls(i) => Target::Memory(*tls.get(*i as usize).ok_or_else(broken)?),
            In::Local(i) => match locals.get(*i as usize).ok_or_else(broken)? {
                Some(t) => *t,
                None => continue, // the local itself was dropped, with a finding
            },
        };
        let target = match target {
            Target::Memory(a) => Target::Memory(a.add(place.offset)),
            t => t,
        };
        state.put(target, &value.to_le_bytes()[..size], &[]);
        state.stats.relocs += 1;
    }
    Ok(())
}
