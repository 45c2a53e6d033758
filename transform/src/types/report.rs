//! What `mcr types OLD NEW` says.

use super::changes::{ChangeKind, TypeDiff, field_change};
use super::diff::LayoutDiff;
use super::mapping::Op;
use super::model::{Function, Type, TypeId, TypeModel, Variable};
use serde::Serialize;
use std::collections::{BTreeSet, HashSet};
use std::fmt::Write;

/// Everything that differs between two programs, as far as types go.
#[derive(Clone, Debug, Serialize)]
pub struct TypesReport {
    /// The old program.
    pub old: String,
    /// The new program.
    pub new: String,
    /// How much was compared: silence means that it is the same, not that it was not looked at.
    pub compared: Compared,
    /// Types that differ; those whose size is the same but whose bytes mean something else come first.
    pub types: Vec<TypeDiff>,
    /// Structs, unions and enums that only the new program has.
    pub added_types: Vec<String>,
    /// … that only the old program has.
    pub removed_types: Vec<String>,
    /// Variables that only the new program has.
    pub added_globals: Vec<GlobalRow>,
    /// Variables that only the old program has: their values are dropped.
    pub removed_globals: Vec<GlobalRow>,
    /// Variables whose own type or layout differs.
    pub changed_globals: Vec<GlobalChange>,
    /// Functions that only the new program has.
    pub added_functions: Vec<String>,
    /// Functions that only the old program has: a live pointer to one of them is a refusal.
    pub removed_functions: Vec<String>,
    /// Live objects of these types cannot be converted without a rule.
    pub needs_rule: Vec<NeedsRule>,
}

/// How many of each were compared, in the old program.
#[derive(Clone, Copy, Debug, Serialize)]
#[allow(missing_docs)]
pub struct Compared {
    pub types: usize,
    pub globals: usize,
    pub functions: usize,
}

/// A variable.
#[derive(Clone, Debug, Serialize)]
pub struct GlobalRow {
    /// `name` or `function::name`.
    pub name: String,
    /// Source file.
    pub unit: String,
    /// As C writes it.
    pub type_name: String,
    /// The whole declaration.
    pub declaration: String,
    /// In bytes.
    pub size: u64,
}

/// A variable that is in both.
#[derive(Clone, Debug, Serialize)]
pub struct GlobalChange {
    /// In the old program.
    pub name: String,
    /// In the new program, if a rule renames it.
    pub new_name: String,
    /// Source file in the old program.
    pub unit: String,
    /// As C writes it.
    pub old_type: String,
    /// As C writes it.
    pub new_type: String,
    /// In bytes.
    pub old_size: u64,
    /// In bytes.
    pub new_size: u64,
    /// What differs.
    pub text: String,
}

/// A member that nobody but the user can explain.
#[derive(Clone, Debug, Serialize)]
pub struct NeedsRule {
    /// "struct value".
    pub type_name: String,
    /// The member.
    pub member: String,
    /// Why.
    pub message: String,
    /// The line for the rules file.
    pub next_step: String,
}

fn row(m: &TypeModel, v: &Variable) -> GlobalRow {
    GlobalRow {
        name: v.display(),
        unit: v.unit.to_string(),
        type_name: m.display(v.ty),
        declaration: m.declare(v.ty, &v.display()),
        size: v.size,
    }
}

fn tagged(m: &TypeModel) -> impl Iterator<Item = (TypeId, String)> + '_ {
    m.ids().filter_map(|id| {
        let complete = match &m[id] {
            Type::Record(r) => !r.incomplete,
            Type::Enum(e) => !e.incomplete,
            _ => false,
        };
        complete.then(|| m.type_name(id)).flatten().map(|n| (id, n))
    })
}

