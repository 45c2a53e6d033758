//! The table of verbs and flags.

use crate::exit::Outcome;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Live update and checkpoint/restore for running Linux servers.
///
/// A server runs version N; mcr carries its state and its open connections into version N+1, by the two
/// builds' debug info alone. If the result cannot be proven right, mcr refuses and the old server goes on.
///
/// Exit codes: 0 done; 1 refused, old untouched; 2 usage; 3 failed and rolled back; 4 state lost;
/// 5 a type needs a rule.
#[derive(Parser)]
#[command(name = "mcr", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Write a quiescent process into an image file; ends it unless --leave-running
    Dump(DumpArgs),
    /// Rewrite an image for another build of the program, offline and unprivileged
    Transform(TransformArgs),
    /// Bring an image back to life: a dump as it was, an update image as the new version
    Restore(RestoreArgs),
    /// Dump, transform and restore in one live transaction, with rollback
    Update(UpdateArgs),
    /// Say what an update would do, without touching anything
    Plan(PlanArgs),
    /// Compare the types of two builds, the silent killers first
    Types(TypesArgs),
    /// Look into an image, offline
    Inspect(InspectArgs),
    /// Show each thread's stack, its blocking call, and whether it is quiescent
    Quiesce(QuiesceArgs),
    /// Show which updates a process has been through
    History(HistoryArgs),
    /// What this kernel and these privileges allow; with a pid, whether that process can be handled
    Check(CheckArgs),
    /// Update the bundled server twice, with connections open, and show it
    Demo(DemoArgs),
    /// Holds the connections of a dumped process until they are fetched (started by dump)
    #[command(hide = true)]
    Keeper(KeeperArgs),
}

/// `mcr dump`.
#[derive(Args)]
pub struct DumpArgs {
    /// Process to dump
    pub pid: i32,
    /// Image file; - is standard output
    #[arg(short, long)]
    pub output: PathBuf,
    /// Let the process run on afterwards
    #[arg(long)]
    pub leave_running: bool,
    /// Seconds to wait for every thread to become quiescent
    #[arg(long, default_value_t = 5.0)]
    pub timeout: f64,
    /// Record the connections for a restore on another machine: their peers hear nothing until then
    #[arg(long, conflicts_with = "leave_running")]
    pub tcp_repair: bool,
    /// Seconds for which the connections are kept open for a restore
    #[arg(long, default_value_t = 300)]
    pub keep: u64,
    /// zstd level of the memory; 0 stores it as it is, which is the fastest where the disk is
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(i32).range(0..=19))]
    pub compress: i32,
    /// Write all phases in microseconds to this file, as JSON
    #[arg(long)]
    pub stats: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `mcr transform`.
