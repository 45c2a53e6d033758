//! Rules files, and (later) state-transformation handlers.
//!
//! Most updates need no rules. Where the two builds alone do not say what a value means, a small TOML file
//! does: see [`rules`] for its grammar.
#![forbid(unsafe_code)]

pub mod expr;
mod parse;
pub mod rules;

pub use expr::{EvalError, Expr, ExprError, Path as ExprPath};
pub use rules::{
    BootRules, FdRules, Keep, QuiescentRule, RuleName, RuleNameKind, Rules, RulesError, Side, UnionCase,
    UnionRule, nearest,
};
