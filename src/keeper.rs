//! `mcr keeper`: the hidden verb that `mcr dump` starts to hold connections until they are fetched.

use crate::cli::KeeperArgs;
use crate::exit::{Failure, Outcome};

/// Runs the verb.
pub fn run(a: &KeeperArgs) -> Outcome {
    let args: Vec<_> = a.args.iter().map(|s| s.to_string_lossy().into_owned()).collect();
    match mcr_restore::keeper::keeper_main(&args) {
        0 => Ok(()),
        code => Err(Failure::with_code(code.clamp(1, 255) as u8, "keeper: ended with an error")),
    }
}
