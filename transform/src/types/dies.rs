//! One unit of DWARF → raw nodes. Everything still refers to entries by their offset.

use super::model::{Encoding, Qualifier, VarPlace};
use super::sections::{Dwarf, SPACE_INFO, SPACE_SUP, SPACE_TYPES, Slice, Unit};
use gimli::constants as dw;
use gimli::{AttributeValue, Operation, SectionId, UnitSectionOffset};
use mcr_image::LinkAddr;

/// A reference to an entry: section space and offset in one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Ref {
    Die(u64),
    /// A type unit's signature.
    Signature(u64),
}

pub(super) type Str<'a> = &'a [u8];

#[derive(Debug, Clone, Copy)]
pub(super) struct RawMember<'a> {
    pub name: Option<Str<'a>>,
    pub ty: Option<Ref>,
    pub offset: u64,
    pub bit_size: Option<u64>,
    /// `DW_AT_data_bit_offset`.
    pub data_bit_offset: Option<u64>,
    /// `DW_AT_bit_offset` (DWARF 3: from the most significant bit of the storage).
    pub old_bit_offset: Option<i64>,
    /// Storage size of an old-style bit-field.
    pub byte_size: Option<u64>,
}

#[derive(Debug)]
pub(super) enum RawKind<'a> {
    Base {
        name: Str<'a>,
        size: u64,
        encoding: Encoding,
    },
    Pointer(Option<Ref>),
    Record {
        union: bool,
        name: Option<Str<'a>>,
        size: u64,
        decl: bool,
        signature: Option<Ref>,
        members: Vec<RawMember<'a>>,
    },
    Enum {
        name: Option<Str<'a>>,
        size: Option<u64>,
        under: Option<Ref>,
        decl: bool,
        constants: Vec<(Str<'a>, i128)>,
    },
    Array {
        element: Option<Ref>,
        counts: Vec<Option<u64>>,
    },
    Typedef {
        name: Str<'a>,
        to: Option<Ref>,
    },
    Qualified {
        qualifier: Qualifier,
        to: Option<Ref>,
    },
    Function {
        result: Option<Ref>,
        params: Vec<Option<Ref>>,
        variadic: bool,
    },
}

#[derive(Debug)]
pub(super) struct RawNode<'a> {
    pub die: u64,
    pub kind: RawKind<'a>,
}

/// The function that an entry lies in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scope<'a> {
    pub name: Option<Str<'a>>,
    pub origin: Option<Ref>,
}

#[derive(Debug)]
pub(super) struct RawVar<'a> {
    pub name: Option<Str<'a>>,
    pub origin: Option<Ref>,
    pub ty: Option<Ref>,
    pub scope: Option<Scope<'a>>,
    pub place: VarPlace,
    pub external: bool,
    pub file: Option<u64>,
    pub line: u32,
}

#[derive(Debug)]
pub(super) struct RawFunc<'a> {
    pub die: u64,
    pub name: Option<Str<'a>>,
    pub origin: Option<Ref>,
    pub ranges: Vec<(LinkAddr, LinkAddr)>,
    pub external: bool,
    pub line: u32,
}

#[derive(Debug, Default)]
pub(super) struct RawUnit<'a> {
    pub nodes: Vec<RawNode<'a>>,
    pub vars: Vec<RawVar<'a>>,
    pub funcs: Vec<RawFunc<'a>>,
    /// Signature of a type unit, and the entry it stands for.
    pub signature: Option<(u64, u64)>,
    /// Name of a .dwo file: the real content is elsewhere.
    pub dwo: Option<Str<'a>>,
}

/// The space of a unit's section, see [`Ref`].
pub(super) fn space_of(unit: &Unit<'_>, in_sup: bool) -> u64 {
    match (unit.header.section(), in_sup) {
        (SectionId::DebugTypes, _) => SPACE_TYPES,
        (_, true) => SPACE_SUP,
        _ => SPACE_INFO,
    }
}

/// Offset of an entry of `unit` in its section.
pub(super) fn section_offset(unit: &Unit<'_>, offset: gimli::UnitOffset) -> u64 {
    let UnitSectionOffset(start) = unit.header.offset();
    (start as u64).wrapping_add(offset.0 as u64) & !super::sections::SPACE_MASK
}

