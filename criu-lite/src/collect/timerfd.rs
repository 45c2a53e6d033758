//! timerfd_create(2): clock, ticks that wait to be read, time left and interval, from fdinfo.

use super::Open;
use mcr_image::proto;

pub(super) fn collect(o: &Open<'_>) -> proto::TimerFd {
    let flags = o.info.get("settime flags").and_then(|b| std::str::from_utf8(b).ok());
    proto::TimerFd {
        clockid: o.info.dec("clockid").unwrap_or(0) as i32,
        ticks: o.info.dec("ticks").unwrap_or(0),
        settime_flags: flags.and_then(|s| u32::from_str_radix(s, 8).ok()).unwrap_or(0),
        value_ns: o.info.time("it_value").unwrap_or(0),
        interval_ns: o.info.time("it_interval").unwrap_or(0),
    }
}
