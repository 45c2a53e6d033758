//! `mcr restore FILE`: a dump comes back as it was, an update image as the new version.

use crate::cli::RestoreArgs;
use crate::exit::{Failure, Outcome};
use crate::report;
use mcr_image::Image;
use mcr_image::proto::{Finding, Phase};
use mcr_restore::rebuild::{RebuildOptions, restore_image};
use mcr_restore::transaction::{UpdateOptions, restore_update};
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
    // Nothing is made from an image of which a part is damaged, also if that part is not needed this time.
    image.verify().map_err(|e| named(a, Failure::from(e)))?;
    let options = RebuildOptions { drop_connections: a.drop_connections, ..RebuildOptions::default() };
    if image.has_patch() {
        return update_image(a, &image);
    }
    let done = restore_image(&image, &options).map_err(|e| named(a, Failure::from(e)))?;
    let (pid, phases, findings) = (done.pid.0, done.phases, done.findings);
    pidfile(a, pid)?;
    let body = Body {
        pid,
        image: a.image.display().to_string(),
        updated: false,
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

/// Boots the new version over the image's state.
fn update_image(a: &RestoreArgs, image: &Image) -> Outcome {
    let options = UpdateOptions {
        transform: crate::update::options(&a.how)?,
        boot_timeout: crate::update::limit(a.timeout),
        drop_connections: a.drop_connections,
        ..UpdateOptions::default()
    };
    let done = restore_update(image, &options).map_err(|e| {
        crate::update::failure(&e, "the image is as it was: restore it again, or the dump it was made from")
    })?;
    let body = crate::update::Body::new(done);
    pidfile(a, body.pid())?;
    report::stats("restore", a.stats.as_deref(), &body)?;
    if a.json {
        return report::json("restore", &body);
    }
    body.print("restore");
    println!("{}", body.pid());
    Ok(())
}

/// A failure that says which image it is about.
fn named(a: &RestoreArgs, f: Failure) -> Failure {
    let name = a.image.display().to_string();
    if f.message.contains(&name) { f } else { Failure::with_code(f.code, format!("{name}: {}", f.message)) }
}

fn pidfile(a: &RestoreArgs, pid: i32) -> Outcome {
    let Some(file) = &a.pidfile else { return Ok(()) };
    std::fs::write(file, format!("{pid}\n"))
        .map_err(|e| Failure::refused(format!("process {pid} runs, but --pidfile {}: {e}", file.display())))
}
