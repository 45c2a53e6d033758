//! Dumps a real process for the tests, its sockets handed to a keeper.

use libtest_mimic::Failed;
use mcr_criu_lite::dump::{DumpOptions, Kept, dump as write};
use mcr_image::{Image, Pid};
use mcr_restore::keeper::{Keeper, KeeperOptions};
use std::path::Path;

/// Dumps and ends `pid`; the image is in `dir`.
pub fn dump(pid: i32, dir: &Path) -> Result<Image, Failed> {
    let path = dir.join("image.mcr");
    write(Pid(pid), &path, &DumpOptions::default(), &mut |image_id, collected| {
        let keeper = Keeper::for_process(image_id, &mut collected.process, &KeeperOptions::default())
            .map_err(|e| e.to_string())?;
        let socket = keeper.map(|k| k.name().to_owned()).unwrap_or_default();
        Ok(Kept { socket, deadline_unix_s: 0 })
    })?;
    Ok(Image::open(&path)?)
}
