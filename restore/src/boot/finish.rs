//! From a finished start-up to the booted host as `link` wants it: every thread just before its blocking
//! call, and the descriptors matched.

use super::error::{BootError, Result};
use super::gate::kind_of;
use super::host::{Host, finding};
use super::ptrace::{self, Stop};
use super::run::{Rest, Run};
use super::{BootOutcome, BootSpec, ThreadKernel};
use crate::link::{BootEpoll, BootFrame, BootModule, Booted, FdMatch, NewThread, Span};
use mcr_criu_lite::procfs::maps::MapsLine;
use mcr_image::Module;
use mcr_image::unwind::Frame;
use mcr_image::{Addr, Fd, Regs, Tid, proto};
use std::time::{Duration, Instant};

/// How long a sleeping thread may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(2);

pub(super) fn finish(host: &Host, spec: &BootSpec<'_>, mut run: Run<'_>) -> Result<BootOutcome> {
    let mut threads = Vec::new();
    let rests = std::mem::take(&mut run.threads);
    for rest in &rests {
        normalise(host, rest)?;
    }
    // Places kept for libraries that the new version does not load.
    let leftovers = host.maps()?;
    for m in leftovers.iter().filter(|m| m.prot == 0 && m.ino == 0 && covers(&run.loaded.reserved, m)) {
        let args = [m.start.0, m.end.since(m.start)];
        host.call(Tid(host.pid.0), "munmap", libc::SYS_munmap, &args)?;
    }
    let maps = host.maps()?;
    run.stacks.stale();
    for rest in &rests {
        threads.push(new_thread(host, spec, &mut run, rest, &maps)?);
    }
    let kernel = rests.iter().map(|r| thread_kernel(host, r.tid)).collect::<Result<Vec<_>>>()?;
    let output = run.gate.output_text();
    let (fds, new_only_fds, epolls) = settle(host, &mut run)?;
    let modules = run.stacks.modules(host, spec)?.clone();
    let retained = clip(&run.loaded.retained, &maps);
    let native = native(&maps, &retained, &spec.reserve, host.scratch);
    for t in threads.iter().filter(|t| t.old_tid.is_none()) {
        run.gate.findings.push(finding(
            "thread-added",
            proto::Severity::Info,
            format!("the new version has a thread more: {}", t.signature.join(" < ")),
            "",
        ));
    }
    let pid_files = run.gate.pid_files.iter().map(|(path, _)| path.clone()).collect();
    // What the start-up left alone and old ignores is ignored still, as after execve(2).
    let mut sigactions = run.gate.sigactions.clone();
    for a in spec.old.sigactions.iter().filter(|a| a.handler == 1) {
        sigactions.entry(a.signo).or_insert_with(|| *a);
    }
    let sigactions = sigactions.into_values().collect();
    let timers = std::mem::take(&mut run.gate.timers);
    let new_itimers = std::mem::take(&mut run.gate.new_itimers);
    let booted = Booted {
        pid: host.pid,
        new_path: spec.new_path.clone(),
        new_base: run.loaded.new_base,
        modules: modules.modules().iter().map(|m| module(m, spec)).collect(),
        vmas: host.vmas()?,
        native,
        retained,
        threads,
        fds,
        new_only_fds,
        epolls,
        sigactions,
        timers,
        new_itimers,
        brk: Addr(spec.old.mm.as_ref().map_or(0, |m| m.brk)),
        stack: Some(run.loaded.stack),
        entry_stack: run.loaded.entry_stack,
        in_place: false,
        findings: run.gate.findings,
    };
    let mm = run.loaded.mm;
    Ok(BootOutcome { booted, modules, output, pid_files, kernel, mm, phases: Vec::new() })
}

/// Makes a resting thread stand just before its `syscall` instruction, in a stop where calls can be made.
fn normalise(host: &Host, rest: &Rest) -> Result<()> {
    let tid = rest.tid;
    let mask = ptrace::sigmask(tid).unwrap_or(0);
    if rest.at_entry {
        let r = ptrace::regs(tid)?;
        ptrace::set_regs(tid, &Regs { orig_rax: u64::MAX, ..r })?;
        ptrace::set_sigmask(tid, u64::MAX)?;
        host.to_syscall_stop(tid, "skipping a blocking call")?;
        ptrace::set_sigmask(tid, mask)?;
    } else {
        ptrace::interrupt(tid)?;
        match host.waiter.one(tid, Instant::now() + STOP_LIMIT) {
            Ok(Some(Stop::Syscall | Stop::Parked)) => {}
            other => {
                return Err(BootError::Unsupported {
                    what: format!("thread {tid} of the new version did not stop in its call ({other:?})"),
                    next_step: "try again".into(),
                });
            }
        }
        let r = ptrace::regs(tid)?;
        // EINTR, ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK
        if !matches!(r.rax as i64, -4 | -512 | -513 | -514 | -516) {
            return Err(BootError::Unsupported {
                what: format!("thread {tid} of the new version went on while it was being stopped"),
                next_step: "try again".into(),
            });
        }
    }
    let r = ptrace::regs(tid)?;
    let r = Regs { rax: rest.call.nr as u64, rip: r.rip - 2, orig_rax: u64::MAX, ..r };
    ptrace::set_regs(tid, &r)?;
    Ok(())
}

