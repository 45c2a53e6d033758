//! Byte-exact parsers for the /proc files whose text matters to the byte (paths need not be UTF-8, trailing
//! blanks are part of a path, unknown keys are kept).

pub mod fdinfo;
pub mod maps;
pub mod smaps;

/// Hexadecimal digits to a number; `None` on anything else.
pub(crate) fn hex(b: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(b).ok()?, 16).ok()
}

/// Decimal digits to a number.
pub(crate) fn dec(b: &[u8]) -> Option<u64> {
    std::str::from_utf8(b).ok()?.parse().ok()
}

/// Splits at the first `sep`.
pub(crate) fn cut(b: &[u8], sep: u8) -> Option<(&[u8], &[u8])> {
    let n = b.iter().position(|&c| c == sep)?;
    Some((&b[..n], &b[n + 1..]))
}

/// Removes blanks at both ends.
pub(crate) fn trim(b: &[u8]) -> &[u8] {
    b.trim_ascii()
}
