//! Typed values as text, the way a debugger shows them, and as JSON.

use super::expr::Value;
use super::model::{Encoding, Type, TypeId, TypeModel};
use mcr_image::{Addr, Memory};
use serde_json::{Map, Number, Value as Json};
use std::fmt::Write as _;

/// How much is shown.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Nested structs.
    pub depth: usize,
    /// Elements of an array.
    pub elements: u64,
    /// Bytes of a string.
    pub string: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { depth: 4, elements: 16, string: 200 }
    }
}

/// Prints values of one process.
pub struct Printer<'p> {
    /// Types of the program.
    pub model: &'p TypeModel,
    /// Its memory.
    pub memory: &'p dyn Memory,
    /// Names an address in a program or library (`handle_get`, `config+0x10`).
    pub symbol: &'p dyn Fn(Addr) -> Option<String>,
    /// How much is shown.
    pub limits: Limits,
}

impl Printer<'_> {
    /// As a debugger would.
    #[must_use]
    pub fn text(&self, v: &Value) -> String {
        let mut s = String::new();
        self.write(v, 0, &mut s);
        s
    }

    fn write(&self, v: &Value, depth: usize, s: &mut String) {
        let indent = |n: usize| "  ".repeat(n);
        match self.model.strip(v.ty) {
            Type::Record(r) if r.incomplete => s.push_str("<incomplete type>"),
            Type::Record(_) if depth >= self.limits.depth => s.push_str("{...}"),
            Type::Record(r) => {
                s.push_str("{\n");
                for m in &r.members {
                    let bits = m.bits.map(|b| (b.start - m.offset * 8, b.width));
                    let inner = Value { addr: v.addr.add(m.offset), ty: m.ty, bits };
                    s.push_str(&indent(depth + 1));
                    if let Some(n) = &m.name {
                        let _ = write!(s, "{n} = ");
                    }
                    self.write(&inner, depth + 1, s);
                    s.push_str(",\n");
                }
                let _ = write!(s, "{}}}", indent(depth));
            }
            Type::Array { element, count } => {
                if self.is_char(*element) {
                    s.push_str(&self.chars(v.addr, *count));
                    return;
                }
                let count = count.unwrap_or(0);
                let size = self.model.size_of(*element);
                s.push('{');
                for i in 0..count.min(self.limits.elements) {
                    if i > 0 {
                        s.push_str(", ");
                    }
                    self.write(&Value { addr: v.addr.add(i * size), ty: *element, bits: None }, depth + 1, s);
                }
                if count > self.limits.elements {
                    let _ = write!(s, ", ... {count} in all");
                }
                s.push('}');
            }
            _ => s.push_str(&self.scalar(v)),
        }
    }

    fn is_char(&self, ty: TypeId) -> bool {
        matches!(self.model.strip(ty), Type::Base { size: 1, encoding, .. } if encoding.is_char())
    }

    fn chars(&self, at: Addr, count: Option<u64>) -> String {
        let n = count
            .map_or(self.limits.string, |c| self.limits.string.min(usize::try_from(c).unwrap_or(usize::MAX)));
        match self.memory.bytes(at, n) {
            Ok(b) => {
                let end = b.iter().rposition(|&c| c != 0).map_or(0, |p| p + 1);
                quote(&b[..end])
            }
            Err(_) => "<not in the image>".into(),
        }
    }

    /// Any bits of at most 8 bytes.
    fn word(&self, v: &Value, size: u64) -> Option<u64> {
        if let Some((start, width)) = v.bits {
            let bytes = (start + u64::from(width)).div_ceil(8) as usize;
            let b = self.memory.bytes(v.addr, bytes).ok()?;
            let mut w = [0u8; 16];
            w.get_mut(..bytes)?.copy_from_slice(&b);
            let all = u128::from_le_bytes(w) >> start;
            let mask = if width >= 64 { u64::MAX } else { (1u64 << width) - 1 };
            return Some(all as u64 & mask);
        }
        let b = self.memory.bytes(v.addr, (size as usize).min(8)).ok()?;
        let mut w = [0u8; 8];
        w[..b.len()].copy_from_slice(&b);
        Some(u64::from_le_bytes(w))
    }

    fn signed(v: &Value, word: u64, size: u64) -> i64 {
        let width = v.bits.map_or(size * 8, |b| u64::from(b.1)).clamp(1, 64);
        let shift = 64 - width;
        ((word << shift) as i64) >> shift
    }

    fn scalar(&self, v: &Value) -> String {
        let size = self.model.size_of(v.ty);
        let Some(w) = self.word(v, size) else {
            return "<not in the image>".into();
        };
        match self.model.strip(v.ty) {
            Type::Base { encoding: Encoding::Bool, .. } => if w == 0 { "false" } else { "true" }.into(),
            Type::Base { encoding: Encoding::Float, size: 4, .. } => f32::from_bits(w as u32).to_string(),
            Type::Base { encoding: Encoding::Float, size: 8, .. } => f64::from_bits(w).to_string(),
            Type::Base { encoding, .. } if encoding.is_char() && w != 0 => {
                let n = if encoding.is_signed() { Self::signed(v, w, size) } else { w as i64 };
                match char::from_u32(w as u32).filter(char::is_ascii_graphic) {
                    Some(c) => format!("{n} '{c}'"),
                    None => n.to_string(),
                }
            }
            Type::Base { encoding, .. } if encoding.is_signed() => Self::signed(v, w, size).to_string(),
            Type::Base { .. } => w.to_string(),
            Type::Enum(e) => {
                let n = if e.signed { i128::from(Self::signed(v, w, size)) } else { i128::from(w) };
                e.name_of(n).map_or_else(|| n.to_string(), ToString::to_string)
            }
            Type::Pointer(to) => self.pointer(*to, w),
            _ => format!("{w:#x}"),
        }
    }

    fn pointer(&self, to: TypeId, p: u64) -> String {
        if p == 0 {
            return "NULL".into();
        }
        if self.is_char(to) {
            return match self.memory.cstr(Addr(p), self.limits.string) {
                Ok(b) => format!("{p:#x} {}", quote(&b)),
                Err(_) => format!("{p:#x} <not in the image>"),
            };
        }
        match (self.symbol)(Addr(p)) {
            Some(name) => format!("{p:#x} <{name}>"),
            None => format!("{p:#x}"),
        }
    }

    /// The same as JSON: structs as objects, pointers as `{"address": …}` with a string or symbol beside it.
    #[must_use]
    pub fn json(&self, v: &Value) -> Json {
        self.to_json(v, 0)
    }

    fn to_json(&self, v: &Value, depth: usize) -> Json {
        match self.model.strip(v.ty) {
            Type::Record(_) if depth >= self.limits.depth => Json::Null,
            Type::Record(r) => {
                let mut o = Map::new();
                for m in &r.members {
                    let bits = m.bits.map(|b| (b.start - m.offset * 8, b.width));
                    let inner =
                        self.to_json(&Value { addr: v.addr.add(m.offset), ty: m.ty, bits }, depth + 1);
                    match (&m.name, inner) {
                        (Some(n), j) => drop(o.insert(n.to_string(), j)),
                        (None, Json::Object(sub)) => o.extend(sub),
                        (None, _) => {}
                    }
                }
                Json::Object(o)
            }
            Type::Array { element, count } if self.is_char(*element) => {
                let n = count.unwrap_or(0).min(self.limits.string as u64) as usize;
                let b = self.memory.bytes(v.addr, n).unwrap_or_default();
                let end = b.iter().rposition(|&c| c != 0).map_or(0, |p| p + 1);
                Json::String(String::from_utf8_lossy(&b[..end]).into_owned())
            }
            Type::Array { element, count } => {
                let size = self.model.size_of(*element);
                (0..count.unwrap_or(0).min(self.limits.elements))
                    .map(|i| {
                        let e = Value { addr: v.addr.add(i * size), ty: *element, bits: None };
                        self.to_json(&e, depth + 1)
                    })
                    .collect()
            }
            Type::Pointer(to) => {
                let Some(p) = self.word(v, 8) else {
                    return Json::Null;
                };
                if p == 0 {
                    return Json::Null;
                }
                let mut o = Map::new();
                o.insert("address".into(), Json::String(format!("{p:#x}")));
                if self.is_char(*to) {
                    if let Ok(b) = self.memory.cstr(Addr(p), self.limits.string) {
                        o.insert("string".into(), Json::String(String::from_utf8_lossy(&b).into_owned()));
                    }
                } else if let Some(n) = (self.symbol)(Addr(p)) {
                    o.insert("symbol".into(), Json::String(n));
                }
                Json::Object(o)
            }
            t => {
                let size = self.model.size_of(v.ty);
                let Some(w) = self.word(v, size) else {
                    return Json::Null;
                };
                match t {
                    Type::Base { encoding: Encoding::Bool, .. } => Json::Bool(w != 0),
                    Type::Base { encoding: Encoding::Float, size: 8, .. } => {
                        Number::from_f64(f64::from_bits(w)).map_or(Json::Null, Json::Number)
                    }
                    Type::Base { encoding, .. } if encoding.is_signed() => Self::signed(v, w, size).into(),
                    Type::Base { encoding, .. } if encoding.is_integer() => w.into(),
                    _ => Json::String(self.scalar(v)),
                }
            }
        }
    }
}

/// A C string literal.
fn quote(b: &[u8]) -> String {
    let mut s = String::from("\"");
    for &c in b {
        match c {
            b'"' => s.push_str("\\\""),
            b'\\' => s.push_str("\\\\"),
            b'\n' => s.push_str("\\n"),
            b'\r' => s.push_str("\\r"),
            b'\t' => s.push_str("\\t"),
            32..127 => s.push(char::from(c)),
            _ => {
                let _ = write!(s, "\\x{c:02x}");
            }
        }
    }
    s.push('"');
    s
}
