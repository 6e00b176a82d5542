//! Bundles whose base is a raw file, served alone and under deltas.

use std::fs::{self, File};

use super::common::{backend::Backend, fixtures::fixture, img::ploop_img, require_tool, tool};
use super::*;

/// The bundle and its only image.
pub fn unpack(folder: &TempDir) -> Option<(PathBuf, PathBuf)> {
    let bundle = fixture("plain").unpack(folder.path())?;
    let raw = bundle.join("root.hds");
    Some((bundle, raw))
}

#[test]
fn a_plain_bundle_is_true_to_the_model() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Some((bundle, raw)) = unpack(&folder) else {
        return;
    };
    // Larger, and nothing but a hole, as the models expect it.
    let size = 64 * MIB + 5 * SECTOR as u64;
    File::create(&raw).unwrap().set_len(size).unwrap();
    let descriptor = bundle.join("DiskDescriptor.xml");
    let text = fs::read_to_string(&descriptor).unwrap();
    let sectors = |bytes: u64| (bytes / SECTOR as u64).to_string();
    let text = text.replace(&sectors(fixture("plain").size), &sectors(size));
    fs::write(&descriptor, text).unwrap();
    let rig = Rig {
        image: bundle,
        socket: folder.path().join("socket"),
        folder,
    };
    let mut models = models(3, size, 7);
    let mut bytes = Vec::new();
    for options in [
        &["--cache", "none", "--aio", "io_uring"],
        &["--cache", "writeback", "--aio", "psync"],
    ] {
        let backend = rig.serve(options);
        let mut client = Client::connect(backend.socket(), models.len());
        assert_eq!(client.capacity, size);
        read_back(&mut client, &mut models);
        load(&mut client, &mut models, REQUESTS);
        expect_locked(&raw);
        bytes = read_back(&mut client, &mut models);
        drop(client);
        backend.stop();
    }
    assert_eq!(fs::metadata(&raw).unwrap().len(), size);
    let copy = rig.folder.path().join("copy");
    fs::write(&copy, &bytes).unwrap();
    if require_tool("qemu-img") {
        let formats = ["-f", "raw", "-F", "raw"];
        run(tool("qemu-img")
            .arg("compare")
            .args(formats)
            .args([&raw, &copy]));
    }
    ploop_img(["check".as_ref(), rig.image.as_os_str()]).ok();
}

/// QEMU does not write to the raw file, as to one that another QEMU writes to. It
/// does read raw files that others write to.
fn expect_locked(raw: &Path) {
    if !require_tool("qemu-io") {
        return;
    }
    let output = tool("qemu-io")
        .args(["-f", "raw", "-c", "write 0 512"])
        .arg(raw)
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("lock"), "{said}");
}

#[test]
fn a_plain_snapshot_is_served_as_it_was() {
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Some((bundle, raw)) = unpack(&folder) else {
        return;
    };
    let before = fs::read(&raw).unwrap();
    let said = ploop_img(["snapshot".as_ref(), "create".as_ref(), bundle.as_os_str()]).ok();
    let base = said.trim();

    let top = Backend::start::<&str>(&bundle, &folder.path().join("top"), &[]);
    let option = ["--snapshot", base];
    let snapshot = Backend::start(&bundle, &folder.path().join("snapshot"), &option);
    let mut client = Client::connect(top.socket(), 1);
    let lane = &mut client.lanes[0];
    lane.write(0, &[9; 4096], 0);
    assert_eq!(lane.wait(1), [(0, 0)]);
    let mut of_snapshot = Client::connect_read_only(snapshot.socket(), 1);
    assert!(read_back(&mut of_snapshot, &mut []) == before);
    let mut now = before.clone();
    now[..4096].fill(9);
    assert!(read_back(&mut client, &mut []) == now);
    drop((client, of_snapshot));
    top.stop();
    snapshot.stop();
    assert!(fs::read(&raw).unwrap() == before);
}
