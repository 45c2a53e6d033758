//! Decompressed frames, kept up to a limit. One lock a frame, so that scanning threads do not meet.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// A frame's content.
pub(crate) type Content = Arc<Vec<u8>>;

#[derive(Default)]
struct Slot {
    content: RwLock<Option<Content>>,
    used: AtomicBool,
}

/// A cache with a second-chance clock.
pub(crate) struct FrameCache {
    slots: Vec<Slot>,
    bytes: AtomicUsize,
    hand: AtomicUsize,
    limit: AtomicUsize,
}

impl FrameCache {
    pub fn new(frames: usize, limit: usize) -> Self {
        Self {
            slots: std::iter::repeat_with(Slot::default).take(frames).collect(),
            bytes: AtomicUsize::new(0),
            hand: AtomicUsize::new(0),
            limit: AtomicUsize::new(limit),
        }
    }

    pub fn set_limit(&self, bytes: usize) {
        self.limit.store(bytes, Ordering::Relaxed);
    }

    pub fn get(&self, frame: usize) -> Option<Content> {
        let slot = self.slots.get(frame)?;
        let content = slot.content.read().unwrap_or_else(PoisonError::into_inner).clone();
        if content.is_some() {
            slot.used.store(true, Ordering::Relaxed);
        }
        content
    }

    pub fn put(&self, frame: usize, content: &Content) {
        let limit = self.limit.load(Ordering::Relaxed);
        let Some(slot) = self.slots.get(frame).filter(|_| content.len() <= limit) else {
            return;
        };
        {
            let mut s = slot.content.write().unwrap_or_else(PoisonError::into_inner);
            if s.is_some() {
                return;
            }
            *s = Some(Arc::clone(content));
            self.bytes.fetch_add(content.len(), Ordering::Relaxed);
        }
        // Two rounds at most: the first clears `used`, the second evicts.
        for _ in 0..2 * self.slots.len() {
            if self.bytes.load(Ordering::Relaxed) <= limit {
                break;
            }
            let n = self.hand.fetch_add(1, Ordering::Relaxed) % self.slots.len();
            if n == frame || self.slots[n].used.swap(false, Ordering::Relaxed) {
                continue;
            }
            let gone = self.slots[n].content.write().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(c) = gone {
                self.bytes.fetch_sub(c.len(), Ordering::Relaxed);
            }
        }
    }
}
