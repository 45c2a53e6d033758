//! How types are named and shown, and how units are told apart.

use super::model::{Record, Type, TypeId, TypeModel};
use std::fmt::Write;

/// A unit's source file, relative to the directory it was compiled in, so that two builds in different
/// directories agree.
pub(super) fn unit_name(name: &str, comp_dir: &str) -> String {
    let mut n = name;
    if !comp_dir.is_empty()
        && let Some(rest) = n.strip_prefix(comp_dir.trim_end_matches('/'))
        && let Some(rest) = rest.strip_prefix('/')
    {
        n = rest;
    }
    // "./src/../src/a.c" and "src/a.c" are the same file.
    let mut parts: Vec<&str> = Vec::new();
    for p in n.split('/') {
        match p {
            "." => {}
            "" if !parts.is_empty() => {}
            ".." if parts.last().is_some_and(|l| *l != ".." && !l.is_empty()) => {
                parts.pop();
            }
            p => parts.push(p),
        }
    }
    if parts.is_empty() { n.to_owned() } else { parts.join("/") }
}

/// No name of a type nests deeper than this in what we print.
const MAX_NESTING: u32 = 12;

impl TypeModel {
    /// The name that a rules file uses for a type: "struct foo", "union foo", "enum foo", or the typedef that
    /// names it. `None` for pointers, arrays, functions and nameless types.
    #[must_use]
    pub fn type_name(&self, id: TypeId) -> Option<String> {
        match &self[self.unqualified(id)] {
            Type::Base { name, .. } | Type::Typedef { name, .. } => Some(name.to_string()),
            Type::Record(r) => match (&r.tag, &r.alias) {
                (Some(t), _) => Some(format!("{} {t}", r.kind.keyword())),
                (None, Some(a)) => Some(a.to_string()),
                _ => None,
            },
            Type::Enum(e) => match (&e.tag, &e.alias) {
                (Some(t), _) => Some(format!("enum {t}")),
                (None, Some(a)) => Some(a.to_string()),
                _ => None,
            },
            _ => None,
        }
    }

    /// The type as C writes it: `const struct foo *[4]`.
    #[must_use]
    pub fn display(&self, id: TypeId) -> String {
        self.declare(id, "")
    }

    /// A declaration of `name` with this type: `int (*run)(struct foo *)`.
    #[must_use]
    pub fn declare(&self, id: TypeId, name: &str) -> String {
        self.declarator(id, name.to_owned(), MAX_NESTING)
    }

    fn declarator(&self, id: TypeId, inner: String, depth: u32) -> String {
        let join = |base: &str, inner: &str| match inner {
            "" => base.to_owned(),
            i => format!("{base} {i}"),
        };
        if depth == 0 {
            return join("…", &inner);
        }
        match &self[id] {
            Type::Void => join("void", &inner),
            Type::Pointer(to) => {
                let needs = matches!(self[self.unqualified(*to)], Type::Array { .. } | Type::Function { .. });
                let inner = if needs { format!("(*{inner})") } else { format!("*{inner}") };
                self.declarator(*to, inner, depth - 1)
            }
            Type::Array { element, count } => {
                let n = count.map(|n| n.to_string()).unwrap_or_default();
                self.declarator(*element, format!("{inner}[{n}]"), depth - 1)
            }
            Type::Function { result, params, variadic } => {
                let mut p: Vec<String> =
                    params.iter().map(|&t| self.declarator(t, String::new(), depth - 1)).collect();
                if *variadic {
                    p.push("...".into());
                } else if p.is_empty() {
                    p.push("void".into());
                }
                self.declarator(*result, format!("{inner}({})", p.join(", ")), depth - 1)
            }
            Type::Qualified { qualifier, to } => {
                let word = qualifier.keyword();
                // DWARF says it twice for an array: of the array and of its elements.
                if let Type::Array { element, .. } = &self[*to]
                    && matches!(&self[*element], Type::Qualified { qualifier: q, .. } if q == qualifier)
                {
                    return self.declarator(*to, inner, depth - 1);
                }
                if matches!(self[*to], Type::Pointer(_)) {
                    // The qualifier of a pointer stands behind the star.
                    return self.declarator(*to, join(word, &inner), depth - 1);
                }
                format!("{word} {}", self.declarator(*to, inner, depth - 1))
            }
            other => {
                let named = self.type_name(id).unwrap_or_else(|| match other {
                    Type::Record(r) => format!("{} {{…}}", r.kind.keyword()),
                    _ => "enum {…}".into(),
                });
                join(&named, &inner)
            }
        }
    }

