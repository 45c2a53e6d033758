//! Sockets: what old listens on is not bound again, and nobody outside is called.

use super::{After, Call, Decision, Gate};
use crate::boot::error::{BootError, Result};
use crate::boot::fdplan;
use crate::boot::host::Host;
use mcr_image::proto::fd::Object;
use mcr_image::{Addr, Memory};

/// Local services that libraries talk to (name service cache, system log, service manager).
const LOCAL_SERVICES: [&[u8]; 5] = [
    b"/var/run/nscd/socket",
    b"/run/nscd/socket",
    b"/dev/log",
    b"/run/systemd/notify",
    b"/run/systemd/journal/socket",
];

fn family_of(addr: &[u8]) -> i32 {
    addr.get(..2).map_or(0, |b| i32::from(u16::from_le_bytes([b[0], b[1]])))
}

impl Gate<'_> {
    pub(super) fn socket_entry(&mut self, host: &Host, call: &Call, name: &str) -> Result<Option<Decision>> {
        let cloexec = |i| call.flag(i, libc::SOCK_CLOEXEC);
        Ok(match name {
            "socket" => Some(Decision::Then(After::NewFd { cloexec: cloexec(1) })),
            "socketpair" => {
                Some(Decision::Then(After::TwoFds { at: Addr(call.args[3]), cloexec: cloexec(1) }))
            }
            "bind" => self.bind(host, call)?,
            "listen" => match self.fds.bound(call.fd(0)) {
                Some(_) => Some(Decision::Answer(0)),
                None => Some(
                    self.elsewhere(format!("descriptor {}, which is not bound to an address", call.fd(0))),
                ),
            },
            "connect" => self.connect(host, call)?,
            "accept" => Some(Decision::Then(After::NewFd { cloexec: false })),
            "accept4" => Some(Decision::Then(After::NewFd { cloexec: cloexec(3) })),
            "getsockname" => self.fds.bound(call.fd(0)).map(|old| {
                Decision::Then(After::SockName { old, addr: Addr(call.args[1]), len: Addr(call.args[2]) })
            }),
            _ => None,
        })
    }

    fn bind(&mut self, host: &Host, call: &Call) -> Result<Option<Decision>> {
        let addr = host.mem.bytes(Addr(call.args[1]), (call.args[2] as usize).min(128))?;
        let family = family_of(&addr);
        if !matches!(family, libc::AF_INET | libc::AF_INET6 | libc::AF_UNIX) {
            return Ok(None);
        }
        let Ok(kind) = host.socket_kind(call.fd(0)).map(|s| s.kind) else {
            return Ok(None);
        };
        let shown = fdplan::describe(&addr);
        if let Some(old) = self.fds.bind(call.fd(0), kind, &addr) {
            if old != call.fd(0) {
                let number = call.fd(0);
                self.warn(
                    "listener-number",
                    format!("{shown} is descriptor {number} in the new version and {old} in the old one; it gets both"),
                    "",
                );
            }
            return Ok(Some(Decision::Answer(0)));
        }
        let no_port = family != libc::AF_UNIX && addr.get(2..4) == Some(&[0, 0]);
        let autobind = family == libc::AF_UNIX && addr.len() <= 2;
        if (no_port && kind == libc::SOCK_DGRAM) || autobind {
            return Ok(None);
        }
        Ok(Some(self.elsewhere(shown)))
    }

    fn elsewhere(&self, wanted: String) -> Decision {
        Decision::Refuse(Box::new(BootError::ListensElsewhere { wanted, had: self.fds.addresses() }))
    }

    fn connect(&mut self, host: &Host, call: &Call) -> Result<Option<Decision>> {
        let addr = host.mem.bytes(Addr(call.args[1]), (call.args[2] as usize).min(128))?;
        match family_of(&addr) {
            libc::AF_UNIX => {
                let path = addr.get(2..).unwrap_or_default();
                let path = &path[..path.iter().position(|&b| b == 0).unwrap_or(path.len())];
                if LOCAL_SERVICES.contains(&path) {
                    return Ok(None);
                }
            }
            // A connected datagram socket sends nothing by itself; resolvers use it to learn an address.
            libc::AF_INET | libc::AF_INET6 => {
                if host.socket_kind(call.fd(0))?.kind == libc::SOCK_DGRAM {
                    return Ok(None);
                }
            }
            _ => return Ok(None),
        }
        self.warn(
            "connect-refused",
            format!(
                "connecting to {} was answered with ECONNREFUSED during the start-up",
                fdplan::describe(&addr)
            ),
            "old's connections are carried over; a new one is made when the new version tries again",
        );
        Ok(Some(Decision::Answer(-i64::from(libc::ECONNREFUSED))))
    }

    /// getsockname(2) of a socket whose bind was not executed.
    pub(super) fn socket_name(&mut self, host: &Host, old: i32, addr: Addr, len: Addr) -> Result<()> {
        let fd = self.spec.old.fds.iter().find(|f| f.number as i32 == old);
        let raw = match fd.and_then(|f| f.object.as_ref()) {
            Some(Object::Tcp(t)) => t.local.clone(),
            Some(Object::Udp(u)) => u.local.clone(),
            Some(Object::Unix(u)) => [&(libc::AF_UNIX as u16).to_le_bytes(), u.address.as_slice()].concat(),
            _ => return Ok(()),
        };
        // The kernel has already answered for the unbound socket; the caller's room is not known any more, so
        // nothing longer than that is written (for the internet families the size does not vary).
        let size = host.mem.u32(len)? as usize;
        host.mem.write(addr, &raw[..raw.len().min(size)])?;
        Ok(())
    }
}
