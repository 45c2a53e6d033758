//! `mcr types OLD NEW`: the types of two builds, the silent killers first.

use crate::cli::TypesArgs;
use crate::exit::Outcome;
use crate::report;
use mcr_image::ElfFile;
use mcr_transform::types::{LayoutDiff, TypeModel};

/// Runs the verb.
pub fn run(a: &TypesArgs) -> Outcome {
    let options = crate::update::options(&a.how)?;
    let dirs = options.debug_search();
    let read = |path: &std::path::Path| -> Result<TypeModel, crate::exit::Failure> {
        let elf = ElfFile::open_with_debug(path, &dirs)?;
        Ok(TypeModel::load(&elf, &dirs)?)
    };
    let (old, new) = (read(&a.old)?, read(&a.new)?);
    let diff = LayoutDiff::new(&old, &new, &options.rules);
    let report = diff.report();
    if a.json {
        return report::json("types", &report);
    }
    print!("{}", report.text());
    Ok(())
}
