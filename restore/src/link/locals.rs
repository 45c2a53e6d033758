//! Locals of frames that stay: old's values at the same-named variables of the paired new frame.

use super::state::{State, Target};
use mcr_image::unwind::Frame;
use mcr_image::{Addr, Memory, Tid, proto};
use mcr_transform::types::{Local, LocalPlace, TypeModel};
use std::collections::HashMap;

/// A variable of a new frame.
#[derive(Clone, Debug)]
pub struct Site {
    /// Frame, counted from the innermost.
    pub frame: usize,
    /// The frame's function.
    pub function: String,
    /// The variable.
    pub local: Local,
    /// Where it can be written; `None`: computed or gone.
    pub target: Option<Target>,
}

/// All variables of the new version's quiescent frames.
#[derive(Default)]
pub struct Sites {
    by_thread: HashMap<Tid, Vec<Site>>,
}

impl Sites {
    /// Evaluates the locations in every program frame of every thread.
    pub fn read(types: &TypeModel, memory: &dyn Memory, bias: Addr, threads: &[(Tid, Vec<Frame>)]) -> Self {
        let mut by_thread: HashMap<Tid, Vec<Site>> = HashMap::new();
        for (tid, frames) in threads {
            let sites = by_thread.entry(*tid).or_default();
            for (i, f) in frames.iter().enumerate().filter(|(_, f)| f.in_program()) {
                let function = f.base_name().unwrap_or_default().to_owned();
                for local in types.locals_at(f, memory, bias) {
                    let target = match &local.place {
                        LocalPlace::Memory(a) => Some(Target::Memory(*a)),
                        LocalPlace::Register { saved_at: Some(a), .. } => Some(Target::Memory(*a)),
                        LocalPlace::Register { reg, .. } => Some(Target::Register(*tid, *reg)),
                        _ => None,
                    };
                    sites.push(Site { frame: i, function: function.clone(), local, target });
                }
            }
        }
        Self { by_thread }
    }

    /// The variables of a thread.
    pub fn of(&self, tid: Tid) -> &[Site] {
        self.by_thread.get(&tid).map_or(&[], Vec::as_slice)
    }

    /// A variable by frame, function and name. Where signatures are equal the frame numbers are, too; a
    /// function that is once on the stack is found whatever its number.
    pub fn find(&self, tid: Tid, frame: u32, function: &str, variable: &str) -> Option<&Site> {
        let all = self.of(tid);
        let base = mcr_image::unwind::base_name(function);
        let same = |s: &&Site| s.function == base && s.local.name == variable;
        if let Some(s) = all.iter().filter(same).find(|s| s.frame == frame as usize) {
            return Some(s);
        }
        let mut it = all.iter().filter(same);
        let first = it.next()?;
        it.all(|s| s.frame == first.frame).then_some(first)
    }
}

/// Writes every local of the patch; what cannot be placed is a finding.
pub fn write(
    patch: &proto::Patch,
    sites: &Sites,
    types: &TypeModel,
    thread_for: impl Fn(u32) -> Option<Tid>,
    is_heap: impl Fn(u64) -> bool,
    state: &mut State<'_>,
) -> Vec<Option<Target>> {
    let mut targets = Vec::with_capacity(patch.locals.len());
    for v in &patch.locals {
        let path = format!("{}::{}", v.function, v.variable);
        let site = thread_for(v.old_tid).and_then(|t| sites.find(t, v.frame, &v.function, &v.variable));
        let target = site.and_then(|s| s.target);
        let fits = site.is_none_or(|s| types.size_of(s.local.ty) == v.content.len() as u64);
        if let (Some(t), true) = (target, fits) {
            state.put(t, &v.content, &v.keep_native);
            state.stats.locals += 1;
            targets.push(Some(t));
            continue;
        }
        targets.push(None);
        let heap =
            v.content.chunks_exact(8).any(|w| is_heap(u64::from_le_bytes(w.try_into().unwrap_or_default())));
        let why = match site {
            None => "the new version's frame has no such variable",
            Some(_) if !fits => "its size differs from the patch's",
            Some(_) => "it has no place in the new version's frame at this point",
        };
        // A pointer to live memory that nobody holds any more may matter; a number that the optimiser
        // dropped does not.
        let severity = if heap { proto::Severity::Warning } else { proto::Severity::Info };
        state.find(severity, "local-dropped", format!("local {path} of thread {}: {why}", v.old_tid), &path);
    }
    targets
}
