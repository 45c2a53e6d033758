//! Stack unwinding by call frame information over any `Memory`: every frame's registers, and where in memory
//! each of them was saved, so that a caller's variables in callee-saved registers can be read and rewritten.

mod cfi;
mod name;

pub(crate) use cfi::CfiIndex;
pub use name::base_name;

use crate::modules::Module;
use crate::{Addr, LinkAddr, Memory, MemoryError, ModuleMap, Regs, proto};
use cfi::{Cfa, Row, Rule};
use gimli::{EndianSlice, Evaluation, EvaluationResult, LittleEndian, Location, Value};
use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;

/// More frames than this are taken for a damaged stack.
pub const MAX_DEPTH: usize = 256;

const RSP: usize = 7;
const RA: usize = 16;
/// rbx, rbp, r12–r15: kept across calls by the System V ABI.
const CALLEE_SAVED: [usize; 6] = [3, 6, 12, 13, 14, 15];

/// One frame.
#[derive(Clone)]
pub struct Frame {
    /// The instruction that this frame is at, or returns to.
    pub pc: Addr,
    /// The address inside the calling instruction, to look up scopes and line numbers: `pc` for the innermost
    /// frame and for one that a signal interrupted, else `pc - 1`.
    pub lookup_pc: Addr,
    /// Canonical frame address (rsp before the call that made this frame); 0 where it is not known.
    pub cfa: Addr,
    /// Values in this frame by DWARF number (`Regs::DWARF_NAMES`; 16 is the program counter); `None`: clobbered.
    pub regs: [Option<u64>; 17],
    /// Where this frame's value lies in memory; `None`: in the live register, or computed.
    pub saved_at: [Option<Addr>; 17],
    /// The module that holds `pc`.
    pub module: Option<Arc<Module>>,
    /// The function's name, where there is a symbol.
    pub function: Option<String>,
    /// The function's start.
    pub function_link_addr: Option<LinkAddr>,
    /// From the function's start, else from the module's load bias, else from 0.
    pub offset: u64,
    /// A signal trampoline: the next frame was interrupted, it did not call.
    pub signal: bool,
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let module = self.module.as_ref().map_or("?", |m| m.name());
        match &self.function {
            Some(n) => write!(f, "{n}+{:#x} ({module})", self.offset),
            None => write!(f, "{module}+{:#x}", self.offset),
        }
    }
}

impl Frame {
    /// In the main executable.
    #[must_use]
    pub fn in_program(&self) -> bool {
        self.module.as_ref().is_some_and(|m| m.is_exe())
    }
    /// `lookup_pc` in the module's own space, for debug information.
    #[must_use]
    pub fn lookup_link_addr(&self) -> Option<LinkAddr> {
        self.module.as_ref().map(|m| m.link(self.lookup_pc))
    }
    /// The function's name without what the compiler appended.
    #[must_use]
    pub fn base_name(&self) -> Option<&str> {
        self.function.as_deref().map(base_name)
    }
    /// The frame's part of a signature: the function's base name for the program, "module+offset" (link
    /// address) elsewhere, "?" where nothing is known.
    #[must_use]
    pub fn signature(&self) -> String {
        match &self.module {
            Some(m) if m.is_exe() => self.base_name().unwrap_or("?").to_owned(),
            Some(m) => format!("{}+{:#x}", m.name(), m.link(self.pc).0),
            None => "?".to_owned(),
        }
    }
    /// As the image records it.
    #[must_use]
    pub fn to_proto(&self) -> proto::Frame {
        proto::Frame {
            pc: self.pc.0,
            cfa: self.cfa.0,
            module: self.module.as_ref().map(|m| m.name().to_owned()).unwrap_or_default(),
            function: self.function.clone().unwrap_or_default(),
            offset: self.offset,
            in_program: self.in_program(),
            module_offset: self.module.as_ref().map_or(0, |m| m.link(self.pc).0),
        }
    }
}

