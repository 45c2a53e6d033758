//! What must hold before a host is released (I1, I3, I6, I7, I9; I4 and I5 are checked where words are
//! redirected). Each has its own refusal.

use super::input::Booted;
use super::output::Refusal;
use super::overlay::Overlay;
use mcr_image::{Addr, Fd, Memory, ModuleMap, Tid, proto};

/// Calls whose first argument is a descriptor.
const FD_CALLS: [i64; 11] = [0, 17, 19, 43, 45, 47, 232, 281, 288, 299, 441];

/// I1: threads pair one to one: same stack, same call, same descriptor.
pub fn threads(process: &proto::Process, booted: &Booted) -> Result<(), Refusal> {
    let refuse = |message: String| {
        Err(Refusal::new(
            "I1",
            message,
            "compare both with `mcr quiesce`; a rule can name the threads' roles",
        ))
    };
    for t in &process.threads {
        let tid = Tid(t.tid as i32);
        let mut takers = booted.threads.iter().filter(|n| n.old_tid == Some(tid));
        let Some(new) = takers.next() else {
            return refuse(format!("old thread {tid} ({}) has no counterpart in the new version", t.comm));
        };
        if let Some(other) = takers.next() {
            return refuse(format!(
                "new threads {} and {} both take over old thread {tid}",
                new.tid, other.tid
            ));
        }
        let Some(call) = &t.syscall else { continue };
        if call.nr != new.syscall {
            return refuse(format!(
                "old thread {tid} waits in system call {}, its counterpart {} in {}",
                call.nr, new.tid, new.syscall
            ));
        }
        let signature = mcr_image::unwind::proto_signature(&t.frames);
        if !signature.is_empty() && !new.signature.is_empty() && signature != new.signature {
            return refuse(format!(
                "old thread {tid} waits under {}, its counterpart {} under {}",
                signature.join("<"),
                new.tid,
                new.signature.join("<")
            ));
        }
        if FD_CALLS.contains(&call.nr) {
            let old_fd = call.args.first().copied().unwrap_or(0) as i32;
            let epoll = booted.epolls.iter().find(|e| e.old_fd == Some(Fd(old_fd))).map(|e| e.fd);
            let other = booted.fds.iter().find(|m| m.old_fd.0 == old_fd).map(|m| m.new_fd);
            let want = epoll.or(other).map_or(old_fd, |f| f.0);
            if new.args[0] as i32 != want {
                return refuse(format!(
                    "old thread {tid} waits on fd {old_fd}, its counterpart {} on fd {} instead of {want}",
                    new.tid, new.args[0] as i32
                ));
            }
        }
    }
    if booted.threads.first().and_then(|t| t.old_tid).map(|t| t.0 as u32)
        != process.threads.first().map(|t| t.tid)
    {
        return refuse("the main thread of the new version does not take over the old main thread".into());
    }
    Ok(())
}

/// I3: every library of the old process that is still needed is the same file at the same base.
pub fn modules(old: &ModuleMap, booted: &Booted, findings: &mut Vec<proto::Finding>) -> Result<(), Refusal> {
    for m in old.modules() {
        if m.is_exe() || m.role == mcr_image::Role::Vdso {
            continue;
        }
        let id = m.build_id().unwrap_or_default();
        let same = booted.modules.iter().find(|b| !id.is_empty() && b.build_id == id);
        match same {
            Some(b) if b.base == m.bias => {}
            Some(b) => {
                return Err(Refusal::new(
                    "I3",
                    format!("{} is at {} in the new version and was at {}", m.path, b.base, m.bias),
                    "its old place was taken; try again",
                ));
            }
            None => {
                let file = |p: &str| p.rsplit('/').next().unwrap_or(p).to_owned();
                let changed = booted.modules.iter().find(|b| file(&b.path.to_string_lossy()) == m.name());
                if let Some(b) = changed {
                    return Err(Refusal::new(
                        "I3",
                        format!("{} is another build in the new version ({})", m.path, b.path.display()),
                        "changed shared libraries are not supported yet: run the new version with the old library",
                    ));
                }
                findings.push(super::finding(
                    proto::Severity::Warning,
                    "library-gone",
                    format!("the old version had loaded {}; the new one has not", m.path),
                    "",
                ));
            }
        }
    }
    Ok(())
}

