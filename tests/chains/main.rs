//! Disks of the official tool, with snapshots on them, served to a guest.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/front_end.rs"]
mod front_end;

use std::path::Path;

use sha2::{Digest, Sha256};
use tempfile::TempDir;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use common::backend::Backend;
use common::fixtures::FIXTURES;
use common::img::{names_in, ploop_img, qemu_img_check, sha256};
use common::require_tool;
use front_end::*;

const OK: u8 = 0;

/// What is read at once, in bytes.
const CHUNK: u64 = 256 << 10;
/// Of all fixtures, in sectors.
const CLUSTER: u64 = 128;

/// A disk that is served, and what should be in it.
struct Guest {
    front_end: FrontEnd,
    disk: Vec<u8>,
}

impl Guest {
    /// Reads all of it.
    fn new(backend: &Backend, size: u64) -> Self {
        let mut front_end = FrontEnd::connect(backend.socket());
        front_end.negotiate(u64::MAX);
        front_end.start_rings();
        let mut guest = Self {
            front_end,
            disk: Vec::new(),
        };
        guest.disk = guest.read(size);
        guest
    }

    fn read(&mut self, size: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for start in (0..size).step_by(CHUNK as usize) {
            let len = CHUNK.min(size - start) as u32;
            let target = [writable(DATA, len)];
            let ring = &mut self.front_end.rings[0];
            let answer = ring.run(VIRTIO_BLK_T_IN, start / 512, &target);
            assert_eq!(answer, (OK, len + 1));
            bytes.extend(self.front_end.bytes(DATA, len as usize));
        }
        bytes
    }

    /// That what is read is what should be in it.
    #[track_caller]
    fn compare(&mut self) {
        let found = self.read(self.disk.len() as u64);
        let sectors = found.chunks(512).zip(self.disk.chunks(512));
        let wrong: Vec<_> = (0..)
            .zip(sectors)
            .filter(|(_, (found, expected))| found != expected)
            .map(|(sector, _)| sector)
            .collect();
        assert_eq!(wrong, [0_u64; 0], "sectors that differ");
    }

