//! Timers. Old's go on with the time that was left of them: those that the start-up makes for the same purpose
//! get the same ids and are never set running, so that nothing expires twice.

use super::{After, Call, Decision, Gate};
use crate::apply::PR_TIMER_CREATE_RESTORE_IDS;
use crate::boot::error::{BootError, Result};
use crate::boot::host::Host;
use crate::link::BootTimer;
use mcr_image::{Addr, Memory, Tid};

/// Turns the choice of timer ids on or off, in a host that is at no call's entry.
pub(in crate::boot) fn choose_ids(host: &Host, on: bool) -> Result<()> {
    let args = [PR_TIMER_CREATE_RESTORE_IDS, u64::from(on), 0, 0, 0];
    match host.call(Tid(host.pid.0), "prctl(PR_TIMER_CREATE_RESTORE_IDS)", libc::SYS_prctl, &args) {
        Ok(_) => Ok(()),
        Err(BootError::Step { errno: nix::errno::Errno::EINVAL, .. }) => Err(BootError::Unsupported {
            what: "the old version has POSIX timers, whose ids this kernel does not let one choose".into(),
            next_step: "update on Linux 6.15 or later".into(),
        }),
        Err(e) => Err(e),
    }
}

impl Gate<'_> {
    pub(super) fn timer_entry(&mut self, host: &Host, call: &Call, name: &str) -> Result<Option<Decision>> {
        Ok(match name {
            "timer_create" => self.timer_create(host, call)?,
            "timer_settime" if self.is_olds(call.args[0]) => {
                let what = format!("POSIX timer {}", call.args[0]);
                Some(self.goes_on(&what, call.args[3], libc::SYS_timer_gettime, call.args[0]))
            }
            "setitimer" if self.old_itimer(call.args[0]) => {
                let what = format!("interval timer {}", call.args[0]);
                Some(self.goes_on(&what, call.args[2], libc::SYS_getitimer, call.args[0]))
            }
            "alarm" if self.old_itimer(0) => Some(self.goes_on("the alarm clock", 0, 0, 0)),
            "setitimer" => {
                self.itimer(call.args[0], self.sets(host, call.args[1])?);
                None
            }
            "alarm" => {
                self.itimer(0, call.args[0] != 0);
                None
            }
            "timer_delete" => {
                self.timers.retain(|t| u64::from(t.id) != call.args[0]);
                None
            }
            _ => None,
        })
    }

    fn is_olds(&self, id: u64) -> bool {
        self.timers.iter().any(|t| u64::from(t.id) == id && t.in_old)
    }

    fn old_itimer(&self, which: u64) -> bool {
        self.spec.old.itimers.iter().any(|t| u64::from(t.which) == which)
    }

    /// Whether a struct itimerval has a time.
    fn sets(&self, host: &Host, at: u64) -> Result<bool> {
        Ok(at != 0 && host.mem.bytes(Addr(at + 16), 16)?.iter().any(|b| *b != 0))
    }

    fn itimer(&mut self, which: u64, on: bool) {
        self.new_itimers.retain(|w| u64::from(*w) != which);
        if on {
            self.new_itimers.push(which as u32);
        }
    }

    /// Not set; the former setting is read if it was asked for.
    fn goes_on(&mut self, what: &str, former: u64, read: i64, id: u64) -> Decision {
        self.note("timer-carried", format!("{what} goes on with old's time"));
        match former {
            0 => Decision::Answer(0),
            at => Decision::Instead { nr: read, args: [id, at, 0, 0, 0, 0], then: None },
        }
    }

    /// The id of the timer of old's that this one stands for, or one that old does not use.
    fn timer_create(&mut self, host: &Host, call: &Call) -> Result<Option<Decision>> {
        let clock = call.args[0] as i32;
        let kind = match call.args[1] {
            0 => (clock, libc::SIGEV_SIGNAL, libc::SIGALRM),
            at => (clock, host.mem.u32(Addr(at + 12))? as i32, host.mem.u32(Addr(at + 8))? as i32),
        };
        let free = |id: &u32| !self.timers.iter().any(|t| t.id == *id);
        let old = &self.spec.old.posix_timers;
        let same = old.iter().find(|t| (t.clockid, t.notify, t.signo) == kind && free(&t.id)).map(|t| t.id);
        let unused = || {
            let ids = old.iter().map(|t| t.id).chain(self.timers.iter().map(|t| t.id));
            ids.max().map_or(0, |n| n + 1)
        };
        let id = same.unwrap_or_else(unused);
        if !old.is_empty() {
            host.mem.write(Addr(call.args[2]), &id.to_le_bytes())?;
        }
        self.timers.push(BootTimer { id, kind, in_old: same.is_some() });
        // The main thread was told the number that it will have.
        let at = Addr(call.args[1]).add(16);
        if kind.1 & libc::SIGEV_THREAD_ID != 0
            && let Some(told) = self.spec.pid
            && host.mem.u32(at)? == told.0 as u32
        {
            host.mem.write(at, &host.pid.0.to_le_bytes())?;
            return Ok(Some(Decision::Then(After::PutBack { at, word: told.0 as u32 })));
        }
        Ok(None)
    }
}