impl LayoutDiff<'_> {
    /// Compares everything.
    #[must_use]
    pub fn report(&self) -> TypesReport {
        let (old, new) = (self.old, self.new);
        let types = self.changes();
        let names = |m| -> BTreeSet<String> { tagged(m).map(|t| t.1).collect() };
        let (old_names, new_names) = (names(old), names(new));
        let removed = tagged(old)
            .filter(|(id, n)| self.pair(*id).is_none() && !new_names.contains(self.rules.new_type(n)));
        let added = tagged(new)
            .filter(|(id, n)| self.pair_back(*id).is_none() && !old_names.contains(self.rules.old_type(n)));
        let removed_types: BTreeSet<String> = removed.map(|t| t.1).collect();
        let added_types: BTreeSet<String> = added.map(|t| t.1).collect();

        let mut taken = HashSet::new();
        let (mut removed_globals, mut changed_globals) = (Vec::new(), Vec::new());
        for v in old.globals() {
            match self.pair_global(v) {
                Some(n) => {
                    taken.insert((n.place, n.name.clone()));
                    changed_globals.extend(self.global_change(v, n));
                }
                None => removed_globals.push(row(old, v)),
            }
        }
        let fresh = new.globals().iter().filter(|v| !taken.contains(&(v.place, v.name.clone())));
        let added_globals = fresh.map(|v| row(new, v)).collect();

        let function_names =
            |fs: &[Function]| -> BTreeSet<String> { fs.iter().map(|f| f.name.to_string()).collect() };
        let (f, g) = (function_names(old.functions()), function_names(new.functions()));
        let removed_functions =
            f.iter().filter(|n| !g.contains(self.rules.new_function(n))).cloned().collect();
        let added_functions = g.iter().filter(|n| !f.contains(self.rules.old_function(n))).cloned().collect();

        let mut needs_rule = Vec::new();
        for t in types.iter().filter(|t| t.layout_changed && matches!(old[t.old], Type::Record(_))) {
            for op in &self.plan(t.old, t.new).ops {
                if let Op::Refused { path, message, next_step, .. } = op {
                    needs_rule.push(NeedsRule {
                        type_name: t.name.clone(),
                        member: path.clone(),
                        message: message.clone(),
                        next_step: next_step.clone(),
                    });
                }
            }
        }
        TypesReport {
            old: old.path().to_owned(),
            new: new.path().to_owned(),
            compared: Compared {
                types: old.len(),
                globals: old.globals().len(),
                functions: old.functions().len(),
            },
            types,
            added_types: added_types.into_iter().collect(),
            removed_types: removed_types.into_iter().collect(),
            added_globals,
            removed_globals,
            changed_globals,
            added_functions,
            removed_functions,
            needs_rule,
        }
    }

    fn global_change(&self, v: &Variable, n: &Variable) -> Option<GlobalChange> {
        let (old, new) = (self.old, self.new);
        let what = field_change(self, "", v.ty, n.ty).map(|c| c.text);
        let renamed = || (v.display() != n.display()).then(|| format!("is now {}, by rule", n.display()));
        let text = what
            .or_else(renamed)
            .or_else(|| (v.size != n.size).then(|| format!("{} bytes, now {}", v.size, n.size)))?;
        Some(GlobalChange {
            name: v.display(),
            new_name: n.display(),
            unit: v.unit.to_string(),
            old_type: old.display(v.ty),
            new_type: new.display(n.ty),
            old_size: v.size,
            new_size: n.size,
            text,
        })
    }
}

impl TypesReport {
    /// Nothing differs but code.
    #[must_use]
    pub fn is_same(&self) -> bool {
        self.types.is_empty()
            && self.added_globals.is_empty()
            && self.removed_globals.is_empty()
            && self.changed_globals.is_empty()
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        let o = &mut out;
        let _ = writeln!(o, "{} -> {}", self.old, self.new);
        let _ = writeln!(
            o,
            "compared: {} types, {} variables, {} functions",
            self.compared.types, self.compared.globals, self.compared.functions
        );
        let silent: Vec<&TypeDiff> = self.types.iter().filter(|t| t.silent).collect();
        let laid: Vec<&TypeDiff> = self.types.iter().filter(|t| !t.silent && t.layout_changed).collect();
        let rest: Vec<&TypeDiff> = self.types.iter().filter(|t| !t.silent && !t.layout_changed).collect();
        let section = |o: &mut String, title: &str, list: &[&TypeDiff]| {
            if list.is_empty() {
                return;
            }
            let _ = writeln!(o, "\n{title}");
            for t in list {
                let size = match t.old_size == t.new_size {
                    true => format!("{} bytes in both", t.old_size),
                    false => format!("{} -> {} bytes", t.old_size, t.new_size),
                };
                let _ = writeln!(o, "  {} ({size})", t.name);
                let moved = t.changes.iter().filter(|c| c.kind == ChangeKind::Moved).count();
                let mut shown = 0;
                for c in &t.changes {
                    if c.kind == ChangeKind::Moved && moved > 4 {
                        shown += 1;
                        if shown == 4 {
                            let _ = writeln!(o, "    - … and {} more members moved", moved - 3);
                        }
                        if shown > 3 {
                            continue;
                        }
                    }
                    let mark = if c.kind <= ChangeKind::KindChanged { "!" } else { "-" };
                    let _ = writeln!(o, "    {mark} {}", c.text);
                }
            }
        };
        section(o, "Same size, other meaning (nothing would crash; the data would be wrong):", &silent);
        section(o, "Layout changed:", &laid);
        section(o, "Layout kept, meaning to be looked at:", &rest);
        if !self.needs_rule.is_empty() {
            let _ = writeln!(o, "\nNeeds a rule if there are live objects of it:");
            for n in &self.needs_rule {
                let _ = writeln!(o, "  {}.{}: {}\n    {}", n.type_name, n.member, n.message, n.next_step);
            }
        }
        let names = |o: &mut String, title: &str, list: &[String]| {
            if !list.is_empty() {
                let _ = writeln!(o, "\n{title} ({}): {}", list.len(), list.join(", "));
            }
        };
        names(o, "Types only in new", &self.added_types);
        names(o, "Types only in old", &self.removed_types);
        if !self.changed_globals.is_empty() {
            let _ = writeln!(o, "\nVariables that changed:");
            for g in &self.changed_globals {
                let _ = writeln!(o, "  {} ({}): {}", g.name, g.unit, g.text);
            }
        }
        for (title, list) in [
            ("Variables only in new (they keep the value that start-up gives them):", &self.added_globals),
            ("Variables only in old (dropped, or renamed: then a rule says so):", &self.removed_globals),
        ] {
            if !list.is_empty() {
                let _ = writeln!(o, "\n{title}");
                for g in list {
                    let _ = writeln!(o, "  {} ({}, {} bytes)", g.declaration, g.unit, g.size);
                }
            }
        }
        names(o, "Functions only in new", &self.added_functions);
        names(o, "Functions only in old", &self.removed_functions);
        if self.is_same() {
            let _ = writeln!(o, "\nNo type and no variable differs.");
        }
        out
    }
}