/// An attribute that refers to an entry.
pub(super) fn reference(unit: &Unit<'_>, space: u64, v: &AttributeValue<Slice<'_>>) -> Option<Ref> {
    Some(match v {
        AttributeValue::UnitRef(o) => Ref::Die(space | section_offset(unit, *o)),
        AttributeValue::DebugInfoRef(o) => {
            let same = if space == SPACE_TYPES { SPACE_INFO } else { space };
            Ref::Die(same | (o.0 as u64 & !super::sections::SPACE_MASK))
        }
        AttributeValue::DebugInfoRefSup(o) => {
            Ref::Die(SPACE_SUP | (o.0 as u64 & !super::sections::SPACE_MASK))
        }
        AttributeValue::DebugTypesRef(s) => Ref::Signature(s.0),
        _ => return None,
    })
}

/// A constant of any form, as unsigned.
pub(super) fn unsigned(v: &AttributeValue<Slice<'_>>) -> Option<u64> {
    match *v {
        AttributeValue::Sdata(n) => u64::try_from(n).ok(),
        _ => v.udata_value(),
    }
}

/// A constant of any form; only `DW_FORM_sdata` can be negative.
fn number(v: &AttributeValue<Slice<'_>>) -> Option<i128> {
    match *v {
        AttributeValue::Sdata(n) => Some(n.into()),
        AttributeValue::Data16(n) => i128::try_from(n).ok(),
        _ => v.udata_value().map(i128::from),
    }
}

/// All attributes that we look at, of any tag.
#[derive(Default)]
pub(super) struct Attrs<'a> {
    pub name: Option<Str<'a>>,
    pub size: Option<u64>,
    pub ty: Option<Ref>,
    pub origin: Option<Ref>,
    pub signature: Option<Ref>,
    pub encoding: Option<dw::DwAte>,
    pub decl: bool,
    pub external: bool,
    pub artificial: bool,
    pub member_location: u64,
    pub bit_size: Option<u64>,
    pub old_bit_offset: Option<i64>,
    pub data_bit_offset: Option<u64>,
    pub value: Option<i128>,
    pub count: Option<u64>,
    pub upper: Option<AttributeValue<Slice<'a>>>,
    pub low: Option<u64>,
    pub high: Option<AttributeValue<Slice<'a>>>,
    pub ranges: Option<AttributeValue<Slice<'a>>>,
    pub location: Option<AttributeValue<Slice<'a>>>,
    pub const_value: Option<AttributeValue<Slice<'a>>>,
    pub frame_base: Option<AttributeValue<Slice<'a>>>,
    pub inline: bool,
    pub file: Option<u64>,
    pub line: u32,
    pub dwo: Option<Str<'a>>,
}

impl<'a> Attrs<'a> {
    pub fn take(
        &mut self,
        dwarf: &Dwarf<'a>,
        unit: &Unit<'a>,
        space: u64,
        attr: &gimli::Attribute<Slice<'a>>,
    ) {
        let v = attr.value();
        let text = |v| dwarf.attr_string(unit, v).ok().map(|s| s.slice());
        match attr.name() {
            dw::DW_AT_name => self.name = text(v),
            dw::DW_AT_byte_size => self.size = unsigned(&v),
            dw::DW_AT_type => self.ty = reference(unit, space, &v),
            dw::DW_AT_abstract_origin | dw::DW_AT_specification => {
                self.origin = reference(unit, space, &v);
            }
            dw::DW_AT_signature => self.signature = reference(unit, space, &v),
            dw::DW_AT_encoding => {
                if let AttributeValue::Encoding(e) = v {
                    self.encoding = Some(e);
                }
            }
            dw::DW_AT_declaration => self.decl = v == AttributeValue::Flag(true),
            dw::DW_AT_external => self.external = v == AttributeValue::Flag(true),
            dw::DW_AT_artificial => self.artificial = v == AttributeValue::Flag(true),
            dw::DW_AT_data_member_location => {
                self.member_location = match v {
                    AttributeValue::Exprloc(e) => match e.operations(unit.encoding()).next() {
                        Ok(Some(Operation::PlusConstant { value })) => value,
                        Ok(Some(Operation::UnsignedConstant { value })) => value,
                        _ => 0,
                    },
                    _ => unsigned(&v).unwrap_or(0),
                }
            }
            dw::DW_AT_bit_size => self.bit_size = unsigned(&v),
            dw::DW_AT_bit_offset => {
                self.old_bit_offset = number(&v).and_then(|n| i64::try_from(n).ok());
            }
            dw::DW_AT_data_bit_offset => self.data_bit_offset = unsigned(&v),
            dw::DW_AT_const_value => {
                self.value = number(&v);
                self.const_value = Some(v);
            }
            dw::DW_AT_count => self.count = unsigned(&v),
            dw::DW_AT_upper_bound => self.upper = Some(v),
            dw::DW_AT_low_pc => self.low = dwarf.attr_address(unit, v).ok().flatten(),
            dw::DW_AT_high_pc => self.high = Some(v),
            dw::DW_AT_ranges => self.ranges = Some(v),
            dw::DW_AT_location => self.location = Some(v),
            dw::DW_AT_frame_base => self.frame_base = Some(v),
            dw::DW_AT_inline => self.inline = true,
            dw::DW_AT_decl_file => {
                self.file = match v {
                    AttributeValue::FileIndex(n) => Some(n),
                    _ => unsigned(&v),
                }
            }
            dw::DW_AT_decl_line => {
                self.line = unsigned(&v).and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
            }
            dw::DW_AT_GNU_dwo_name | dw::DW_AT_dwo_name => self.dwo = text(v),
            _ => {}
        }
    }

