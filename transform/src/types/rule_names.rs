//! A rule about something that neither build has is a mistake: it would be silently without effect.

use super::diff::LayoutDiff;
use super::fields::{Unions, fields, nested};
use super::model::{TypeId, TypeModel};
use mcr_plugin::{RuleName, RuleNameKind, Side};

/// A rule that names something that does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleMistake {
    /// Line in the rules file.
    pub line: usize,
    /// What does not exist, where, and what comes close.
    pub message: String,
}

impl LayoutDiff<'_> {
    /// Every name in the rules that the program it should be in does not have.
    #[must_use]
    pub fn rule_mistakes(&self) -> Vec<RuleMistake> {
        let mut out: Vec<RuleMistake> = self.rules.names().iter().filter_map(|n| self.mistake(n)).collect();
        out.sort_by_key(|m| m.line);
        out.dedup();
        out
    }

    fn mistake(&self, n: &RuleName) -> Option<RuleMistake> {
        let (m, which) = match n.side {
            Side::Old => (self.old, "old"),
            Side::New => (self.new, "new"),
        };
        let say = |what: String, choices: Vec<String>, name: &str| {
            let near = nearest(name, &choices).map(|c| format!(" (did you mean `{c}`?)")).unwrap_or_default();
            Some(RuleMistake {
                line: n.line,
                message: format!(
                    "{} line {}: the {which} version has no {what}{near}",
                    self.rules.path().display(),
                    n.line
                ),
            })
        };
        let globals = || m.globals().iter().map(|v| v.display()).collect::<Vec<_>>();
        let is_global = |name: &str| {
            let (function, plain) = name.rsplit_once("::").map_or((None, name), |(f, n)| (Some(f), n));
            m.globals_named(plain).any(|v| function.is_none() || v.function.as_deref() == function)
        };
        match n.kind {
            RuleNameKind::Global if is_global(&n.name) => None,
            // `[keep]` takes either name.
            RuleNameKind::Global if self.rules.keep(&n.name).is_some() && self.either(&n.name) => None,
            RuleNameKind::Global => say(format!("global `{}`", n.name), globals(), &n.name),
            RuleNameKind::Function if m.functions_named(&n.name).next().is_some() => None,
            RuleNameKind::Function => say(
                format!("function `{}`", n.name),
                m.functions().iter().map(|f| f.name.to_string()).collect(),
                &n.name,
            ),
            RuleNameKind::Type => {
                let bare = n.name.trim_end_matches(['*', ' ']);
                if m.find_type(bare).is_some() {
                    return None;
                }
                say(format!("type `{bare}`"), m.by_name.keys().cloned().collect(), bare)
            }
            RuleNameKind::Field => {
                let (ty, field) = n.name.split_once('.')?;
                let Some(id) = m.find_type(ty) else {
                    return say(format!("type `{ty}`"), m.by_name.keys().cloned().collect(), ty);
                };
                let all = paths(m, id);
                if all.iter().any(|p| p == field) {
                    return None;
                }
                say(format!("member `{field}` in `{ty}`"), all, field)
            }
        }
    }

    fn either(&self, name: &str) -> bool {
        self.old.globals_named(name).next().is_some() || self.new.globals_named(name).next().is_some()
    }
}

/// Names of all members, nested ones with dots.
fn paths(m: &TypeModel, id: TypeId) -> Vec<String> {
    let Some(r) = m.record(id) else { return Vec::new() };
    let mut all = fields(m, r, Unions::Open);
    let deep = nested(m, &all, 6);
    all.extend(deep);
    // Members of embedded unions, too: `v.val`.
    let mut out: Vec<String> = Vec::new();
    for f in all.iter().filter(|f| !f.path.is_empty()) {
        out.push(f.path.clone());
        if let Some(u) = m.record(f.ty).filter(|u| u.kind == super::RecordKind::Union) {
            let inner = fields(m, u, Unions::Open);
            out.extend(inner.iter().filter(|i| !i.path.is_empty()).map(|i| format!("{}.{}", f.path, i.path)));
        }
    }
    out
}

/// The candidate with the smallest edit distance, if it is close.
fn nearest<'c>(name: &str, candidates: &'c [String]) -> Option<&'c String> {
    let limit = (name.len() / 3).clamp(1, 4);
    let scored =
        candidates.iter().filter(|c| c.len().abs_diff(name.len()) <= limit).map(|c| (distance(name, c), c));
    scored.min_by_key(|s| s.0).filter(|s| s.0 <= limit).map(|s| s.1)
}

fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut last = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let up = row[j + 1];
            row[j + 1] = (last + usize::from(x != *y)).min(row[j] + 1).min(up + 1);
            last = up;
        }
    }
    row[b.len()]
}
