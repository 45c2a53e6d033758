//! Local variables of a frame: which are in scope at its instruction, and where each of them lives there.
//!
//! DWARF 5 section 2.6 (location descriptions), 3.3.8 (inlined subroutines), 3.5 (lexical blocks).

use super::dies::{Attrs, Ref, space_of};
use super::model::{Function, Name, TypeId, TypeModel};
use super::read::{attrs_at, unit_at};
use super::sections::{Dwarf, SPACE_MASK, Slice, Unit};
use gimli::constants as dw;
use gimli::{AttributeValue, EvaluationResult, Expression, Location, Value};
use mcr_image::unwind::Frame;
use mcr_image::{Addr, LinkAddr, Memory};

/// Where a variable is, at one instruction of one frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalPlace {
    /// In memory.
    Memory(Addr),
    /// In a register of the frame; `saved_at` is the stack slot where a callee saved it, `None`: still live.
    Register {
        /// DWARF number.
        reg: u16,
        /// Stack slot that holds it.
        saved_at: Option<Addr>,
        /// Its value.
        value: u64,
    },
    /// Computed: the value is known, but nothing can be written back.
    Value(Vec<u8>),
    /// Not available here, and why.
    Gone(&'static str),
}

/// A variable or parameter in scope.
#[derive(Clone, Debug)]
pub struct Local {
    /// Its name; `inlined_function::name` for one of an inlined call.
    pub name: String,
    /// Its type.
    pub ty: TypeId,
    /// A parameter.
    pub parameter: bool,
    /// Where it is.
    pub place: LocalPlace,
}

impl Local {
    /// Its bytes, where they can be had.
    #[must_use]
    pub fn bytes(&self, model: &TypeModel, memory: &dyn Memory) -> Option<Vec<u8>> {
        let size = usize::try_from(model.size_of(self.ty)).ok()?;
        match &self.place {
            LocalPlace::Memory(a) => memory.bytes(*a, size).ok(),
            LocalPlace::Register { value, .. } if size <= 8 => Some(value.to_le_bytes()[..size].to_vec()),
            LocalPlace::Value(v) if v.len() >= size => Some(v[..size].to_vec()),
            _ => None,
        }
    }
}

/// More nested scopes than this are taken for damaged debug information.
const MAX_NESTING: usize = 64;

impl TypeModel {
    /// The function of this model that a frame is in; `None` for frames of other modules.
    #[must_use]
    pub fn function_of(&self, frame: &Frame) -> Option<&Function> {
        if !frame.in_program() {
            return None;
        }
        self.function_at(frame.lookup_link_addr()?)
    }

    /// The variables and parameters in scope in a frame of the program, outer scopes first. `bias` is the
    /// program's load bias in the frame's process.
    #[must_use]
    pub fn locals_at(&self, frame: &Frame, memory: &dyn Memory, bias: Addr) -> Vec<Local> {
        let (Some(f), Some(pc)) = (self.function_of(frame), frame.lookup_link_addr()) else {
            return Vec::new();
        };
        let dwarf = self.sections.dwarf();
        let Some(unit) = unit_at(&dwarf, f.die) else {
            return Vec::new();
        };
        let base = attrs_at(&dwarf, &unit, f.die).and_then(|a| a.frame_base);
        let walk = Walk { model: self, dwarf: &dwarf, unit: &unit, frame, memory, bias, pc, base };
        let mut out = Vec::new();
        let offset = (f.die & !SPACE_MASK).wrapping_sub(unit.header.offset().0 as u64);
        if let Ok(mut tree) = unit.entries_tree(Some(gimli::UnitOffset(offset as usize)))
            && let Ok(root) = tree.root()
        {
            walk.scope(root, None, 0, &mut out);
        }
        out
    }

    fn type_at(&self, r: Option<Ref>) -> Option<TypeId> {
        let Some(Ref::Die(die)) = r else { return None };
        self.type_of_die(die)
    }
}

struct Walk<'w, 'a> {
    model: &'w TypeModel,
    dwarf: &'w Dwarf<'a>,
    unit: &'w Unit<'a>,
    frame: &'w Frame,
    memory: &'w dyn Memory,
    bias: Addr,
    pc: LinkAddr,
    base: Option<AttributeValue<Slice<'a>>>,
}