    /// Code ranges, the entry point's first.
    pub fn code(&self, dwarf: &Dwarf<'a>, unit: &Unit<'a>) -> Vec<(LinkAddr, LinkAddr)> {
        let mut out = Vec::new();
        if let Some(r) = self.ranges {
            if let Ok(Some(mut it)) = dwarf.attr_ranges(unit, r) {
                while let Ok(Some(r)) = it.next() {
                    out.push((LinkAddr(r.begin), LinkAddr(r.end)));
                }
            }
        } else if let (Some(low), Some(high)) = (self.low, &self.high) {
            let end = match high {
                AttributeValue::Addr(_) | AttributeValue::DebugAddrIndex(_) => {
                    dwarf.attr_address(unit, *high).ok().flatten()
                }
                v => unsigned(v).map(|n| low.wrapping_add(n)),
            };
            out.extend(end.map(|e| (LinkAddr(low), LinkAddr(e))));
        }
        // The linker writes 0 (or a tombstone) for code that it dropped.
        out.retain(|r| r.0.0 > 1 && r.0 < r.1 && !unit.header.is_tombstone_address(r.0.0));
        if let Some(low) = self.low.filter(|l| *l > 1) {
            // With DW_AT_ranges the unit of gcc puts the entry part anywhere in the list.
            out.sort_by_key(|r| !(r.0.0 <= low && low < r.1.0));
        }
        out
    }

    /// A bound of an array dimension.
    fn dimension(&self) -> Option<u64> {
        let n = match (self.count, &self.upper) {
            (Some(n), _) => n,
            (None, Some(AttributeValue::Sdata(n))) => u64::try_from(n.checked_add(1)?).ok()?,
            (None, Some(v)) => {
                let n = v.udata_value()?;
                // -1 written unsigned: `int a[0]` of older compilers.
                if n >= u64::from(u32::MAX) {
                    return None;
                }
                n + 1
            }
            (None, None) => return None,
        };
        (n > 0).then_some(n)
    }
}

/// The place of a variable whose location is one constant address.
pub(super) fn static_place(
    dwarf: &Dwarf<'_>,
    unit: &Unit<'_>,
    v: &AttributeValue<Slice<'_>>,
) -> Option<VarPlace> {
    let e = v.exprloc_value()?;
    let mut ops = e.operations(unit.encoding());
    let mut at: Option<u64> = None;
    let mut tls = false;
    while let Some(op) = ops.next().ok()? {
        match op {
            Operation::Address { address } if at.is_none() => at = Some(address),
            Operation::AddressIndex { index } if at.is_none() => {
                at = Some(dwarf.address(unit, index).ok()?);
            }
            Operation::UnsignedConstant { value } if at.is_none() => at = Some(value),
            Operation::SignedConstant { value } if at.is_none() => at = Some(value as u64),
            Operation::ConstantIndex { index } if at.is_none() => {
                at = Some(dwarf.address(unit, index).ok()?);
            }
            Operation::TLS if at.is_some() => tls = true,
            Operation::PlusConstant { value } if at.is_some() && !tls => {
                at = at.map(|a| a.wrapping_add(value));
            }
            _ => return None,
        }
    }
    match (at?, tls) {
        (o, true) => Some(VarPlace::Tls(o)),
        // A variable in a section that the linker dropped.
        (a, false) if a <= 1 || unit.header.is_tombstone_address(a) => None,
        (a, false) => Some(VarPlace::Link(LinkAddr(a))),
    }
}

