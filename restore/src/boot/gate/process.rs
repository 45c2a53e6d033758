//! Processes, signals and privileges.

use super::{After, Call, Decision, Gate};
use crate::boot::error::Result;
use crate::boot::host::Host;
use mcr_image::{Addr, Memory};

impl Gate<'_> {
    pub(super) fn process_entry(&mut self, host: &Host, call: &Call, name: &str) -> Result<Option<Decision>> {
        Ok(match name {
            "exit_group" => Some(Decision::Ends(call.args[0] as i32 & 0xff)),
            "fork" | "vfork" | "execve" | "execveat" => Some(Decision::Forks(name.to_owned())),
            "clone" => clone(call.args[0], name),
            "clone3" => clone(host.mem.u64(Addr(call.args[0]))?, name),
            "kill" | "tgkill" | "tkill" | "rt_sigqueueinfo" | "rt_tgsigqueueinfo" => {
                self.signal(host, call, name)
            }
            "rt_sigaction" if call.args[1] != 0 => Some(Decision::Then(After::SigAction {
                signo: call.args[0] as u32,
                action: Addr(call.args[1]),
            })),
            "setuid" | "setgid" | "setreuid" | "setregid" | "setresuid" | "setresgid" | "setgroups"
            | "chroot" | "capset" | "setsid" | "setpgid" | "setrlimit" | "prlimit64" => {
                Some(Decision::Then(After::Privilege))
            }
            _ => None,
        })
    }

    /// Signals to others: a look into a pid file must not find (nor end) the old version.
    fn signal(&mut self, host: &Host, call: &Call, name: &str) -> Option<Decision> {
        let target = call.fd(0);
        if target == host.pid.0 || host.tids().iter().any(|t| t.0 == target) {
            return None;
        }
        self.warn(
            "signal-withheld",
            format!("{name} to process {target} was answered with ESRCH during the start-up"),
            "nothing to do if it only looked for an earlier instance",
        );
        Some(Decision::Answer(-i64::from(libc::ESRCH)))
    }
}

fn clone(flags: u64, name: &str) -> Option<Decision> {
    let thread = (libc::CLONE_THREAD | libc::CLONE_VM) as u64;
    (flags & thread != thread).then(|| Decision::Forks(name.to_owned()))
}
