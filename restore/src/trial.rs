//! The trial after an update: a new version is watched for a while. It may die, spin, or fail the health command;
//! all of that is told for what it is. There is no way back from here: the new version has run.

use crate::sys;
use mcr_image::Pid;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use std::collections::BTreeMap;
use std::io::{PipeReader, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Between two runs of the health command.
const PAUSE: Duration = Duration::from_millis(500);
/// How much of what somebody wrote is told.
const TOLD: usize = 4096;
/// A thread that used less than this part of the time has not been spinning.
const BUSY_PERCENT: u64 = 10;

/// How to watch.
#[derive(Clone, Debug, Default)]
pub struct TrialOptions {
    /// For how long.
    pub window: Duration,
    /// A command for `sh -c`, run again and again with `MCR_PID` in its environment; 0 means healthy.
    pub health: Option<String>,
    /// How long one run of it may take.
    pub health_timeout: Duration,
}

/// What came of a trial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing happened; so often the health command said yes.
    Healthy {
        /// Runs of the health command.
        checks: u32,
    },
    /// The process ended.
    Died {
        /// Its wait status, if it was to be had.
        status: Option<i32>,
        /// When, after the begin of the trial.
        after: Duration,
        /// What it wrote to its standard error since the begin, or where that goes.
        stderr: String,
    },
    /// The health command failed or took too long. The process goes on.
    Unhealthy {
        /// The end of the command.
        how: String,
        /// What it wrote.
        output: String,
    },
    /// A thread has not come to a blocking call in the whole trial. The process goes on.
    Spinning {
        /// The thread.
        tid: i32,
        /// How much of a processor it used.
        percent: u64,
    },
    /// Somebody interrupted us. The process goes on.
    Interrupted,
}

impl Verdict {
    /// Nothing speaks against the new version.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        matches!(self, Self::Healthy { .. } | Self::Interrupted)
    }
    /// The process is no more.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        matches!(self, Self::Died { .. })
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Healthy { checks: 0 } => write!(f, "it runs"),
            Self::Healthy { checks } => write!(f, "it runs, and the health command said so {checks} times"),
            Self::Died { status, after, stderr } => {
                let how = status.map_or_else(
                    || "ended (its parent has collected the status)".to_owned(),
                    |s| ended(ExitStatus::from_raw(s)),
                );
                write!(f, "it {how} {:.1} s after the update; {stderr}", after.as_secs_f64())
            }
            Self::Unhealthy { how, output } if output.is_empty() => {
                write!(f, "the health command {how} and wrote nothing")
            }
            Self::Unhealthy { how, output } => write!(f, "the health command {how}: {output}"),
            Self::Spinning { tid, percent } => {
                write!(f, "thread {tid} reached no blocking call and used {percent} % of a processor")
            }
            Self::Interrupted => write!(f, "the trial was interrupted"),
        }
    }
}

/// The end of a process in words.
fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (_, Some(n)) => {
            let name = Signal::try_from(n).map_or("a real-time signal", Signal::as_str);
            format!("was killed by signal {n} ({name})")
        }
        _ => format!("ended ({status})"),
    }
}

/// A process under watch. It begins before the update, so that nothing is missed.
#[derive(Debug)]
pub struct Watch {
    pid: Pid,
    pidfd: OwnedFd,
    /// A file that its standard error goes to, from its end at the begin.
    stderr: Result<std::fs::File, PathBuf>,
}

impl Watch {
    /// Begins to watch a living process.
    pub fn begin(pid: Pid) -> std::io::Result<Self> {
        let pidfd = mcr_criu_lite::pidfd_open(pid.0)?;
        let path = PathBuf::from(format!("/proc/{pid}/fd/2"));
        // Only a regular file: to open anything else can have effects.
        let file = std::fs::metadata(&path).ok().filter(std::fs::Metadata::is_file);
        let mut file = file.and_then(|_| std::fs::File::open(&path).ok());
        if let Some(f) = &mut file {
            f.seek(SeekFrom::End(0))?;
        }
        let stderr = file.ok_or_else(|| std::fs::read_link(&path).unwrap_or_default());
        Ok(Self { pid, pidfd, stderr })
    }

