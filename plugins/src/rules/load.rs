//! From TOML to checked [`Rules`].

use super::{
    BootRules, FdRules, Keep, Named, QuiescentRule, Rules, RulesError, UnionCase, UnionRule, same_type,
    split_field,
};
use crate::expr::Expr;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use toml::Spanned;

type Table<T> = BTreeMap<Spanned<String>, T>;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawRules {
    rename: RawRename,
    values: Table<RawValue>,
    defaults: Table<RawValue>,
    keep: Table<Keep>,
    types: Table<String>,
    unions: Table<RawUnion>,
    quiescent: Vec<Spanned<RawQuiescent>>,
    boot: BootRules,
    fds: FdRules,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawRename {
    types: Table<String>,
    fields: Table<String>,
    globals: Table<String>,
    functions: Table<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number, true, false or an expression in quotes")]
enum RawValue {
    Bool(bool),
    Int(i64),
    Text(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawUnion {
    by: String,
    cases: BTreeMap<String, String>,
    default: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawQuiescent {
    stack: Vec<String>,
    safe_when: Option<String>,
}

/// Every key of the file's grammar, for suggestions.
const KEYS: [&str; 22] = [
    "rename",
    "types",
    "fields",
    "globals",
    "functions",
    "values",
    "defaults",
    "keep",
    "unions",
    "quiescent",
    "boot",
    "fds",
    "by",
    "cases",
    "default",
    "stack",
    "safe_when",
    "argv",
    "env",
    "unset_env",
    "timeout_s",
    "leave_paths",
];

pub(super) struct Reader<'a> {
    pub text: &'a str,
    pub path: &'a Path,
}

impl Reader<'_> {
    fn line(&self, at: usize) -> usize {
        self.text.as_bytes()[..at.min(self.text.len())].iter().filter(|b| **b == b'\n').count() + 1
    }
    fn fail(&self, line: usize, message: String, hint: String) -> RulesError {
        RulesError::Syntax { path: self.path.to_owned(), line, message, hint }
    }

    pub fn read(&self) -> Result<Rules, RulesError> {
        let raw: RawRules = toml::from_str(self.text).map_err(|e| self.toml_error(&e))?;
        let quiescent = raw
            .quiescent
            .into_iter()
            .map(|q| {
                let line = self.line(q.span().start);
                let q = q.into_inner();
                if q.stack.is_empty() {
                    return Err(self.fail(
                        line,
                        "a quiescent point needs at least one function in `stack`".to_owned(),
                        "; `mcr quiesce PID` prints the stacks".to_owned(),
                    ));
                }
                let safe_when = q.safe_when.map(|t| self.expr(&t, line, None)).transpose()?;
                Ok(QuiescentRule { stack: q.stack, safe_when, line })
            })
            .collect::<Result<_, _>>()?;
        let plain =
            |t: Table<String>| -> Vec<Named<String>> { self.named(t, |_, v| Ok(v)).unwrap_or_default() };
        let rules = Rules {
            path: self.path.to_owned(),
            globals: plain(raw.rename.globals),
            types: plain(raw.rename.types),
            functions: plain(raw.rename.functions),
            fields: plain(raw.rename.fields),
            values: self.named(raw.values, |line, v| self.value(v, line))?,
            defaults: self.named(raw.defaults, |line, v| self.value(v, line))?,
            keep: self.named(raw.keep, |_, v| Ok(v))?,
            slots: plain(raw.types),
            unions: self.named(raw.unions, |line, v| self.union_rule(v, line))?,
            quiescent,
            boot: raw.boot,
            fds: raw.fds,
        };
        self.check(&rules)?;
        Ok(rules)
    }

    fn named<T, U>(
        &self,
        table: Table<T>,
        mut f: impl FnMut(usize, T) -> Result<U, RulesError>,
    ) -> Result<Vec<Named<U>>, RulesError> {
        let mut v = table
            .into_iter()
            .map(|(k, value)| {
                let line = self.line(k.span().start);
                Ok(Named { key: k.into_inner(), line, value: f(line, value)? })
            })
            .collect::<Result<Vec<_>, RulesError>>()?;
        v.sort_by_key(|n| n.line);
        Ok(v)
    }

    fn expr(&self, text: &str, line: usize, root: Option<&str>) -> Result<Expr, RulesError> {
        let e = Expr::parse(text).map_err(|source| RulesError::Expression {
            path: self.path.to_owned(),
            line,
            source,
        })?;
        if let Some(root) = root
            && let Some(p) = e.paths().into_iter().find(|p| p.root != root)
        {
            return Err(self.fail(
                line,
                format!("`{p}` is not a value of the old object"),
                format!("; write `{root}.{p}`"),
            ));
        }
        Ok(e)
    }

    fn value(&self, v: RawValue, line: usize) -> Result<Expr, RulesError> {
        match v {
            RawValue::Bool(b) => Ok(Expr::constant(i128::from(b))),
            RawValue::Int(i) => Ok(Expr::constant(i128::from(i))),
            RawValue::Text(t) => self.expr(&t, line, Some("old")),
        }
    }

    fn union_rule(&self, raw: RawUnion, line: usize) -> Result<UnionRule, RulesError> {
        let cases = raw
            .cases
            .into_iter()
            .map(|(k, member)| {
                let case = match Expr::parse(&k).ok().and_then(|e| e.as_constant()) {
                    Some(v) => UnionCase::Value(v),
                    None => UnionCase::Constant(k),
                };
                (case, member)
            })
            .collect();
        Ok(UnionRule { by: self.expr(&raw.by, line, Some("old"))?, cases, default: raw.default })
    }

    /// What the grammar of TOML cannot say.
    fn check(&self, r: &Rules) -> Result<(), RulesError> {
        for (n, what) in r
            .fields
            .iter()
            .map(|n| (n.line, &n.key))
            .chain(r.unions.iter().map(|n| (n.line, &n.key)))
            .map(|(line, key)| ((line, key), "\"struct type.field\""))
        {
            if split_field(n.1).is_none_or(|(t, f)| t.is_empty() || f.is_empty()) {
                return Err(self.fail(
                    n.0,
                    format!("`{}` names no field", n.1),
                    format!("; write {what} in quotes"),
                ));
            }
        }
        for n in &r.fields {
            if let Some((t, f)) = split_field(&n.value)
                && same_type(t, r.new_type(split_field(&n.key).map_or("", |(t, _)| t)))
            {
                return Err(self.fail(
                    n.line,
                    "the right side of a field's rename is the new field alone".to_owned(),
                    format!("; write \"{}\" = \"{f}\"", n.key),
                ));
            }
        }
        for (list, what) in [(&r.globals, "globals"), (&r.types, "types"), (&r.functions, "functions")] {
            for (i, n) in list.iter().enumerate() {
                if let Some(first) = list[..i].iter().find(|f| f.value == n.value) {
                    return Err(self.fail(
                        n.line,
                        format!(
                            "two old {what} are renamed to `{}` (the other one on line {})",
                            n.value, first.line
                        ),
                        "; one new name takes one old one".to_owned(),
                    ));
                }
            }
        }
        Ok(())
    }

    fn toml_error(&self, e: &toml::de::Error) -> RulesError {
        let line = e.span().map_or(1, |s| self.line(s.start));
        let message = e.message().to_owned();
        // "unknown field `x`, expected one of …": point at the nearest key.
        let hint = message
            .strip_prefix("unknown field `")
            .and_then(|r| r.split_once('`'))
            .and_then(|(word, rest)| {
                let expected = |k: &str| rest.contains(&format!("`{k}`"));
                nearest(word, KEYS.into_iter().chain(["leave"]).filter(|k| expected(k)))
            })
            .map(|k| format!("; did you mean `{k}`?"))
            .or_else(|| {
                message.starts_with("unknown variant").then(|| "; `keep` is \"old\" or \"new\"".to_owned())
            })
            .unwrap_or_default();
        self.fail(line, message, hint)
    }
}

/// The candidate with the smallest edit distance, where that is small enough to be a slip.
#[must_use]
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|c| (distance(word, c), c))
        .filter(|(d, c)| *d <= 1 + c.len() / 4)
        .min_by_key(|(d, _)| *d)
        .map(|(_, c)| c)
}

fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let next = (diagonal + usize::from(ca != *cb)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = row[j + 1];
            row[j + 1] = next;
        }
    }
    row[b.len()]
}
