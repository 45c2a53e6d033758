//! What belongs to the process as a whole: identity, credentials, limits, signal actions, the memory
//! descriptor, and the command line as the process itself sees it.

use super::{CollectError, Inside, View};
use mcr_image::{Addr, Memory, Tid, proto};
use std::collections::HashMap;

/// `/proc/PID/status` as a map.
fn status(view: &View<'_>) -> Result<HashMap<String, String>, CollectError> {
    let path = view.proc("status");
    let name = path.display().to_string();
    let text = std::fs::read(&path).map_err(view.io(&name, "read"))?;
    Ok(String::from_utf8_lossy(&text)
        .lines()
        .filter_map(|l| l.split_once(':'))
        .map(|(k, v)| (k.to_owned(), v.trim().to_owned()))
        .collect())
}

/// Fields of /proc/PID/stat behind the command name: `[0]` is field 3, the state (proc_pid_stat(5)).
fn stat(view: &View<'_>) -> Result<Vec<u64>, CollectError> {
    let path = view.proc("stat");
    let name = path.display().to_string();
    let text = std::fs::read(&path).map_err(view.io(&name, "read"))?;
    let text = String::from_utf8_lossy(&text);
    let rest = text.rsplit_once(") ").map_or("", |(_, r)| r);
    Ok(rest
        .split_ascii_whitespace()
        .map(|w| w.parse::<i64>().map_or_else(|_| w.parse().unwrap_or(0), |v| v as u64))
        .collect())
}

pub(super) fn collect(
    view: &View<'_>,
    inside: &mut Inside<'_>,
    threads: Vec<proto::Thread>,
) -> Result<proto::Process, CollectError> {
    let st = status(view)?;
    let f = stat(view)?;
    // Field n of proc_pid_stat(5) is f[n - 3].
    let field = |n: usize| f.get(n - 3).copied().unwrap_or(0);
    let word = |key: &str| st.get(key).map(String::as_str).unwrap_or_default();
    let ids =
        |key: &str| -> Vec<u32> { word(key).split_whitespace().filter_map(|w| w.parse().ok()).collect() };
    let cap = |key: &str| u64::from_str_radix(word(key), 16).unwrap_or(0);
    let (uid, gid) = (ids("Uid"), ids("Gid"));
    let at = |v: &[u32], n: usize| v.get(n).copied().unwrap_or(0);
    let text = |file: &str| view.link(file).map(|b| String::from_utf8_lossy(&b).into_owned());
    let read = |file: &str| std::fs::read(view.proc(file)).unwrap_or_default();
    let page = inside.page();
    let tid = Tid(view.pid.0);
    let prctl = |n: i32, arg: u64| (libc::SYS_prctl, [n as u64, arg, 0, 0, 0, 0]);
    let mut list = vec![
        prctl(libc::PR_GET_DUMPABLE, 0),
        prctl(libc::PR_GET_CHILD_SUBREAPER, page.0 + ACTIONS_LEN as u64),
        prctl(libc::PR_GET_SECUREBITS, 0),
        prctl(libc::PR_GET_THP_DISABLE, 0),
        // /proc shows only where it starts.
        (libc::SYS_brk, [0; 6]),
    ];
    let settings = list.len();
    // struct kernel_sigaction: handler, flags, restorer, mask.
    list.extend((1..=SIGNALS).map(|s| (libc::SYS_rt_sigaction, [s, 0, page.0 + (s - 1) * 32, 8, 0, 0])));
    let said = inside
        .calls(tid, &list)
        .map_err(|e| view.io("the process", "injected calls")(std::io::Error::other(e.to_string())))?;
    let answers = view
        .memory
        .bytes(page, ACTIONS_LEN + 4)
        .map_err(|e| view.io("memory", "read")(std::io::Error::other(e)))?;
    let subreaper = answers[ACTIONS_LEN..].iter().any(|b| *b != 0);
    let mm = proto::Mm {
        start_code: field(26),
        end_code: field(27),
        start_stack: field(28),
        start_data: field(45),
        end_data: field(46),
        start_brk: field(47),
        brk: said[4] as u64,
        arg_start: field(48),
        arg_end: field(49),
        env_start: field(50),
        env_end: field(51),
        auxv: read("auxv"),
        personality: u64::from_str_radix(String::from_utf8_lossy(&read("personality")).trim(), 16)
            .unwrap_or(0),
        thp_disabled: said[3] > 0,
    };
    let exe = text("exe")?;
    let (argv, envp) = vectors(view, &mm);
    Ok(proto::Process {
        pid: view.pid.0 as u32,
        ppid: field(4) as u32,
        pgid: field(5) as u32,
        sid: field(6) as u32,
        comm: String::from_utf8_lossy(read("comm").strip_suffix(b"\n").unwrap_or_default()).into_owned(),
        exe_path: exe.strip_suffix(" (deleted)").unwrap_or(&exe).to_owned(),
        exe_build_id: view.modules.exe().and_then(|m| m.build_id().map(<[u8]>::to_vec)).unwrap_or_default(),
        cwd: text("cwd")?,
        root: text("root")?,
        umask: u32::from_str_radix(word("Umask"), 8).unwrap_or(0o022),
        cmdline: read("cmdline"),
        environ: read("environ"),
        mm: Some(mm),
        creds: Some(proto::Creds {
            ruid: at(&uid, 0),
            euid: at(&uid, 1),
            suid: at(&uid, 2),
            fsuid: at(&uid, 3),
            rgid: at(&gid, 0),
            egid: at(&gid, 1),
            sgid: at(&gid, 2),
            fsgid: at(&gid, 3),
            groups: ids("Groups"),
            cap_inh: cap("CapInh"),
            cap_prm: cap("CapPrm"),
            cap_eff: cap("CapEff"),
            cap_bnd: cap("CapBnd"),
            cap_amb: cap("CapAmb"),
            securebits: said[2].max(0) as u32,
        }),
        rlimits: limits(&String::from_utf8_lossy(&read("limits"))),
        sigactions: actions(&said[settings..], &answers),
        no_new_privs: word("NoNewPrivs") == "1",
        child_subreaper: subreaper,
        dumpable: said[0].max(0) as u32,
        oom_score_adj: String::from_utf8_lossy(&read("oom_score_adj")).trim().parse().unwrap_or(0),
        threads,
        argv,
        envp,
        ..Default::default()
    })
}

