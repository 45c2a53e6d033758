//! What the kernel keeps per process and per thread: session, memory layout, directories, handlers, limits,
//! credentials, threads and their registrations.

use super::RebuildError;
use super::batch::Batch;
use super::mapped::MappedFiles;
use super::objects::finding;
use super::remote::{BUILD_MASK, Inject, Remote};
use super::spawn::thread_args;
use mcr_image::proto;

/// SECBIT_NO_SETUID_FIXUP | SECBIT_KEEP_CAPS (include/uapi/linux/securebits.h).
const SECUREBITS_WHILE_SWITCHING: u64 = 0x4 | 0x10;
const PROCESS: &str = "process";

/// Session and process group. What cannot be joined becomes new, and is reported.
pub(super) fn session(leader: &mut Remote, p: &proto::Process) -> Result<Vec<proto::Finding>, RebuildError> {
    let mut findings = Vec::new();
    let pid = p.pid;
    let mine = nix::unistd::getsid(None).map_or(0, nix::unistd::Pid::as_raw) as u32;
    let inside =
        |call| move |source| RebuildError::Inside { object: "session".into(), call, source, next: "" };
    if p.sid == pid || p.sid != mine {
        leader.call(libc::SYS_setsid, &[]).map_err(inside("setsid"))?;
        if p.sid != pid {
            findings.push(finding(
                proto::Severity::Info,
                "new-session",
                format!("session {} is not ours to join: the process leads a session of its own now", p.sid),
                "",
            ));
        }
    } else if p.pgid == pid {
        leader.call(libc::SYS_setpgid, &[0, 0]).map_err(inside("setpgid"))?;
    } else if leader.call(libc::SYS_setpgid, &[0, u64::from(p.pgid)]).is_err() {
        leader.call(libc::SYS_setpgid, &[0, 0]).map_err(inside("setpgid"))?;
        findings.push(finding(
            proto::Severity::Info,
            "new-process-group",
            format!("process group {} is gone: the process leads one of its own now", p.pgid),
            "",
        ));
    }
    Ok(findings)
}

/// PR_SET_MM_MAP: where code, data, heap, stack, arguments and environment are, and /proc/PID/exe.
pub(super) fn memory_layout(
    leader: &mut Remote,
    p: &proto::Process,
    files: &MappedFiles,
) -> Result<(), RebuildError> {
    let Some(mm) = &p.mm else {
        return Err(RebuildError::Image("no memory layout (Mm)".to_owned()));
    };
    let mut batch = Batch::new(leader)?;
    let auxv = batch.data(&mm.auxv);
    let exe = files.exe.as_ref().map_or(u32::MAX, |f| f.raw() as u32);
    let mut map = Vec::with_capacity(104);
    for w in [
        mm.start_code,
        mm.end_code,
        mm.start_data,
        mm.end_data,
        mm.start_brk,
        mm.brk,
        mm.start_stack,
        mm.arg_start,
        mm.arg_end,
        mm.env_start,
        mm.env_end,
        auxv,
    ] {
        map.extend_from_slice(&w.to_le_bytes());
    }
    map.extend_from_slice(&(mm.auxv.len() as u32).to_le_bytes());
    map.extend_from_slice(&exe.to_le_bytes());
    let at = batch.data(&map);
    batch.add(
        "memory layout",
        "prctl PR_SET_MM_MAP",
        libc::SYS_prctl,
        &[35, 14, at, map.len() as u64, 0],
        "it needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN, and a program file that may be executed",
    )?;
    if mm.thp_disabled {
        batch.add("memory layout", "prctl PR_SET_THP_DISABLE", libc::SYS_prctl, &[41, 1, 0, 0, 0], "")?;
    }
    batch.run()
}

