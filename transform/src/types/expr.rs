//! Expressions over the state in an image: `server->clients->head`, `*config`, `table[3].key`,
//! `main::counter`, `util.c::cache`.

use super::model::{Type, TypeId, TypeModel, VarPlace};
use mcr_image::{Addr, LinkAddr, Memory, MemoryError};

/// Why an expression has no value.
#[derive(Debug, thiserror::Error)]
pub enum ExprError {
    /// It does not parse.
    #[error("expression {text:?}: {what} at column {column}")]
    Syntax {
        /// The expression.
        text: String,
        /// What is wrong.
        what: String,
        /// Where, from 1.
        column: usize,
    },
    /// No such variable.
    #[error("there is no global variable {name:?} in {program}{hint}")]
    Unknown {
        /// The name.
        name: String,
        /// The program.
        program: String,
        /// Names that come close; empty, or starting with "; ".
        hint: String,
    },
    /// Several variables have the name.
    #[error("{name:?} is defined in several files; write one of: {choices}")]
    Ambiguous {
        /// The name.
        name: String,
        /// How to say which.
        choices: String,
    },
    /// An operator that the type does not have.
    #[error("{what}")]
    Type {
        /// What does not fit.
        what: String,
    },
    /// Memory that is not there.
    #[error("{path}: {source}")]
    Memory {
        /// The part of the expression.
        path: String,
        /// Why.
        source: MemoryError,
    },
}

/// A typed place in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value {
    /// Where.
    pub addr: Addr,
    /// What.
    pub ty: TypeId,
    /// For a bit-field: first bit from `addr`, and width.
    pub bits: Option<(u64, u32)>,
}

/// Where variables are: the program's load bias and, for thread-locals, the start of a thread's copy of the
/// program's TLS segment.
#[derive(Clone, Copy, Debug)]
pub struct Bases {
    /// Load bias of the program.
    pub bias: Addr,
    /// TLS block of the program in the thread that is looked at.
    pub tls: Option<Addr>,
}

/// A member: its offset, its type, and for a bit-field its first bit and width.
pub type FoundMember = (u64, TypeId, Option<(u64, u32)>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Name(String),
    Number(u64),
    Sign(&'static str),
}

struct Parser<'p> {
    text: &'p str,
    tokens: Vec<(Token, usize)>,
    at: usize,
    model: &'p TypeModel,
    memory: &'p dyn Memory,
    bases: Bases,
}

/// Evaluates an expression to a place.
pub fn evaluate(
    model: &TypeModel,
    memory: &dyn Memory,
    bases: Bases,
    text: &str,
) -> Result<Value, ExprError> {
    let tokens = tokens(text)?;
    let mut p = Parser { text, tokens, at: 0, model, memory, bases };
    let v = p.unary(0)?;
    if p.at < p.tokens.len() {
        return Err(p.syntax("something after the end of the expression"));
    }
    Ok(v)
}

fn tokens(text: &str) -> Result<Vec<(Token, usize)>, ExprError> {
    let b = text.as_bytes();
    let mut out = Vec::new();
    let mut i = 0;
    let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_' || c == b'$';
    while i < b.len() {
        let start = i;
        if b[i].is_ascii_whitespace() {
            i += 1;
        } else if b[i].is_ascii_digit() {
            while i < b.len() && word(b[i]) {
                i += 1;
            }
            let digits = &text[start..i];
            let n = digits
                .strip_prefix("0x")
                .map_or_else(|| digits.parse().ok(), |h| u64::from_str_radix(h, 16).ok());
            let n = n.ok_or_else(|| ExprError::Syntax {
                text: text.into(),
                what: format!("{digits:?} is no number"),
                column: start + 1,
            })?;
            out.push((Token::Number(n), start));
        } else if word(b[i]) {
            while i < b.len() && word(b[i]) {
                i += 1;
            }
            // `unit.c::name` and `dir/unit.c::name`: the unit's name is part of the word.
            if let Some(n) = text[i..].find("::")
                && text[i..i + n].bytes().all(|c| word(c) || matches!(c, b'.' | b'/' | b'-'))
            {
                i += n;
            }
            out.push((Token::Name(text[start..i].to_owned()), start));
        } else {
            let sign = ["->", "::", "*", "&", "(", ")", "[", "]", "."]
                .into_iter()
                .find(|s| text[i..].starts_with(s))
                .ok_or_else(|| ExprError::Syntax {
                    text: text.into(),
                    what: format!("unexpected {:?}", text[i..].chars().next().unwrap_or(' ')),
                    column: i + 1,
                })?;
            i += sign.len();
            out.push((Token::Sign(sign), start));
        }
    }
    Ok(out)
}

/// Deeper nesting than this is refused.
const MAX_DEPTH: usize = 64;

