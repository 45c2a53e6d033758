//! Images written by hand, with programs of a few instructions: what is restored is known to the last byte.

use libtest_mimic::{Failed, Trial};
use mcr_image::{Addr, Image, ImageWriter, PAGE, RecordKind, proto};
use mcr_restore::rebuild::{RebuildError, RebuildOptions, Threads, rebuild, restore_image};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("synthetic_process_runs", runs),
        Trial::test("synthetic_threads_run", threads),
        Trial::test("synthetic_dropped_host_leaves_nothing", dropped),
        Trial::test("synthetic_pid_in_use_is_refused", in_use),
        Trial::test("synthetic_leader_only", leader_only),
        Trial::test("synthetic_descriptors_by_socket", by_socket),
        Trial::test("synthetic_killed_engine_leaves_nothing", killed_engine),
        Trial::test("synthetic_missing_file_is_refused", missing_file),
        Trial::test("synthetic_hard_limit_is_explained", hard_limit),
        Trial::test("synthetic_tid_in_use_is_refused", tid_in_use),
    ]
}

const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x7000_0000_0000;
const STACK: u64 = 0x7fff_0000_0000;

fn vma(start: u64, len: u64, prot: u32, flags: &[&str]) -> proto::Vma {
    proto::Vma {
        start,
        end: start + len,
        prot,
        vm_flags: flags.iter().map(|f| (*f).to_owned()).collect(),
        ..Default::default()
    }
}

/// Ids that the kernel will not give out soon: it counts upwards.
fn free_below(pid: u32) -> impl Iterator<Item = u32> {
    let top = if pid > 1000 { pid - 100 } else { 32_000 };
    (300..top).rev().filter(|id| !Path::new(&format!("/proc/{id}")).exists())
}

fn free_pid() -> Result<u32, Failed> {
    let mut child = std::process::Command::new("/bin/true").spawn()?;
    child.wait()?;
    Ok(free_below(child.id() + 50).next().ok_or("no free pid")?)
}

/// The program of the leader: wait for the others by reading `DATA + 128` until it is `r14`, then write and end.
#[rustfmt::skip]
fn code() -> Vec<u8> {
    let mut c = Vec::new();
    let other_len;
    {
        // Other threads (r15 != 0): write(5, r15, 8); lock inc [r13]; exit(0).
        let mut o = vec![];
        o.extend([0xb8, 1, 0, 0, 0, 0xbf, 5, 0, 0, 0]);
        o.extend([0x4c, 0x89, 0xfe]);               // mov rsi, r15
        o.extend([0xba, 8, 0, 0, 0, 0x0f, 0x05]);
        o.extend([0xf0, 0x41, 0xff, 0x45, 0x00]);   // lock inc dword [r13]
        o.extend([0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05]);
        other_len = o.len() as u8;
        c.extend([0x4d, 0x85, 0xff, 0x74, other_len]);
        c.extend(o);
    }
    c.extend([0x45, 0x39, 0x75, 0x00]);             // spin: cmp [r13], r14d
    c.extend([0x75, 0xfa]);                         // jne spin
    c.extend([0xb8, 1, 0, 0, 0, 0xbf, 5, 0, 0, 0]);
    c.extend([0x4c, 0x89, 0xe6]);                   // mov rsi, r12
    c.extend([0xba, 9, 0, 0, 0, 0x0f, 0x05]);
    c.extend([0x41, 0x8b, 0x7c, 0x24, 0x40]);       // mov edi, [r12 + 64]
    c.extend([0xb8, 231, 0, 0, 0, 0x0f, 0x05]);     // exit_group
    c
}

fn image(dir: &Path, pid: u32, others: u32) -> Result<Image, Failed> {
    image_with(dir, pid, others, |_| ())
}