/// Directories, umask and name.
pub(super) fn surroundings(leader: &mut Remote, p: &proto::Process) -> Result<(), RebuildError> {
    let mut batch = Batch::new(leader)?;
    let cwd = batch.string(&p.cwd);
    batch.add(
        format!("working directory {}", p.cwd),
        "chdir",
        libc::SYS_chdir,
        &[cwd],
        "make the directory again, then restore",
    )?;
    if !p.root.is_empty() && p.root != "/" {
        let root = batch.string(&p.root);
        batch.add(format!("root directory {}", p.root), "chroot", libc::SYS_chroot, &[root], "")?;
    }
    batch.add(PROCESS, "umask", libc::SYS_umask, &[u64::from(p.umask)], "")?;
    if p.child_subreaper {
        batch.add(PROCESS, "prctl PR_SET_CHILD_SUBREAPER", libc::SYS_prctl, &[36, 1, 0, 0, 0], "")?;
    }
    batch.run()?;
    let path = format!("/proc/{}/oom_score_adj", p.pid);
    // Lowering it needs CAP_SYS_RESOURCE; the kernel's choice of a victim is no reason to fail.
    let _ = std::fs::write(path, p.oom_score_adj.to_string());
    Ok(())
}

/// Handlers. The new process has the engine's until now.
pub(super) fn handlers(leader: &mut Remote, p: &proto::Process) -> Result<(), RebuildError> {
    let mut batch = Batch::new(leader)?;
    for signo in 1..=64u32 {
        if signo == libc::SIGKILL as u32 || signo == libc::SIGSTOP as u32 {
            continue;
        }
        let a = p.sigactions.iter().find(|a| a.signo == signo).cloned().unwrap_or_default();
        let words = [a.handler, a.flags, a.restorer, a.mask];
        let at = batch.data(&words.map(u64::to_le_bytes).concat());
        let args = [u64::from(signo), at, 0, 8];
        batch.add(format!("handler of signal {signo}"), "rt_sigaction", libc::SYS_rt_sigaction, &args, "")?;
    }
    batch.run()
}

/// Limits, last of all that can run into them.
pub(crate) fn limits<I: Inject>(leader: &mut I, p: &proto::Process) -> Result<(), RebuildError> {
    let mut batch = Batch::new(leader)?;
    for l in &p.rlimits {
        let at = batch.data(&[l.soft.to_le_bytes(), l.hard.to_le_bytes()].concat());
        batch.add(
            format!("resource limit {} (soft {}, hard {})", l.resource, l.soft, l.hard),
            "prlimit64",
            libc::SYS_prlimit64,
            &[0, u64::from(l.resource), at, 0],
            "raising a hard limit needs CAP_SYS_RESOURCE: start mcr with at least the server's hard limits",
        )?;
    }
    batch.run()
}

/// Makes the other threads, each stopped before its first instruction.
pub(super) fn threads(leader: &mut Remote, p: &proto::Process) -> Result<Vec<Remote>, RebuildError> {
    let mut made: Vec<Remote> = Vec::new();
    for t in p.threads.iter().skip(1) {
        let object = || format!("thread {} ({})", t.tid, t.comm);
        let (at, _) = leader.scratch().map_err(RebuildError::call(object(), "scratch memory"))?;
        let tid_at = at.add(256);
        leader
            .poke(tid_at, &(t.tid as i32).to_le_bytes())
            .map_err(RebuildError::call(object(), "writing memory"))?;
        let new = leader.clone_thread(&thread_args(tid_at.0)).map_err(|source| RebuildError::Inside {
            object: object(),
            call: "clone3 with set_tid",
            source,
            next: "the tid must be free, and choosing it needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN",
        })?;
        new.set_sigmask(BUILD_MASK).map_err(RebuildError::call(object(), "PTRACE_SETSIGMASK"))?;
        made.push(new);
    }
    Ok(made)
}

