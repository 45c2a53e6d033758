//! Findings, collected without repeating the same one a million times.

use mcr_image::proto::{Finding, Severity};
use std::collections::HashMap;

/// How many findings of one code are kept in full.
const MAX_PER_CODE: u64 = 40;

/// Codes of refusals that a rule about a type answers (exit code 5).
const RULE_CODES: &[&str] = &[
    "type-conflict",
    "object-too-small",
    "unknown-tail",
    "untyped-object",
    "table-order",
    "union-changed",
    "kind-changed",
    "enum-removed",
    "array-shrunk",
    "narrowed",
    "sign-changed",
    "rule-failed",
    "rule-type",
];

#[derive(Default)]
pub(crate) struct Findings {
    list: Vec<Finding>,
    counts: HashMap<(String, i32), u64>,
}

impl Findings {
    pub fn add(
        &mut self,
        severity: Severity,
        code: &str,
        message: String,
        path: String,
        next: &str,
        addr: u64,
    ) {
        let n = self.counts.entry((code.to_owned(), severity as i32)).or_default();
        *n += 1;
        if *n > MAX_PER_CODE {
            return;
        }
        let twin = |f: &Finding| f.code == code && f.message == message && f.path == path;
        if self.list.iter().rev().take(64).any(twin) {
            return;
        }
        self.list.push(Finding {
            severity: severity as i32,
            code: code.into(),
            message,
            path,
            next_step: next.into(),
            addr,
        });
    }
    pub fn info(&mut self, code: &str, message: String, path: String, next: &str, addr: u64) {
        self.add(Severity::Info, code, message, path, next, addr);
    }
    pub fn warn(&mut self, code: &str, message: String, path: String, next: &str, addr: u64) {
        self.add(Severity::Warning, code, message, path, next, addr);
    }
    pub fn refuse(&mut self, code: &str, message: String, path: String, next: &str, addr: u64) {
        self.add(Severity::Refusal, code, message, path, next, addr);
    }

    /// All of them, refusals first; a line for what was left out.
    pub fn finish(mut self) -> Vec<Finding> {
        for ((code, severity), n) in &self.counts {
            if *n > MAX_PER_CODE {
                self.list.push(Finding {
                    severity: *severity,
                    code: code.clone(),
                    message: format!("… and {} more of these", n - MAX_PER_CODE),
                    ..Finding::default()
                });
            }
        }
        self.list.sort_by_key(|f| std::cmp::Reverse(f.severity));
        self.list
    }
}

/// The refusal that a list of findings amounts to, if it does.
pub(crate) fn refusal(findings: &[Finding]) -> Option<crate::Refusal> {
    let is = |f: &&Finding| f.severity == Severity::Refusal as i32;
    let reasons: Vec<Finding> = findings.iter().filter(is).cloned().collect();
    if reasons.is_empty() {
        return None;
    }
    let needs_rules = reasons.iter().all(|r| RULE_CODES.contains(&r.code.as_str()));
    let rest = findings.iter().filter(|f| !is(f)).cloned().collect();
    Some(crate::Refusal { reasons, findings: rest, needs_rules })
}
