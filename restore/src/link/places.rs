//! Where an old address is once the patch is laid over: objects move, and elements of an array that has another
//! layout lie further apart.

use mcr_image::proto;

struct Place {
    old: (u64, u64),
    old_stride: u64,
    new: u64,
    stride: u64,
}

/// The re-laid-out objects of a patch, by old address.
pub struct Places(Vec<Place>);

impl Places {
    /// Those of a patch.
    #[must_use]
    pub fn of(patch: &proto::Patch) -> Self {
        let place = |o: &proto::TypedObject| {
            // Without strides (an older image) only an object's start is known.
            let end = o.old_addr + (u64::from(o.count.max(1)) * o.old_stride).max(1);
            Place { old: (o.old_addr, end), old_stride: o.old_stride.max(1), new: o.addr, stride: o.stride }
        };
        let mut all: Vec<Place> = patch.objects.iter().filter(|o| o.moved || o.relaid).map(place).collect();
        all.sort_unstable_by_key(|p| p.old.0);
        Self(all)
    }

    /// The new address: of an object, or of an element of an array. `None`: somewhere inside of one, which only
    /// types can tell.
    #[must_use]
    pub fn find(&self, old: u64) -> Option<u64> {
        let n = self.0.partition_point(|p| p.old.0 <= old);
        let Some(p) = n.checked_sub(1).map(|n| &self.0[n]).filter(|p| old < p.old.1) else {
            return Some(old);
        };
        let offset = old - p.old.0;
        offset.is_multiple_of(p.old_stride).then(|| p.new + offset / p.old_stride * p.stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_of_arrays_have_places_of_their_own() {
        let object = |old_addr, addr, count, old_stride, stride| proto::TypedObject {
            old_addr,
            addr,
            count,
            old_stride,
            stride,
            moved: old_addr != addr,
            relaid: true,
            ..proto::TypedObject::default()
        };
        let objects = vec![
            object(0x1000, 0x9000, 4, 72, 80),
            object(0x2000, 0x2000, 3, 8, 16),
            object(0x3000, 0xa000, 0, 0, 0),
        ];
        let p = Places::of(&proto::Patch { objects, ..proto::Patch::default() });
        assert_eq!(p.find(0x1000), Some(0x9000));
        assert_eq!(p.find(0x1000 + 3 * 72), Some(0x9000 + 3 * 80));
        assert_eq!(p.find(0x1000 + 73), None, "a member may be anywhere");
        assert_eq!(p.find(0x2010), Some(0x2020), "in place, too");
        assert_eq!((p.find(0x3000), p.find(0x3008)), (Some(0xa000), Some(0x3008)));
        assert_eq!((p.find(0xfff), p.find(0x1000 + 4 * 72)), (Some(0xfff), Some(0x1000 + 4 * 72)));
    }
}