    /// A struct, union or enum as pahole prints it: offsets, sizes, holes.
    #[must_use]
    pub fn describe(&self, id: TypeId) -> String {
        let mut out = String::new();
        match self.strip(id) {
            Type::Record(r) => {
                let _ = writeln!(
                    out,
                    "{} {{",
                    self.type_name(self.resolve(id)).unwrap_or_else(|| r.kind.keyword().into())
                );
                self.describe_members(&mut out, r, 0, 1);
                let _ = writeln!(out, "\t/* size: {}, members: {} */", r.size, r.members.len());
                out.push_str("};\n");
            }
            Type::Enum(e) => {
                let _ =
                    writeln!(out, "{} {{", self.type_name(self.resolve(id)).unwrap_or_else(|| "enum".into()));
                for (n, v) in &e.constants {
                    let _ = writeln!(out, "\t{n} = {v},");
                }
                out.push_str("};\n");
            }
            _ => {
                let _ = writeln!(out, "{}; /* size: {} */", self.declare(id, ""), self.size_of(id));
            }
        }
        out
    }

    fn describe_members(&self, out: &mut String, r: &Record, base: u64, depth: usize) {
        let tabs = "\t".repeat(depth);
        let mut end_bit = 0u64;
        for m in &r.members {
            let (start, width) = self.member_bits(m);
            if r.kind == super::RecordKind::Struct && start > end_bit {
                let gap = start - end_bit;
                let _ = match gap % 8 {
                    0 => writeln!(out, "{tabs}/* XXX {} bytes hole */", gap / 8),
                    _ => writeln!(out, "{tabs}/* XXX {gap} bits hole */"),
                };
            }
            end_bit = end_bit.max(start.saturating_add(width));
            let at = base.saturating_add(m.offset);
            match (&m.name, self.record(m.ty)) {
                (None, Some(inner)) if depth < 8 => {
                    let _ = writeln!(out, "{tabs}{} {{", inner.kind.keyword());
                    self.describe_members(out, inner, at, depth + 1);
                    let _ = writeln!(out, "{tabs}}}; /* {at:5} {:5} */", inner.size);
                }
                (name, _) => {
                    let name = name.as_deref().unwrap_or("");
                    let mut line = self.declare(m.ty, name);
                    if let Some(b) = m.bits {
                        let _ = write!(line, ":{}", b.width);
                    }
                    let bit = m.bits.map(|b| format!(":{:2}", b.start % 8)).unwrap_or_default();
                    let _ = writeln!(
                        out,
                        "{tabs}{:<32} /* {at:5}{bit} {:5} */",
                        format!("{line};"),
                        self.size_of(m.ty)
                    );
                }
            }
        }
        let size_bits = r.size.saturating_mul(8);
        if r.kind == super::RecordKind::Struct && size_bits > end_bit && !r.members.is_empty() {
            let gap = size_bits - end_bit;
            let _ = match gap % 8 {
                0 => writeln!(out, "{tabs}/* padding: {} */", gap / 8),
                _ => writeln!(out, "{tabs}/* bit_padding: {gap} bits */"),
            };
        }
    }

    /// First bit and width of a member, from the start of its record.
    #[must_use]
    pub fn member_bits(&self, m: &super::Member) -> (u64, u64) {
        match m.bits {
            Some(b) => (b.start, b.width.into()),
            None => (m.offset.saturating_mul(8), self.size_of(m.ty).saturating_mul(8)),
        }
    }
}
