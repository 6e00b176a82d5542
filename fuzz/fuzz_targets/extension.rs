//! The cluster of a format extension. Its checksum is made right half of the time: no
//! mutation finds it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use md5::{Digest, Md5};
use vhost_user_ploop::format::Extension;

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    if bytes.len() > 24 && bytes.last().is_some_and(|last| last % 2 == 0) {
        bytes[..8].copy_from_slice(&0xAB23_4CEF_23DC_EA87_u64.to_le_bytes());
        let sum = Md5::digest(&bytes[24..]);
        bytes[8..24].copy_from_slice(&sum);
    }
    if let Ok(extension) = Extension::parse(&bytes) {
        // Nothing in it is larger than what it was read from.
        let entries: usize = extension.bitmaps.iter().map(|bitmap| bitmap.l1.len()).sum();
        assert!(entries * 8 <= bytes.len());
        assert!(extension.unknown.len() * 24 <= bytes.len());
        assert!(extension.clusters().all(|sector| sector.0 > 1));
    }
});