/// I6: nothing that is written points into the old program's memory that is gone. `returns_to` tells whether an
/// address of the old program follows a call: in a local (an array that was never filled) that is what an earlier
/// call left on the stack. No variable of C holds such a value.
pub fn no_old_program(
    old_exe: (Addr, Addr),
    booted: &Booted,
    out: &Overlay<'_>,
    ranges: &[(Addr, u64, String)],
    returns_to: impl Fn(Addr) -> bool,
) -> Result<(), Refusal> {
    each_word(out, ranges, |place, word, what| {
        let a = Addr(word);
        let gone = a >= old_exe.0 && a < old_exe.1 && !booted.is_retained(a) && !booted.is_native(a);
        if gone && !(what.starts_with("local ") && returns_to(a)) {
            return Err(Refusal::new(
                "I6",
                format!("{what}: the word at {place} still points at {a} in the old program, which is gone"),
                "the address has no symbol in the new version; a rule can say what it becomes",
            )
            .at(what));
        }
        Ok(())
    })
}

/// Whether a call instruction ends at an address: `call rel32`, or `call r/m64` in its lengths.
pub fn after_call(memory: &dyn Memory, at: Addr) -> bool {
    let Ok(b) = memory.bytes(Addr(at.0.saturating_sub(7)), 7) else {
        return false;
    };
    let indirect = |n: usize| b[7 - n] == 0xff && b[8 - n] >> 3 & 7 == 2;
    b[2] == 0xe8 || [2, 3, 6, 7].into_iter().any(indirect)
}

/// I7: the patch itself has nothing open.
pub fn patch_is_closed(patch: &proto::Patch) -> Result<(), Refusal> {
    match patch.findings.iter().find(|f| f.severity() == proto::Severity::Refusal) {
        None => Ok(()),
        Some(f) => Err(Refusal {
            invariant: "I7",
            message: format!("the update image holds an unsolved question ({}): {}", f.code, f.message),
            path: f.path.clone(),
            next_step: if f.next_step.is_empty() { "see `mcr plan`".into() } else { f.next_step.clone() },
        }),
    }
}

/// I9: nothing that is written points at a place that a moved object left.
pub fn moved_set_is_closed(
    patch: &proto::Patch,
    out: &Overlay<'_>,
    ranges: &[(Addr, u64, String)],
) -> Result<(), Refusal> {
    if patch.retired.is_empty() {
        return Ok(());
    }
    let mut gone: Vec<(u64, u64)> = patch.retired.iter().map(|r| (r.start, r.end)).collect();
    gone.sort_unstable();
    each_word(out, ranges, |place, word, what| {
        let i = gone.partition_point(|g| g.1 <= word);
        if gone.get(i).is_some_and(|g| g.0 <= word) {
            return Err(Refusal::new(
                "I9",
                format!(
                    "{what}: the word at {place} still points at {word:#x}, from where an object moved away"
                ),
                "report this with the image; a rule `keep = \"new\"` for the holder avoids it",
            )
            .at(what));
        }
        Ok(())
    })
}