/// Why the unwinder stopped.
#[derive(Debug)]
pub enum End {
    /// The outermost frame: its return address is undefined (`_start`, `clone`), or zero.
    Bottom,
    /// The code at the last frame has no call frame information.
    NoCfi {
        /// File name of the module.
        module: String,
        /// Link address.
        offset: LinkAddr,
    },
    /// The last frame's program counter is in no module (JIT code, a damaged stack).
    NoModule(Addr),
    /// Stack memory that cannot be read.
    BadMemory(MemoryError),
    /// A rule that needs a register whose value is lost, or that cannot be evaluated.
    BadRule(String),
    /// The stack does not get shorter.
    Loop(Addr),
    /// More than [`MAX_DEPTH`] frames.
    TooDeep,
}

impl End {
    /// The whole stack was seen.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        matches!(self, Self::Bottom)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bottom => write!(f, "end of stack"),
            Self::NoCfi { module, offset } => {
                write!(f, "no unwind information for {module}+{:#x}", offset.0)
            }
            Self::NoModule(a) => write!(f, "code at {a} belongs to no ELF file"),
            Self::BadMemory(e) => write!(f, "{e}"),
            Self::BadRule(e) => write!(f, "unwind rule: {e}"),
            Self::Loop(a) => write!(f, "the frame at {a} does not lead outwards"),
            Self::TooDeep => write!(f, "more than {MAX_DEPTH} frames"),
        }
    }
}

/// A stack.
#[derive(Debug)]
pub struct Unwound {
    /// Innermost first; never empty.
    pub frames: Vec<Frame>,
    /// Why there are no more.
    pub end: End,
}

impl Unwound {
    /// See [`signature`].
    #[must_use]
    pub fn signature(&self) -> Vec<String> {
        signature(&self.frames)
    }
    /// As the image records it.
    #[must_use]
    pub fn to_proto(&self) -> Vec<proto::Frame> {
        self.frames.iter().map(Frame::to_proto).collect()
    }
}

/// What identifies a thread's stack across builds of the program: innermost first, function names in the
/// program, "module+offset" in libraries. No address of the program is in it.
#[must_use]
pub fn signature(frames: &[Frame]) -> Vec<String> {
    frames.iter().map(Frame::signature).collect()
}

/// [`signature`] of frames that an image recorded.
#[must_use]
pub fn proto_signature(frames: &[proto::Frame]) -> Vec<String> {
    let one = |f: &proto::Frame| match (f.in_program, f.module.is_empty()) {
        (true, _) if f.function.is_empty() => "?".to_owned(),
        (true, _) => base_name(&f.function).to_owned(),
        (false, true) => "?".to_owned(),
        (false, false) => format!("{}+{:#x}", f.module, f.module_offset),
    };
    frames.iter().map(one).collect()
}

/// Keeps the pages that one unwind touches: a live process costs a system call for each read.
struct Pages<'a> {
    memory: &'a dyn Memory,
    pages: RefCell<Vec<(u64, Box<[u8; 4096]>)>>,
}

impl Pages<'_> {
    fn word(&self, at: Addr) -> Result<u64, MemoryError> {
        let (page, inside) = (at.0 & !4095, (at.0 & 4095) as usize);
        if inside > 4096 - 8 {
            return self.memory.u64(at);
        }
        let take = |p: &[u8; 4096]| {
            let mut b = [0; 8];
            b.copy_from_slice(&p[inside..inside + 8]);
            u64::from_le_bytes(b)
        };
        if let Some((_, p)) = self.pages.borrow().iter().rev().find(|p| p.0 == page) {
            return Ok(take(p));
        }
        let mut p = Box::new([0; 4096]);
        if self.memory.read(Addr(page), &mut p[..]).is_err() {
            return self.memory.u64(at);
        }
        let v = take(&p);
        self.pages.borrow_mut().push((page, p));
        Ok(v)
    }
}

enum Stop {
    Memory(MemoryError),
    Rule(String),
}