fn encoding(e: Option<dw::DwAte>) -> Encoding {
    match e {
        Some(dw::DW_ATE_signed) => Encoding::Signed,
        Some(dw::DW_ATE_unsigned) => Encoding::Unsigned,
        Some(dw::DW_ATE_signed_char) => Encoding::SignedChar,
        Some(dw::DW_ATE_unsigned_char) => Encoding::UnsignedChar,
        Some(dw::DW_ATE_boolean) => Encoding::Bool,
        Some(dw::DW_ATE_float) => Encoding::Float,
        Some(dw::DW_ATE_complex_float) => Encoding::Complex,
        Some(dw::DW_ATE_UTF | dw::DW_ATE_UCS | dw::DW_ATE_ASCII) => Encoding::Unsigned,
        _ => Encoding::Other,
    }
}

#[derive(Clone, Copy)]
enum Context {
    Outside,
    Node(usize),
    /// In a function; index in the list of scopes.
    Code(usize),
}

/// Reads one unit.
pub(super) fn read_unit<'a>(dwarf: &Dwarf<'a>, unit: &Unit<'a>, in_sup: bool) -> gimli::Result<RawUnit<'a>> {
    let space = space_of(unit, in_sup);
    let mut out = RawUnit::default();
    match unit.header.type_() {
        gimli::UnitType::Type { type_signature, type_offset }
        | gimli::UnitType::SplitType { type_signature, type_offset } => {
            out.signature = Some((type_signature.0, space | section_offset(unit, type_offset)));
        }
        _ => {}
    }
    let mut scopes: Vec<Scope<'a>> = Vec::new();
    let mut stack: Vec<Context> = Vec::new();
    let mut entries = unit.entries_raw(None)?;
    while !entries.is_empty() {
        let depth = usize::try_from(entries.next_depth()).unwrap_or(0);
        let offset = entries.next_offset();
        let Some(abbrev) = entries.read_abbreviation()? else {
            continue;
        };
        stack.truncate(depth);
        let parent = stack.last().copied().unwrap_or(Context::Outside);
        let tag = abbrev.tag();
        let in_code = match parent {
            Context::Code(i) => Some(i),
            _ => None,
        };
        let wanted = match tag {
            dw::DW_TAG_base_type
            | dw::DW_TAG_unspecified_type
            | dw::DW_TAG_pointer_type
            | dw::DW_TAG_reference_type
            | dw::DW_TAG_structure_type
            | dw::DW_TAG_class_type
            | dw::DW_TAG_union_type
            | dw::DW_TAG_enumeration_type
            | dw::DW_TAG_array_type
            | dw::DW_TAG_typedef
            | dw::DW_TAG_const_type
            | dw::DW_TAG_volatile_type
            | dw::DW_TAG_restrict_type
            | dw::DW_TAG_atomic_type
            | dw::DW_TAG_subroutine_type
            | dw::DW_TAG_variable
            | dw::DW_TAG_subprogram
            | dw::DW_TAG_inlined_subroutine
            | dw::DW_TAG_compile_unit
            | dw::DW_TAG_skeleton_unit => true,
            dw::DW_TAG_member
            | dw::DW_TAG_inheritance
            | dw::DW_TAG_enumerator
            | dw::DW_TAG_subrange_type
            | dw::DW_TAG_formal_parameter
            | dw::DW_TAG_unspecified_parameters => matches!(parent, Context::Node(_)),
            _ => false,
        };
        let mut context = parent;
        if !wanted {
            entries.skip_attributes(abbrev.attributes())?;
            if abbrev.has_children() {
                stack.resize(depth, parent);
                stack.push(in_code.map_or(Context::Outside, Context::Code));
            }
            continue;
        }
        let mut a = Attrs::default();
        for spec in abbrev.attributes() {
            let attr = entries.read_attribute(*spec)?;
            a.take(dwarf, unit, space, &attr);
        }
        let die = space | section_offset(unit, offset);
        let kind = match tag {
            dw::DW_TAG_compile_unit | dw::DW_TAG_skeleton_unit => {
                out.dwo = out.dwo.or(a.dwo);
                if tag == dw::DW_TAG_skeleton_unit {
                    out.dwo = out.dwo.or(Some(b"?"));
                }
                None
            }
            dw::DW_TAG_variable => {
                let place = a.location.as_ref().and_then(|l| static_place(dwarf, unit, l));
                if let Some(place) = place {
                    out.vars.push(RawVar {
                        name: a.name,
                        origin: a.origin,
                        ty: a.ty,
                        scope: in_code.map(|i| scopes[i]),
                        place,
                        external: a.external,
                        file: a.file,
                        line: a.line,
                    });
                }
                None
            }
            dw::DW_TAG_subprogram => {
                let ranges = a.code(dwarf, unit);
                // Without code: inlined everywhere (link-time optimisation leaves out DW_AT_inline).
                let no_code = a.inline || (a.low.is_none() && a.ranges.is_none() && a.name.is_some());
                if !a.decl && (no_code || !ranges.is_empty()) {
                    out.funcs.push(RawFunc {
                        die,
                        name: a.name,
                        origin: a.origin,
                        ranges,
                        external: a.external,
                        line: a.line,
                    });
                }
                scopes.push(Scope { name: a.name, origin: a.origin });
                context = Context::Code(scopes.len() - 1);
                None
            }
            dw::DW_TAG_inlined_subroutine => {
                scopes.push(Scope { name: a.name, origin: a.origin });
                context = Context::Code(scopes.len() - 1);
                None
            }
            dw::DW_TAG_base_type => Some(RawKind::Base {
                name: a.name.unwrap_or(b"?"),
                size: a.size.unwrap_or(0),
                encoding: encoding(a.encoding),
            }),
            // `void` of some compilers, nullptr_t.
            dw::DW_TAG_unspecified_type => Some(RawKind::Base {
                name: a.name.unwrap_or(b"void"),
                size: a.size.unwrap_or(0),
                encoding: Encoding::Other,
            }),
            dw::DW_TAG_pointer_type | dw::DW_TAG_reference_type => Some(RawKind::Pointer(a.ty)),
            dw::DW_TAG_structure_type | dw::DW_TAG_class_type | dw::DW_TAG_union_type => {
                Some(RawKind::Record {
                    union: tag == dw::DW_TAG_union_type,
                    name: a.name,
                    size: a.size.unwrap_or(0),
                    decl: a.decl,
                    signature: a.signature,
                    members: Vec::new(),
                })
            }
            dw::DW_TAG_enumeration_type => Some(RawKind::Enum {
                name: a.name,
                size: a.size,
                under: a.ty,
                decl: a.decl,
                constants: Vec::new(),
            }),
            dw::DW_TAG_array_type => Some(RawKind::Array { element: a.ty, counts: Vec::new() }),
            dw::DW_TAG_typedef => Some(RawKind::Typedef { name: a.name.unwrap_or(b"?"), to: a.ty }),
            dw::DW_TAG_const_type
            | dw::DW_TAG_volatile_type
            | dw::DW_TAG_restrict_type
            | dw::DW_TAG_atomic_type => Some(RawKind::Qualified {
                qualifier: match tag {
                    dw::DW_TAG_const_type => Qualifier::Const,
                    dw::DW_TAG_volatile_type => Qualifier::Volatile,
                    dw::DW_TAG_restrict_type => Qualifier::Restrict,
                    _ => Qualifier::Atomic,
                },
                to: a.ty,
            }),
            dw::DW_TAG_subroutine_type => {
                Some(RawKind::Function { result: a.ty, params: Vec::new(), variadic: false })
            }
            _ => {
                if let Context::Node(n) = parent {
                    child(&mut out.nodes[n].kind, tag, &a);
                }
                None
            }
        };
        if let Some(kind) = kind {
            out.nodes.push(RawNode { die, kind });
            context = Context::Node(out.nodes.len() - 1);
        }
        if abbrev.has_children() {
            stack.resize(depth, parent);
            stack.push(context);
        }
    }
    Ok(out)
}

