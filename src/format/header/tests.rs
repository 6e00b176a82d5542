use proptest::prelude::*;

use super::*;

fn small() -> Header {
    Header::new(Sector(1000), ClusterSize::MIN).unwrap()
}

/// The bytes of [`small`] with the word at `at` replaced, parsed.
fn parse_with(at: usize, word: u32) -> Result<Header, HeaderError> {
    let mut bytes = small().to_bytes();
    bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
    Header::parse(&bytes)
}

#[test]
fn a_new_header_is_as_the_format_document_says() {
    let header = Header::new(Sector(131_072), ClusterSize::from_bytes(65_536).unwrap()).unwrap();
    let bytes = header.to_bytes();
    let words: Vec<u32> = bytes[16..]
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(&bytes[..16], b"WithouFreSpacExt");
    // type, heads, cylinders, cluster, n, disk size, its high half, in use,
    // first block, flags, extension
    assert_eq!(words, [2, 16, 256, 128, 1024, 131_072, 0, 0, 128, 1, 0, 0]);
    assert_eq!(Header::parse(&bytes), Ok(header));
}

#[test]
fn first_block_is_header_and_bat_rounded_up() {
    // 16 + 8176 entries fill a cluster of 32 KiB to the byte.
    let full = Header::new(Sector(8176 * 64), ClusterSize::MIN).unwrap();
    assert_eq!(full.geometry().data_start, 32 << 10);
    let more = Header::new(Sector(8176 * 64 + 1), ClusterSize::MIN).unwrap();
    assert_eq!(more.geometry().data_start, 64 << 10);
}

#[test]
fn sizes_that_the_format_cannot_hold() {
    let new = Header::new;
    assert_eq!(
        new(Sector(0), ClusterSize::MIN),
        Err(HeaderError::DiskSize(0))
    );
    let too_large = |sectors, cluster| match new(Sector(sectors), cluster) {
        Err(HeaderError::TooLarge(error)) => error,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        too_large(u64::MAX, ClusterSize::MAX).cluster_that_fits(),
        None
    );
    let largest = Sector(u64::from(Header::ENTRIES_MAX) * 64);
    let header = new(largest, ClusterSize::MIN).unwrap();
    assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
    let more = Sector(largest.0 + 1);
    let error = too_large(more.0, ClusterSize::MIN);
    assert_eq!(error.max(), largest);
    assert_eq!(error.cluster_that_fits(), ClusterSize::from_bytes(64 << 10));
    assert_eq!(
        error.to_string(),
        "a disk of 17592186012160 bytes is too large: version 2 of the format holds at most \
         17592186011648 bytes (16 TiB) with clusters of 32 KiB"
    );
    // As large as it is said to be possible, and not a cluster more.
    for shift in 15..=26 {
        let cluster = ClusterSize::from_bytes(1 << shift).unwrap();
        let max = too_large(1 << 50, cluster).max();
        assert!(new(max, cluster).is_ok());
        let fits = too_large(max.0 + cluster.sectors(), cluster).cluster_that_fits();
        assert!(fits.is_none_or(|fits| fits > cluster));
    }
}

#[test]
fn each_bad_field_is_named() {
    use HeaderError as E;
    assert_eq!(parse_with(0, 0), Err(E::Signature));
    assert_eq!(parse_with(16, 3), Err(E::Type(3)));
    for cluster in [0, 1, 32, 65, 96, 1 << 18, u32::MAX] {
        assert_eq!(parse_with(28, cluster), Err(E::ClusterSize(cluster)));
    }
    let too_few = |entries| {
        Err(E::TooFewEntries {
            entries,
            needed: 16,
        })
    };
    assert_eq!(parse_with(32, 0), too_few(0));
    assert_eq!(parse_with(32, 15), too_few(15));
    assert_eq!(parse_with(32, u32::MAX), Err(E::TooManyEntries(u32::MAX)));
    assert_eq!(parse_with(36, 0), Err(E::DiskSize(0)));
    assert!(matches!(parse_with(40, u32::MAX), Err(E::DiskSize(_))));
    assert_eq!(parse_with(44, 2), Err(E::InUse(2)));
    for sectors in [0, 1, 63, 65] {
        let result = parse_with(48, sectors);
        assert!(
            matches!(result, Err(E::FirstBlock { sectors: s, .. }) if s == sectors),
            "{result:?}"
        );
    }
}