fn each_word(
    out: &Overlay<'_>,
    ranges: &[(Addr, u64, String)],
    mut check: impl FnMut(Addr, u64, &str) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    for (start, len, what) in ranges {
        let from = Addr((start.0 + 7) & !7);
        let skip = from.since(*start);
        if *len < skip + 8 {
            continue;
        }
        let Ok(bytes) = out.bytes(from, ((len - skip) & !7) as usize) else {
            continue;
        };
        for (i, w) in bytes.chunks_exact(8).enumerate() {
            let w = u64::from_le_bytes(w.try_into().unwrap_or_default());
            if w >= 4096 {
                check(from.add(8 * i as u64), w, what)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::input::{FdMatch, NewThread, Span};
    use super::super::overlay::test::Runs;
    use super::*;

    fn process() -> proto::Process {
        let thread = |tid, nr, fd| proto::Thread {
            tid,
            syscall: Some(proto::SyscallState { nr, args: vec![fd, 0, 0, 0, 0, 0], ..Default::default() }),
            ..Default::default()
        };
        proto::Process {
            pid: 10,
            threads: vec![thread(10, 232, 4), thread(11, 202, 0)],
            ..Default::default()
        }
    }
    fn booted() -> Booted {
        let thread = |tid, old, nr, fd| NewThread {
            tid: Tid(tid),
            old_tid: Some(Tid(old)),
            syscall: nr,
            args: [fd, 0, 0, 0, 0, 0],
            ..Default::default()
        };
        Booted { threads: vec![thread(20, 10, 232, 4), thread(21, 11, 202, 0)], ..Default::default() }
    }

    #[test]
    fn i1_equal_threads_pass_and_each_difference_is_refused() {
        assert_eq!(threads(&process(), &booted()), Ok(()));
        let says = |b: Booted, text: &str| {
            let r = threads(&process(), &b).unwrap_err();
            assert!(r.invariant == "I1" && r.message.contains(text), "{r}");
        };
        let mut b = booted();
        b.threads.pop();
        says(b, "has no counterpart");
        let mut b = booted();
        b.threads[1].old_tid = Some(Tid(10));
        says(b, "both take over");
        let mut b = booted();
        b.threads[1].syscall = 35;
        says(b, "in 35");
        let mut b = booted();
        b.threads[0].args[0] = 7;
        says(b, "on fd 7 instead of 4");
        let mut b = booted();
        b.threads.swap(0, 1);
        says(b, "main thread");
        let mut b = booted();
        b.threads[0].args[0] = 7;
        b.fds.push(FdMatch { new_fd: Fd(7), old_fd: Fd(4), ..Default::default() });
        assert_eq!(threads(&process(), &b), Ok(()), "a matched number is the same object");
    }

    /// The modules of this very process.
    fn own_modules() -> ModuleMap {
        let pid = mcr_image::Pid(std::process::id() as i32);
        let mem = mcr_criu_lite::ProcessMemory::open(pid).unwrap();
        let vma = |m: &mcr_criu_lite::procfs::maps::MapsLine| proto::Vma {
            start: m.start.0,
            end: m.end.0,
            prot: m.prot,
            kind: if m.ino != 0 { proto::VmaKind::VmaFilePrivate } else { proto::VmaKind::VmaAnonPrivate }
                as i32,
            name: String::from_utf8_lossy(&m.name).into_owned(),
            file_offset: m.offset,
            dev: m.dev,
            ino: m.ino,
            ..Default::default()
        };
        let vmas: Vec<_> = mem.maps().unwrap().iter().map(vma).collect();
        let auxv = std::fs::read("/proc/self/auxv").unwrap();
        ModuleMap::new(&vmas, &auxv, |v| mcr_image::ElfFile::open(&v.name).ok().map(std::sync::Arc::new))
    }

    #[test]
    fn i3_a_library_elsewhere_or_of_another_build_is_refused() {
        let old = own_modules();
        let module = |m: &std::sync::Arc<mcr_image::Module>| super::super::BootModule {
            path: m.path.clone().into(),
            base: m.bias,
            build_id: m.build_id().unwrap_or_default().to_vec(),
            ..Default::default()
        };
        let good = Booted { modules: old.modules().iter().map(module).collect(), ..Default::default() };
        let libc = good.modules.iter().position(|m| m.path.to_string_lossy().contains("libc.so")).unwrap();
        let check = |b: &Booted| {
            let mut findings = Vec::new();
            modules(&old, b, &mut findings).map(|()| findings)
        };
        assert_eq!(check(&good), Ok(Vec::new()));
        let mut b = good.clone();
        b.modules[libc].base = Addr(0x1000);
        let r = check(&b).unwrap_err();
        assert!(r.invariant == "I3" && r.message.contains("libc.so") && r.message.contains("0x1000"), "{r}");
        let mut b = good.clone();
        b.modules[libc].build_id[0] ^= 1;
        let r = check(&b).unwrap_err();
        assert!(r.invariant == "I3" && r.message.contains("another build"), "{r}");
        let mut b = good;
        b.modules.remove(libc);
        assert_eq!(check(&b).unwrap()[0].code, "library-gone");
    }

    #[test]
    fn i6_a_word_into_the_old_program_is_refused_unless_it_is_kept() {
        let mut m = Runs::default().with(0x9000, vec![0; 64]);
        m.put(0x9008, 0x40_1000);
        let out = Overlay::new(&m);
        let ranges = [(Addr(0x9000), 64, "global x".to_owned())];
        let exe = (Addr(0x40_0000), Addr(0x50_0000));
        let r = no_old_program(exe, &Booted::default(), &out, &ranges, |_| true).unwrap_err();
        assert!(r.invariant == "I6" && r.message.contains("0x9008") && r.path == "global x", "{r}");
        let kept =
            Booted { retained: vec![Span::new(Addr(0x40_1000), Addr(0x40_2000))], ..Default::default() };
        let never = |_| false;
        assert_eq!(
            no_old_program(exe, &kept, &out, &ranges, never),
            Ok(()),
            "old read-only data stays mapped"
        );
        let local = [(Addr(0x9000), 64, "local loop::ev".to_owned())];
        assert!(no_old_program(exe, &Booted::default(), &out, &local, never).is_err());
        assert_eq!(no_old_program(exe, &Booted::default(), &out, &local, |a| a == Addr(0x40_1000)), Ok(()));
    }

    #[test]
    fn return_addresses_are_recognised() {
        let code = |b: &[u8]| Runs::default().with(0x1000, b.to_vec());
        let nop = 0x90;
        assert!(after_call(&code(&[nop, nop, 0xe8, 1, 2, 3, 4]), Addr(0x1007)));
        // call *%rax; call *0x8(%rbx); call *sym(%rip)
        assert!(after_call(&code(&[nop, nop, nop, nop, nop, 0xff, 0xd0]), Addr(0x1007)));
        assert!(after_call(&code(&[nop, nop, nop, nop, 0xff, 0x53, 8]), Addr(0x1007)));
        assert!(after_call(&code(&[nop, 0xff, 0x15, 1, 2, 3, 4]), Addr(0x1007)));
        assert!(!after_call(&code(&[nop, nop, 0xe9, 1, 2, 3, 4]), Addr(0x1007)));
        assert!(!after_call(&code(&[]), Addr(0x1007)));
    }

    #[test]
    fn i7_an_open_question_of_the_patch_is_refused() {
        let mut patch = proto::Patch::default();
        assert_eq!(patch_is_closed(&patch), Ok(()));
        patch.findings.push(super::super::finding(
            proto::Severity::Refusal,
            "value-narrowed",
            "config.port does not fit".into(),
            "config",
        ));
        let r = patch_is_closed(&patch).unwrap_err();
        assert!(r.invariant == "I7" && r.message.contains("value-narrowed"), "{r}");
    }

    #[test]
    fn i9_a_word_to_a_left_place_is_refused() {
        let mut m = Runs::default().with(0x9000, vec![0; 64]);
        m.put(0x9010, 0x7008);
        let patch = proto::Patch {
            retired: vec![proto::Retired { start: 0x7000, end: 0x7040 }],
            ..Default::default()
        };
        let ranges = [(Addr(0x9000), 64, "table".to_owned())];
        let r = moved_set_is_closed(&patch, &Overlay::new(&m), &ranges).unwrap_err();
        assert!(r.invariant == "I9" && r.message.contains("0x9010"), "{r}");
        m.put(0x9010, 0x7040);
        assert_eq!(moved_set_is_closed(&patch, &Overlay::new(&m), &ranges), Ok(()));
    }
}
