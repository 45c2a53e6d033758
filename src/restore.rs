//! `mcr restore FILE`: a dump comes back as it was, an update image as the new version.

use crate::cli::RestoreArgs;
use crate::exit::{Failure, Outcome};
use crate::report;
use mcr_image::Image;
use mcr_image::proto::{Finding, Phase};
use mcr_restore::rebuild::{RebuildOptions, restore_image};
use serde::Serialize;

/// What `--json` and `--stats` say.
#[derive(Serialize)]
struct Body {
    pid: i32,
    image: String,
    updated: bool,
    frozen_us: u64,
    phases: Vec<Phase>,
    findings: Vec<Finding>,
}

/// Time in which nothing served: the sum of the phases in which the process was stopped.
pub fn frozen_us(phases: &[Phase]) -> u64 {
    phases.iter().filter(|p| p.frozen).map(|p| p.duration_us).sum()
}

/// Runs the verb.
pub fn run(a: &RestoreArgs) -> Outcome {
    let image = crate::inspect::open(&a.image)?;
    let options = RebuildOptions { drop_connections: a.drop_connections, ..RebuildOptions::default() };
    let (pid, phases, findings) = if image.has_patch() {
        update_image(a, &image)?
    } else {
        let done = restore_image(&image, &options)?;
        (done.pid.0, done.phases, done.findings)
    };
    if let Some(file) = &a.pidfile {
        std::fs::write(file, format!("{pid}\n"))
            .map_err(|e| Failure::refused(format!("process {pid} runs, but --pidfile {}: {e}", file.display())))?;
    }
    let body = Body {
        pid,
        image: a.image.display().to_string(),
        updated: image.has_patch(),
        frozen_us: frozen_us(&phases),
        phases,
        findings,
    };
    report::stats("restore", a.stats.as_deref(), &body)?;
    if a.json {
        return report::json("restore", &body);
    }
    report::waterfall("restore", &body.phases);
    report::findings(&body.findings);
    println!("{pid}");
    Ok(())
}

fn update_image(_: &RestoreArgs, _: &Image) -> Result<(i32, Vec<Phase>, Vec<Finding>), Failure> {
    Err(Failure::refused("not yet"))
}