/// What a thread registers with the kernel, its name and scheduling, and its pending signals.
pub(super) fn thread_state(
    remote: &mut Remote,
    p: &proto::Process,
    t: &proto::Thread,
    shared: bool,
) -> Result<Vec<proto::Finding>, RebuildError> {
    let object = format!("thread {} ({})", t.tid, t.comm);
    let mut batch = Batch::new(remote)?;
    let add = |b: &mut Batch<'_, Remote>, call, nr, args: &[u64]| b.add(object.as_str(), call, nr, args, "");
    let comm = batch.string(&t.comm);
    add(&mut batch, "prctl PR_SET_NAME", libc::SYS_prctl, &[15, comm, 0, 0, 0])?;
    if t.robust_list != 0 {
        add(
            &mut batch,
            "set_robust_list",
            libc::SYS_set_robust_list,
            &[t.robust_list, t.robust_list_len.max(24)],
        )?;
    }
    add(&mut batch, "set_tid_address", libc::SYS_set_tid_address, &[t.clear_child_tid])?;
    if let Some(r) = t.rseq.as_ref().filter(|r| r.addr != 0) {
        add(&mut batch, "rseq", libc::SYS_rseq, &[r.addr, u64::from(r.size), 0, u64::from(r.signature)])?;
    }
    let a = t.altstack.unwrap_or_default();
    // SS_ONSTACK (1) is a state, not a setting; without a size there is none (SS_DISABLE).
    let flags = if a.size == 0 { 2 } else { a.flags & !1 };
    let mut ss = [0u8; 24];
    ss[..8].copy_from_slice(&a.sp.to_le_bytes());
    ss[8..12].copy_from_slice(&flags.to_le_bytes());
    ss[16..].copy_from_slice(&a.size.to_le_bytes());
    let at = batch.data(&ss);
    add(&mut batch, "sigaltstack", libc::SYS_sigaltstack, &[at, 0])?;
    let prio = batch.data(&t.sched_priority.to_le_bytes());
    add(
        &mut batch,
        "sched_setscheduler",
        libc::SYS_sched_setscheduler,
        &[0, u64::from(t.sched_policy), prio],
    )?;
    add(&mut batch, "setpriority", libc::SYS_setpriority, &[0, 0, i64::from(t.nice) as u64])?;
    for s in &t.pending {
        let at = batch.data(&s.siginfo);
        let args = [u64::from(p.pid), u64::from(t.tid), signo(s), at];
        add(&mut batch, "rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, &args)?;
    }
    for s in p.shared_pending.iter().filter(|_| shared) {
        let at = batch.data(&s.siginfo);
        add(&mut batch, "rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, &[u64::from(p.pid), signo(s), at])?;
    }
    batch.run()?;
    let mut findings = Vec::new();
    if !t.cpu_affinity.is_empty() {
        let len = t.cpu_affinity.len() as u64;
        let r = remote.call_with(libc::SYS_sched_setaffinity, &[Some(0), Some(len), None], &t.cpu_affinity);
        if r.is_err() {
            let text = format!("{object}: none of the processors it was bound to is usable here");
            findings.push(finding(proto::Severity::Warning, "cpu-affinity", text, ""));
        }
    }
    Ok(findings)
}

/// Signal number of a raw siginfo.
fn signo(s: &proto::SigInfo) -> u64 {
    s.siginfo.get(..4).and_then(|b| b.try_into().ok()).map_or(0, |b| u64::from(u32::from_le_bytes(b)))
}

/// Credentials of one thread (the kernel keeps them per thread), capabilities with them, no_new_privs last.
pub(crate) fn credentials<I: Inject>(
    remote: &mut I,
    p: &proto::Process,
    leader: bool,
) -> Result<(), RebuildError> {
    let mut batch = Batch::new(remote)?;
    const NEXT: &str = "restore with at least the privileges that the server was started with";
    let add = |b: &mut Batch<'_, I>, call, nr, args: &[u64]| b.add("credentials", call, nr, args, NEXT);
    if let Some(c) = &p.creds {
        let prctl = libc::SYS_prctl;
        let groups: Vec<u8> = c.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
        let at = batch.data(&groups);
        add(&mut batch, "setgroups", libc::SYS_setgroups, &[c.groups.len() as u64, at])?;
        let ids = [c.rgid, c.egid, c.sgid].map(u64::from);
        add(&mut batch, "setresgid", libc::SYS_setresgid, &ids)?;
        add(&mut batch, "setfsgid", libc::SYS_setfsgid, &[u64::from(c.fsgid)])?;
        let have = own_bounding_set();
        for cap in (0..64).filter(|n| have >> n & 1 == 1 && c.cap_bnd >> n & 1 == 0) {
            add(&mut batch, "prctl PR_CAPBSET_DROP", prctl, &[24, cap, 0, 0, 0])?;
        }
        add(&mut batch, "prctl PR_SET_SECUREBITS", prctl, &[28, SECUREBITS_WHILE_SWITCHING, 0, 0, 0])?;
        let ids = [c.ruid, c.euid, c.suid].map(u64::from);
        add(&mut batch, "setresuid", libc::SYS_setresuid, &ids)?;
        add(&mut batch, "setfsuid", libc::SYS_setfsuid, &[u64::from(c.fsuid)])?;
        add(&mut batch, "prctl PR_SET_SECUREBITS", prctl, &[28, u64::from(c.securebits), 0, 0, 0])?;
        // Header: _LINUX_CAPABILITY_VERSION_3, this thread. Data: effective, permitted, inheritable, twice.
        let head = batch.data(&0x2008_0522u64.to_le_bytes());
        let mut data = Vec::with_capacity(24);
        for shift in [0, 32] {
            for set in [c.cap_eff, c.cap_prm, c.cap_inh] {
                data.extend_from_slice(&((set >> shift) as u32).to_le_bytes());
            }
        }
        let data = batch.data(&data);
        add(&mut batch, "capset", libc::SYS_capset, &[head, data])?;
        for cap in (0..64).filter(|n| c.cap_amb >> n & 1 == 1) {
            add(&mut batch, "prctl PR_CAP_AMBIENT_RAISE", prctl, &[47, 2, cap, 0, 0])?;
        }
    }
    if p.no_new_privs {
        add(&mut batch, "prctl PR_SET_NO_NEW_PRIVS", libc::SYS_prctl, &[38, 1, 0, 0, 0])?;
    }
    if leader {
        // 2 (suid_dumpable) can only come from the kernel itself.
        add(&mut batch, "prctl PR_SET_DUMPABLE", libc::SYS_prctl, &[4, u64::from(p.dumpable == 1), 0, 0, 0])?;
        if let Some(mm) = p.mm.as_ref().filter(|m| m.personality != 0) {
            add(&mut batch, "personality", libc::SYS_personality, &[mm.personality])?;
        }
    }
    batch.run()
}

fn own_bounding_set() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let hex = text.lines().find_map(|l| l.strip_prefix("CapBnd:"));
    hex.and_then(|h| u64::from_str_radix(h.trim(), 16).ok()).unwrap_or(0)
}

/// POSIX record locks belong to the process: it takes them itself.
pub(crate) fn posix_locks<I: Inject>(leader: &mut I, p: &proto::Process) -> Result<(), RebuildError> {
    let mut batch = Batch::new(leader)?;
    for fd in &p.fds {
        let Some(proto::fd::Object::File(f)) = &fd.object else {
            continue;
        };
        for lock in f.locks.iter().filter(|l| l.kind.eq_ignore_ascii_case("posix")) {
            let (start, len) = super::file::lock_range(lock);
            // struct flock: type, whence, start, length, pid.
            let mut b = [0u8; 32];
            b[..2].copy_from_slice(
                &(if lock.write { libc::F_WRLCK } else { libc::F_RDLCK } as i16).to_le_bytes(),
            );
            b[8..16].copy_from_slice(&start.to_le_bytes());
            b[16..24].copy_from_slice(&len.to_le_bytes());
            let at = batch.data(&b);
            batch.add(
                super::objects::name_of(fd),
                "fcntl F_SETLK",
                libc::SYS_fcntl,
                &[u64::from(fd.number), libc::F_SETLK as u64, at],
                "another process holds the lock now; end that process",
            )?;
        }
    }
    batch.run()
}
