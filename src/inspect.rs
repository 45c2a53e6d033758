//! `mcr inspect FILE`: what is in an image, offline.

use crate::cli::InspectArgs;
use crate::exit::{Failure, Outcome};
use crate::report::{self, Table, size};
use crate::state::State;
use mcr_image::Image;
use mcr_image::proto::{Fd, Frame, Process, SyscallState, Vma, VmaKind, fd::Object};
use mcr_transform::types::expr;
use mcr_transform::types::print::{Limits, Printer};
use serde::Serialize;

/// Opens an image; the message names the file.
pub fn open(path: &std::path::Path) -> Result<Image, Failure> {
    Image::open(path).map_err(|e| {
        let text = e.to_string();
        let name = path.display().to_string();
        Failure::refused(if text.contains(&name) { text } else { format!("{name}: {text}") })
    })
}

/// Runs the verb.
pub fn run(a: &InspectArgs) -> Outcome {
    let image = open(&a.image)?;
    if let Some(out) = &a.core {
        return core(&image, out);
    }
    if let Some(expr) = &a.object {
        return object(&image, expr, a);
    }
    let p = image.process();
    if a.json {
        return json(&image, a);
    }
    let all = !(a.maps || a.threads || a.fds || a.types);
    if all {
        summary(&image)?;
    }
    if a.maps {
        maps(p);
    }
    if a.threads {
        threads(p);
    }
    if a.fds {
        fds(p);
    }
    if a.types || (all && image.has_patch()) {
        patch(&image)?;
    }
    Ok(())
}

#[derive(Serialize)]
struct Body<'a> {
    meta: &'a mcr_image::proto::Meta,
    #[serde(skip_serializing_if = "Option::is_none")]
    processes: Option<&'a [Process]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    maps: Option<&'a [Vma]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<&'a [mcr_image::proto::Thread]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fds: Option<&'a [Fd]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch: Option<&'a mcr_image::proto::Patch>,
}

fn json(image: &Image, a: &InspectArgs) -> Outcome {
    let p = image.process();
    let all = !(a.maps || a.threads || a.fds || a.types);
    let body = Body {
        meta: image.meta(),
        processes: all.then(|| image.processes()),
        maps: a.maps.then_some(p.vmas.as_slice()),
        threads: a.threads.then_some(p.threads.as_slice()),
        fds: a.fds.then_some(p.fds.as_slice()),
        patch: if a.types || all { image.patch()? } else { None },
    };
    report::json("inspect", &body)
}

fn summary(image: &Image) -> Outcome {
    let (m, p) = (image.meta(), image.process());
    println!("image     {} ({}, mcr {})", m.image_id, size(image.len()), m.mcr_version);
    println!("from      {}, Linux {}", m.hostname, m.kernel_release);
    println!("process   {} {} (parent {}, session {})", p.pid, p.exe_path, p.ppid, p.sid);
    let argv: Vec<_> = p.argv.iter().map(|a| String::from_utf8_lossy(a)).collect();
    println!("command   {}", argv.join(" "));
    println!("holds     {} threads, {} mappings, {} descriptors", p.threads.len(), p.vmas.len(), p.fds.len());
    let bytes: u64 = p.vmas.iter().map(|v| v.end - v.start).sum();
    println!("memory    {} mapped", size(bytes));
    if !m.keeper_socket.is_empty() {
        println!("keeper    @{} until {} (Unix time)", m.keeper_socket, m.keeper_deadline_unix_s);
    }
    Ok(())
}

/// `rwxp` as proc_pid_maps(5) shows it.
pub fn protection(v: &Vma) -> String {
    let bit = |b: u32, c: char| if v.prot & b != 0 { c } else { '-' };
    let shared = matches!(v.kind(), VmaKind::VmaAnonShared | VmaKind::VmaFileShared);
    [bit(1, 'r'), bit(2, 'w'), bit(4, 'x'), if shared { 's' } else { 'p' }].iter().collect()
}

fn maps(p: &Process) {
    let mut t = Table::new(&["RANGE", "PROT", "SIZE", "WHAT"]);
    for v in &p.vmas {
        let deleted = if v.deleted { " (deleted)" } else { "" };
        t.row([
            format!("{:#x}-{:#x}", v.start, v.end),
            protection(v),
            size(v.end - v.start),
            format!("{}{deleted}", v.name),
        ]);
    }
    t.print();
}

/// `function+offset` or `module+offset`.
pub fn frame(f: &Frame) -> String {
    if f.function.is_empty() {
        format!("{}+{:#x}", if f.module.is_empty() { "?" } else { &f.module }, f.offset)
    } else {
        format!("{}+{:#x}", f.function, f.offset)
    }
}

