//! The expressions of a rules file: integers, paths into old state, and C's operators.
//!
//! ```text
//! expr    = or
//! or      = and { "||" and }            and   = bitor { "&&" bitor }
//! bitor   = bitxor { "|" bitxor }       bitxor = bitand { "^" bitand }
//! bitand  = equal { "&" equal }         equal = rel { ("==" | "!=") rel }
//! rel     = shift { ("<" | "<=" | ">" | ">=") shift }
//! shift   = sum { ("<<" | ">>") sum }   sum   = prod { ("+" | "-") prod }
//! prod    = unary { ("*" | "/" | "%") unary }
//! unary   = ("-" | "~" | "!") unary | atom
//! atom    = integer | path | "(" expr ")"
//! path    = name { "." name | "[" digits "]" }
//! integer = decimal | 0x hex | 0 octal | 'c'
//! ```
//!
//! Precedence and meaning are C's, but every step is computed in 128 bits and an overflow, a division by
//! zero or a shift outside 0..=127 is an error, never a silently wrapped value. In `[values]` and
//! `[defaults]` a path starts with `old.`, the old object that is being converted; in `safe_when` with the
//! name of a global.

use std::fmt;

/// A parsed expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expr {
    text: String,
    root: Node,
}

/// A path into old state, `old.limits[2].soft`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Path {
    /// The first name: `old`, or a global.
    pub root: String,
    /// What follows it.
    pub steps: Vec<Step>,
}

/// One step of a [`Path`].
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step {
    /// `.name`
    Field(String),
    /// `[3]`
    Index(u64),
}

impl Path {
    /// The steps as they are written after the root: `limits[2].soft`.
    #[must_use]
    pub fn field_path(&self) -> String {
        let mut s = String::new();
        for step in &self.steps {
            match step {
                Step::Field(f) => {
                    if !s.is_empty() {
                        s.push('.');
                    }
                    s.push_str(f);
                }
                Step::Index(i) => s.push_str(&format!("[{i}]")),
            }
        }
        s
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.root)?;
        for step in &self.steps {
            match step {
                Step::Field(n) => write!(f, ".{n}")?,
                Step::Index(i) => write!(f, "[{i}]")?,
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Add,
    Sub,
    Mul,
    Div,
    Rem,
    Shl,
    Shr,
    BitAnd,
    BitOr,
    BitXor,
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    And,
    Or,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    Int(i128),
    Path(Path),
    Neg(Box<Node>),
    BitNot(Box<Node>),
    Not(Box<Node>),
    Bin(Op, Box<Node>, Box<Node>),
}

/// Why a text is not an expression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("in the expression `{text}`, at column {column}: {what}")]
pub struct ExprError {
    /// The whole expression.
    pub text: String,
    /// Where, counted from 1.
    pub column: usize,
    /// What is wrong there.
    pub what: String,
}

/// Why an expression has no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvalError {
    /// The path names nothing in the old state.
    #[error(
        "`{path}` in the expression `{text}` names nothing in the old version; check the spelling with `mcr types`"
    )]
    UnknownPath {
        /// The path.
        path: String,
        /// The expression.
        text: String,
    },
    /// An overflow, a division by zero, a shift by too much.
    #[error("the expression `{text}` cannot be computed: {what}")]
    Arithmetic {
        /// The expression.
        text: String,
        /// Which operation failed, with its operands.
        what: String,
    },
}

impl Expr {
    /// Parses one expression; the whole text must be used up.
    pub fn parse(text: &str) -> Result<Self, ExprError> {
        crate::parse::parse(text).map(|root| Self { text: text.to_owned(), root })
    }

    /// A constant.
    #[must_use]
    pub fn constant(v: i128) -> Self {
        Self { text: v.to_string(), root: Node::Int(v) }
    }

    /// The text it was parsed from.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its value where it is a plain constant (no path in it).
    #[must_use]
    pub fn as_constant(&self) -> Option<i128> {
        self.eval(&mut |_| None).ok().filter(|_| self.paths().is_empty())
    }

