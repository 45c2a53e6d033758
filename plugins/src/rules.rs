//! The rules file: what the two builds alone do not say.
//!
//! ```toml
//! # Old names on the left, new names on the right.
//! [rename.types]
//! "struct conn" = "struct client"
//! [rename.fields]                          # "old type.old field" = "new field"
//! "struct conn.timeout" = "timeout_ms"
//! [rename.globals]
//! nconns = "nclients"
//! [rename.functions]
//! on_read = "client_read"
//!
//! # Fields of the NEW version, "new type.new field", or a new global's name. An expression (see
//! # `crate::expr`) over the old object, `old.…`, or a plain number.
//! [values]                                 # always computed
//! "struct client.timeout_ms" = "old.timeout * 1000"
//! [defaults]                               # used where no old field matches
//! "struct client.quota" = 1000
//!
//! # Who wins at a global: "old" or "new". (Default: old's value if old changed it.)
//! [keep]
//! command_table = "new"
//!
//! # What a void*, an integer or a char array really points at: the type behind the pointer.
//! # "opaque" says: bytes, never a pointer.
//! [types]
//! "dictEntry.v.val" = "struct robj"
//!
//! # Which member of a union is live: an expression over the object that holds the union.
//! [unions."struct value.u"]
//! by = "old.kind"
//! cases = { KIND_STR = "str", 2 = "num" }  # enum constant or number = member
//! default = "raw"                          # optional; without it another value is an error
//!
//! # Stacks at which a thread may be stopped, innermost function first; a pattern matches a run of frames.
//! [[quiescent]]
//! stack = ["epoll_wait", "event_loop"]
//! safe_when = "server.loading == 0"        # optional condition over globals
//!
//! [boot]                                   # how the new version is started
//! argv = ["./kv", "--port", "6000"]        # instead of the old command line
//! env = { KV_DEBUG = "1" }                 # added to the old environment
//! unset_env = ["OLD_FLAG"]
//! timeout_s = 20
//!
//! [fds]                                    # not matched against start-up, not carried
//! leave = [7]
//! leave_paths = ["/var/log/kv.log"]
//! ```
//!
//! Type names are written as in C (`struct conn`, or a typedef's name); `conn` alone also finds
//! `struct conn`. Unknown keys are errors that name the line and the nearest known key.

use crate::expr::{Expr, ExprError};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

mod load;
pub use load::nearest;

/// A loaded rules file. `Rules::default()` holds no rule.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    path: PathBuf,
    globals: Vec<Named<String>>,
    types: Vec<Named<String>>,
    functions: Vec<Named<String>>,
    fields: Vec<Named<String>>,
    values: Vec<Named<Expr>>,
    defaults: Vec<Named<Expr>>,
    keep: Vec<Named<Keep>>,
    slots: Vec<Named<String>>,
    unions: Vec<Named<UnionRule>>,
    quiescent: Vec<QuiescentRule>,
    boot: BootRules,
    fds: FdRules,
}

#[derive(Clone, Debug)]
struct Named<T> {
    key: String,
    line: usize,
    value: T,
}

/// Who wins at a global.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// The old process's value, converted.
    Old,
    /// What the new version's start-up put there.
    New,
}

/// How to tell which member of a union is live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnionRule {
    /// Expression over the object that holds the union.
    pub by: Expr,
    /// Value of `by` → member.
    pub cases: Vec<(UnionCase, String)>,
    /// Member for every other value.
    pub default: Option<String>,
}

/// One left-hand side in a union's `cases`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnionCase {
    /// A number.
    Value(i128),
    /// An enum constant of the old version.
    Constant(String),
}

impl UnionRule {
    /// The member for a value of `by`; `constant` resolves enum constants of the old version.
    pub fn member(&self, value: i128, mut constant: impl FnMut(&str) -> Option<i128>) -> Option<&str> {
        self.cases
            .iter()
            .find(|(c, _)| match c {
                UnionCase::Value(v) => *v == value,
                UnionCase::Constant(name) => constant(name) == Some(value),
            })
            .map(|(_, m)| m.as_str())
            .or(self.default.as_deref())
    }
}