    fn sha256(&self) -> String {
        let digest = Sha256::digest(&self.disk);
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn write(&mut self, sector: u64, count: u64, byte: u8) {
        let part = (sector * 512) as usize..((sector + count) * 512) as usize;
        self.disk[part.clone()].fill(byte);
        self.front_end.fill(DATA, &self.disk[part.clone()]);
        let source = [readable(DATA, part.len() as u32)];
        let ring = &mut self.front_end.rings[sector as usize % 4];
        assert_eq!(ring.run(VIRTIO_BLK_T_OUT, sector, &source), (OK, 1));
    }

    fn write_zeroes(&mut self, sector: u64, count: u64) {
        let part = (sector * 512) as usize..((sector + count) * 512) as usize;
        self.disk[part].fill(0);
        self.run_on_range(VIRTIO_BLK_T_WRITE_ZEROES, sector, count);
    }

    /// Discards what the top has: it reads as zeros. What only a lower image has
    /// stays, see [`Guest::discard_in_vain`].
    fn discard(&mut self, sector: u64, count: u64) {
        let part = (sector * 512) as usize..((sector + count) * 512) as usize;
        self.disk[part].fill(0);
        self.run_on_range(VIRTIO_BLK_T_DISCARD, sector, count);
    }

    fn discard_in_vain(&mut self, sector: u64, count: u64) {
        self.run_on_range(VIRTIO_BLK_T_DISCARD, sector, count);
    }

    fn run_on_range(&mut self, kind: u32, sector: u64, count: u64) {
        // No flags.
        let range = [sector.to_le_bytes(), count.to_le_bytes()].concat();
        self.front_end.fill(DATA, &range);
        let ring = &mut self.front_end.rings[sector as usize % 4];
        assert_eq!(ring.run(kind, 0, &[readable(DATA, 16)]), (OK, 1));
    }

    /// Parts of clusters and whole ones, of which the fixtures have some.
    fn change(&mut self) {
        let size = self.disk.len() as u64 / 512;
        for cluster in [0, 2, 40, 81, 100] {
            self.write(cluster * CLUSTER + 3, 7, 0x81);
            self.write((cluster + 1) * CLUSTER, CLUSTER, 0x82);
            // From one into the next.
            self.write((cluster + 4) * CLUSTER - 9, 20, 0x83);
        }
        self.write(size - 1, 1, 0x84);
        for cluster in [1, 41, 82] {
            self.discard(cluster * CLUSTER, CLUSTER);
        }
        self.discard(3 * CLUSTER + 120, 8);
        self.discard_in_vain(8 * CLUSTER, CLUSTER);
        self.discard_in_vain(11 * CLUSTER + 8, 16);
        // Of what only the lower image has, of what the top has, and of nothing.
        for cluster in [9, 43, 60, 101] {
            self.write_zeroes(cluster * CLUSTER, CLUSTER);
        }
        self.write_zeroes(14 * CLUSTER + 1, 3);
        self.write_zeroes(2 * CLUSTER + 5, 2);
        let ring = &mut self.front_end.rings[0];
        assert_eq!(ring.run(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    }
}

/// Every image is clean, for us and for QEMU.
fn check(bundle: &Path) {
    ploop_img(["check".as_ref(), bundle.as_os_str()]).ok();
    for name in names_in(bundle) {
        let path = bundle.join(name);
        let is_ploop = std::fs::read(&path).unwrap().starts_with(b"Without");
        if is_ploop && require_tool("qemu-img") {
            qemu_img_check(&path);
        }
    }
}

#[test]
fn disks_of_the_official_tool_are_bases_of_chains() {
    let folder = TempDir::new().unwrap();
    for fixture in FIXTURES {
        let Some(bundle) = fixture.unpack(folder.path()) else {
            return;
        };
        let path = bundle.to_str().unwrap();
        let snapshot = || {
            ploop_img(["snapshot", "create", path])
                .ok()
                .trim()
                .to_owned()
        };
        let serve = |options: &[&str]| {
            let socket = folder.path().join("socket");
            Backend::start(&bundle, &socket, options)
        };
        let looks_like = |options: &[&str], digest: &str| {
            let backend = serve(options);
            let guest = Guest::new(&backend, fixture.size);
            assert_eq!(guest.sha256(), digest, "{}: {options:?}", fixture.name);
            backend.stop();
            check(&bundle);
        };

        let first = snapshot();
        let backend = serve(&[]);
        let mut guest = Guest::new(&backend, fixture.size);
        assert_eq!(guest.sha256(), fixture.sha256, "{}", fixture.name);
        guest.change();
        guest.compare();
        let changed = guest.sha256();
        backend.stop();
        check(&bundle);

        let second = snapshot();
        let backend = serve(&[]);
        let mut guest = Guest::new(&backend, fixture.size);
        assert_eq!(guest.sha256(), changed, "{}", fixture.name);
        guest.write(5, 1000, 0x91);
        guest.discard(3 * CLUSTER, 2 * CLUSTER);
        guest.compare();
        let last = guest.sha256();
        backend.stop();

        looks_like(&["--snapshot", &first], fixture.sha256);
        looks_like(&["--snapshot", &second], &changed);
        looks_like(&[], &last);
        let flat = folder.path().join("flat.raw");
        ploop_img(["convert", path, flat.to_str().unwrap()]).ok();
        assert_eq!(sha256(&flat), last, "{}", fixture.name);
        std::fs::remove_file(flat).unwrap();
        ploop_img(["snapshot", "delete", path, &second]).ok();
        looks_like(&[], &last);
        ploop_img(["snapshot", "merge", path]).ok();
        looks_like(&[], &last);
    }
}

#[test]
fn a_bundle_is_not_changed_under_a_guest() {
    let folder = TempDir::new().unwrap();
    let bundle = folder.path().join("bundle");
    let path = bundle.to_str().unwrap();
    ploop_img(["create", path, "64M"]).ok();
    let guid = ploop_img(["snapshot", "create", path]).ok();
    let guid = guid.trim();
    let state = || {
        let names = names_in(&bundle).into_iter();
        let digests = names.map(|name| (sha256(&bundle.join(&name)), name));
        digests.collect::<Vec<_>>()
    };
    let below: [&[&str]; 5] = [
        &["snapshot", "delete", path, guid],
        &["snapshot", "merge", path],
        &["compact", path],
        &["convert", "--format-version", "1", path],
        &["check", "--repair", "all", path],
    ];
    let above: [&[&str]; 3] = [
        &["snapshot", "create", path],
        &["snapshot", "switch", path, guid],
        &["resize", path, "+1M"],
    ];
    // Who serves the top uses all levels; who serves a snapshot, not the top.
    for (options, refused) in [
        (&[][..], [&below[..], &above].concat()),
        (&["--snapshot", guid], below.to_vec()),
    ] {
        let backend = Backend::start(&bundle, &folder.path().join("socket"), options);
        let before = state();
        for command in refused {
            let error = ploop_img(command).fails();
            assert!(error.contains("another process"), "{command:?}: {error}");
            assert!(state() == before, "{command:?}");
        }
        ploop_img(["convert", "--snapshot", guid, path, &format!("{path}.raw")]).ok();
        std::fs::remove_file(format!("{path}.raw")).unwrap();
        backend.stop();
    }
    for command in [below[1], below[2], above[2]] {
        ploop_img(command).ok();
        check(&bundle);
    }
}