    /// Every path it reads, in order of appearance.
    #[must_use]
    pub fn paths(&self) -> Vec<&Path> {
        fn walk<'a>(n: &'a Node, out: &mut Vec<&'a Path>) {
            match n {
                Node::Int(_) => {}
                Node::Path(p) => out.push(p),
                Node::Neg(a) | Node::BitNot(a) | Node::Not(a) => walk(a, out),
                Node::Bin(_, a, b) => {
                    walk(a, out);
                    walk(b, out);
                }
            }
        }
        let mut v = Vec::new();
        walk(&self.root, &mut v);
        v
    }

    /// Computes the value; `lookup` gives the old integer at a path (sign-extended as its type says).
    pub fn eval(&self, lookup: &mut dyn FnMut(&Path) -> Option<i128>) -> Result<i128, EvalError> {
        self.node(&self.root, lookup)
    }

    fn node(&self, n: &Node, lookup: &mut dyn FnMut(&Path) -> Option<i128>) -> Result<i128, EvalError> {
        Ok(match n {
            Node::Int(v) => *v,
            Node::Path(p) => lookup(p)
                .ok_or_else(|| EvalError::UnknownPath { path: p.to_string(), text: self.text.clone() })?,
            Node::Neg(a) => {
                let a = self.node(a, lookup)?;
                a.checked_neg().ok_or_else(|| self.arith(format!("-({a}) overflows")))?
            }
            Node::BitNot(a) => !self.node(a, lookup)?,
            Node::Not(a) => i128::from(self.node(a, lookup)? == 0),
            Node::Bin(Op::And, a, b) => i128::from(self.node(a, lookup)? != 0 && self.node(b, lookup)? != 0),
            Node::Bin(Op::Or, a, b) => i128::from(self.node(a, lookup)? != 0 || self.node(b, lookup)? != 0),
            Node::Bin(op, a, b) => {
                let (a, b) = (self.node(a, lookup)?, self.node(b, lookup)?);
                self.bin(*op, a, b)?
            }
        })
    }

    fn bin(&self, op: Op, a: i128, b: i128) -> Result<i128, EvalError> {
        let shift = || u32::try_from(b).ok().filter(|s| *s < 128);
        let (sign, v) = match op {
            Op::Add => ("+", a.checked_add(b)),
            Op::Sub => ("-", a.checked_sub(b)),
            Op::Mul => ("*", a.checked_mul(b)),
            Op::Div => ("/", a.checked_div(b)),
            Op::Rem => ("%", a.checked_rem(b)),
            // A left shift must be reversible: bits that fall out at the top are an overflow.
            Op::Shl => ("<<", shift().and_then(|s| a.checked_shl(s).filter(|v| v >> s == a))),
            Op::Shr => (">>", shift().and_then(|s| a.checked_shr(s))),
            Op::BitAnd => ("&", Some(a & b)),
            Op::BitOr => ("|", Some(a | b)),
            Op::BitXor => ("^", Some(a ^ b)),
            Op::Eq => ("==", Some(i128::from(a == b))),
            Op::Ne => ("!=", Some(i128::from(a != b))),
            Op::Lt => ("<", Some(i128::from(a < b))),
            Op::Le => ("<=", Some(i128::from(a <= b))),
            Op::Gt => (">", Some(i128::from(a > b))),
            Op::Ge => (">=", Some(i128::from(a >= b))),
            Op::And | Op::Or => unreachable!("short-circuited by the caller"),
        };
        v.ok_or_else(|| {
            let why = match op {
                Op::Div | Op::Rem if b == 0 => "divides by zero",
                Op::Shl | Op::Shr if shift().is_none() => "shifts by an amount outside 0..=127",
                _ => "overflows 128 bits",
            };
            self.arith(format!("{a} {sign} {b} {why}"))
        })
    }

    fn arith(&self, what: String) -> EvalError {
        EvalError::Arithmetic { text: self.text.clone(), what }
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eval(text: &str) -> i128 {
        Expr::parse(text)
            .unwrap()
            .eval(&mut |p| match p.to_string().as_str() {
                "old.timeout_s" => Some(30),
                "old.a.b[2]" => Some(-7),
                "server.loading" => Some(0),
                _ => None,
            })
            .unwrap()
    }

    #[test]
    fn computes_like_c() {
        assert_eq!(eval("old.timeout_s * 1000"), 30_000);
        assert_eq!(eval("1 + 2 * 3"), 7);
        assert_eq!(eval("(1 + 2) * 3"), 9);
        assert_eq!(eval("10 - 3 - 2"), 5);
        assert_eq!(eval("-old.a.b[2] << 4 | 1"), 113);
        assert_eq!(eval("0xff & ~0x0f"), 0xf0);
        assert_eq!(eval("017 + 'A'"), 15 + 65);
        assert_eq!(eval("-7 / 2"), -3);
        assert_eq!(eval("-7 % 2"), -1);
        assert_eq!(eval("server.loading == 0 && !0"), 1);
        assert_eq!(eval("1 < 2 == 1"), 1);
        assert_eq!(eval("6 ^ 3"), 5);
        assert_eq!(eval("1 || 1 / 0"), 1);
        assert_eq!(eval("-1 >> 3"), -1);
    }

    #[test]
    fn refuses_what_has_no_value() {
        let e = |t: &str| Expr::parse(t).unwrap().eval(&mut |_| None).unwrap_err().to_string();
        assert!(e("1 / 0").contains("divides by zero"));
        assert!(e("1 << 127").contains("overflows"));
        assert!(e("1 << 200").contains("0..=127"));
        assert!(e("old.missing").contains("`old.missing`"));
        assert!(e("170141183460469231731687303715884105727 + 1").contains("overflows"));
    }

    #[test]
    fn refuses_bad_text_with_a_column() {
        for (text, column) in [
            ("", 1),
            ("1 +", 4),
            ("(1", 3),
            ("1 2", 3),
            ("old.", 5),
            ("old = 3", 5),
            ("a[x]", 3),
            ("08", 1),
            ("€", 1),
        ] {
            let e = Expr::parse(text).unwrap_err();
            assert_eq!(e.column, column, "{text}: {e}");
        }
        // Depth is bounded: no stack overflow by a hostile file.
        assert!(Expr::parse(&"(".repeat(100_000)).is_err());
        assert!(Expr::parse(&"-".repeat(100_000)).is_err());
        assert!(Expr::parse(&format!("1{}", "+1".repeat(100_000))).is_err());
    }
}