#[derive(Args)]
pub struct TransformArgs {
    /// Image that `mcr dump` wrote
    pub image: PathBuf,
    /// The new build
    #[arg(long = "to")]
    pub to: PathBuf,
    /// Update image to write
    #[arg(short, long)]
    pub output: PathBuf,
    #[command(flatten)]
    pub how: How,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// Flags of everything that compares two builds.
#[derive(Args, Clone)]
pub struct How {
    /// Directory with separate debug files (may be repeated)
    #[arg(long = "debug-dir")]
    pub debug_dirs: Vec<PathBuf>,
    /// Rules file (TOML)
    #[arg(long)]
    pub rules: Option<PathBuf>,
}

/// `mcr restore`.
#[derive(Args)]
pub struct RestoreArgs {
    /// Image or update image
    pub image: PathBuf,
    /// Write the pid to this file
    #[arg(long)]
    pub pidfile: Option<PathBuf>,
    /// Bring connections whose keeper is gone back as unconnected sockets, instead of refusing
    #[arg(long)]
    pub drop_connections: bool,
    /// Seconds for the new version to start up (update images)
    #[arg(long, default_value_t = 10.0)]
    pub timeout: f64,
    #[command(flatten)]
    pub how: How,
    /// Write all phases in microseconds to this file, as JSON
    #[arg(long)]
    pub stats: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `mcr update`.
#[derive(Args)]
pub struct UpdateArgs {
    /// Process to update
    pub pid: i32,
    /// The new build
    #[arg(long = "to")]
    pub to: PathBuf,
    /// Do all of it on a copy while the server runs on, and report
    #[arg(long)]
    pub dry_run: bool,
    /// Give the new version a process of its own instead of changing this one in place
    #[arg(long)]
    pub new_pid: bool,
    /// Seconds for quiescence, and for the new version to start up
    #[arg(long, default_value_t = 10.0)]
    pub timeout: f64,
    /// Afterwards watch the new version for S seconds: its end, threads that spin, and --health
    #[arg(long, value_name = "S", conflicts_with = "dry_run")]
    pub trial: Option<f64>,
    /// Command for `sh -c`, run again and again during the trial with MCR_PID set; 0 means healthy
    #[arg(long, value_name = "CMD", requires = "trial")]
    pub health: Option<String>,
    /// Seconds that one run of the health command may take
    #[arg(long, default_value_t = 5.0, requires = "health")]
    pub health_timeout: f64,
    /// If the trial fails, keep in this directory what is needed to say why: images of the server before the update
    /// and of the new version (where it still runs), and the report
    #[arg(long, value_name = "DIR", requires = "trial")]
    pub keep: Option<PathBuf>,
    #[command(flatten)]
    pub how: How,
    /// Write all phases in microseconds to this file, as JSON
    #[arg(long)]
    pub stats: Option<PathBuf>,
    /// Write the phases to this file for Chrome's trace viewer (chrome://tracing, ui.perfetto.dev)
    #[arg(long)]
    pub trace: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `mcr history`.
#[derive(Args)]
pub struct HistoryArgs {
    /// Process
    pub pid: i32,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `mcr plan`.
#[derive(Args)]
pub struct PlanArgs {
    /// A pid or an image file
    pub target: String,
    /// The new build
    #[arg(long = "to")]
    pub to: PathBuf,
    #[command(flatten)]
    pub how: How,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `mcr types`.
#[derive(Args)]
pub struct TypesArgs {
    /// The running build
    pub old: PathBuf,
    /// The build to update to
    pub new: PathBuf,
    #[command(flatten)]
    pub how: How,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `mcr inspect`.
#[derive(Args)]
pub struct InspectArgs {
    /// Image file
    pub image: PathBuf,
    /// The memory mappings
    #[arg(long)]
    pub maps: bool,
    /// The threads, their calls and stacks
    #[arg(long)]
    pub threads: bool,
    /// The file descriptors
    #[arg(long)]
    pub fds: bool,
    /// What an update image changes
    #[arg(long)]
    pub types: bool,
    /// Print a value, like a debugger: 'server->clients->head'
    #[arg(long, value_name = "EXPR")]
    pub object: Option<String>,
    /// Write an ELF core file that gdb opens
    #[arg(long, value_name = "FILE")]
    pub core: Option<PathBuf>,
    /// Directory with separate debug files (may be repeated)
    #[arg(long = "debug-dir")]
    pub debug_dirs: Vec<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `mcr quiesce`.
#[derive(Args)]
pub struct QuiesceArgs {
    /// Process to look at
    pub pid: i32,
    /// Seconds to wait for every thread to become quiescent
    #[arg(long, default_value_t = 5.0)]
    pub timeout: f64,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `mcr check`.
#[derive(Args)]
pub struct CheckArgs {
    /// Process to look at
    pub pid: Option<i32>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `mcr demo`.
#[derive(Args)]
pub struct DemoArgs {
    /// Directory for the builds and the images (default: a temporary one)
    #[arg(long)]
    pub dir: Option<PathBuf>,
}

/// `mcr keeper`.
#[derive(Args)]
pub struct KeeperArgs {
    /// What dump passes on
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<std::ffi::OsString>,
}

impl Cli {
    /// Runs the verb.
    pub fn run(&self) -> Outcome {
        match &self.verb {
            Verb::Dump(a) => crate::dump::run(a),
            Verb::Transform(a) => crate::transform::run(a),
            Verb::Update(a) => crate::update::run(a),
            Verb::Plan(a) => crate::plan::run(a),
            Verb::History(a) => crate::history::run(a),
            Verb::Quiesce(a) => crate::quiesce::run(a),
            Verb::Inspect(a) => crate::inspect::run(a),
            Verb::Restore(a) => crate::restore::run(a),
            Verb::Keeper(a) => crate::keeper::run(a),
            Verb::Check(a) => crate::check::run(a),
            Verb::Types(a) => crate::types::run(a),
            Verb::Demo(a) => crate::demo::run(a),
        }
    }
}
