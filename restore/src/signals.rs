//! siginfo_t of pending signals (128 bytes, include/uapi/asm-generic/siginfo.h).

const CODE: usize = 8;
/// Of a timer's signal: its id and value.
const TIMER_ID: usize = 16;
const VALUE: usize = 24;
const SI_TIMER: i32 = -2;

fn word(info: &[u8], at: usize) -> u32 {
    info.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// The signal's number.
pub(crate) fn number(info: &[u8]) -> u64 {
    word(info, 0).into()
}

/// The POSIX timer that sent it.
pub(crate) fn timer_of(info: &[u8]) -> Option<u32> {
    (word(info, CODE) as i32 == SI_TIMER).then(|| word(info, TIMER_ID))
}

/// Sets the value that it carries.
pub(crate) fn set_value(info: &mut [u8], value: u64) {
    if let Some(b) = info.get_mut(VALUE..VALUE + 8) {
        b.copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timers_signal() {
        let mut info = [0u8; 128];
        info[0] = 35;
        assert_eq!((number(&info), timer_of(&info)), (35, None));
        info[8..12].copy_from_slice(&(-2i32).to_le_bytes());
        info[16] = 3;
        assert_eq!(timer_of(&info), Some(3));
        set_value(&mut info, 0x1234);
        assert_eq!(info[24..32], 0x1234u64.to_le_bytes());
    }
}
