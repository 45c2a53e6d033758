//! `mcr`: live update and checkpoint/restore for running Linux servers.
//!
//! One file a verb; `cli` is the table of flags; `report` holds the two ways to speak: for people
//! and, with `--json`, for programs.

mod check;
mod cli;
mod demo;
mod dump;
mod exit;
mod history;
mod inspect;
mod keeper;
mod plan;
mod quiesce;
mod report;
mod restore;
mod state;
mod transform;
mod trial;
mod types;
mod update;

use clap::Parser;

fn main() -> std::process::ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return std::process::ExitCode::from(if e.use_stderr() { exit::USAGE } else { exit::DONE });
        }
    };
    match cli.run() {
        Ok(()) => std::process::ExitCode::from(exit::DONE),
        Err(f) => {
            f.say();
            std::process::ExitCode::from(f.code)
        }
    }
}
