//! The disk under the daemon does not answer any more.

use std::time::Duration;

use tempfile::TempDir;

use crate::common::backend::Backend;
use crate::common::img::ploop_img;
use crate::frail_fs::FrailFs;

/// What the daemon may take to end, and some time for a machine that has much to do.
const TIME_TO_END: Duration = Duration::from_millis(5500);

#[test]
fn the_daemon_ends_without_an_answer() {
    let files = TempDir::new().unwrap();
    let image = files.path().join("disk.hds");
    ploop_img(["create", image.to_str().unwrap(), "64M"]).ok();
    for options in [&[][..], &["--aio=psync"]] {
        let Some(fs) = FrailFs::mount(files.path(), 1) else {
            return;
        };
        let place = TempDir::new().unwrap();
        let socket = place.path().join("socket");
        let backend = Backend::start(&fs.path("disk.hds"), &socket, options);
        let fs = fs.cut_power(|_| {
            let corpse = backend.terminate(TIME_TO_END);
            let log = corpse.log();
            assert!(log.contains("the disk does not answer"), "{log}");
            corpse
        });
        // It was not said to be closed.
        let backend = Backend::start(&fs.path("disk.hds"), &socket, options);
        assert!(backend.log().contains("not closed"), "{}", backend.log());
        backend.stop();
    }
}