/// A stack at which a thread may be stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuiescentRule {
    /// Functions, innermost first.
    pub stack: Vec<String>,
    /// Condition over globals.
    pub safe_when: Option<Expr>,
    /// Line in the file.
    pub line: usize,
}

impl QuiescentRule {
    /// Whether the functions appear as one run in a signature (innermost first). Library frames of a
    /// signature, "libc.so.6+0x1234", may stand in between.
    #[must_use]
    pub fn matches(&self, signature: &[String]) -> bool {
        let mut names = signature.iter().map(String::as_str).filter(|s| !s.contains("+0x")).peekable();
        while names.peek().is_some() {
            if self.stack.iter().map(String::as_str).eq(names.clone().take(self.stack.len())) {
                return true;
            }
            names.next();
        }
        false
    }
}

/// How to start the new version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootRules {
    /// The whole argument vector, instead of the old process's.
    pub argv: Option<Vec<String>>,
    /// Variables to set on top of the old environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Variables to remove from the old environment.
    #[serde(default)]
    pub unset_env: Vec<String>,
    /// Deadline of the start-up, in seconds.
    pub timeout_s: Option<u64>,
}

impl BootRules {
    /// The argument vector to start with.
    #[must_use]
    pub fn argv(&self, old: &[Vec<u8>]) -> Vec<Vec<u8>> {
        match &self.argv {
            Some(v) => v.iter().map(|s| s.clone().into_bytes()).collect(),
            None => old.to_vec(),
        }
    }

    /// The environment to start with: old's without `unset_env`, with `env` replaced or added.
    #[must_use]
    pub fn envp(&self, old: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let named =
            |e: &[u8], n: &str| e.strip_prefix(n.as_bytes()).is_some_and(|r| r.first() == Some(&b'='));
        let mut out: Vec<Vec<u8>> = old
            .iter()
            .filter(|e| !self.unset_env.iter().chain(self.env.keys()).any(|n| named(e, n)))
            .cloned()
            .collect();
        out.extend(self.env.iter().map(|(k, v)| format!("{k}={v}").into_bytes()));
        out
    }
}

/// Descriptors that an update leaves alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FdRules {
    /// Numbers in the old process.
    #[serde(default)]
    pub leave: Vec<i32>,
    /// Paths of files; a trailing `*` matches any rest.
    #[serde(default)]
    pub leave_paths: Vec<String>,
}

impl FdRules {
    /// Whether a rule says to leave this descriptor alone.
    #[must_use]
    pub fn leaves(&self, number: i32, path: &str) -> bool {
        self.leave.contains(&number)
            || self.leave_paths.iter().any(|p| match p.strip_suffix('*') {
                Some(prefix) => path.starts_with(prefix),
                None => p == path,
            })
    }
}

/// Why a rules file cannot be used. The text names file and line and says what to write instead.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// The file cannot be read.
    #[error("rules file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong kind.
    #[error("rules file {path}, line {line}: {message}{hint}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
        /// What to write instead; empty, or starting with "; ".
        hint: String,
    },
    /// A string that should be an expression is none.
    #[error("rules file {path}, line {line}: {source}")]
    Expression {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Where in the expression.
        source: ExprError,
    },
}

/// A name that a rule speaks of, so that it can be checked against the two builds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleName {
    /// What it names.
    pub kind: RuleNameKind,
    /// The version it must exist in.
    pub side: Side,
    /// The name.
    pub name: String,
    /// Line in the rules file.
    pub line: usize,
}

/// What a [`RuleName`] names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum RuleNameKind {
    Type,
    /// "type.field", or (in values) perhaps a global.
    Field,
    Global,
    Function,
}

/// A version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Side {
    Old,
    New,
}

impl Rules {
    /// Reads and checks a rules file.
    pub fn load(path: &Path) -> Result<Self, RulesError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| RulesError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Parses the text of a rules file; `path` is for messages only.
    pub fn parse(text: &str, path: &Path) -> Result<Self, RulesError> {
        load::Reader { text, path }.read()
    }