fn image_with(
    dir: &Path,
    pid: u32,
    others: u32,
    change: impl FnOnce(&mut proto::Process),
) -> Result<Image, Failed> {
    let out = dir.join("out");
    std::fs::write(&out, b"")?;
    let md = std::fs::metadata(&out)?;
    let rw = 3;
    let thread = |tid: u32, n: u32| {
        let mut regs = mcr_image::Regs {
            rip: CODE,
            rsp: STACK + 0x8000,
            cs: 0x33,
            ss: 0x2b,
            eflags: 0x202,
            ..Default::default()
        };
        (regs.r12, regs.r13, regs.r14) = (DATA, DATA + 128, u64::from(others));
        regs.r15 = if n == 0 { 0 } else { DATA + 256 + u64::from(n) * 8 };
        proto::Thread { tid, comm: format!("synth{n}"), regs: regs.to_words(), ..Default::default() }
    };
    let mut process = proto::Process {
        pid,
        pgid: pid,
        sid: pid,
        cwd: dir.to_string_lossy().into_owned(),
        root: "/".to_owned(),
        umask: 0o27,
        dumpable: 1,
        exe_path: "/bin/true".to_owned(),
        mm: Some(proto::Mm {
            start_code: CODE,
            end_code: CODE + 0x100,
            start_data: DATA,
            end_data: DATA + 0x100,
            start_brk: DATA + 0x10_0000,
            brk: DATA + 0x10_0000,
            start_stack: STACK + 0x8000,
            arg_start: STACK + 0x9000,
            arg_end: STACK + 0x9000,
            env_start: STACK + 0x9000,
            env_end: STACK + 0x9000,
            auxv: vec![0; 16],
            ..Default::default()
        }),
        vmas: vec![
            vma(CODE, 0x1000, 5, &[]),
            vma(DATA, 0x2000, rw, &["dc", "hg"]),
            vma(STACK, 0x1_0000, rw, &["gd"]),
        ],
        fds: vec![proto::Fd {
            number: 5,
            ofd: 1,
            flags: (libc::O_WRONLY | libc::O_APPEND) as u32,
            object: Some(proto::fd::Object::File(proto::File {
                path: out.to_string_lossy().into_owned(),
                mode: md.mode(),
                dev: md.dev(),
                ino: md.ino(),
                ..Default::default()
            })),
            ..Default::default()
        }],
        threads: std::iter::once(thread(pid, 0))
            .chain(free_below(pid).take(others as usize).zip(1..).map(|(tid, n)| thread(tid, n)))
            .collect(),
        ..Default::default()
    };
    change(&mut process);
    let path = dir.join("image.mcr");
    let mut w = ImageWriter::create(&path)?;
    w.put(RecordKind::Meta, &proto::Meta { root_pid: pid, ..Default::default() })?;
    w.put(RecordKind::Process, &process)?;
    let mut page = vec![0u8; PAGE];
    page[..code().len()].copy_from_slice(&code());
    w.pages(Addr(CODE), &page)?;
    let mut page = vec![0u8; PAGE];
    page[..9].copy_from_slice(b"restored\n");
    page[64] = 7;
    for n in 1..=others as usize {
        page[256 + n * 8..][..8].copy_from_slice(format!("thread{n}\n").as_bytes());
    }
    w.pages(Addr(DATA), &page)?;
    w.finish()?;
    Ok(Image::open(&path)?)
}

fn exit_status(pid: u32) -> Result<i32, Failed> {
    use nix::sys::wait::{WaitStatus, waitpid};
    match waitpid(nix::unistd::Pid::from_raw(pid as i32), None)? {
        WaitStatus::Exited(_, status) => Ok(status),
        other => Err(format!("{other:?}").into()),
    }
}

fn runs() -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    for _ in 0..5 {
        let pid = free_pid()?;
        let restored = restore_image(&image(dir.path(), pid, 0)?, &RebuildOptions::default())?;
        assert_eq!(restored.pid.0, pid as i32);
        assert_eq!(exit_status(pid)?, 7);
        assert_eq!(std::fs::read(dir.path().join("out"))?, b"restored\n");
    }
    Ok(())
}

fn threads() -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let pid = free_pid()?;
    restore_image(&image(dir.path(), pid, 8)?, &RebuildOptions::default())?;
    assert_eq!(exit_status(pid)?, 7);
    let out = String::from_utf8(std::fs::read(dir.path().join("out"))?)?;
    for n in 1..=8 {
        assert!(out.contains(&format!("thread{n}\n")), "{out}");
    }
    assert!(out.ends_with("restored\n"), "{out}");
    Ok(())
}

fn dropped() -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let pid = free_pid()?;
    let host = rebuild(&image(dir.path(), pid, 4)?, &RebuildOptions::default())?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    assert!(maps.contains("[stack]"), "{maps}");
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/exe"))?, std::fs::canonicalize("/bin/true")?);
    let fds: Vec<_> =
        std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten().map(|e| e.file_name()).collect();
    assert_eq!(fds, ["5"]);
    drop(host);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(std::fs::read(dir.path().join("out"))?, b"");
    Ok(())
}

fn in_use() -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn()?;
    let e = restore_image(&image(dir.path(), child.id(), 0)?, &RebuildOptions::default());
    child.kill()?;
    child.wait()?;
    let e = e.err().ok_or("no refusal")?;
    assert!(matches!(e, RebuildError::IdInUse { .. }), "{e}");
    assert!(e.to_string().contains("sleep"), "{e}");
    Ok(())
}

fn leader_only() -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let pid = free_pid()?;
    let options = RebuildOptions { threads: Threads::LeaderOnly, ..Default::default() };
    let host = rebuild(&image(dir.path(), pid, 3)?, &options)?;
    assert_eq!(std::fs::read_dir(format!("/proc/{pid}/task"))?.count(), 1);
    assert_eq!(host.files.by_ofd.len(), 1);
    let fds: Vec<_> =
        std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten().map(|e| e.file_name()).collect();
    assert!(fds.len() <= 3, "{fds:?}");
    drop(host);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    Ok(())
}