#[test]
fn version_1_takes_half_of_the_size_and_an_implied_first_block() {
    let mut bytes = small().to_bytes();
    bytes[..16].copy_from_slice(SIGNATURE_V1);
    bytes[40..44].copy_from_slice(&7u32.to_le_bytes());
    bytes[48..52].fill(0);
    let header = Header::parse(&bytes).unwrap();
    assert_eq!(header.geometry().disk_size, Sector(1000));
    // 64 bytes and 16 entries end in the first sector.
    assert_eq!(header.geometry().data_start, 512);
    // What version 1 leaves undefined stays as it was.
    assert_eq!(header.to_bytes(), bytes);
}

#[test]
fn a_header_on_top_of_another() {
    let top = small().on_top().unwrap();
    assert_eq!(top, small());
    // With the version, and with entries that the disk does not need.
    let mut bytes = small().to_bytes();
    bytes[..16].copy_from_slice(SIGNATURE_V1);
    bytes[32..36].copy_from_slice(&9000u32.to_le_bytes());
    bytes[48..52].copy_from_slice(&256u32.to_le_bytes());
    let lower = Header::parse(&bytes).unwrap();
    let top = lower.on_top().unwrap();
    assert_eq!(top.geometry().version, Version::V1);
    assert_eq!(top.geometry().entries, 9000);
    assert_eq!(top.geometry().data_start, 2 << 15);
    assert_eq!(Header::parse(&top.to_bytes()), Ok(top));
}

#[test]
fn versions_change_where_they_can() {
    let v2 = small();
    let v1 = v2.in_version(Version::V1).unwrap();
    assert_eq!(Header::parse(&v1.to_bytes()), Ok(v1.clone()));
    assert_eq!(v1.geometry().data_start, v2.geometry().data_start);
    assert_eq!(v1.in_version(Version::V2), Ok(v2));

    let large = Header::new(Sector(1 << 32), ClusterSize::DEFAULT).unwrap();
    let is_too_large = |result| match result {
        Err(HeaderError::TooLarge(error)) => error.version == Version::V1,
        _ => false,
    };
    assert!(is_too_large(large.in_version(Version::V1)));
    let mut bytes = v1.to_bytes();
    bytes[48..52].fill(0);
    let odd = Header::parse(&bytes).unwrap();
    assert!(matches!(
        odd.in_version(Version::V2),
        Err(HeaderError::FirstBlock { .. })
    ));
}

#[test]
fn growing_keeps_the_grid() {
    let grown = small().grown(Sector(64 * 9000)).unwrap();
    assert_eq!(
        grown,
        Header::new(Sector(64 * 9000), ClusterSize::MIN).unwrap()
    );
    let smaller = HeaderError::Smaller {
        from: 1000,
        to: 999,
    };
    assert_eq!(small().grown(Sector(999)), Err(smaller));
    let mut bytes = small().to_bytes();
    bytes[..16].copy_from_slice(SIGNATURE_V1);
    bytes[48..52].fill(0);
    let odd = Header::parse(&bytes).unwrap();
    let grown = odd.grown(Sector(64 * 9000)).unwrap();
    assert_eq!(grown.geometry().data_start, 512 + (2 << 15));
    assert_eq!(Header::parse(&grown.to_bytes()), Ok(grown));
    let Err(HeaderError::TooLarge(error)) = odd.grown(Sector(1 << 32)) else {
        panic!("version 1 has no more than 32 bits of sectors");
    };
    assert_eq!(error.max(), Sector((1 << 32) - 64));
    assert_eq!(error.cluster_that_fits(), Some(ClusterSize::MIN));
}

