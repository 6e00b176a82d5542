//! Sizes as `qemu-img` takes and shows them.

use vhost_user_ploop::format::{ClusterSize, SECTOR_SIZE, Sector};
use vhost_user_ploop::image::NewSize;
pub use vhost_user_ploop::quantity::parse_bytes;

/// A disk size, rounded up to whole sectors.
///
/// # Errors
/// As [`parse_bytes`], and for nothing.
pub fn parse_disk_size(text: &str) -> Result<Sector, String> {
    match parse_sectors(text)? {
        Sector(0) => Err("a disk cannot be empty: give a size above 0".to_owned()),
        sectors => Ok(sectors),
    }
}

fn parse_sectors(text: &str) -> Result<Sector, String> {
    let bytes = parse_bytes(text)?;
    if bytes > i64::MAX as u64 {
        return Err(format!("'{text}' is too large: a disk is smaller than 8E"));
    }
    Ok(Sector(bytes.div_ceil(SECTOR_SIZE)))
}

/// A new disk size, or with a `+` or `-` in front how much to change it by. What a
/// disk shrinks by is rounded down to sectors, so that its size is rounded up.
///
/// # Errors
/// As [`parse_disk_size`].
pub fn parse_new_size(text: &str) -> Result<NewSize, String> {
    if let Some(less) = text.strip_prefix('-') {
        let less = parse_bytes(less)?;
        return Ok(NewSize::ShrinkBy(Sector(less / SECTOR_SIZE)));
    }
    match text.strip_prefix('+') {
        Some(more) => parse_sectors(more).map(NewSize::GrowBy),
        None => parse_disk_size(text).map(NewSize::Exactly),
    }
}

/// A cluster size.
///
/// # Errors
/// As [`parse_bytes`], and for what is no power of two in the range.
pub fn parse_cluster_size(text: &str) -> Result<ClusterSize, String> {
    ClusterSize::from_bytes(parse_bytes(text)?).ok_or_else(|| {
        format!("'{text}' is not a cluster size: give a power of two from 32k to 64M")
    })
}

/// As `qemu-img info` shows sizes: three significant digits and a binary unit.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // 999.5 would be shown as 1000.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = match value {
        _ if value.fract() == 0.0 => 0,
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    let mut number = format!("{value:.decimals$}");
    if number.contains('.') {
        number.truncate(number.trim_end_matches('0').trim_end_matches('.').len());
    }
    format!("{number} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_and_cluster_sizes() {
        assert_eq!(parse_disk_size("1"), Ok(Sector(1)));
        assert_eq!(parse_disk_size("513"), Ok(Sector(2)));
        assert!(parse_disk_size("0").is_err());
        assert!(parse_disk_size("8E").is_err());
        assert_eq!(parse_new_size("1k"), Ok(NewSize::Exactly(Sector(2))));
        assert_eq!(parse_new_size("+1k"), Ok(NewSize::GrowBy(Sector(2))));
        assert_eq!(parse_new_size("+1.5k"), Ok(NewSize::GrowBy(Sector(3))));
        assert_eq!(parse_new_size("+0"), Ok(NewSize::GrowBy(Sector(0))));
        assert_eq!(parse_new_size("-1.5k"), Ok(NewSize::ShrinkBy(Sector(3))));
        assert_eq!(parse_new_size("-1000"), Ok(NewSize::ShrinkBy(Sector(1))));
        for (text, what) in [
            ("0", "above 0"),
            ("-x", "not a size"),
            ("++1k", "not a size"),
            ("+-1k", "not a size"),
            ("+8E", "too large"),
        ] {
            let error = parse_new_size(text).unwrap_err();
            assert!(error.contains(what), "{text}: {error}");
        }
        assert_eq!(parse_cluster_size("1M"), Ok(ClusterSize::DEFAULT));
        for text in ["16k", "128M", "100k", "0"] {
            assert!(parse_cluster_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_as_qemu_img_shows_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.98 KiB"),
            (1 << 10, "1 KiB"),
            (1536, "1.5 KiB"),
            (2_293_760, "2.19 MiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human(bytes), text, "{bytes}");
        }
    }
}
