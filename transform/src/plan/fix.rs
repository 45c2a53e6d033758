//! One word at a time: what an old value has to become.

use super::objects::Convs;
use crate::relayout::Relayout;
use crate::resolve::{Resolver, Target};
use crate::space::{Space, Spot};
use crate::types::TypeId;
use mcr_image::proto;
use mcr_image::proto::reloc;
use std::ops::Range;

/// A local variable of a quiescent frame, by its place on the stack.
#[derive(Clone, Debug)]
pub(crate) struct StackVar {
    pub range: Range<u64>,
    pub addr: proto::LocalAddr,
}

/// What a word becomes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum NewWord {
    /// It keeps its value.
    Same,
    /// This value.
    Value(u64),
    /// Known after the boot only.
    Reloc(reloc::Target, String),
    /// It cannot be carried: code of the finding, and why.
    Lost(&'static str, String),
}

/// Everything that decides about a word.
pub(crate) struct Fixer<'a> {
    pub space: &'a Space<'a>,
    pub resolver: &'a Resolver<'a>,
    pub rl: &'a dyn Relayout,
    pub convs: &'a Convs,
    pub threads: &'a [proto::Thread],
    pub pid: u32,
    pub stack_vars: &'a [StackVar],
    /// Where the main thread's arguments and environment begin (`mm.start_stack`); 0 when not known.
    pub arguments: u64,
    /// Old and new offset of each thread-local variable of the program, with its size and name.
    pub tls_vars: &'a [(Range<u64>, Option<u64>, String)],
}

impl Fixer<'_> {
    /// A pointer-sized word; `want`: the type it points to.
    pub fn word(&self, v: u64, want: Option<TypeId>) -> NewWord {
        if v < 4096 {
            return NewWord::Same;
        }
        if self.space.program.contains(&v) {
            return match self.resolver.resolve(v, want) {
                Target::New { link, symbol } => NewWord::Reloc(reloc::Target::NewLinkAddr(link), symbol),
                Target::Stays => NewWord::Same,
                Target::Unresolved(why) => NewWord::Lost("I6-text-pointer", why),
            };
        }
        if let Some(hit) = self.convs.map(self.rl, v, want) {
            return match hit {
                Ok(new) if new == v => NewWord::Same,
                Ok(new) => NewWord::Value(new),
                Err(n) => {
                    let c = &self.convs.list[n];
                    let off = v.wrapping_sub(c.old_addr);
                    NewWord::Lost(
                        "I7-interior",
                        format!("it points {off:#x} bytes into an object whose new layout has nothing there"),
                    )
                }
            };
        }
        match self.space.outside(v) {
            Spot::Stack(t) => self.stack(v, t),
            Spot::Tls(t, offset) => self.tls(t, offset),
            _ => NewWord::Same,
        }
    }

    fn stack(&self, v: u64, thread: usize) -> NewWord {
        let tid = self.threads.get(thread).map_or(0, |t| t.tid);
        if let Some(t) = self.threads.iter().find(|t| t.fs_base == v) {
            return NewWord::Reloc(reloc::Target::ThreadOf(t.tid), format!("thread {}", t.tid));
        }
        let hit = self.stack_vars.iter().find(|s| s.range.contains(&v) && s.addr.old_tid == tid);
        match hit {
            Some(s) => {
                let mut a = s.addr.clone();
                a.offset = v - s.range.start;
                let name = format!("local {}::{}+{:#x}", a.function, a.variable, a.offset);
                NewWord::Reloc(reloc::Target::Local(a), name)
            }
            None => NewWord::Lost(
                "stack-reference",
                format!("it points at the stack of thread {tid}, but into no variable of a frame that stays"),
            ),
        }
    }

    fn tls(&self, thread: usize, offset: u64) -> NewWord {
        let tid = self.threads.get(thread).map_or(0, |t| t.tid);
        match self.tls_vars.iter().find(|v| v.0.contains(&offset)) {
            Some((range, Some(new), name)) => {
                let a = proto::TlsAddr { old_tid: tid, offset: new + (offset - range.start) };
                NewWord::Reloc(reloc::Target::Tls(a), format!("thread-local {name} of thread {tid}"))
            }
            Some((_, None, name)) => NewWord::Lost(
                "I6-text-pointer",
                format!("thread-local variable {name} is not in the new version"),
            ),
            None => {
                NewWord::Lost("I6-text-pointer", "it points at thread-local memory without a name".into())
            }
        }
    }

    /// A `pthread_t`.
    pub fn thread(&self, v: u64) -> NewWord {
        match self.threads.iter().find(|t| t.fs_base == v && v != 0) {
            Some(t) => NewWord::Reloc(reloc::Target::ThreadOf(t.tid), format!("thread {}", t.tid)),
            None => NewWord::Same,
        }
    }

    /// A `pid_t`: our own pid or the tid of a thread.
    pub fn pid(&self, v: u32) -> NewWord {
        let ours = v != 0 && (v == self.pid || self.threads.iter().any(|t| t.tid == v));
        if ours {
            return NewWord::Reloc(reloc::Target::Pid(proto::PidOf { old_tid: v }), format!("pid {v}"));
        }
        NewWord::Same
    }

    /// A word of opaque memory that is worth a look: it lies in the old program, or in an object that gets a
    /// new layout.
    pub fn is_interesting(&self, v: u64) -> bool {
        self.space.program.contains(&v) || self.convs.at(v).is_some()
    }

    /// Whether [`Self::word`] says [`NewWord::Same`] whatever is wanted, and the word is of no interest otherwise.
    pub fn keeps(&self, v: u64) -> bool {
        v < 4096
            || !self.is_interesting(v) && !matches!(self.space.outside(v), Spot::Stack(_) | Spot::Tls(..))
    }

    /// A pointer at the arguments, the environment or the auxiliary vector: the new version has its own.
    pub fn is_argument(&self, v: u64) -> bool {
        self.arguments != 0 && v >= self.arguments && matches!(self.space.spot(v), Spot::Stack(0))
    }

    /// It points below the stack pointer of its thread: what was there is gone already.
    pub fn is_stale_stack(&self, v: u64) -> bool {
        const RSP: usize = 19; // struct user_regs_struct
        const RED_ZONE: u64 = 128;
        match self.space.spot(v) {
            Spot::Stack(t) => {
                self.threads.get(t).and_then(|t| t.regs.get(RSP)).is_some_and(|sp| v < sp - RED_ZONE)
            }
            _ => false,
        }
    }
}