#[test]
fn md_pages_cover_each_entry_once() {
    let header = Header::new(Sector(64 * 3000), ClusterSize::MIN).unwrap();
    let geometry = header.geometry();
    assert_eq!(geometry.md_pages(), 3);
    let pages: Vec<_> = (0..3).map(|page| geometry.md_page_entries(page)).collect();
    assert_eq!(pages, [0..1008, 1008..2032, 2032..3000]);
    for (page, entries) in pages.into_iter().enumerate() {
        for entry in entries {
            assert_eq!(geometry.md_page(GuestCluster(entry)), page as u32);
        }
    }
}

proptest! {
    #[test]
    fn bytes_never_panic_and_survive_the_round_trip(
        mut bytes: [u8; Header::LEN],
        version_1: bool,
        good in prop::collection::vec(any::<bool>(), 12),
    ) {
        // Noise stops at the signature; let most fields of most cases be good.
        bytes[..16].copy_from_slice(if version_1 { SIGNATURE_V1 } else { SIGNATURE_V2 });
        let model = small().to_bytes();
        for (index, _) in good.iter().enumerate().filter(|(_, good)| **good) {
            let field = 16 + 4 * index..20 + 4 * index;
            bytes[field.clone()].copy_from_slice(&model[field]);
        }
        if let Ok(header) = Header::parse(&bytes) {
            let mut expected = bytes;
            if matches!(header.in_use, InUse::Closed | InUse::ClosedWithExtension) {
                // Nobody is converting it.
                expected[52] &= !(FLAG_CONVERTING as u8);
            }
            prop_assert_eq!(header.to_bytes(), expected);
            let geometry = header.geometry();
            prop_assert!(geometry.data_start >= geometry.metadata_len());
            prop_assert!(geometry.entries <= Header::ENTRIES_MAX);
        }
    }

    #[test]
    fn a_new_header_parses(sectors in 1u64..1 << 44, shift in 15u32..=26) {
        let cluster = ClusterSize::from_bytes(1 << shift).unwrap();
        if let Ok(header) = Header::new(Sector(sectors), cluster) {
            prop_assert_eq!(Header::parse(&header.to_bytes()), Ok(header));
        }
    }

    #[test]
    fn a_bat_value_means_the_cluster_it_was_made_from(
        version_1: bool,
        start in 1u64..2000,
        shift in 15u32..=26,
        number: u32,
    ) {
        let cluster = ClusterSize::from_bytes(1 << shift).unwrap();
        let geometry = Geometry {
            version: if version_1 { Version::V1 } else { Version::V2 },
            cluster,
            entries: 1,
            disk_size: Sector(1),
            data_start: if version_1 { start * SECTOR_SIZE } else { start * cluster.bytes() },
        };
        let limit = geometry.host_cluster_limit();
        let first = geometry.first_host_cluster().0;
        let host = HostCluster(first + number % (limit - first));
        prop_assert_eq!(geometry.host_cluster(geometry.bat_value(host)), Some(host));
        prop_assert_eq!(geometry.host_clusters_below(geometry.host_offset(host)), u64::from(host.0));
    }
}

#[test]
fn a_disk_that_may_hold_data_is_not_said_to_be_empty() {
    let mut header = Header::new(Sector(2048), ClusterSize::DEFAULT).unwrap();
    let flags = |header: &Header| header.to_bytes()[52];
    header.set_converting();
    let before = flags(&header);
    header.clear_empty();
    assert_eq!(flags(&header), before - 1);
    assert!(header.is_converting());
}