    /// Which process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Watches, and runs the health command at the begin, again and again, and at the end.
    pub fn run(mut self, options: &TrialOptions) -> Verdict {
        let begin = Instant::now();
        let end = begin + options.window;
        let threads = self.threads();
        let mut checks = 0;
        loop {
            // The last one is after the window.
            let last = Instant::now() >= end;
            if let Some(command) = &options.health {
                match self.check(command, options.health_timeout) {
                    Ok(true) => checks += 1,
                    Ok(false) => return self.died(begin),
                    Err(_) if self.is_dead(Duration::ZERO) => return self.died(begin),
                    Err(v) => return v,
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            let turn = if options.health.is_some() { left.min(PAUSE) } else { left };
            if self.is_dead(turn) {
                return self.died(begin);
            }
            if mcr_criu_lite::interrupted() {
                return Verdict::Interrupted;
            }
            if last || (options.health.is_none() && Instant::now() >= end) {
                break;
            }
        }
        let spins = || self.spinning(&threads, begin.elapsed());
        let spinning = if checks == 0 { spins() } else { None };
        spinning.unwrap_or(Verdict::Healthy { checks })
    }

    /// Waits for its end. A signal for us ends the wait, too.
    fn is_dead(&self, limit: Duration) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        // Rounded up: a wait of less than a millisecond is none.
        let ms = PollTimeout::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
        poll(&mut fds, ms).is_ok_and(|n| n > 0)
    }

    fn died(&mut self, begin: Instant) -> Verdict {
        let after = begin.elapsed();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit_once(") ").map_or("", |s| s.1).split_whitespace().collect();
        // proc_pid_stat(5): the state, and the wait status. A parent that was quicker leaves it to the pidfd.
        let zombie = fields.first() == Some(&"Z");
        let status = fields.get(52 - 3).filter(|_| zombie).and_then(|s| s.parse().ok());
        let status = status.or_else(|| sys::pidfd_exit_status(self.pidfd.as_fd()));
        let stderr = match &mut self.stderr {
            Ok(file) => {
                let mut text = Vec::new();
                match file.read_to_end(&mut text) {
                    Ok(0) => "it wrote nothing to its standard error".to_owned(),
                    Ok(_) => format!("it wrote: {}", tail(&text)),
                    Err(e) => format!("its standard error cannot be read: {e}"),
                }
            }
            Err(to) => format!("its standard error goes to {}", to.display()),
        };
        Verdict::Died { status, after, stderr }
    }

    /// One run of the health command: whether the process lived to its end.
    fn check(&self, command: &str, limit: Duration) -> Result<bool, Verdict> {
        let unhealthy = |how: String, output: String| Verdict::Unhealthy { how, output };
        let io = |e: std::io::Error| unhealthy(format!("could not be run: {e}"), String::new());
        let (said, out) = std::io::pipe().map_err(io)?;
        let mut child = Command::new("sh")
            .args(["-c", command])
            .env("MCR_PID", self.pid.to_string())
            .stdin(Stdio::null())
            .stdout(out.try_clone().map_err(io)?)
            .stderr(out)
            .process_group(0)
            .spawn()
            .map_err(io)?;
        let output = Output::of(said);
        let id = nix::unistd::Pid::from_raw(child.id() as i32);
        let ended_in_time = mcr_criu_lite::pidfd_open(id.as_raw()).map_err(|e| io(e.into())).and_then(|fd| {
            let end = Instant::now() + limit;
            loop {
                let left = end.saturating_duration_since(Instant::now());
                let mut fds = [
                    PollFd::new(fd.as_fd(), PollFlags::POLLIN),
                    PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN),
                ];
                let ms = PollTimeout::try_from(left.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX);
                match poll(&mut fds, ms) {
                    Ok(0) => return Ok(Some(false)),
                    Ok(_) if fds[1].any() == Some(true) => return Ok(None),
                    Ok(_) => return Ok(Some(true)),
                    Err(Errno::EINTR) if !mcr_criu_lite::interrupted() => {}
                    Err(Errno::EINTR) => return Err(Verdict::Interrupted),
                    Err(e) => return Err(io(e.into())),
                }
            }
        });
        if !matches!(ended_in_time, Ok(Some(true))) {
            // The shell and what it has started.
            let _ = kill(nix::unistd::Pid::from_raw(-id.as_raw()), Signal::SIGKILL);
        }
        let status = child.wait().map_err(io)?;
        match ended_in_time? {
            None => Ok(false),
            Some(false) => {
                let how = format!("did not end within {:.1} s", limit.as_secs_f64());
                Err(unhealthy(how, output.told()))
            }
            Some(true) if status.success() => Ok(true),
            Some(true) => Err(unhealthy(ended(status), output.told())),
        }
    }

