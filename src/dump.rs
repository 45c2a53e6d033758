//! `mcr dump PID -o FILE`: a quiescent process into one image file.

use crate::cli::DumpArgs;
use crate::exit::{Failure, Outcome};
use crate::report::{self, size};
use mcr_criu_lite::collect::Collected;
use mcr_criu_lite::dump::{DumpOptions, Kept, dump};
use mcr_image::Pid;
use mcr_image::proto::fd::Object;
use mcr_restore::keeper::{self, Keeper, KeeperOptions};
use mcr_restore::portable;
use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Runs the verb.
pub fn run(a: &DumpArgs) -> Outcome {
    if a.pid == std::process::id() as i32 {
        return Err(Failure::refused(format!(
            "{} is mcr itself: it cannot dump itself\ngive the server's pid",
            a.pid
        )));
    }
    if a.tcp_repair && a.output.as_os_str() == "-" {
        return Err(Failure::refused(
            "--tcp-repair writes the image twice: it needs a file, not standard output\ngive -o FILE",
        ));
    }
    let options = DumpOptions {
        leave_running: a.leave_running,
        timeout: Duration::from_secs_f64(a.timeout.clamp(0.01, 3600.0)),
        level: a.compress,
    };
    let mut keeper = None;
    let mut hook = |image_id: &str, all: &mut Collected| {
        if a.leave_running {
            // The process itself keeps its connections.
            return Ok(Kept::default());
        }
        if a.tcp_repair {
            portable::check(&all.process).map_err(|e| e.to_string())?;
        }
        keep(image_id, all, a.keep, &mut keeper)
    };
    let done = dump(Pid(a.pid), &a.output, &options, &mut hook);
    let done = match done {
        Ok(d) => d,
        Err(e) => {
            if let Some(k) = keeper {
                k.abandon();
            }
            let f = Failure::from(e);
            let text = f.message;
            let name = a.output.display().to_string();
            let text = if text.contains(&name) { text } else { format!("{text}\n(dumping to {name})") };
            return Err(Failure::with_code(f.code, text));
        }
    };
    let exported = if a.tcp_repair { Some(export(a)?) } else { None };
    report::stats("dump", a.stats.as_deref(), &done)?;
    let to_stdout = a.output.as_os_str() == "-";
    if a.json && !to_stdout {
        return report::json("dump", &done);
    }
    report::waterfall("dump", &done.phases);
    if !to_stdout {
        println!("{}: {}, {} pages", a.output.display(), size(done.image_bytes), done.pages);
        if let Some(x) = &exported {
            println!(
                "{} connections recorded ({} queued): mcr restore works on another machine that has their \
                 addresses; here until the keeper ends, in {} s",
                x.connections,
                size(x.queued_bytes),
                a.keep
            );
            if x.not_accepted > 0 {
                println!("{} connections that the server had not accepted yet will end", x.not_accepted);
            }
        } else if keeper.is_some() {
            println!("its connections are kept open for {} s: mcr restore {}", a.keep, a.output.display());
        }
    }
    Ok(())
}

/// The connections' records, after the process has ended.
fn export(a: &DumpArgs) -> Result<portable::Exported, Failure> {
    portable::export(&a.output).map_err(|e| {
        let name = a.output.display();
        Failure::with_code(
            3,
            format!(
                "{e}\n{name} is complete without the connections' records: mcr restore {name} on this machine, \
                 within {} s",
                a.keep
            ),
        )
    })
}

/// Hands the sockets to a keeper.
fn keep(
    image_id: &str,
    all: &mut Collected,
    seconds: u64,
    slot: &mut Option<Keeper>,
) -> Result<Kept, String> {
    let mut kept = Vec::new();
    let mut seen = BTreeSet::new();
    for fd in &mut all.process.fds {
        let ino = match &mut fd.object {
            Some(Object::Tcp(s)) => {
                s.kept = true;
                s.ino
            }
            Some(Object::Udp(s)) => {
                s.kept = true;
                s.ino
            }
            Some(Object::Unix(s)) => {
                s.kept = true;
                s.ino
            }
            // Its other end may be in another process.
            Some(Object::Pipe(p)) => p.ino,
            _ => continue,
        };
        if !seen.insert(fd.ofd) {
            continue;
        }
        let file = all.fds.get(&fd.number).ok_or_else(|| format!("descriptor {} is gone", fd.number))?;
        let file = file.try_clone().map_err(|e| format!("descriptor {}: dup: {e}", fd.number))?;
        kept.push(keeper::Kept { ofd: fd.ofd, ino, fd: file });
    }
    if kept.is_empty() {
        return Ok(Kept::default());
    }
    let options = KeeperOptions { deadline: Duration::from_secs(seconds), ..KeeperOptions::default() };
    let started = Keeper::start(image_id, kept, &options).map_err(|e| e.to_string())?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let result = Kept { socket: started.name().to_owned(), deadline_unix_s: now + seconds };
    *slot = Some(started);
    Ok(result)
}
