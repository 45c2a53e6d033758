//! Any bytes as an image: no panic, no unbounded allocation.
#![no_main]
use libfuzzer_sys::fuzz_target;
use mcr_image::{Addr, Image};

fuzz_target!(|data: &[u8]| {
    if let Ok(image) = Image::from_bytes(data) {
        let _ = image.verify();
        let _ = image.memory().for_each_stored(Addr(0), Addr(u64::MAX), &mut |_, _| ());
    }
});
