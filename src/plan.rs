//! `mcr plan`: what an update would do, before anything is touched; and the text form of every patch.

use crate::cli::PlanArgs;
use crate::exit::{Failure, Outcome};
use mcr_image::Pid;
use mcr_image::proto::{Patch, Severity};
use serde::Serialize;
use std::fmt::Write as _;
use std::path::Path;

/// A patch for people: types first, then objects, then what needs attention.
pub fn print(p: &Patch) {
    let mut s = String::new();
    let _ = writeln!(s, "update    {} -> {}", p.old_path, p.new_path);
    let _ = writeln!(s, "builds    {} -> {}", hex(&p.old_build_id), hex(&p.new_build_id));
    if p.changes.is_empty() {
        let _ = writeln!(s, "types     no live type changes its layout");
    }
    for c in &p.changes {
        let mark = if c.silent { "  SILENT: same size, another meaning" } else { "" };
        let _ = writeln!(
            s,
            "type      {} {} ({} -> {} bytes), {} live{mark}",
            c.type_name, c.kind, c.old_size, c.new_size, c.live_objects
        );
        for d in &c.details {
            let _ = writeln!(s, "            {d}");
        }
    }
    if let Some(t) = &p.stats {
        let _ = writeln!(
            s,
            "globals   {} carried over, {} keep the new build's value, {} dropped",
            t.globals_carried, t.globals_native, t.globals_dropped
        );
        let _ = writeln!(
            s,
            "objects   {} typed, {} opaque; {} re-laid out in place, {} moved",
            t.objects_typed, t.objects_opaque, t.relaid, t.moved
        );
        let _ = writeln!(
            s,
            "pointers  {} into the program by type, {} found by scanning {}",
            t.relocs_typed,
            t.relocs_conservative,
            crate::report::size(t.bytes_scanned)
        );
    }
    if let Some(h) = &p.heap {
        let _ = writeln!(
            s,
            "heap      {}, {} chunks in use ({}), {} free, {} arenas",
            h.allocator,
            h.chunks_in_use,
            crate::report::size(h.bytes_in_use),
            h.chunks_free,
            h.arenas.len()
        );
    }
    let mut shown = 0;
    for severity in [Severity::Refusal, Severity::Warning, Severity::Info] {
        for f in p.findings.iter().filter(|f| f.severity() == severity) {
            shown += 1;
            if shown > 40 {
                continue;
            }
            let word = match severity {
                Severity::Refusal => "REFUSED",
                Severity::Warning => "warning",
                Severity::Info => "note",
            };
            let _ = writeln!(s, "{word:<9} {} [{}]", f.message, f.code);
            if !f.path.is_empty() {
                let _ = writeln!(s, "            at {}", f.path);
            }
            if !f.next_step.is_empty() {
                let _ = writeln!(s, "            {}", f.next_step);
            }
        }
    }
    if shown > 40 {
        let _ = writeln!(s, "          … and {} more findings (--json shows all)", shown - 40);
    }
    print!("{s}");
}

fn hex(b: &[u8]) -> String {
    if b.is_empty() {
        return "(no build-id)".into();
    }
    b.iter().map(|x| format!("{x:02x}")).collect()
}

#[derive(Serialize)]
struct Body {
    possible: bool,
    patch: Patch,
}

/// Runs the verb.
pub fn run(a: &PlanArgs) -> Outcome {
    let options = crate::update::options(&a.how)?;
    let patch = match a.target.parse::<i32>() {
        Ok(pid) => mcr_restore::transaction::plan(Pid(pid), &a.to, &options)
            .map_err(|e| crate::update::failure(&e, &format!("process {pid} was not changed and goes on")))?,
        Err(_) => {
            let image = crate::inspect::open(Path::new(&a.target))?;
            mcr_transform::transform_with_findings(&image, &a.to, &options)
                .map_err(|e| Failure::with_code(e.exit_code(), e))?
        }
    };
    let refusal = mcr_transform::plan::refusal(&patch);
    if a.json {
        crate::report::json("plan", &Body { possible: refusal.is_none(), patch })?;
    } else {
        print(&patch);
    }
    match refusal {
        None => Ok(()),
        Some(r) => Err(Failure::with_code(r.exit_code(), "plan: this update would be refused (see above)")),
    }
}