impl Parser<'_> {
    fn syntax(&self, what: impl Into<String>) -> ExprError {
        let column = self.tokens.get(self.at).map_or(self.text.len(), |t| t.1) + 1;
        ExprError::Syntax { text: self.text.into(), what: what.into(), column }
    }

    fn eat(&mut self, sign: &'static str) -> bool {
        let hit = self.tokens.get(self.at).is_some_and(|t| t.0 == Token::Sign(sign));
        self.at += usize::from(hit);
        hit
    }

    fn need(&mut self, sign: &'static str) -> Result<(), ExprError> {
        if self.eat(sign) { Ok(()) } else { Err(self.syntax(format!("expected {sign:?}"))) }
    }

    fn name(&mut self) -> Result<String, ExprError> {
        match self.tokens.get(self.at) {
            Some((Token::Name(n), _)) => {
                self.at += 1;
                Ok(n.clone())
            }
            _ => Err(self.syntax("expected a name")),
        }
    }

    fn unary(&mut self, depth: usize) -> Result<Value, ExprError> {
        if depth > MAX_DEPTH {
            return Err(self.syntax("too deeply nested"));
        }
        if self.eat("*") {
            let v = self.unary(depth + 1)?;
            return self.deref(v, 0);
        }
        self.postfix(depth)
    }

    fn postfix(&mut self, depth: usize) -> Result<Value, ExprError> {
        let mut v = if self.eat("(") {
            let v = self.unary(depth + 1)?;
            self.need(")")?;
            v
        } else {
            self.variable()?
        };
        loop {
            if self.eat("->") {
                v = self.deref(v, 0)?;
                let n = self.name()?;
                v = self.member(v, &n)?;
            } else if self.eat(".") {
                let n = self.name()?;
                v = self.member(v, &n)?;
            } else if self.eat("[") {
                let Some((Token::Number(i), _)) = self.tokens.get(self.at).cloned() else {
                    return Err(self.syntax("expected a number"));
                };
                self.at += 1;
                self.need("]")?;
                v = self.deref(v, i)?;
            } else {
                return Ok(v);
            }
        }
    }

    fn variable(&mut self) -> Result<Value, ExprError> {
        let first = self.name()?;
        let (scope, name) = if self.eat("::") { (Some(first), self.name()?) } else { (None, first) };
        let all: Vec<_> = self
            .model
            .globals_named(&name)
            .filter(|g| match &scope {
                None => true,
                Some(s) => {
                    g.function.as_deref() == Some(s) || *g.unit == **s || g.unit.ends_with(&format!("/{s}"))
                }
            })
            .collect();
        let unscoped = || all.iter().filter(|g| g.function.is_none()).collect::<Vec<_>>();
        let g = match (all.as_slice(), unscoped().as_slice()) {
            ([], _) => {
                return Err(ExprError::Unknown {
                    hint: near(self.model, &name),
                    name,
                    program: self.model.path().to_owned(),
                });
            }
            ([g], _) => *g,
            (_, [g]) if scope.is_none() => **g,
            (many, _) => {
                let choices: Vec<_> = many
                    .iter()
                    .map(|g| format!("{}::{name}", g.function.as_ref().unwrap_or(&g.unit)))
                    .collect();
                return Err(ExprError::Ambiguous { name, choices: choices.join(", ") });
            }
        };
        let addr = match g.place {
            VarPlace::Link(LinkAddr(a)) => LinkAddr(a).at(self.bases.bias),
            VarPlace::Tls(off) => self
                .bases
                .tls
                .ok_or_else(|| ExprError::Type {
                    what: format!("{name} is thread-local: its place is not known"),
                })?
                .add(off),
        };
        Ok(Value { addr, ty: g.ty, bits: None })
    }

    fn member(&self, v: Value, name: &str) -> Result<Value, ExprError> {
        find_member(self.model, v.ty, name)
            .map(|(off, ty, bits)| Value { addr: v.addr.add(off), ty, bits })
            .ok_or_else(|| ExprError::Type {
                what: format!("{} has no member {name:?}", self.model.display(v.ty)),
            })
    }

    /// Element `index` of an array or behind a pointer.
    fn deref(&self, v: Value, index: u64) -> Result<Value, ExprError> {
        let (addr, ty) = match self.model.strip(v.ty) {
            Type::Array { element, .. } => (v.addr, *element),
            Type::Pointer(to) => {
                let p = self
                    .memory
                    .u64(v.addr)
                    .map_err(|source| ExprError::Memory { path: self.text.into(), source })?;
                if p == 0 {
                    return Err(ExprError::Type {
                        what: format!("{}: a NULL pointer is followed", self.text),
                    });
                }
                (Addr(p), *to)
            }
            _ => {
                return Err(ExprError::Type {
                    what: format!("{} is neither a pointer nor an array", self.model.display(v.ty)),
                });
            }
        };
        let addr = addr.add(index.wrapping_mul(self.model.size_of(ty)));
        Ok(Value { addr, ty, bits: None })
    }
}

/// A member by name, through anonymous members: (offset, type, bit-field).
#[must_use]
pub fn find_member(model: &TypeModel, ty: TypeId, name: &str) -> Option<FoundMember> {
    fn find(model: &TypeModel, ty: TypeId, name: &str, depth: usize) -> Option<FoundMember> {
        let r = model.record(ty).filter(|_| depth < 16)?;
        for m in &r.members {
            match &m.name {
                Some(n) if **n == *name => {
                    let bits = m.bits.map(|b| (b.start - m.offset * 8, b.width));
                    return Some((m.offset, m.ty, bits));
                }
                None => {
                    if let Some((o, t, b)) = find(model, m.ty, name, depth + 1) {
                        return Some((m.offset + o, t, b));
                    }
                }
                Some(_) => {}
            }
        }
        None
    }
    find(model, ty, name, 0)
}

/// Variables whose names contain the wanted one, or are contained in it.
fn near(model: &TypeModel, name: &str) -> String {
    let mut hits: Vec<_> = model
        .globals()
        .iter()
        .filter(|g| g.name.contains(name) || (g.name.len() > 3 && name.contains(&*g.name)))
        .map(super::Variable::display)
        .collect();
    hits.sort();
    hits.dedup();
    hits.truncate(5);
    if hits.is_empty() { String::new() } else { format!("; there is {}", hits.join(", ")) }
}
