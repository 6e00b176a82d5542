//! Chains on a file system whose files can share data: the copy-on-write of a
//! cluster takes the space of the write, not that of the cluster.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::fs::statvfs;

use super::common::{img::ploop_img, require_tool, small_fs::SmallFs, tool};
use super::*;

const DISK: u64 = 128 * MIB;

/// A disk on XFS, made by `make` where it is told to, and then under a snapshot.
fn chain_on_xfs(make: impl FnOnce(&Rig)) -> Option<(Rig, SmallFs)> {
    let fs = SmallFs::xfs(640 * MIB)?;
    let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let rig = Rig {
        image: fs.root().join("bundle"),
        socket: folder.path().join("socket"),
        folder,
    };
    make(&rig);
    ploop_img(["snapshot", "create", rig.image.to_str().unwrap()]).ok();
    Some((rig, fs))
}

/// What `ploop-img` says of the whole chain, and what is in it.
fn expect_chain(rig: &Rig, bytes: &[u8]) {
    let image = rig.image.to_str().unwrap();
    ploop_img(["check", image]).ok();
    let flat = rig.folder.path().join("flat");
    let raw = rig.folder.path().join("raw");
    fs::write(&raw, bytes).unwrap();
    let flat = flat.to_str().unwrap();
    ploop_img(["convert", "-O", "raw", image, flat]).ok();
    if require_tool("qemu-img") {
        let formats = ["-f", "raw", "-F", "raw"];
        let mut compare = tool("qemu-img");
        run(compare.arg("compare").args(formats).arg(flat).arg(&raw));
    }
}

#[test]
fn a_chain_whose_clusters_are_cloned_is_true_to_the_model() {
    let mut models = models(3, DISK, 11);
    let made = chain_on_xfs(|rig| {
        let image = rig.image.to_str().unwrap();
        ploop_img(["create", image, &DISK.to_string()]).ok();
        let backend = rig.serve(&[]);
        let mut client = Client::connect(backend.socket(), models.len());
        load(&mut client, &mut models, REQUESTS);
        drop(client);
        backend.stop();
    });
    let Some((rig, _fs)) = made else {
        return;
    };
    let mut bytes = Vec::new();
    for options in [&["--aio", "io_uring"], &["--aio", "psync"]] {
        let backend = rig.serve(options);
        let mut client = Client::connect(backend.socket(), models.len());
        read_back(&mut client, &mut models);
        load(&mut client, &mut models, REQUESTS / 6);
        bytes = read_back(&mut client, &mut models);
        drop(client);
        backend.stop();
        ploop_img(["snapshot", "create", rig.image.to_str().unwrap()]).ok();
    }
    expect_chain(&rig, &bytes);
}

#[test]
fn a_small_write_over_a_lower_delta_takes_little_space() {
    const CLUSTERS: u64 = 64;
    let mut bytes = vec![0; (CLUSTERS * MIB) as usize];
    SmallRng::seed_from_u64(5).fill(&mut bytes[..]);
    let made = chain_on_xfs(|rig| {
        let raw = rig.folder.path().join("raw");
        fs::write(&raw, &bytes).unwrap();
        let (raw, image) = (raw.to_str().unwrap(), rig.image.to_str().unwrap());
        ploop_img(["convert", "-f", "raw", "-O", "ploop", raw, image]).ok();
    });
    let Some((rig, fs)) = made else {
        return;
    };
    let used = || {
        let stat = statvfs(fs.root()).unwrap();
        (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    };
    let before = used();
    let backend = rig.serve(&[]);
    let mut client = Client::connect(backend.socket(), 1);
    let lane = &mut client.lanes[0];
    let new = [0x5a; 4096];
    for cluster in 0..CLUSTERS {
        let at = cluster * MIB + 8192;
        lane.write(at, &new, 0);
        assert_eq!(lane.wait(1), [(0, 0)]);
        bytes[at as usize..at as usize + new.len()].copy_from_slice(&new);
    }
    drop(client);
    backend.stop();
    let taken = used().saturating_sub(before);
    assert!(taken < CLUSTERS * MIB / 4, "{taken} bytes");
    expect_chain(&rig, &bytes);
}