impl From<MemoryError> for Stop {
    fn from(e: MemoryError) -> Self {
        Self::Memory(e)
    }
}

impl From<gimli::Error> for Stop {
    fn from(e: gimli::Error) -> Self {
        Self::Rule(e.to_string())
    }
}

/// Unwinds a thread from its registers.
#[must_use]
pub fn unwind(modules: &ModuleMap, memory: &dyn Memory, regs: &Regs) -> Unwound {
    let memory = Pages { memory, pages: RefCell::new(Vec::new()) };
    let mut frames: Vec<Frame> = Vec::new();
    let mut regs = regs.dwarf().map(Some);
    let mut saved_at = [None; 17];
    let mut interrupted = true;
    loop {
        let pc = Addr(regs[RA].unwrap_or(0));
        if pc.0 == 0 && !frames.is_empty() {
            return Unwound { frames, end: End::Bottom };
        }
        let lookup_pc = if interrupted { pc } else { Addr(pc.0.wrapping_sub(1)) };
        let module = modules.find(lookup_pc).cloned();
        let row = module.as_ref().and_then(|m| m.elf.cfi().row(&m.elf, m.link(lookup_pc)));
        frames.push(make_frame(pc, lookup_pc, module, regs, saved_at, row.as_deref()));
        let last = frames.len() - 1;
        let Some(m) = frames[last].module.clone() else {
            return Unwound { frames, end: End::NoModule(pc) };
        };
        let Some(row) = row else {
            let end = End::NoCfi { module: m.name().to_owned(), offset: m.link(pc) };
            return Unwound { frames, end };
        };
        let cfa = match cfa(&row, &regs, &memory) {
            Ok(v) => v,
            Err(e) => {
                return Unwound { frames, end: stopped(e) };
            }
        };
        frames[last].cfa = Addr(cfa);
        // A signal may have switched to an alternate stack; a call never leads inwards.
        let before = last.checked_sub(1).map(|i| &frames[i]);
        if before.is_some_and(|b| !b.signal && !row.signal && cfa <= b.cfa.0) {
            return Unwound { frames, end: End::Loop(Addr(cfa)) };
        }
        if matches!(row.rules[RA], Rule::Undefined | Rule::Unspecified) {
            return Unwound { frames, end: End::Bottom };
        }
        match caller(&row, cfa, &regs, &saved_at, &memory) {
            Ok((r, s)) => {
                if r[RA] == regs[RA] && r[RSP] == regs[RSP] {
                    return Unwound { frames, end: End::Loop(Addr(cfa)) };
                }
                (regs, saved_at) = (r, s);
            }
            Err(e) => {
                return Unwound { frames, end: stopped(e) };
            }
        }
        interrupted = row.signal;
        if frames.len() >= MAX_DEPTH {
            return Unwound { frames, end: End::TooDeep };
        }
    }
}

fn stopped(s: Stop) -> End {
    match s {
        Stop::Memory(e) => End::BadMemory(e),
        Stop::Rule(e) => End::BadRule(e),
    }
}

fn make_frame(
    pc: Addr,
    lookup_pc: Addr,
    module: Option<Arc<Module>>,
    regs: [Option<u64>; 17],
    saved_at: [Option<Addr>; 17],
    row: Option<&Row>,
) -> Frame {
    let signal = row.is_some_and(|r| r.signal);
    let mut frame = Frame {
        pc,
        lookup_pc,
        cfa: Addr(0),
        regs,
        saved_at,
        module: None,
        function: None,
        function_link_addr: None,
        offset: pc.0,
        signal,
    };
    if let Some(m) = module {
        // A trampoline is returned to at its first instruction; the address before it is another function.
        let at = m.link(if signal { pc } else { lookup_pc });
        frame.offset = m.link(pc).0;
        if let Some(s) = m.elf.function_at(at) {
            frame.function = Some(s.name.to_owned());
            frame.function_link_addr = Some(s.addr);
            frame.offset = m.link(pc).0.wrapping_sub(s.addr.0);
        }
        frame.module = Some(m);
    }
    frame
}

