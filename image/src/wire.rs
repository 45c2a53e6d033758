//! Decoding messages without letting a hostile file multiply its size in memory.
//!
//! An empty element of a repeated field takes two bytes on the wire and some hundred in memory. Elements of
//! real records are longer, so a record of nothing but tiny ones is refused before it is decoded.

use prost::Message;
use prost::encoding::{WireType, decode_key, decode_varint};

/// So many elements are fine, whatever their size.
const FREE: usize = 100_000;
/// Bytes that an element takes on average, at least.
const LEAST: usize = 6;

/// Decodes a message of bounded size in memory.
pub(crate) fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, String> {
    let n = elements(bytes);
    if n > FREE && n > bytes.len() / LEAST {
        return Err(format!("{n} elements of less than {LEAST} bytes on average"));
    }
    M::decode(bytes).map_err(|e| e.to_string())
}

/// Length-delimited fields at the top, up to the first malformed byte (which the decoder describes).
fn elements(mut left: &[u8]) -> usize {
    let mut n = 0;
    while !left.is_empty() {
        let Ok((_, wire)) = decode_key(&mut left) else {
            break;
        };
        let skip = match wire {
            WireType::Varint => decode_varint(&mut left).map(|_| 0).ok(),
            WireType::SixtyFourBit => Some(8),
            WireType::ThirtyTwoBit => Some(4),
            WireType::LengthDelimited => {
                n += 1;
                decode_varint(&mut left).ok().and_then(|n| usize::try_from(n).ok())
            }
            WireType::StartGroup | WireType::EndGroup => None,
        };
        let Some(rest) = skip.and_then(|n| left.get(n..)) else {
            break;
        };
        left = rest;
    }
    n
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{Process, Vma};

    #[test]
    fn a_bomb_of_empty_threads_is_refused_and_many_mappings_are_not() {
        // Field 22, length-delimited, empty.
        let bomb = [0xb2, 0x01, 0x00].repeat(200_000);
        assert!(decode::<Process>(&bomb).unwrap_err().contains("200000 elements"));
        let vma = Vma { start: 1 << 40, end: 1 << 41, prot: 3, ..Default::default() };
        let many = Process { vmas: vec![vma; 200_000], ..Default::default() };
        assert_eq!(decode::<Process>(&many.encode_to_vec()).unwrap(), many);
    }
}
