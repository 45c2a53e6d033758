//! timerfd_create(2): clock, ticks that wait to be read, time left and interval, from fdinfo.

use super::{Open, View, fdinfo};
use crate::procfs::fdinfo::FdInfo;
use mcr_image::proto;

/// How often a timer that is due is looked at again.
const LOOKS: usize = 1000;

pub(super) fn collect(view: &View<'_>, o: &Open<'_>) -> proto::TimerFd {
    let mut timer = read(&o.info);
    // An interval, no time left and no tick: not set, or due with the interrupt still to come (timerfd_show in
    // fs/timerfd.c shows a time that has passed as 0). The latter has a tick in a moment.
    for _ in 0..LOOKS {
        if timer.value_ns != 0 || timer.ticks != 0 || timer.interval_ns == 0 {
            break;
        }
        std::thread::yield_now();
        let Ok(again) = fdinfo(view, o.number) else { break };
        timer = read(&again);
    }
    timer
}

fn read(info: &FdInfo) -> proto::TimerFd {
    let flags = info.get("settime flags").and_then(|b| std::str::from_utf8(b).ok());
    proto::TimerFd {
        clockid: info.dec("clockid").unwrap_or(0) as i32,
        ticks: info.dec("ticks").unwrap_or(0),
        settime_flags: flags.and_then(|s| u32::from_str_radix(s, 8).ok()).unwrap_or(0),
        value_ns: info.time("it_value").unwrap_or(0),
        interval_ns: info.time("it_interval").unwrap_or(0),
    }
}
