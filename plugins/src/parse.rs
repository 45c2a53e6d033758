//! Recursive-descent parser of [`crate::expr`].

use crate::expr::{ExprError, Node, Op, Path, Step};

/// Nesting and number of operators are bounded, so that neither parsing nor evaluation can exhaust the stack.
const MAX_DEPTH: usize = 100;
const MAX_LEN: usize = 1000;

/// Binary operators by rising precedence; within a level the longer spelling comes first.
const LEVELS: [&[(&str, Op)]; 10] = [
    &[("||", Op::Or)],
    &[("&&", Op::And)],
    &[("|", Op::BitOr)],
    &[("^", Op::BitXor)],
    &[("&", Op::BitAnd)],
    &[("==", Op::Eq), ("!=", Op::Ne)],
    &[("<=", Op::Le), (">=", Op::Ge), ("<", Op::Lt), (">", Op::Gt)],
    &[("<<", Op::Shl), (">>", Op::Shr)],
    &[("+", Op::Add), ("-", Op::Sub)],
    &[("*", Op::Mul), ("/", Op::Div), ("%", Op::Rem)],
];
/// All spellings, longest first: what stands at a position is decided before its level is.
const SPELLINGS: [&str; 18] =
    ["||", "&&", "==", "!=", "<=", ">=", "<<", ">>", "|", "^", "&", "<", ">", "+", "-", "*", "/", "%"];

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

pub(crate) fn parse(text: &str) -> Result<Node, ExprError> {
    let mut p = Parser { text, at: 0, depth: 0 };
    if text.len() > MAX_LEN {
        p.at = MAX_LEN;
        while !text.is_char_boundary(p.at) {
            p.at -= 1;
        }
        return Err(p.fail(format!("expressions may be {MAX_LEN} bytes long")));
    }
    let n = p.level(0)?;
    p.space();
    if p.at < text.len() {
        let what = if p.rest().starts_with('=') {
            "`=` is not an operator; compare with `==`".to_owned()
        } else {
            format!("expected an operator or the end, found `{}`", p.word())
        };
        return Err(p.fail(what));
    }
    Ok(n)
}

impl Parser<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }
    fn space(&mut self) {
        let trimmed = self.rest().trim_start().len();
        self.at = self.text.len() - trimmed;
    }
    fn word(&self) -> String {
        self.rest().chars().take(12).take_while(|c| !c.is_whitespace()).collect()
    }
    fn fail(&self, what: String) -> ExprError {
        // An expression can be long; the message shows its start.
        let mut text: String = self.text.chars().take(120).collect();
        if text.len() < self.text.len() {
            text.push('…');
        }
        ExprError { text, column: self.text[..self.at].chars().count() + 1, what }
    }
    fn deeper(&mut self) -> Result<(), ExprError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH { Err(self.fail("nested too deeply".to_owned())) } else { Ok(()) }
    }

    fn level(&mut self, level: usize) -> Result<Node, ExprError> {
        let Some(ops) = LEVELS.get(level) else {
            return self.unary();
        };
        let mut left = self.level(level + 1)?;
        loop {
            self.space();
            let Some(spelling) = SPELLINGS.into_iter().find(|s| self.rest().starts_with(s)) else {
                return Ok(left);
            };
            let Some((_, op)) = ops.iter().find(|(s, _)| *s == spelling) else {
                return Ok(left);
            };
            self.at += spelling.len();
            let right = self.level(level + 1)?;
            left = Node::Bin(*op, Box::new(left), Box::new(right));
        }
    }

    fn unary(&mut self) -> Result<Node, ExprError> {
        self.space();
        self.deeper()?;
        let wrap: fn(Box<Node>) -> Node = match self.rest().bytes().next() {
            Some(b'-') => Node::Neg,
            Some(b'~') => Node::BitNot,
            Some(b'!') => Node::Not,
            _ => {
                let n = self.atom();
                self.depth -= 1;
                return n;
            }
        };
        self.at += 1;
        let n = self.unary()?;
        self.depth -= 1;
        Ok(wrap(Box::new(n)))
    }

    fn atom(&mut self) -> Result<Node, ExprError> {
        let Some(c) = self.rest().chars().next() else {
            return Err(self.fail("expected a number, `old.field` or `(`, found the end".to_owned()));
        };
        if c == '(' {
            self.at += 1;
            let n = self.level(0)?;
            self.space();
            if !self.rest().starts_with(')') {
                return Err(self.fail("expected `)`".to_owned()));
            }
            self.at += 1;
            return Ok(n);
        }
        if c == '\'' {
            let b = self.rest().as_bytes();
            return match b {
                [b'\'', ch, b'\'', ..] if ch.is_ascii() && *ch != b'\\' => {
                    let v = i128::from(*ch);
                    self.at += 3;
                    Ok(Node::Int(v))
                }
                _ => Err(self.fail("expected one character in quotes, like 'A'".to_owned())),
            };
        }
        if c.is_ascii_digit() {
            return self.number();
        }
        if is_name_start(c) {
            return self.path().map(Node::Path);
        }
        Err(self.fail(format!("expected a number, `old.field` or `(`, found `{}`", self.word())))
    }

    fn number(&mut self) -> Result<Node, ExprError> {
        let n = self.rest().find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(self.rest().len());
        let word = &self.text[self.at..self.at + n];
        let (digits, radix) = match word.as_bytes() {
            [b'0', b'x' | b'X', ..] => (&word[2..], 16),
            [b'0', _, ..] => (&word[1..], 8),
            _ => (word, 10),
        };
        match i128::from_str_radix(digits, radix) {
            Ok(v) => {
                self.at += n;
                Ok(Node::Int(v))
            }
            Err(_) => Err(self.fail(format!("`{word}` is not a number of base {radix}"))),
        }
    }

    fn name(&mut self) -> Result<String, ExprError> {
        let n = self.rest().find(|c: char| !is_name(c)).unwrap_or(self.rest().len());
        if n == 0 || !self.rest().starts_with(is_name_start) {
            return Err(self.fail("expected a name".to_owned()));
        }
        let s = self.rest()[..n].to_owned();
        self.at += n;
        Ok(s)
    }

    fn path(&mut self) -> Result<Path, ExprError> {
        let root = self.name()?;
        let mut steps = Vec::new();
        loop {
            if self.rest().starts_with('.') {
                self.at += 1;
                steps.push(Step::Field(self.name()?));
            } else if self.rest().starts_with('[') {
                self.at += 1;
                let n = self.rest().find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest().len());
                let Ok(i) = self.rest()[..n].parse() else {
                    return Err(self.fail("expected a decimal index".to_owned()));
                };
                self.at += n;
                if !self.rest().starts_with(']') {
                    return Err(self.fail("expected `]`".to_owned()));
                }
                self.at += 1;
                steps.push(Step::Index(i));
            } else {
                return Ok(Path { root, steps });
            }
        }
    }
}

fn is_name_start(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_'
}
fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}