/// 600 open files, some at several numbers, over a socket that the target opens itself.
fn by_socket() -> Result<(), Failed> {
    use mcr_restore::fds::{Install, install_fds};
    use std::os::fd::AsFd;
    let dir = tempfile::tempdir()?;
    let pid = free_pid()?;
    let options = RebuildOptions { threads: Threads::LeaderOnly, ..Default::default() };
    let mut host = rebuild(&image(dir.path(), pid, 0)?, &options)?;
    let files: Vec<_> = (0..600)
        .map(|n| std::fs::File::create(dir.path().join(format!("file{n}"))))
        .collect::<Result<_, _>>()?;
    // Descending numbers, so that received and wanted ones cross.
    let mut wanted: Vec<(i32, usize, bool)> =
        files.iter().enumerate().map(|(n, _)| (700 - n as i32, n, n % 3 == 0)).collect();
    wanted.extend((0..50).map(|n| (1000 + n as i32, n, false)));
    wanted.push((3, 599, true));
    let list: Vec<Install<'_>> = wanted
        .iter()
        .map(|&(number, n, cloexec)| Install {
            number: mcr_image::Fd(number),
            file: files[n].as_fd(),
            cloexec,
        })
        .collect();
    install_fds(host.leader().ok_or("leader")?, pid as i32, &list)?;
    let open: Vec<i32> = std::fs::read_dir(format!("/proc/{pid}/fd"))?
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|n| *n > 2)
        .collect();
    assert_eq!(open.len(), wanted.len());
    for (number, n, cloexec) in wanted {
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{number}"))?;
        assert_eq!(link, dir.path().join(format!("file{n}")), "fd {number}");
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
        let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).ok_or("flags")?;
        let flags = i64::from_str_radix(flags.trim(), 8)?;
        assert_eq!(flags & 0o2_000_000 != 0, cloexec, "fd {number}");
    }
    Ok(())
}

/// First argument with which this program rebuilds an image, says so, and waits to be killed.
pub const HALF: &str = "rebuild-and-wait";

/// See [`HALF`].
pub fn half(path: &str) -> std::process::ExitCode {
    let host = Image::open(Path::new(path))
        .map_err(|e| e.to_string())
        .and_then(|i| rebuild(&i, &RebuildOptions::default()).map_err(|e| e.to_string()));
    match host {
        Ok(_host) => {
            println!("stopped");
            loop {
                std::thread::park();
            }
        }
        Err(e) => {
            println!("{e}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// SIGKILL of the engine just before the release: the half-made process, with its threads, goes too.
fn killed_engine() -> Result<(), Failed> {
    use std::io::BufRead;
    let dir = tempfile::tempdir()?;
    let pid = free_pid()?;
    drop(image(dir.path(), pid, 4)?);
    let mut engine = std::process::Command::new("/proc/self/exe")
        .arg(HALF)
        .arg(dir.path().join("image.mcr"))
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    std::io::BufReader::new(engine.stdout.take().ok_or("stdout")?).read_line(&mut line)?;
    assert_eq!(line, "stopped\n");
    assert_eq!(std::fs::read_dir(format!("/proc/{pid}/task"))?.count(), 5);
    engine.kill()?;
    engine.wait()?;
    // It is init's now, which may take its time to collect it; it must not run.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        if stat.contains(") Z") {
            break;
        }
        assert!(std::time::Instant::now() < until, "{stat}");
        std::thread::yield_now();
    }
    assert_eq!(std::fs::read(dir.path().join("out"))?, b"");
    Ok(())
}

/// What is left of a refused restore: no process, nothing written.
fn refused(image: &Image, pid: u32, dir: &Path) -> Result<String, Failed> {
    let e = restore_image(image, &RebuildOptions::default()).err().ok_or("no refusal")?;
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{e}");
    if let Ok(out) = std::fs::read(dir.join("out")) {
        assert_eq!(out, b"");
    }
    Ok(e.to_string())
}

fn missing_file() -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let pid = free_pid()?;
    let image = image(dir.path(), pid, 0)?;
    std::fs::remove_file(dir.path().join("out"))?;
    let e = refused(&image, pid, dir.path())?;
    assert!(e.contains("fd 5") && e.contains("No such file") && e.contains("restore again"), "{e}");
    Ok(())
}

fn hard_limit() -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let pid = free_pid()?;
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    let image = image_with(dir.path(), pid, 0, |p| {
        p.rlimits.push(proto::Rlimit { resource: libc::RLIMIT_NOFILE, soft: 100, hard: hard + 1 });
    })?;
    match restore_image(&image, &RebuildOptions::default()) {
        // With CAP_SYS_RESOURCE there is nothing to refuse.
        Ok(_) => assert_eq!(exit_status(pid)?, 7),
        Err(e) => {
            assert!(e.to_string().contains("CAP_SYS_RESOURCE"), "{e}");
            assert!(!Path::new(&format!("/proc/{pid}")).exists());
        }
    }
    Ok(())
}

fn tid_in_use() -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let pid = free_pid()?;
    let mine = std::process::id();
    let image = image_with(dir.path(), pid, 1, |p| p.threads[1].tid = mine)?;
    let e = refused(&image, pid, dir.path())?;
    assert!(e.contains(&format!("tid {mine} is in use by")), "{e}");
    Ok(())
}