    /// Of every thread: processor time in ticks, and how often it gave the processor up.
    fn threads(&self) -> BTreeMap<i32, (u64, u64)> {
        let tids = mcr_criu_lite::tids(self.pid).unwrap_or_default();
        tids.iter().filter_map(|t| Some((t.0, self.thread(t.0)?))).collect()
    }

    fn thread(&self, tid: i32) -> Option<(u64, u64)> {
        let read = |f: &str| std::fs::read_to_string(format!("/proc/{}/task/{tid}/{f}", self.pid)).ok();
        let stat = read("stat")?;
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split_whitespace().collect();
        let ticks = fields.get(14 - 3)?.parse::<u64>().ok()? + fields.get(15 - 3)?.parse::<u64>().ok()?;
        let status = read("status")?;
        let switches = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"))?;
        Some((ticks, switches.trim().parse().ok()?))
    }

    fn spinning(&self, before: &BTreeMap<i32, (u64, u64)>, time: Duration) -> Option<Verdict> {
        let hz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??.unsigned_abs();
        let all = time.as_millis() as u64 * hz / 1000;
        before.iter().find_map(|(&tid, &(ticks, switches))| {
            let (now, s) = self.thread(tid)?;
            let percent = (now - ticks) * 100 / all.max(1);
            (s == switches && percent >= BUSY_PERCENT).then_some(Verdict::Spinning { tid, percent })
        })
    }
}

/// The end of a text that somebody wrote.
fn tail(text: &[u8]) -> String {
    String::from_utf8_lossy(&text[text.len().saturating_sub(TOLD)..]).trim().to_owned()
}

/// What a command writes, read as it comes so that it is not held up.
struct Output(mpsc::Receiver<Vec<u8>>);

impl Output {
    fn of(mut from: PipeReader) -> Self {
        let (to, all) = mpsc::channel();
        std::thread::spawn(move || {
            let (mut text, mut piece) = (Vec::new(), [0; 4096]);
            while let Ok(n @ 1..) = from.read(&mut piece) {
                text.extend_from_slice(&piece[..n]);
                text.drain(..text.len().saturating_sub(TOLD));
                if to.send(text.clone()).is_err() {
                    break;
                }
            }
        });
        Self(all)
    }

    /// All of it; where somebody whom the command has left behind holds the pipe open, what comes in a second.
    fn told(self) -> String {
        let (mut last, end) = (Vec::new(), Instant::now() + Duration::from_secs(1));
        while let Ok(t) = self.0.recv_timeout(end.saturating_duration_since(Instant::now())) {
            last = t;
        }
        tail(&last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(program: &str, health: Option<&str>, ms: u64) -> Verdict {
        let mut child = Command::new("sh").args(["-c", program]).spawn().unwrap();
        let watch = Watch::begin(Pid(child.id() as i32)).unwrap();
        let v = watch.run(&TrialOptions {
            window: Duration::from_millis(ms),
            health: health.map(str::to_owned),
            health_timeout: Duration::from_millis(300),
        });
        let _ = child.kill();
        child.wait().unwrap();
        v
    }

    #[test]
    fn an_end_is_told_with_its_status() {
        let status = |v: Verdict| match v {
            Verdict::Died { status, .. } => status,
            v => panic!("{v}"),
        };
        assert_eq!(status(trial("exit 7", None, 60_000)), Some(7 << 8));
        assert_eq!(status(trial("kill -SEGV $$", None, 60_000)).map(|s| s & 0x7f), Some(libc::SIGSEGV));
        assert_eq!(status(trial("kill -9 $$", Some("true"), 60_000)), Some(9));
    }

    #[test]
    fn the_health_command_decides() {
        assert!(matches!(
            trial("exec sleep 60", Some("kill -0 $MCR_PID"), 50),
            Verdict::Healthy { checks: 2.. }
        ));
        let v = trial("exec sleep 60", Some("echo no good; exit 3"), 60_000);
        assert_eq!(v.to_string(), "the health command exited with status 3: no good");
        let v = trial("exec sleep 60", Some("echo waiting; sleep 60"), 60_000);
        assert_eq!(v.to_string(), "the health command did not end within 0.3 s: waiting");
    }

    #[test]
    fn a_thread_that_blocks_nowhere_is_seen() {
        assert!(matches!(trial("exec sleep 60", None, 50), Verdict::Healthy { checks: 0 }));
        assert!(matches!(trial("while :; do :; done", None, 1000), Verdict::Spinning { .. }));
    }
}