#[test]
fn a_first_block_offset_that_cannot_be_is_computed_anew() {
    let cluster = ClusterSize::MIN;
    // 9000 entries and the header take two clusters, or 71 sectors of them.
    let bytes_of = |version_1: bool, first_block: u32| {
        let mut bytes = Header::new(Sector(64 * 9000), cluster).unwrap().to_bytes();
        if version_1 {
            bytes[..16].copy_from_slice(SIGNATURE_V1);
        }
        bytes[48..52].copy_from_slice(&first_block.to_le_bytes());
        bytes
    };
    let repaired = |version_1, first_block, bat: &[u32]| {
        let bytes = bytes_of(version_1, first_block);
        let mut header = Header::parse_for_repair(&bytes).unwrap();
        header.repair_first_block(100 << 20, bat);
        assert!(header.first_block_is_wrong());
        header.accept_first_block();
        assert!(!header.first_block_is_wrong());
        let again = Header::parse(&header.to_bytes()).unwrap();
        assert_eq!(again.geometry(), header.geometry());
        header.geometry().data_start
    };
    for wrong in [1, 127, u32::MAX] {
        assert!(Header::parse(&bytes_of(false, wrong)).is_err(), "{wrong}");
        assert_eq!(repaired(false, wrong, &[0, 2, 3]), 2 << 15);
    }
    // The entries of version 1 say on which grid the clusters are; those that cannot
    // be right say nothing.
    for (bat, sectors) in [
        (&[][..], 71),
        (&[0, 5, 70], 71),
        (&[0, 71], 71),
        (&[0, 3, 72 + 64 * 9, 90], 72),
        (&[70 + 64], 70 + 64),
    ] {
        assert_eq!(repaired(true, 1, bat), sectors * 512, "{bat:?}");
    }
    // One that can be, and lies in the file, stays.
    let mut header = Header::parse(&bytes_of(true, 90)).unwrap();
    for (file_len, is_wrong) in [(90 * 512, false), (90 * 512 - 1, true)] {
        header.repair_first_block(file_len, &[]);
        assert_eq!(header.first_block_is_wrong(), is_wrong, "{file_len}");
    }
    assert_eq!(header.geometry().data_start, 71 * 512);
}

#[test]
fn shrinking_keeps_the_grid_and_gives_entries_up() {
    let large = Header::new(Sector(64 * 9000), ClusterSize::MIN).unwrap();
    assert_eq!(large.geometry().data_start, 2 << 15);
    let mut small = large.shrunk(Sector(64 * 3 + 1)).unwrap();
    assert_eq!(
        small,
        Header::new(Sector(64 * 3 + 1), ClusterSize::MIN).unwrap()
    );
    assert_eq!(large.shrunk(Sector(64 * 9000)), Ok(large.clone()));
    for size in [0, 64 * 9000 + 1] {
        assert_eq!(large.shrunk(Sector(size)), Err(HeaderError::DiskSize(size)));
    }
    // Data that starts later than it has to stays where it is; so does version 1.
    small.geometry.data_start = 5 << 15;
    small.first_block_sectors = 5 * 64;
    assert_eq!(
        small.shrunk(Sector(64)).unwrap().geometry().data_start,
        5 << 15
    );
    let old = large.in_version(Version::V1).unwrap();
    let shrunk = old.shrunk(Sector(64)).unwrap();
    assert_eq!(shrunk.geometry().data_start, 2 << 15);
    assert_eq!(Header::parse(&shrunk.to_bytes()), Ok(shrunk));
}

#[test]
fn both_signatures_are_known_and_no_other() {
    for signature in [SIGNATURE_V1, SIGNATURE_V2] {
        assert!(Header::has_signature(signature));
        assert!(!Header::has_signature(&signature[..15]));
    }
    assert!(!Header::has_signature(b"QFI\xfb0123456789abcdef"));
}

#[test]
fn the_largest_disk_is_too_large_for_its_entries_and_a_larger_one_for_any() {
    let parse = |sectors: u64| {
        let mut bytes = small().to_bytes();
        bytes[36..44].copy_from_slice(&sectors.to_le_bytes());
        Header::parse(&bytes).unwrap_err()
    };
    let largest = i64::MAX as u64 / SECTOR_SIZE;
    assert!(matches!(parse(largest), HeaderError::TooFewEntries { .. }));
    assert!(matches!(parse(largest + 1), HeaderError::DiskSize(_)));
    assert!(matches!(parse(0), HeaderError::DiskSize(0)));
}