fn cfa(row: &Row, regs: &[Option<u64>; 17], memory: &Pages<'_>) -> Result<u64, Stop> {
    match &row.cfa {
        Cfa::Offset(r, n) => {
            let v = regs.get(*r).copied().flatten();
            let v = v.ok_or_else(|| Stop::Rule(format!("register {r} is lost")))?;
            Ok(v.wrapping_add_signed(*n))
        }
        Cfa::Expression(e) => evaluate(e, None, regs, memory),
    }
}

type Restored = ([Option<u64>; 17], [Option<Addr>; 17]);

fn caller(
    row: &Row,
    cfa: u64,
    regs: &[Option<u64>; 17],
    saved_at: &[Option<Addr>; 17],
    memory: &Pages<'_>,
) -> Result<Restored, Stop> {
    let mut out = ([None; 17], [None; 17]);
    for (i, rule) in row.rules.iter().enumerate() {
        let at = |a: u64| Ok::<_, Stop>((Some(memory.word(Addr(a))?), Some(Addr(a))));
        let keep = (regs[i], saved_at[i]);
        let (value, place) = match rule {
            Rule::Unspecified if i == RSP => (Some(cfa), None),
            Rule::Unspecified if CALLEE_SAVED.contains(&i) => keep,
            Rule::Unspecified | Rule::Undefined => (None, None),
            Rule::Same => keep,
            Rule::At(n) => at(cfa.wrapping_add_signed(*n))?,
            Rule::Value(n) => (Some(cfa.wrapping_add_signed(*n)), None),
            Rule::Register(r) => (regs.get(*r).copied().flatten(), saved_at.get(*r).copied().flatten()),
            Rule::AtExpression(e) => at(evaluate(e, Some(cfa), regs, memory)?)?,
            Rule::ValueExpression(e) => (Some(evaluate(e, Some(cfa), regs, memory)?), None),
            Rule::Constant(v) => (Some(*v), None),
        };
        (out.0[i], out.1[i]) = (value, place);
    }
    if out.0[RA].is_none() {
        return Err(Stop::Rule("the return address is lost".into()));
    }
    Ok(out)
}

fn evaluate(
    code: &[u8],
    initial: Option<u64>,
    regs: &[Option<u64>; 17],
    memory: &Pages<'_>,
) -> Result<u64, Stop> {
    let encoding = gimli::Encoding { address_size: 8, format: gimli::Format::Dwarf32, version: 5 };
    let mut e = Evaluation::new(EndianSlice::new(code, LittleEndian), encoding);
    e.set_max_iterations(1000);
    if let Some(v) = initial {
        e.set_initial_value(v);
    }
    let mut r = e.evaluate()?;
    loop {
        r = match r {
            EvaluationResult::Complete => break,
            EvaluationResult::RequiresMemory { address, size, .. } => {
                let word = if size == 8 {
                    memory.word(Addr(address))?
                } else {
                    let bytes = memory.memory.bytes(Addr(address), usize::from(size.min(8)))?;
                    bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
                };
                e.resume_with_memory(Value::Generic(word))?
            }
            EvaluationResult::RequiresRegister { register, .. } => {
                let v = regs.get(usize::from(register.0)).copied().flatten();
                let v = v.ok_or_else(|| Stop::Rule(format!("register {} is lost", register.0)))?;
                e.resume_with_register(Value::Generic(v))?
            }
            _ => {
                return Err(Stop::Rule("an operation that call frame information may not use".into()));
            }
        };
    }
    if let Some(v) = e.value_result() {
        return Ok(v.to_u64(u64::MAX)?);
    }
    match e.as_result() {
        [p] => match p.location {
            Location::Address { address } => Ok(address),
            Location::Value { value } => Ok(value.to_u64(u64::MAX)?),
            _ => Err(Stop::Rule("an expression without an address".into())),
        },
        _ => Err(Stop::Rule("an expression in pieces".into())),
    }
}
