//! `mcr transform FILE --to NEW -o OUT`: an image for another build, offline and unprivileged.

use crate::cli::TransformArgs;
use crate::exit::{Failure, Outcome};
use crate::report;
use mcr_image::proto::Patch;
use serde::Serialize;

#[derive(Serialize)]
struct Body<'a> {
    output: String,
    patch: &'a Patch,
}

/// Runs the verb.
pub fn run(a: &TransformArgs) -> Outcome {
    let image = crate::inspect::open(&a.image)?;
    let options = crate::update::options(&a.how)?;
    let patch = mcr_transform::transform(&image, &a.to, &options)
        .map_err(|e| Failure::with_code(e.exit_code(), format!("{e}\nno image was written")))?;
    image.write_update(&a.output, &patch)?;
    if a.json {
        return report::json("transform", &Body { output: a.output.display().to_string(), patch: &patch });
    }
    crate::plan::print(&patch);
    println!("image     {}", a.output.display());
    Ok(())
}
