//! sd_notify(3): a service manager that watches the main process is told its new pid.
//!
//! The message is sent by the old process, in the moment before it ends: with `NotifyAccess=main`, the default of
//! `Type=notify`, nobody else is believed (systemd.service(5)), and a message is handled before the end of its sender.

use mcr_criu_lite::{Frozen, Scratch};
use mcr_image::{Pid, proto};
use nix::errno::Errno;

/// struct sockaddr_un (unix(7)) of a `NOTIFY_SOCKET`: a path, or an abstract name that is written with an `@`.
fn address(socket: &[u8]) -> Option<Vec<u8>> {
    /// Size of sun_path; a path has a NUL after it.
    const PATH: usize = 108;
    let mut at = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    match socket {
        [b'/', ..] if socket.len() < PATH => {
            at.extend_from_slice(socket);
            at.push(0);
        }
        [b'@', name @ ..] if name.len() < PATH => {
            at.push(0);
            at.extend_from_slice(name);
        }
        _ => return None,
    }
    Some(at)
}

/// Sends `MAINPID=` for the new process from the old one, if that was started with a notification socket.
pub(super) fn main_pid(frozen: &mut Frozen, old: &proto::Process, new: Pid) -> Option<proto::Finding> {
    let socket = old.envp.iter().find_map(|v| v.strip_prefix(b"NOTIFY_SOCKET="))?;
    let said = match address(socket) {
        Some(at) => send(frozen, &at, &format!("MAINPID={new}\n")),
        None => Err("is no address of a unix socket".into()),
    };
    said.err().map(|why| proto::Finding {
        severity: proto::Severity::Warning.into(),
        code: "notify".into(),
        message: format!("MAINPID={new} did not reach {}: it {why}", String::from_utf8_lossy(socket)),
        next_step:
            "the service manager may take the service for ended: look at its status; an update that keeps \
                    the pid (without --new-pid) needs no message"
                .into(),
        ..Default::default()
    })
}

fn send(frozen: &mut Frozen, at: &[u8], text: &str) -> Result<(), String> {
    let call = |name: &str, e: &dyn std::fmt::Display| format!("{name} in the old process: {e}");
    let mut page = Scratch::data(frozen.leader(), 4096).map_err(|e| call("mmap", &e))?;
    let (message, address) = (page.addr(), page.addr().add(2048));
    page.write(0, text.as_bytes()).map_err(|e| call("writing", &e))?;
    page.write(2048, at).map_err(|e| call("writing", &e))?;
    let kind = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as u64;
    let tracee = page.tracee();
    let fd =
        tracee.syscall(libc::SYS_socket, &[libc::AF_UNIX as u64, kind, 0]).map_err(|e| call("socket", &e))?;
    let flags = (libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) as u64;
    let args = [fd, message.0, text.len() as u64, flags, address.0, at.len() as u64];
    let sent = tracee.syscall_raw(libc::SYS_sendto, &args).map_err(|e| call("sendto", &e))?;
    drop(tracee.syscall(libc::SYS_close, &[fd]));
    if sent < 0 { Err(call("sendto", &Errno::from_raw(-sent as i32))) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn paths_and_abstract_names() {
        assert_eq!(address(b"/run/x").unwrap(), b"\x01\x00/run/x\0");
        assert_eq!(address(b"@x/y").unwrap(), b"\x01\x00\0x/y");
        assert_eq!((address(b""), address(b"vsock:2:1"), address(&[b'/'; 108])), (None, None, None));
    }
}