    /// Whether there is no rule at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names().is_empty()
            && self.quiescent.is_empty()
            && self.boot == BootRules::default()
            && self.fds == FdRules::default()
    }

    /// The file it came from; empty for `Rules::default()`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What an old global is called in the new version (its own name without a rule).
    #[must_use]
    pub fn new_global<'a>(&'a self, old: &'a str) -> &'a str {
        renamed(&self.globals, old, |a, b| a == b)
    }
    /// What a new global was called in the old version.
    #[must_use]
    pub fn old_global<'a>(&'a self, new: &'a str) -> &'a str {
        renamed_back(&self.globals, new, |a, b| a == b)
    }
    /// What an old function is called in the new version.
    #[must_use]
    pub fn new_function<'a>(&'a self, old: &'a str) -> &'a str {
        renamed(&self.functions, old, |a, b| a == b)
    }
    /// What a new function was called in the old version.
    #[must_use]
    pub fn old_function<'a>(&'a self, new: &'a str) -> &'a str {
        renamed_back(&self.functions, new, |a, b| a == b)
    }
    /// What an old type ("struct conn", "conn_t") is called in the new version.
    #[must_use]
    pub fn new_type<'a>(&'a self, old: &'a str) -> &'a str {
        renamed(&self.types, old, same_type)
    }
    /// What a new type was called in the old version.
    #[must_use]
    pub fn old_type<'a>(&'a self, new: &'a str) -> &'a str {
        renamed_back(&self.types, new, same_type)
    }
    /// What a field of an old type is called in the new version. Nested anonymous members are transparent;
    /// a named nested member is written with a dot ("limits.soft").
    #[must_use]
    pub fn new_field<'a>(&'a self, old_type: &str, old_field: &'a str) -> &'a str {
        field_rule(&self.fields, old_type, old_field).map_or(old_field, |n| n.value.as_str())
    }
    /// What a field was called in the old type. Empty-handed (`new_field` itself) without a rule.
    #[must_use]
    pub fn old_field<'a>(&'a self, old_type: &str, new_field: &'a str) -> &'a str {
        self.fields
            .iter()
            .filter(|n| n.value == new_field)
            .find_map(|n| split_field(&n.key).filter(|(t, _)| same_type(t, old_type)).map(|(_, f)| f))
            .unwrap_or(new_field)
    }

    /// The expression that computes a field of a new type, from `[values]`.
    #[must_use]
    pub fn value(&self, new_type: &str, new_field: &str) -> Option<&Expr> {
        field_rule(&self.values, new_type, new_field).map(|n| &n.value)
    }
    /// The expression for a field of a new type that no old field matches, from `[defaults]`.
    #[must_use]
    pub fn default_value(&self, new_type: &str, new_field: &str) -> Option<&Expr> {
        field_rule(&self.defaults, new_type, new_field).map(|n| &n.value)
    }
    /// The expression for a whole new global of integer type, from `[values]`; `old` is the matched old
    /// global.
    #[must_use]
    pub fn global_value(&self, new_global: &str) -> Option<&Expr> {
        exact(&self.values, new_global)
    }
    /// The expression for a global that only the new version has, from `[defaults]`.
    #[must_use]
    pub fn global_default(&self, new_global: &str) -> Option<&Expr> {
        exact(&self.defaults, new_global)
    }
    /// Who wins at a global (by its new name, or by its old one).
    #[must_use]
    pub fn keep(&self, global: &str) -> Option<Keep> {
        exact(&self.keep, global).copied()
    }
    /// The type behind a `void *`, integer or char-array field; `Some("opaque")` = not a pointer.
    #[must_use]
    pub fn slot_type(&self, in_type: &str, field: &str) -> Option<&str> {
        field_rule(&self.slots, in_type, field).map(|n| n.value.as_str())
    }
    /// The type behind a `void *` global or local.
    #[must_use]
    pub fn variable_slot_type(&self, variable: &str) -> Option<&str> {
        exact(&self.slots, variable).map(String::as_str)
    }
    /// How to tell the live member of a union field.
    #[must_use]
    pub fn union_rule(&self, in_type: &str, field: &str) -> Option<&UnionRule> {
        field_rule(&self.unions, in_type, field).map(|n| &n.value)
    }
    /// Stacks at which threads may be stopped. Empty: automatic recognition alone.
    #[must_use]
    pub fn quiescent(&self) -> &[QuiescentRule] {
        &self.quiescent
    }
    /// How to start the new version.
    #[must_use]
    pub fn boot(&self) -> &BootRules {
        &self.boot
    }
    /// Descriptors to leave alone.
    #[must_use]
    pub fn fds(&self) -> &FdRules {
        &self.fds
    }

    /// The renames the other way round, from the new version to the old one; nothing else can be turned round.
    #[must_use]
    pub fn reversed(&self) -> Self {
        let turned = |list: &[Named<String>]| {
            let one = |n: &Named<String>| Named { key: n.value.clone(), line: n.line, value: n.key.clone() };
            list.iter().map(one).collect()
        };
        let field = |n: &Named<String>| {
            let (ty, old) = split_field(&n.key)?;
            let key = format!("{}.{}", self.new_type(ty), n.value);
            Some(Named { key, line: n.line, value: old.to_owned() })
        };
        Self {
            path: self.path.clone(),
            globals: turned(&self.globals),
            types: turned(&self.types),
            functions: turned(&self.functions),
            fields: self.fields.iter().filter_map(field).collect(),
            ..Self::default()
        }
    }

    /// Every name the rules speak of, to be checked against the two builds: a rule about something that does
    /// not exist is a mistake, never a no-op.
    #[must_use]
    pub fn names(&self) -> Vec<RuleName> {
        use RuleNameKind::{Field, Function, Global, Type};
        let mut out = Vec::new();
        let mut add =
            |kind, side, name: &str, line| out.push(RuleName { kind, side, name: name.to_owned(), line });
        for (list, kind) in [(&self.globals, Global), (&self.types, Type), (&self.functions, Function)] {
            for n in list {
                add(kind, Side::Old, &n.key, n.line);
                add(kind, Side::New, &n.value, n.line);
            }
        }
        for n in &self.fields {
            add(Field, Side::Old, &n.key, n.line);
        }
        for n in self.values.iter().chain(&self.defaults) {
            add(if n.key.contains('.') { Field } else { Global }, Side::New, &n.key, n.line);
        }
        for n in &self.keep {
            add(Global, if n.value == Keep::Old { Side::Old } else { Side::New }, &n.key, n.line);
        }
        for n in &self.slots {
            add(if n.key.contains('.') { Field } else { Global }, Side::Old, &n.key, n.line);
            if n.value != "opaque" {
                add(Type, Side::Old, &n.value, n.line);
            }
        }
        for n in &self.unions {
            add(Field, Side::Old, &n.key, n.line);
        }
        out
    }
}