/// The call a thread is blocked in.
pub fn call(s: Option<&SyscallState>) -> String {
    match s {
        None => "running".into(),
        Some(s) => match mcr_image::syscalls::name(s.nr) {
            Some(n) => n.to_owned(),
            None => format!("system call {}", s.nr),
        },
    }
}

fn threads(p: &Process) {
    let mut t = Table::new(&["TID", "NAME", "BLOCKED IN", "STACK, innermost first"]);
    for th in &p.threads {
        let stack: Vec<_> = th.frames.iter().map(frame).collect();
        t.row([th.tid.to_string(), th.comm.clone(), call(th.syscall.as_ref()), stack.join(" < ")]);
    }
    t.print();
}

/// One descriptor in words.
pub fn describe(fd: &Fd) -> String {
    let addr = |b: &[u8]| sockaddr(b);
    match &fd.object {
        None => fd.link.clone(),
        Some(Object::File(f)) => {
            format!("{} at {}{}", f.path, fd.pos, if f.deleted { " (deleted)" } else { "" })
        }
        Some(Object::Pipe(p)) => format!(
            "pipe {} {}, {} bytes inside",
            p.ino,
            if p.write_end { "write end" } else { "read end" },
            p.contents.len()
        ),
        Some(Object::Unix(u)) => {
            format!("unix socket {} {}", u.ino, String::from_utf8_lossy(&u.address).replace('\0', "@"))
        }
        Some(Object::Tcp(s)) if s.state == 10 => format!("tcp listening on {}", addr(&s.local)),
        Some(Object::Tcp(s)) => format!("tcp {} to {}", addr(&s.local), addr(&s.peer)),
        Some(Object::Udp(s)) => format!("udp {}", addr(&s.local)),
        Some(Object::Epoll(e)) => format!("epoll, {} watches", e.watches.len()),
        Some(Object::Eventfd(e)) => format!("eventfd, count {}", e.count),
        Some(Object::Timerfd(t)) => format!("timerfd, every {} ms", t.interval_ns / 1_000_000),
        Some(Object::Foreign(f)) => {
            format!("family {}, type {}, protocol {}", f.family, f.r#type, f.protocol)
        }
        Some(Object::Signalfd(s)) => format!("signalfd, mask {:#x}", s.mask),
    }
}

/// A struct sockaddr_in or sockaddr_in6 in words (ip(7), ipv6(7)).
pub fn sockaddr(b: &[u8]) -> String {
    let port = |b: &[u8]| u16::from_be_bytes([b[2], b[3]]);
    match (b.first().copied(), b.len()) {
        (Some(2), 8..) => format!("{}.{}.{}.{}:{}", b[4], b[5], b[6], b[7], port(b)),
        (Some(10), 24..) => {
            let mut a = [0u8; 16];
            a.copy_from_slice(&b[8..24]);
            format!("[{}]:{}", std::net::Ipv6Addr::from(a), port(b))
        }
        _ => "?".into(),
    }
}

fn fds(p: &Process) {
    let mut t = Table::new(&["FD", "OBJECT", "FLAGS", "WHAT"]);
    for f in &p.fds {
        let flags = format!("{:#o}{}", f.flags, if f.cloexec { " cloexec" } else { "" });
        t.row([f.number.to_string(), format!("#{}", f.ofd), flags, describe(f)]);
    }
    t.print();
}

/// What the patch of an update image says.
fn patch(image: &Image) -> Outcome {
    let Some(p) = image.patch()? else {
        return Err(Failure::refused(
            "this image has no patch: it is a plain dump; `mcr transform` writes update images",
        ));
    };
    crate::plan::print(p);
    Ok(())
}

fn core(image: &Image, out: &std::path::Path) -> Outcome {
    mcr_image::export_core_file(image, out)?;
    println!("{}: open it with  gdb {} {}", out.display(), image.process().exe_path, out.display());
    Ok(())
}

#[derive(Serialize)]
struct TypedValue {
    expression: String,
    address: String,
    r#type: String,
    value: serde_json::Value,
}

/// A typed value, like a debugger would print it.
fn object(image: &Image, text: &str, a: &InspectArgs) -> Outcome {
    let state = State::of(image, &a.debug_dirs)?;
    let symbol = |at| state.symbol(at);
    let v = expr::evaluate(&state.model, &state.memory, state.bases(), text)?;
    let p =
        Printer { model: &state.model, memory: &state.memory, symbol: &symbol, limits: Limits::default() };
    if a.json {
        let body = TypedValue {
            expression: text.to_owned(),
            address: v.addr.to_string(),
            r#type: state.model.display(v.ty),
            value: p.json(&v),
        };
        return report::json("inspect", &body);
    }
    println!("({}) {text} = {}", state.model.display(v.ty), p.text(&v));
    Ok(())
}
