//! Sizes as `qemu-img` takes and shows them.

use vhost_user_ploop::format::{ClusterSize, SECTOR_SIZE, Sector};
use vhost_user_ploop::image::NewSize;

/// Parses bytes: digits, perhaps with a fraction, and a suffix of b, k, M, G, T,
/// P or E in either case; powers of 1024. Or whole bytes in hexadecimal after `0x`.
/// So far this is what `qemu-img` takes. It refuses `kB` to `EB`, which are powers of
/// 1000 here, as SI has it, and `KiB` to `EiB`, which are powers of 1024.
///
/// # Errors
/// In words, naming the value.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let help = "a number of bytes, or one with a suffix of k, M, G, T, P or E, as in 10G";
    let wrong = || format!("'{text}' is not a size: give {help}");
    let too_large = || format!("'{text}' is too large: the largest size is just below 8E");
    if let Some(digits) = text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
        let bytes = u64::from_str_radix(digits, 16).map_err(|_| too_large());
        return if is_number { bytes } else { Err(wrong()) };
    }
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = unit(&text[number.len()..]).ok_or_else(wrong)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if !is_digits(whole) || !is_digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return Err(wrong());
    }
    let whole: u64 = match whole {
        "" => 0,
        _ => whole.parse().map_err(|_| too_large())?,
    };
    let part: f64 = format!("0.{fraction}0").parse().map_err(|_| wrong())?;
    if unit == 1 && part != 0.0 {
        // There is no part of a byte; a suffix was forgotten.
        return Err(wrong());
    }
    let bytes = whole.checked_mul(unit).ok_or_else(too_large)?;
    let part = (part * unit as f64).round() as u64;
    bytes.checked_add(part).ok_or_else(too_large)
}

fn unit(suffix: &str) -> Option<u64> {
    let suffix = suffix.to_ascii_uppercase();
    let (base, letter) = match suffix.strip_suffix('B') {
        None | Some("") => (1024_u64, suffix.as_str()),
        Some(prefix) => match prefix.strip_suffix('I') {
            Some(letter) => (1024, letter),
            None => (1000, prefix),
        },
    };
    let exponent = match letter {
        "" => 0,
        "B" if suffix == "B" => 0,
        "K" | "M" | "G" | "T" | "P" | "E" => "BKMGTPE".find(letter)?,
        _ => return None,
    };
    // What is left of "iB" is no unit.
    (exponent > 0 || suffix.len() < 2).then(|| base.pow(exponent as u32))
}

/// A disk size, rounded up to whole sectors.
///
/// # Errors
/// As [`parse_bytes`], and for nothing.
pub fn parse_disk_size(text: &str) -> Result<Sector, String> {
    match parse_sectors(text)? {
        Sector(0) => Err("a disk of no bytes is none: give a size above 0".to_owned()),
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
    fn sizes_as_qemu_img_takes_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1000", 1000),
            ("7b", 7),
            ("1k", 1 << 10),
            ("512M", 512 << 20),
            ("10G", 10 << 30),
            ("1.5g", 3 << 29),
            ("0.5T", 1 << 39),
            ("2P", 2 << 50),
            ("8E", 8 << 60),
            ("1.0", 1),
            ("1.", 1),
            (".5k", 512),
            ("1.G", 1 << 30),
            ("0.0001k", 0),
            ("1.99999k", 2048),
            ("0x1F0", 0x1f0),
            ("10GB", 10_000_000_000),
            ("10GiB", 10 << 30),
            ("10gib", 10 << 30),
            ("1.5kB", 1500),
            ("1KiB", 1024),
            ("1EB", 1_000_000_000_000_000_000),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "G",
            "x",
            "-1",
            "+1",
            "1X",
            "1 G",
            "1iB",
            "1Bi",
            "1BB",
            "1Gi",
            "1GBB",
            "1KK",
            "19EB",
            ".",
            ".k",
            ".5",
            "1.x",
            "1e3",
            "1.5",
            "1.5b",
            "0x",
            "0x1k",
            "0x1.8",
            "0x11111111111111111",
            "16E",
            "1é",
            "99999999999999999999",
        ] {
            let error = parse_bytes(text).unwrap_err();
            assert!(error.contains(&format!("'{text}'")), "{text}: {error}");
        }
    }

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