fn new_thread(
    host: &Host,
    spec: &BootSpec<'_>,
    run: &mut Run<'_>,
    rest: &Rest,
    maps: &[MapsLine],
) -> Result<NewThread> {
    let regs = ptrace::regs(rest.tid)?;
    let stack = run.stacks.unwind(host, spec, &regs)?;
    let holds = |m: &&MapsLine| m.start.0 <= regs.rsp && regs.rsp < m.end.0;
    let fs_base = Addr(regs.fs_base);
    let block = super::exec::pthread_block(&host.mem, fs_base, Addr(regs.rsp));
    let mapping = maps.iter().find(holds).map(|m| Span::new(m.start, m.end));
    let old = rest.old.and_then(|i| spec.old.threads.get(i));
    Ok(NewThread {
        tid: rest.tid,
        regs,
        signature: stack.signature(),
        frames: stack.frames.iter().map(frame).collect(),
        old_tid: old.map(|t| Tid(t.tid as i32)),
        fs_base,
        stack: block.or(mapping),
        syscall: rest.call.nr,
        args: rest.call.args,
        altstack: altstack(host, rest.tid)?,
        sigmask: ptrace::sigmask(rest.tid)?,
    })
}

fn thread_kernel(host: &Host, tid: Tid) -> Result<ThreadKernel> {
    let at = host.stage(0, &[0; 24])?;
    host.call(tid, "prctl(PR_GET_TID_ADDRESS)", libc::SYS_prctl, &[40, at])?;
    host.call(tid, "get_robust_list", libc::SYS_get_robust_list, &[0, at + 8, at + 16])?;
    let b = mcr_image::Memory::bytes(&host.mem, Addr(at), 24)?;
    let w = |i: usize| b[i..i + 8].try_into().map(u64::from_le_bytes).unwrap_or(0);
    Ok(ThreadKernel {
        tid,
        robust_list: (w(8), w(16)),
        rseq: ptrace::rseq(tid)?,
        tid_address: Addr(w(0)),
        xstate: ptrace::xstate(tid)?,
    })
}

fn altstack(host: &Host, tid: Tid) -> Result<proto::AltStack> {
    let at = host.stage(0, &[0; 24])?;
    host.call(tid, "sigaltstack", libc::SYS_sigaltstack, &[0, at])?;
    let mut b = [0u8; 24];
    mcr_image::Memory::read(&host.mem, Addr(at), &mut b)?;
    let w = |i: usize| b[i..i + 8].try_into().map(u64::from_le_bytes).unwrap_or(0);
    let flags = w(8) as u32;
    Ok(proto::AltStack { sp: w(0), flags, size: w(16) })
}

fn frame(f: &Frame) -> BootFrame {
    BootFrame {
        pc: f.pc,
        cfa: f.cfa,
        regs: f.regs,
        saved_at: f.saved_at,
        module: f.module.as_ref().map(|m| m.path.clone()).unwrap_or_default(),
        module_base: f.module.as_ref().map(|m| m.bias).unwrap_or_default(),
        function: f.function.clone(),
        function_link_addr: f.function_link_addr.map_or(0, |a| a.0),
        offset: f.offset,
        in_program: f.in_program(),
    }
}

fn module(m: &Module, spec: &BootSpec<'_>) -> BootModule {
    let same =
        spec.old_modules.modules().iter().any(|o| {
            !o.is_exe() && o.build_id().is_some() && o.build_id() == m.build_id() && o.bias == m.bias
        });
    BootModule {
        path: m.path.clone().into(),
        base: m.bias,
        build_id: m.build_id().unwrap_or_default().to_vec(),
        start: m.start,
        end: m.end,
        is_exe: m.is_exe(),
        is_interp: m.is_interp(),
        same_as_old: same,
    }
}

type Descriptors = (Vec<FdMatch>, Vec<(Fd, String)>, Vec<BootEpoll>);

