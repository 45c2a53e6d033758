//! Exit codes and failures: what went wrong, and in which state it leaves the server.

use std::fmt::Display;

/// All done.
pub const DONE: u8 = 0;
/// Refused or impossible; the old process is untouched.
pub const REFUSED: u8 = 1;
/// The command line was wrong.
pub const USAGE: u8 = 2;
// 3 (failed and rolled back), 4 (state lost) and 5 (a type needs a rule) come from the libraries' errors.

/// A failed verb.
#[derive(Debug)]
pub struct Failure {
    /// Exit code.
    pub code: u8,
    /// What to say: a line that names the object, the call and the reason, then what to do next.
    pub message: String,
}

impl Failure {
    /// Refused, nothing touched.
    pub fn refused(message: impl Display) -> Self {
        Self { code: REFUSED, message: message.to_string() }
    }

    /// With another exit code.
    pub fn with_code(code: u8, message: impl Display) -> Self {
        Self { code, message: message.to_string() }
    }

    /// To standard error.
    pub fn say(&self) {
        let mut lines = self.message.lines();
        eprintln!("mcr: {}", lines.next().unwrap_or("failed"));
        for l in lines {
            eprintln!("     {l}");
        }
    }
}

/// Any error whose text says enough, with the chain of its causes.
impl<E: std::error::Error> From<E> for Failure {
    fn from(e: E) -> Self {
        let mut message = e.to_string();
        let mut source = e.source();
        while let Some(s) = source {
            let text = s.to_string();
            if !message.contains(&text) {
                message = format!("{message}: {text}");
            }
            source = s.source();
        }
        Self::refused(message)
    }
}

/// What every verb returns.
pub type Outcome = Result<(), Failure>;
