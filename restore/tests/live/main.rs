//! Restores real processes. Needs root: choosing pids is privileged. This program is also the keeper that it
//! starts (`/proc/self/exe keeper …`), so it has a main of its own.
#![allow(missing_docs)]

use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;

mod keeping;
mod programs;
mod snapshot;
mod synthetic;
mod world;

#[path = "../support/mod.rs"]
mod support;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == mcr_restore::keeper::SUBCOMMAND) {
        return ExitCode::from(mcr_restore::keeper::keeper_main(&args[2..]) as u8);
    }
    if args.get(1).is_some_and(|a| a == synthetic::HALF) {
        return synthetic::half(&args[2]);
    }
    support::keep_to_ourselves();
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(keeping::trials());
    trials.extend(synthetic::trials());
    trials.extend(programs::trials());
    trials.extend(world::trials());
    let mut arguments = Arguments::from_args();
    // ptrace belongs to a thread, and pids are reused: one after the other.
    arguments.test_threads = Some(1);
    if !nix::unistd::geteuid().is_root() {
        trials = trials.into_iter().map(|t| t.with_ignored_flag(true)).collect();
        eprintln!("not root: everything is skipped");
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