fn renamed<'a>(list: &'a [Named<String>], old: &'a str, same: impl Fn(&str, &str) -> bool) -> &'a str {
    list.iter().find(|n| same(&n.key, old)).map_or(old, |n| &n.value)
}
fn renamed_back<'a>(list: &'a [Named<String>], new: &'a str, same: impl Fn(&str, &str) -> bool) -> &'a str {
    list.iter().find(|n| same(&n.value, new)).map_or(new, |n| &n.key)
}
fn exact<'a, T>(list: &'a [Named<T>], key: &str) -> Option<&'a T> {
    list.iter().find(|n| n.key == key).map(|n| &n.value)
}
fn field_rule<'a, T>(list: &'a [Named<T>], of: &str, field: &str) -> Option<&'a Named<T>> {
    list.iter().find(|n| split_field(&n.key).is_some_and(|(t, f)| f == field && same_type(t, of)))
}
fn split_field(key: &str) -> Option<(&str, &str)> {
    key.split_once('.')
}
/// "struct conn" = "struct conn" = "conn"; but never "struct conn" = "union conn".
fn same_type(a: &str, b: &str) -> bool {
    let split = |s: &str| -> (Option<usize>, String) {
        let mut words: Vec<&str> = s.split_whitespace().collect();
        let tag = words.first().and_then(|w| ["struct", "union", "enum"].iter().position(|t| t == w));
        if tag.is_some() {
            words.remove(0);
        }
        (tag, words.join(" "))
    };
    if a == b {
        return true;
    }
    let ((ta, na), (tb, nb)) = (split(a), split(b));
    na == nb && (ta == tb || ta.is_none() || tb.is_none())
}

#[cfg(test)]
mod tests;
