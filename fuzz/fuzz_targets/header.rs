//! The first 64 bytes of an image, the length of its file, and a disk size to change to.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_user_ploop::format::{GuestCluster, Header, Sector, Version};

fuzz_target!(|input: &[u8]| {
    let Some((bytes, rest)) = input.split_first_chunk::<{ Header::LEN }>() else {
        return;
    };
    let mut numbers = rest.chunks_exact(8).map(|bytes| {
        let bytes = bytes.try_into().expect("8 bytes");
        u64::from_le_bytes(bytes)
    });
    let file_len = numbers.next().unwrap_or(0);
    let size = numbers.next().unwrap_or(0);
    let for_repair = Header::parse_for_repair(bytes);
    let Ok(header) = Header::parse(bytes) else {
        if let Ok(header) = for_repair {
            look_at(&header, file_len);
        }
        return;
    };
    assert_eq!(for_repair.as_ref(), Ok(&header), "a repair sees the same");
    look_at(&header, file_len);
    assert_eq!(
        Header::parse(&header.to_bytes()).as_ref(),
        Ok(&header),
        "what is written is read back"
    );
    let size = Sector(size);
    let others = [
        header.grown(size),
        header.shrunk(size),
        header.on_top(),
        header.in_version(Version::V1),
        header.in_version(Version::V2),
    ];
    for other in others.into_iter().flatten() {
        let read = Header::parse(&other.to_bytes()).expect("a header of ours can be read");
        assert_eq!(read.geometry(), other.geometry());
        look_at(&other, file_len);
    }
});

fn look_at(header: &Header, file_len: u64) {
    let geometry = header.geometry();
    assert!(geometry.data_start >= geometry.metadata_len());
    assert!(geometry.disk_clusters() <= u64::from(geometry.entries));
    let last = GuestCluster(geometry.entries - 1);
    let page = geometry.md_page(last);
    assert!(page < geometry.md_pages());
    assert!(geometry.md_page_entries(page).contains(&last.0));
    let first = geometry.first_host_cluster();
    assert!(geometry.host_offset(first) >= geometry.data_start);
    let value = geometry.bat_value(first);
    assert_eq!(geometry.host_cluster(value), Some(first));
    geometry.host_clusters_below(file_len);
    geometry.host_cluster_limit();
    let _ = header.check_file_len(file_len);
    let mut repaired = header.clone();
    repaired.repair_first_block(file_len, &[1, 2, u32::MAX]);
}