/// A member, constant, bound or parameter joins its parent.
fn child<'a>(parent: &mut RawKind<'a>, tag: dw::DwTag, a: &Attrs<'a>) {
    match (parent, tag) {
        // A static member of a C++ class has no place in it.
        (RawKind::Record { .. }, dw::DW_TAG_member) if a.decl || a.external => {}
        (RawKind::Record { members, .. }, dw::DW_TAG_member | dw::DW_TAG_inheritance) => {
            members.push(RawMember {
                name: a.name.filter(|n| !n.is_empty()),
                ty: a.ty,
                offset: a.member_location,
                bit_size: a.bit_size,
                data_bit_offset: a.data_bit_offset,
                old_bit_offset: a.old_bit_offset,
                byte_size: a.size,
            });
        }
        (RawKind::Enum { constants, .. }, dw::DW_TAG_enumerator) => {
            if let (Some(name), Some(value)) = (a.name, a.value) {
                constants.push((name, value));
            }
        }
        (RawKind::Array { counts, .. }, dw::DW_TAG_subrange_type) => counts.push(a.dimension()),
        (RawKind::Function { params, .. }, dw::DW_TAG_formal_parameter) => params.push(a.ty),
        (RawKind::Function { variadic, .. }, dw::DW_TAG_unspecified_parameters) => *variadic = true,
        _ => {}
    }
}
