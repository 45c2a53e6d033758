//! `mcr check [PID]`: what this kernel and these privileges allow, and whether a process can be handled.

use crate::cli::CheckArgs;
use crate::exit::{Failure, Outcome};
use crate::report::{self, Table};
use mcr_criu_lite::probe::{Probe, probes};
use mcr_image::ElfFile;
use serde::Serialize;

#[derive(Serialize)]
struct Body {
    machine: Vec<Probe>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    process: Vec<Point>,
    ok: bool,
}

/// One thing about a process.
#[derive(Serialize)]
struct Point {
    what: String,
    ok: bool,
    detail: String,
}

/// Runs the verb.
pub fn run(a: &CheckArgs) -> Outcome {
    let machine = probes();
    let process = a.pid.map_or(Ok(Vec::new()), process)?;
    let ok = machine.iter().all(|p| p.ok || !p.required) && process.iter().all(|p| p.ok);
    let body = Body { machine, process, ok };
    if a.json {
        report::json("check", &body)?;
    } else {
        print(&body);
    }
    if ok {
        Ok(())
    } else {
        Err(Failure::refused("check: not everything that is needed is there (see above)"))
    }
}

fn print(b: &Body) {
    let mark = |ok: bool, required: bool| match (ok, required) {
        (true, _) => "ok",
        (false, true) => "MISSING",
        (false, false) => "without",
    };
    let mut t = Table::new(&["", "WHAT", "FOUND", "NEEDED FOR"]);
    for p in &b.machine {
        t.row([mark(p.ok, p.required).into(), p.name.into(), p.detail.clone(), p.needed_for.into()]);
    }
    t.print();
    if !b.process.is_empty() {
        println!();
        let mut t = Table::new(&["", "PROCESS", "FOUND"]);
        for p in &b.process {
            t.row([mark(p.ok, true).into(), p.what.clone(), p.detail.clone()]);
        }
        t.print();
    }
}

fn process(pid: i32) -> Result<Vec<Point>, Failure> {
    let exe = format!("/proc/{pid}/exe");
    let path = std::fs::read_link(&exe).map_err(|e| {
        Failure::refused(format!("process {pid}: readlink {exe}: {e}\ncheck the pid with ps"))
    })?;
    let mut out = Vec::new();
    let mut point = |what: &str, r: Result<String, String>| {
        let ok = r.is_ok();
        out.push(Point { what: what.into(), ok, detail: r.unwrap_or_else(|e| e) });
    };
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let word = |key: &str| status.lines().find_map(|l| l.strip_prefix(key)).unwrap_or("").trim().to_owned();
    point(
        "traced by nobody",
        match word("TracerPid:").as_str() {
            "0" => Ok("free".into()),
            tracer => Err(format!("process {tracer} traces it; end that debugger first")),
        },
    );
    point("threads", Ok(word("Threads:")));
    match ElfFile::open(&exe) {
        Ok(elf) => {
            point(
                "program",
                elf.check_updatable().map(|()| path.display().to_string()).map_err(|e| e.to_string()),
            );
            point(
                "build-id",
                elf.build_id().map(|_| elf.build_id_hex()).ok_or_else(|| {
                    "none: link with --build-id, or images cannot be matched with their program".to_owned()
                }),
            );
        }
        Err(e) => point("program", Err(e.to_string())),
    }
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    point(
        "single process",
        if children.trim().is_empty() {
            Ok("no children".into())
        } else {
            Err(format!("it has children ({}): process trees come later", children.trim()))
        },
    );
    for e in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let link = std::fs::read_link(e.path()).unwrap_or_default();
        let link = link.to_string_lossy();
        let known = ["eventpoll", "eventfd", "timerfd", "signalfd"];
        if let Some(kind) = link.strip_prefix("anon_inode:")
            && !known.iter().any(|k| kind.contains(k))
        {
            let n = e.file_name().to_string_lossy().into_owned();
            point(&format!("descriptor {n}"), Err(format!("{link} cannot be carried yet")));
        }
    }
    Ok(out)
}
