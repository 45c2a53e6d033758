//! From fixes to relocations of the patch.

use crate::plan::Fix;
use mcr_image::proto::{self, place};

/// Adds the relocations among `fixes` to the patch; `at` names the place of an offset.
pub(crate) fn place_fixes(
    patch: &mut proto::Patch,
    fixes: Vec<(u64, Fix)>,
    at: &dyn Fn(u64) -> (place::In, u64),
) {
    let stats = patch.stats.get_or_insert_default();
    for (offset, fix) in fixes {
        let Fix::Reloc { target, symbol, conservative } = fix else { continue };
        let (r#in, offset) = at(offset);
        if conservative {
            stats.relocs_conservative += 1;
        } else {
            stats.relocs_typed += 1;
        }
        patch.relocs.push(proto::Reloc {
            place: Some(proto::Place { offset, r#in: Some(r#in) }),
            target: Some(target),
            symbol,
            conservative,
        });
    }
}
