//! The end-to-end tests: real processes, real connections, checked from outside and from inside.
//! What this machine does not allow is skipped with its reason, and counted.

#![allow(missing_docs)]

mod bad_input;
mod house;
mod in_place;
mod kv_update;
mod kv_workers;
mod memcached_update;
mod net_move;
mod nginx_update;
mod ngircd_update;
mod redis_update;
mod restore_plain;
mod support;
mod trial;

use libtest_mimic::{Arguments, Failed, Trial};
use support::Check;

/// A test, or the reason why it cannot run here.
pub struct Case {
    pub name: String,
    pub skip: Option<String>,
    pub root: bool,
    pub run: Box<dyn FnOnce() -> Check + Send>,
}

impl Case {
    pub fn new(name: &str, run: impl FnOnce() -> Check + Send + 'static) -> Case {
        Case { name: name.to_owned(), skip: None, root: true, run: Box::new(run) }
    }

    pub fn needs_no_root(mut self) -> Case {
        self.root = false;
        self
    }

    pub fn skip_if(mut self, reason: Option<String>) -> Case {
        self.skip = self.skip.or(reason);
        self
    }
}

fn main() {
    let mut args = Arguments::from_args();
    // What whoever started us has left open does not reach a server: its numbers would depend on it.
    // SAFETY: close_range(2), with CLOSE_RANGE_CLOEXEC since Linux 5.11, closes nothing of ours yet.
    let kept = unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    assert_eq!(kept, 0, "close_range(2)");
    // Every case freezes and boots processes on what are usually two cores: one at a time.
    args.test_threads.get_or_insert(1);
    let mut cases = Vec::new();
    cases.extend(house::cases());
    cases.extend(restore_plain::cases());
    cases.extend(net_move::cases());
    cases.extend(kv_update::cases());
    cases.extend(kv_workers::cases());
    cases.extend(in_place::cases());
    cases.extend(trial::cases());
    cases.extend(bad_input::cases());
    cases.extend(redis_update::cases(args.list));
    cases.extend(memcached_update::cases(args.list));
    cases.extend(ngircd_update::cases(args.list));
    cases.extend(nginx_update::cases(args.list));
    // SAFETY: geteuid(2) cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let trials = cases
        .into_iter()
        .map(|c| {
            let reason = c.skip.or_else(|| (c.root && !root).then(|| "needs root".to_owned()));
            let name = match &reason {
                Some(r) => format!("{} [skipped: {r}]", c.name),
                None => c.name,
            };
            let (run, what) = (c.run, name.clone());
            let watched = move || {
                let _limit = support::limit::Limit::new(&what);
                run().map_err(Failed::from)
            };
            Trial::test(name, watched).with_ignored_flag(reason.is_some())
        })
        .collect();
    libtest_mimic::run(&args, trials).exit();
}