/// Signals are 1 to 64.
const SIGNALS: u64 = 64;
/// Bytes that their actions take.
const ACTIONS_LEN: usize = SIGNALS as usize * 32;

/// Every signal whose action is not the default.
fn actions(results: &[i64], raw: &[u8]) -> Vec<proto::SigAction> {
    let mut out = Vec::new();
    for (i, r) in results.iter().enumerate() {
        let w = |n: usize| {
            let b = &raw[i * 32 + n * 8..i * 32 + n * 8 + 8];
            u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])
        };
        if *r == 0 && (w(0) != 0 || w(1) != 0) {
            out.push(proto::SigAction {
                signo: i as u32 + 1,
                handler: w(0),
                flags: w(1),
                restorer: w(2),
                mask: w(3),
            });
        }
    }
    out
}

/// /proc/PID/limits; its lines are in the order of the resource numbers but one (asm-generic/resource.h).
fn limits(text: &str) -> Vec<proto::Rlimit> {
    const NAMES: [&str; 16] = [
        "Max cpu time",
        "Max file size",
        "Max data size",
        "Max stack size",
        "Max core file size",
        "Max resident set",
        "Max processes",
        "Max open files",
        "Max locked memory",
        "Max address space",
        "Max file locks",
        "Max pending signals",
        "Max msgqueue size",
        "Max nice priority",
        "Max realtime priority",
        "Max realtime timeout",
    ];
    let value = |w: &str| {
        if w == "unlimited" { u64::MAX } else { w.parse().unwrap_or(u64::MAX) }
    };
    NAMES
        .iter()
        .enumerate()
        .filter_map(|(n, name)| {
            let mut w = text.lines().find_map(|l| l.strip_prefix(name))?.split_whitespace();
            Some(proto::Rlimit { resource: n as u32, soft: value(w.next()?), hard: value(w.next()?) })
        })
        .collect()
}

/// At most so many strings of a vector are believed.
const MAX_STRINGS: usize = 65536;

/// argv and the environment through the process's own vectors: argc lies at mm.start_stack, libc's `environ`
/// says where the environment is now. Both are right after setproctitle() overwrote the argument area.
fn vectors(view: &View<'_>, mm: &proto::Mm) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let stack = Addr(mm.start_stack);
    let argc = view.memory.u64(stack).unwrap_or(0).min(MAX_STRINGS as u64);
    let argv = strings(view.memory, stack.add(8), argc as usize);
    let environ = view.modules.libc().and_then(|m| m.symbol("environ").or_else(|| m.symbol("__environ")));
    let envp = environ.and_then(|a| view.memory.u64(a).ok()).map_or(stack.add(16 + argc * 8), Addr);
    (argv, if envp.0 == 0 { Vec::new() } else { strings(view.memory, envp, MAX_STRINGS) })
}

fn strings(memory: &dyn Memory, vector: Addr, max: usize) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for i in 0..max as u64 {
        match memory.u64(vector.add(i * 8)) {
            Ok(p) if p != 0 => match memory.cstr(Addr(p), 128 * 1024) {
                Ok(s) => out.push(s),
                Err(_) => break,
            },
            _ => break,
        }
    }
    out
}