/// The descriptors at the end of the start-up against old's.
fn settle(host: &Host, run: &mut Run<'_>) -> Result<Descriptors> {
    let table: Vec<_> = host.fd_numbers()?.into_iter().filter_map(|n| Some((n, kind_of(host, n)?))).collect();
    let kinds: Vec<_> = table.iter().map(|(n, (k, _))| (*n, k.clone())).collect();
    let link = |n: i32| table.iter().find(|t| t.0 == n).map(|t| t.1.1.clone()).unwrap_or_default();
    let settled = run.gate.fds.settle(&kinds);
    let what = |n: i32| run.gate.fds.old.get(&n).map(|o| o.what.clone()).unwrap_or_default();
    if let Some(&n) = settled.conflicts.first() {
        return Err(BootError::Unsupported {
            what: format!(
                "I2: descriptor {n} is {} in the new version and {} in the old one",
                link(n),
                what(n)
            ),
            next_step: "start the new version with the old one's arguments and environment".into(),
        });
    }
    for &n in &settled.unclaimed {
        run.gate.findings.push(finding(
            "listener-unclaimed",
            proto::Severity::Warning,
            format!("the new version did not bind {}; the old socket stays open as descriptor {n}", what(n)),
            "",
        ));
    }
    let is_epoll = |n: i32| link(n) == "anon_inode:[eventpoll]";
    let fds: Vec<FdMatch> = settled
        .matched
        .iter()
        .map(|&(new, old)| FdMatch {
            new_fd: Fd(new),
            old_fd: Fd(old),
            what: what(old),
            old_object: !is_epoll(new),
        })
        .collect();
    let mut epolls = Vec::new();
    for (n, _) in table.iter().filter(|t| is_epoll(t.0)) {
        let old_fd = settled.matched.iter().find(|m| m.0 == *n).map(|m| Fd(m.1));
        epolls.push(BootEpoll { fd: Fd(*n), old_fd, watches: host.epoll_watches(*n)? });
    }
    let new_only = settled.new_only.iter().map(|&n| (Fd(n), link(n))).collect();
    Ok((fds, new_only, epolls))
}

fn covers(spans: &[Span], m: &MapsLine) -> bool {
    spans.iter().any(|s| m.start >= s.start && m.end <= s.end)
}

/// The retained ranges that are still there.
fn clip(retained: &[Span], maps: &[MapsLine]) -> Vec<Span> {
    let mut out: Vec<Span> = Vec::new();
    for r in retained {
        for m in maps.iter().filter(|m| m.start < r.end && m.end > r.start) {
            let s = Span::new(m.start.max(r.start), m.end.min(r.end));
            match out.last_mut() {
                Some(l) if l.end == s.start => l.end = s.end,
                _ => out.push(s),
            }
        }
    }
    out
}

/// Everything else that the process has mapped, but the kernel's pages and ours.
fn native(maps: &[MapsLine], retained: &[Span], reserve: &[Span], scratch: Addr) -> Vec<Span> {
    let mut cut: Vec<Span> = retained.iter().chain(reserve).copied().collect();
    cut.push(Span::new(scratch, scratch.add(super::host::SCRATCH_LEN + super::host::AGENT_LEN)));
    cut.sort_unstable();
    let mut out: Vec<Span> = Vec::new();
    for m in maps
        .iter()
        .filter(|m| !matches!(m.name.as_slice(), b"[vdso]" | b"[vvar]" | b"[vvar_vclock]" | b"[vsyscall]"))
    {
        let mut at = m.start;
        for c in cut.iter().filter(|c| c.start < m.end && c.end > m.start) {
            if c.start > at {
                out.push(Span::new(at, c.start));
            }
            at = at.max(c.end);
        }
        if at < m.end {
            out.push(Span::new(at, m.end));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(start: u64, end: u64) -> MapsLine {
        MapsLine {
            start: Addr(start),
            end: Addr(end),
            prot: 3,
            shared: false,
            offset: 0,
            dev: 0,
            ino: 0,
            name: Vec::new(),
            deleted: false,
        }
    }
    fn span(a: u64, b: u64) -> Span {
        Span::new(Addr(a), Addr(b))
    }

    #[test]
    fn native_is_what_is_not_retained() {
        let maps = [line(0x1000, 0x5000), line(0x8000, 0x9000), line(0x10_0000, 0x11_0000)];
        // The middle of a mapping that merged with a new one next to it.
        let retained = clip(
            &[span(0x2000, 0x3000), span(0x3000, 0x4000), span(0x8000, 0x9000), span(0xa000, 0xb000)],
            &maps,
        );
        assert_eq!(retained, [span(0x2000, 0x4000), span(0x8000, 0x9000)]);
        let n = native(&maps, &retained, &[], Addr(0x10_0000));
        assert_eq!(n, [span(0x1000, 0x2000), span(0x4000, 0x5000)]);
    }
}
