//! What the patch says is in the write list, and what it does not speak of stays as it was.

use super::super::output::{LinkStats, Refusal};
use super::super::overlay::Overlay;
use super::super::state::{State, Target};
use super::super::{globals, lay_patch, locals, written_ranges};
use super::{Final, NEXT};
use mcr_image::{Addr, Tid};
use std::collections::{BTreeMap, BTreeSet};

/// Offset of a `FILE`'s method table, and its size: libc's own objects, whose list `link` joins.
const VTABLE: u64 = 0xd8;

/// The patch laid over the host once more, and nothing else.
pub(super) struct Asked<'a> {
    pub state: State<'a>,
    tls: Vec<Addr>,
    locals: Vec<Option<Target>>,
}

/// `heap`: with what changes in old's heap.
pub(super) fn asked<'a>(now: &Final<'a>, heap: bool) -> Result<Asked<'a>, Refusal> {
    let (input, patch) = (now.input, now.input.patch);
    let mut state = State {
        out: Overlay::new(input.host),
        regs: input.booted.threads.iter().map(|t| (t.tid, t.regs)).collect::<BTreeMap<_, _>>(),
        set: BTreeSet::new(),
        findings: Vec::new(),
        stats: LinkStats::default(),
    };
    if heap {
        lay_patch(patch, &mut state.out);
    }
    let tls = globals::write(patch, now.layout, &mut state)?;
    let thread_for = |old: u32| input.booted.thread_for(Tid(old as i32)).map(|t| t.tid);
    let targets = locals::write(patch, now.sites, input.types, thread_for, |_| false, &mut state);
    globals::relocate(patch, now.layout, &targets, &tls, &mut state)?;
    Ok(Asked { state, tls, locals: targets })
}

pub(super) fn check(now: &Final<'_>, asked: &Asked<'_>, heap: bool) -> Result<usize, Refusal> {
    let (input, patch) = (now.input, now.input.patch);
    let Asked { state, tls, locals: targets } = asked;
    let mut syncs: Vec<(u64, u64)> =
        patch.syncs.iter().map(|s| (s.addr, s.addr + u64::from(s.size))).collect();
    syncs.sort_unstable();
    let is_sync = |word: u64| {
        let i = syncs.partition_point(|s| s.1 <= word);
        syncs.get(i).is_some_and(|s| s.0 < word + 8)
    };
    let mut bytes = 0;
    for (at, want) in state.out.runs() {
        bytes += want.len();
        let mut buf = Vec::new();
        let got = now.view.view(at, want.len(), &mut buf);
        if got.is_ok_and(|g| g == want) {
            continue;
        }
        let got = now.view.bytes(at, want.len()).unwrap_or_else(|_| vec![!0; want.len()]);
        for i in (0..want.len()).filter(|&i| got[i] != want[i]) {
            let word = (at.0 + i as u64) & !7;
            if is_sync(word) || is_stream(now, word) {
                continue;
            }
            let ranges = written_ranges(patch, now.layout, tls, targets);
            let what = ranges.iter().rev().find(|r| r.0.0 <= word + 7 && word < r.0.0 + r.1);
            let path = what.map_or_else(|| format!("the word at {word:#x}"), |r| r.2.clone());
            return Err(Refusal::new(
                "I11",
                format!(
                    "{path}: the byte at {} is to be {:#04x} in the new version, and would be {:#04x}",
                    Addr(at.0 + i as u64),
                    want[i],
                    got[i]
                ),
                NEXT,
            )
            .at(path));
        }
    }
    for &(tid, r) in &state.set {
        let Some(t) = input.booted.threads.iter().find(|t| t.tid == tid) else { continue };
        let (mut got, mut want) = (now.regs(t), state.regs.get(&tid).copied().unwrap_or(t.regs));
        let (got, want) =
            (super::super::state::register(&mut got, r), super::super::state::register(&mut want, r));
        if got != want {
            return Err(Refusal::new(
                "I11",
                format!("thread {tid}: a local that lives in register {r} did not get its value"),
                NEXT,
            )
            .at(format!("thread {tid}")));
        }
    }
    if heap {
        untouched(now, &state.out, &is_sync)?;
    }
    Ok(bytes)
}

/// Words of old's objects that nothing asks to change keep their value.
fn untouched(now: &Final<'_>, asked: &Overlay<'_>, is_sync: &dyn Fn(u64) -> bool) -> Result<(), Refusal> {
    for w in &now.list.memory {
        let end = w.addr.0 + w.bytes.len() as u64;
        if now.input.booted.is_native(w.addr) {
            continue;
        }
        let mut at = w.addr.0 & !7;
        while at < end {
            let word = at;
            at += 8;
            if asked.touched(Addr(word), 8) || !now.verifier.is_object(word) {
                continue;
            }
            let (Ok(a), Ok(b)) = (now.input.old.u64(Addr(word)), now.view.u64(Addr(word))) else { continue };
            if a == b || is_sync(word) || is_stream(now, word) {
                continue;
            }
            let path = format!("the word at {word:#x}");
            return Err(super::relation(
                format!(
                    "{path} of old's heap holds {a:#x} and would become {b:#x}, though nothing asks for it"
                ),
                path,
            ));
        }
    }
    Ok(())
}

/// The word lies in a `FILE` on the heap: its methods are libc's.
fn is_stream(now: &Final<'_>, word: u64) -> bool {
    let Some(start) = now.verifier.object_start(word) else { return false };
    let vtable = now.input.old.u64(Addr(start + VTABLE)).unwrap_or(0);
    let libc = now.input.old_modules.libc();
    libc.is_some_and(|m| m.start.0 <= vtable && vtable < m.end.0)
}
