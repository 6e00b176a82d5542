//! Numbers of bytes as people write them on the command lines of both programs.

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
}