impl<'a> Walk<'_, 'a> {
    fn attrs(&self, entry: &gimli::DebuggingInformationEntry<Slice<'a>>) -> Attrs<'a> {
        let mut a = Attrs::default();
        for attr in entry.attrs() {
            a.take(self.dwarf, self.unit, space_of(self.unit, false), attr);
        }
        a
    }

    /// Fills in name and type from the abstract instance of an inlined or cloned entry.
    fn resolve(&self, mut a: Attrs<'a>) -> Attrs<'a> {
        for _ in 0..4 {
            let Some(Ref::Die(die)) = a.origin else { break };
            let Some(unit) = unit_at(self.dwarf, die) else {
                break;
            };
            let Some(o) = attrs_at(self.dwarf, &unit, die) else {
                break;
            };
            a.name = a.name.or(o.name);
            a.ty = a.ty.or(o.ty);
            a.origin = o.origin;
        }
        a
    }

    fn scope(
        &self,
        node: gimli::EntriesTreeNode<'_, '_, Slice<'a>>,
        inlined: Option<&str>,
        depth: usize,
        out: &mut Vec<Local>,
    ) {
        if depth > MAX_NESTING {
            return;
        }
        let mut children = node.children();
        while let Ok(Some(child)) = children.next() {
            let entry = child.entry();
            let a = self.attrs(entry);
            match entry.tag() {
                dw::DW_TAG_variable | dw::DW_TAG_formal_parameter => {
                    let parameter = entry.tag() == dw::DW_TAG_formal_parameter;
                    out.extend(self.local(a, parameter, inlined));
                }
                dw::DW_TAG_lexical_block => {
                    let code = a.code(self.dwarf, self.unit);
                    // Without a range the block covers what its parent covers.
                    if code.is_empty() || code.iter().any(|r| r.0 <= self.pc && self.pc < r.1) {
                        self.scope(child, inlined, depth + 1, out);
                    }
                }
                dw::DW_TAG_inlined_subroutine if self.covers(&a) => {
                    let name = self.resolve(a).name.map(|n| String::from_utf8_lossy(n).into_owned());
                    self.scope(child, Some(name.as_deref().unwrap_or("?")), depth + 1, out);
                }
                _ => {}
            }
        }
    }

    fn covers(&self, a: &Attrs<'a>) -> bool {
        a.code(self.dwarf, self.unit).iter().any(|r| r.0 <= self.pc && self.pc < r.1)
    }

    fn local(&self, a: Attrs<'a>, parameter: bool, inlined: Option<&str>) -> Option<Local> {
        if a.decl || a.external {
            return None;
        }
        let (location, constant) = (a.location, a.const_value);
        let a = self.resolve(a);
        let name: Name = String::from_utf8_lossy(a.name?).into();
        let ty = self.model.type_at(a.ty)?;
        let size = self.model.size_of(ty);
        let place = match (location, constant) {
            (Some(l), _) if super::dies::static_place(self.dwarf, self.unit, &l).is_some() => {
                return None;
            }
            (Some(l), _) => self.place(l, size),
            (None, Some(c)) => super::dies::unsigned(&c)
                .or_else(|| c.sdata_value().map(|v| v as u64))
                .map_or(LocalPlace::Gone("a constant that is no number"), |v| {
                    LocalPlace::Value(v.to_le_bytes().to_vec())
                }),
            (None, None) => LocalPlace::Gone("optimized out"),
        };
        let name = match inlined {
            Some(f) => format!("{f}::{name}"),
            None => name.to_string(),
        };
        Some(Local { name, ty, parameter, place })
    }

    fn place(&self, location: AttributeValue<Slice<'a>>, size: u64) -> LocalPlace {
        let expr = match location {
            AttributeValue::Exprloc(e) => Some(e),
            other => {
                let mut found = None;
                if let Ok(Some(mut list)) = self.dwarf.attr_locations(self.unit, other) {
                    while let Ok(Some(l)) = list.next() {
                        if l.range.begin <= self.pc.0 && self.pc.0 < l.range.end {
                            found = Some(l.data);
                            break;
                        }
                    }
                }
                found
            }
        };
        match expr {
            Some(e) if !e.0.is_empty() => self.evaluate(e, size, 0),
            _ => LocalPlace::Gone("not available at this instruction"),
        }
    }

    fn register(&self, reg: u16) -> LocalPlace {
        match self.frame.regs.get(usize::from(reg)).copied().flatten() {
            Some(value) => {
                LocalPlace::Register { reg, saved_at: self.frame.saved_at[usize::from(reg)], value }
            }
            None => LocalPlace::Gone("in a register that a callee has overwritten"),
        }
    }

    fn frame_base(&self, depth: usize) -> Option<u64> {
        let e = self.base?.exprloc_value()?;
        match self.evaluate(e, 8, depth + 1) {
            LocalPlace::Memory(a) => Some(a.0),
            LocalPlace::Register { value, .. } => Some(value),
            _ => None,
        }
    }

    fn evaluate(&self, e: Expression<Slice<'a>>, size: u64, depth: usize) -> LocalPlace {
        const LOST: LocalPlace = LocalPlace::Gone("its location cannot be computed");
        if depth > 3 {
            return LOST;
        }
        let mut eval = e.evaluation(self.unit.encoding());
        eval.set_max_iterations(10_000);
        let mut step = eval.evaluate();
        let pieces = loop {
            step = match step {
                Ok(EvaluationResult::Complete) => break eval.result(),
                Ok(EvaluationResult::RequiresMemory { address, size, .. }) => {
                    match self.memory.bytes(Addr(address), usize::from(size).min(8)) {
                        Ok(b) => {
                            let mut w = [0u8; 8];
                            w[..b.len()].copy_from_slice(&b);
                            eval.resume_with_memory(Value::Generic(u64::from_le_bytes(w)))
                        }
                        Err(_) => return LOST,
                    }
                }
                Ok(EvaluationResult::RequiresRegister { register, .. }) => {
                    match self.frame.regs.get(usize::from(register.0)).copied().flatten() {
                        Some(v) => eval.resume_with_register(Value::Generic(v)),
                        None => {
                            return LocalPlace::Gone(
                                "computed from a register that a callee has overwritten",
                            );
                        }
                    }
                }
                Ok(EvaluationResult::RequiresFrameBase) => match self.frame_base(depth) {
                    Some(v) => eval.resume_with_frame_base(v),
                    None => return LOST,
                },
                Ok(EvaluationResult::RequiresIndexedAddress { index, relocate }) => {
                    match self.dwarf.address(self.unit, index) {
                        Ok(a) if relocate => eval.resume_with_indexed_address(LinkAddr(a).at(self.bias).0),
                        Ok(a) => eval.resume_with_indexed_address(a),
                        Err(_) => return LOST,
                    }
                }
                Ok(EvaluationResult::RequiresCallFrameCfa) if self.frame.cfa.0 == 0 => return LOST,
                Ok(EvaluationResult::RequiresCallFrameCfa) => {
                    eval.resume_with_call_frame_cfa(self.frame.cfa.0)
                }
                Ok(EvaluationResult::RequiresRelocatedAddress(a)) => {
                    eval.resume_with_relocated_address(LinkAddr(a).at(self.bias).0)
                }
                Ok(EvaluationResult::RequiresEntryValue(_)) => {
                    return LocalPlace::Gone("known only as its value at the function's entry");
                }
                _ => return LOST,
            };
        };
        match pieces.as_slice() {
            [piece] if piece.size_in_bits.is_none() => self.piece(piece, size),
            [] => LOST,
            several => self.assemble(several, size),
        }
    }

    /// A variable that the compiler took apart: its value, if every part can be had.
    fn assemble(&self, pieces: &[gimli::Piece<Slice<'a>>], size: u64) -> LocalPlace {
        let mut out = Vec::new();
        for p in pieces {
            let len = match p.size_in_bits {
                Some(bits) if bits % 8 == 0 => bits / 8,
                Some(_) => return LocalPlace::Gone("in pieces of odd bits"),
                None => size.saturating_sub(out.len() as u64),
            };
            let Some(room) = size.checked_sub(out.len() as u64).filter(|r| len <= *r && len <= 4096) else {
                return LocalPlace::Gone("in pieces that do not fit");
            };
            let bytes = match self.piece(p, len.min(room)) {
                LocalPlace::Memory(a) => self.memory.bytes(a, len as usize).ok(),
                LocalPlace::Register { value, .. } => Some(value.to_le_bytes().to_vec()),
                LocalPlace::Value(v) => Some(v),
                LocalPlace::Gone(why) => return LocalPlace::Gone(why),
            };
            match bytes.and_then(|b| b.get(..len as usize).map(<[u8]>::to_vec)) {
                Some(b) => out.extend(b),
                None => return LocalPlace::Gone("in pieces, one of which cannot be read"),
            }
        }
        if out.len() as u64 == size { LocalPlace::Value(out) } else { LocalPlace::Gone("known in part only") }
    }

    fn piece(&self, piece: &gimli::Piece<Slice<'a>>, size: u64) -> LocalPlace {
        const LOST: LocalPlace = LocalPlace::Gone("its location cannot be computed");
        match piece.location {
            Location::Address { address } => LocalPlace::Memory(Addr(address)),
            Location::Register { register } => self.register(register.0),
            Location::Value { value } => {
                value.to_u64(u64::MAX).map_or(LOST, |v| LocalPlace::Value(v.to_le_bytes().to_vec()))
            }
            Location::Bytes { value } => {
                LocalPlace::Value(value.slice()[..value.len().min(size as usize)].to_vec())
            }
            Location::Empty => LocalPlace::Gone("optimized out"),
            Location::ImplicitPointer { .. } => {
                LocalPlace::Gone("a pointer to an object that does not exist")
            }
        }
    }
}
