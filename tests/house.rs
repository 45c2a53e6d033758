//! What the folders promise: each kind of kernel object has three files of one name, and the offline half does
//! not know the live half.

use crate::support::Check;
use crate::{Case, ensure};
use std::collections::BTreeSet;
use std::path::Path;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("house: every kernel object has its three files", three_files).needs_no_root(),
        Case::new("house: the offline crates do not depend on the live ones", offline).needs_no_root(),
    ]
}

fn stems(dir: &str, extension: &str, not: &[&str]) -> Result<BTreeSet<String>, String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
    let entries = std::fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    Ok(entries
        .filter_map(|e| e.ok().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|e| e == extension))
        .filter_map(|p| Some(p.file_stem()?.to_str()?.to_owned()))
        .filter(|s| !not.contains(&s.as_str()))
        .collect())
}

fn three_files() -> Check {
    let schema = stems("image/schema", "proto", &["container", "fd", "patch"])?;
    let collect = stems("criu-lite/src/collect", "rs", &["mod", "table", "unsupported"])?;
    let rebuild = stems("restore/src/rebuild", "rs", &["mod"])?;
    ensure!(schema.len() > 8, "only {} kinds of objects in the schema", schema.len());
    ensure!(schema == collect, "in image/schema: {schema:?}\nin criu-lite/src/collect: {collect:?}");
    let missing: Vec<_> = schema.difference(&rebuild).collect();
    ensure!(missing.is_empty(), "not in restore/src/rebuild: {missing:?}");
    Ok(())
}

fn offline() -> Check {
    for name in ["image", "plugins", "transform"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name).join("Cargo.toml");
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        for live in ["mcr-criu-lite", "mcr-restore"] {
            let depends = text.lines().any(|l| l.split(['.', ' ', '=']).next() == Some(live));
            ensure!(!depends, "{name} depends on {live}");
        }
    }
    Ok(())
}
