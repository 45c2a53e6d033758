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
            "getpid" => self.spec.pid.map(|p| Decision::Answer(p.0.into())),
            "gettid" | "set_tid_address" => Some(Decision::Then(After::Pid)),
            "getppid" => self.spec.pid.map(|_| Decision::Answer(self.spec.old.ppid.into())),
            // A session of its own is what old made already.
            "setsid" if self.spec.pid.is_some_and(|p| p.0 as u32 == self.spec.old.sid) => {
                Some(Decision::Answer(self.spec.old.sid.into()))
            }
            "getpgid" | "getsid" | "sched_setaffinity" | "sched_getaffinity" | "sched_getparam"
            | "sched_setparam" | "sched_setscheduler" | "sched_getscheduler" | "sched_setattr"
            | "sched_getattr" => self.to_itself(host, call, 0, None),
            "getpriority" | "setpriority" => self.to_itself(host, call, 1, None),
            "setpgid" | "prlimit64" => self.to_itself(host, call, 0, Some(After::Privilege)),
            "setuid" | "setgid" | "setreuid" | "setregid" | "setresuid" | "setresgid" | "setgroups"
            | "chroot" | "capset" | "setsid" | "setrlimit" => Some(Decision::Then(After::Privilege)),
            _ => None,
        })
    }

    /// The program was told the pid that it will have.
    fn means_itself(&self, pid: i32) -> bool {
        self.spec.pid.is_some_and(|p| p.0 == pid)
    }

    /// Argument `i` and the next one are pids or not: ours for the one that it will have.
    fn to_itself(&self, host: &Host, call: &Call, i: usize, then: Option<After>) -> Option<Decision> {
        if !self.means_itself(call.fd(i)) {
            return then.map(Decision::Then);
        }
        let mut args = call.args;
        args[i] = host.pid.0 as u64;
        // tgkill(2): the main thread of itself.
        if matches!(mcr_image::syscalls::name(call.nr), Some("tgkill" | "rt_tgsigqueueinfo"))
            && self.means_itself(call.fd(1))
        {
            args[1] = host.pid.0 as u64;
        }
        Some(Decision::Instead { nr: call.nr, args, then })
    }

    /// Signals to others: a look into a pid file must not find (nor end) the old version.
    fn signal(&mut self, host: &Host, call: &Call, name: &str) -> Option<Decision> {
        if let Some(itself) = self.to_itself(host, call, 0, None).filter(|_| self.means_itself(call.fd(0))) {
            return Some(itself);
        }
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
