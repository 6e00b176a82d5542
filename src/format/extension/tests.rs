use proptest::prelude::*;

use super::*;

const CLUSTER: usize = 32 << 10;

/// A cluster with `features` and a right checksum.
fn cluster(features: &[u8]) -> Vec<u8> {
    let mut cluster = vec![0; CLUSTER];
    cluster[..8].copy_from_slice(&MAGIC.to_le_bytes());
    cluster[HEAD_LEN..HEAD_LEN + features.len()].copy_from_slice(features);
    let checksum = Md5::digest(&cluster[HEAD_LEN..]);
    cluster[8..24].copy_from_slice(&checksum);
    cluster
}

fn feature(magic: u64, flags: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = [magic.to_le_bytes(), flags.to_le_bytes()].concat();
    bytes.extend((data.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn bitmap(l1_size: u32, l1: &[u64]) -> Vec<u8> {
    let mut data = 1000u64.to_le_bytes().to_vec();
    data.extend([7; 16]);
    data.extend(128u32.to_le_bytes());
    data.extend(l1_size.to_le_bytes());
    data.extend(l1.iter().flat_map(|entry| entry.to_le_bytes()));
    data
}

#[test]
fn bitmaps_and_unknown_features() {
    let features = [
        feature(0x1234, 2, &[1, 2, 3]),
        feature(DIRTY_BITMAP, 0, &bitmap(3, &[0, 1, 4096])),
    ];
    let extension = Extension::parse(&cluster(&features.concat())).unwrap();
    assert_eq!(extension.unknown, [0x1234]);
    assert_eq!(
        extension.bitmaps,
        [DirtyBitmap {
            size: Sector(1000),
            id: BitmapId([7; 16]),
            granularity: 128,
            l1: vec![0, 1, 4096],
        }]
    );
    assert_eq!(extension.clusters().collect::<Vec<_>>(), [Sector(4096)]);
}

#[test]
fn what_is_wrong_is_named() {
    use ExtensionError as E;
    assert_eq!(Extension::parse(&[]), Err(E::Cut("head")));
    assert_eq!(Extension::parse(&[0; CLUSTER]), Err(E::Magic(0)));
    let mut torn = cluster(&[]);
    torn[CLUSTER - 1] = 1;
    assert_eq!(Extension::parse(&torn), Err(E::Checksum));
    let parse = |features: &[u8]| Extension::parse(&cluster(features));
    assert_eq!(
        parse(&feature(5, FLAG_NECESSARY, &[])),
        Err(E::Necessary(5))
    );
    let short = feature(DIRTY_BITMAP, 0, &[0; 31]);
    assert_eq!(parse(&short), Err(E::Cut("dirty bitmap")));
    for l1_size in [1, u32::MAX] {
        let short = feature(DIRTY_BITMAP, 0, &bitmap(l1_size, &[]));
        assert_eq!(parse(&short), Err(E::Cut("dirty bitmap")));
    }
    let mut long = feature(5, 0, &[]);
    long[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(parse(&long), Err(E::Cut("list of features")));
    // Features up to the last byte, no end mark.
    let mut endless = feature(5, 0, &[]).repeat((CLUSTER - HEAD_LEN) / FEATURE_HEAD_LEN - 1);
    endless.extend(feature(5, 0, &[0; 8]));
    assert_eq!(endless.len(), CLUSTER - HEAD_LEN);
    assert_eq!(parse(&endless), Err(E::Cut("list of features")));
}

proptest! {
    #[test]
    fn no_cluster_panics(features in prop::collection::vec(any::<u8>(), 0..200), known: bool) {
        let mut features = features;
        if known && features.len() >= 16 {
            features[..8].copy_from_slice(&DIRTY_BITMAP.to_le_bytes());
            features[8..16].fill(0);
        }
        // Only has to end, in one way or the other.
        let _ = Extension::parse(&cluster(&features));
        let _ = Extension::parse(&features);
    }
}

#[test]
fn what_is_written_is_read_again() {
    let cluster = ClusterSize::MIN;
    let bitmap = |byte, l1: Vec<u64>| DirtyBitmap {
        size: Sector(70_000),
        id: BitmapId([byte; 16]),
        granularity: 8,
        l1,
    };
    let bitmaps = vec![
        bitmap(1, vec![0, 1, 4096, 1]),
        bitmap(2, vec![]),
        bitmap(3, vec![7]),
    ];
    let written = Extension {
        bitmaps,
        unknown: Vec::new(),
    };
    let bytes = written.to_bytes(cluster).unwrap();
    assert_eq!(bytes.len() as u64, cluster.bytes());
    assert_eq!(Extension::parse(&bytes), Ok(written));
    // What fits, and what does not.
    let fixed = HEAD_LEN + 2 * FEATURE_HEAD_LEN + BITMAP_HEAD_LEN;
    let most = (CLUSTER - fixed) / 8;
    for (count, fits) in [(most, true), (most + 1, false)] {
        let full = Extension {
            bitmaps: vec![bitmap(1, vec![1; count])],
            unknown: Vec::new(),
        };
        let bytes = full.to_bytes(cluster);
        assert_eq!(bytes.is_some(), fits);
        if let Some(bytes) = bytes {
            assert_eq!(Extension::parse(&bytes), Ok(full));
        }
    }
}

#[test]
fn names_are_shown_as_qemu_shows_them() {
    let text = "c0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5";
    let id = BitmapId::parse(text).unwrap();
    assert_eq!(id.0[..5], [0xc0, 0xc2, 0xbd, 0xc4, 0x2c]);
    assert_eq!(id.to_string(), text);
    for wrong in [
        "",
        "c0c2bdc42c5c4bb58f5340eb0b5bb5f5",
        "C0C2BDC4-2C5C-4BB5-8F53-40EB0B5BB5F5",
        "{c0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5}",
        "c0c2bdc-42c5c-4bb5-8f53-40eb0b5bb5f5",
        "c0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f",
        "g0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5",
    ] {
        assert_eq!(BitmapId::parse(wrong), None, "{wrong}");
    }
}
