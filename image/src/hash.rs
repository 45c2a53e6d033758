//! Maps for small keys that are looked up millions of times: addresses, indexes, type numbers. The hash is one
//! multiplication a word; who can choose the keys can make a lookup slow, not wrong.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// A hash of words, for [`FastMap`] and [`FastSet`].
#[derive(Clone, Copy, Default)]
pub struct WordHasher(u64);

impl WordHasher {
    fn word(&mut self, v: u64) {
        let x = u128::from((self.0.rotate_left(23) ^ v).wrapping_add(0x9e37_79b9_7f4a_7c15));
        let p = x * 0xd6e8_feb8_6659_fd93_u128;
        self.0 = (p as u64) ^ ((p >> 64) as u64);
    }
}

impl Hasher for WordHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for c in bytes.chunks(8) {
            let mut w = [0; 8];
            w[..c.len()].copy_from_slice(c);
            self.word(u64::from_le_bytes(w));
        }
    }
    fn write_u8(&mut self, v: u8) {
        self.word(v.into());
    }
    fn write_u32(&mut self, v: u32) {
        self.word(v.into());
    }
    fn write_u64(&mut self, v: u64) {
        self.word(v);
    }
    fn write_usize(&mut self, v: usize) {
        self.word(v as u64);
    }
}

/// A map with a fast hash.
pub type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<WordHasher>>;
/// A set with a fast hash.
pub type FastSet<K> = HashSet<K, BuildHasherDefault<WordHasher>>;
