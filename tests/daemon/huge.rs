//! Small files that claim to be large: what they cost follows from what they hold.

use std::os::unix::fs::MetadataExt;

use super::common::img::ploop_img_command;
use super::*;

/// Entries of the BAT: at eight bytes each they would take 192 MiB.
const ENTRIES: u32 = (24 << 20) - 16;

const CLUSTER: u64 = 32 << 10;

/// What a process may take, in KiB, whatever an image says.
const MEMORY_MAX: u64 = 64 << 10;

/// A sparse image: a header, and not one entry that is set.
fn image(path: &Path, disk_sectors: u64, file_len: u64) {
    let data_start = (64 + 4 * u64::from(ENTRIES)).next_multiple_of(CLUSTER);
    let mut header = b"WithouFreSpacExt".to_vec();
    let words = [2, 16, 0, (CLUSTER / 512) as u32, ENTRIES];
    header.extend(words.into_iter().flat_map(u32::to_le_bytes));
    header.extend(disk_sectors.to_le_bytes());
    let words = [0, (data_start / 512) as u32, 0, 0, 0];
    header.extend(words.into_iter().flat_map(u32::to_le_bytes));
    let file = fs::File::create(path).unwrap();
    file.set_len(file_len.max(data_start)).unwrap();
    file.write_all_at(&header, 0).unwrap();
}

/// A sparse image of 8 TiB, mapped all over the place, to nothing but holes.
fn mapped_image(path: &Path) {
    const ENTRIES: u32 = 8 << 20;
    const CLUSTER: u64 = 1 << 20;
    let data_start = (64 + 4 * u64::from(ENTRIES)).div_ceil(CLUSTER) as u32;
    let mut bytes = b"WithouFreSpacExt".to_vec();
    let words = [2, 16, ENTRIES, (CLUSTER / 512) as u32, ENTRIES];
    bytes.extend(words.into_iter().flat_map(u32::to_le_bytes));
    bytes.extend((u64::from(ENTRIES) * CLUSTER / 512).to_le_bytes());
    let words = [0, data_start * (CLUSTER / 512) as u32, 0, 0, 0];
    bytes.extend(words.into_iter().flat_map(u32::to_le_bytes));
    // Each entry once: an odd number and a power of two have no common divisor.
    let places = (0..ENTRIES).map(|index| index.wrapping_mul(0x9e37_79b1) % ENTRIES);
    bytes.extend(places.flat_map(|place| (place + data_start).to_le_bytes()));
    let file = fs::File::create(path).unwrap();
    file.set_len(u64::from(data_start + ENTRIES) * CLUSTER)
        .unwrap();
    file.write_all_at(&bytes, 0).unwrap();
}

/// How long a guest that comes from another host waits for such an image, at most.
#[test]
#[ignore = "measures: run it with --release where nothing else runs"]
fn a_mapped_disk_of_8_tib_is_soon_open_again() {
    const LIMIT_MS: f64 = 150.0;
    let rig = Rig::new();
    mapped_image(&rig.image);
    let backend = rig.serve(&["--lock=running"]);
    let turns = crate::turns::take(&backend, 5, 7 << 40);
    eprintln!(
        "opened in {:?} ms, closed in {:?} ms, {:.0} ms of a processor for both",
        turns.opened, turns.closed, turns.cpu
    );
    // Whatever else the machine does.
    let best = turns.opened.into_iter().fold(f64::INFINITY, f64::min);
    assert!(cfg!(debug_assertions) || best < LIMIT_MS, "{best} ms");
    backend.stop();
}

/// The most memory in KiB that the process has had; `None` once it has ended.
fn peak_of(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Lets `ploop-img` check the image; the most memory in KiB that this took. What the kernel
/// says of a process that has ended counts what its parent had when it began.
fn peak_of_check(image: &Path) -> u64 {
    let mut child = ploop_img_command()
        .arg("check")
        .arg(image)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut peak = None;
    let status = loop {
        peak = peak_of(child.id()).or(peak);
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        thread::sleep(Duration::from_millis(1));
    };
    assert!(status.code().is_some(), "{status}");
    peak.unwrap()
}

#[test]
fn small_files_that_claim_to_be_large_cost_little() {
    let rig = Rig::new();
    let whole_disk = u64::from(ENTRIES) * CLUSTER / 512;
    // Many entries for a small disk, for a large one, and in a large file.
    for (disk_sectors, file_len) in [(2048, 0), (whole_disk, 0), (whole_disk, 1 << 40)] {
        image(&rig.image, disk_sectors, file_len);
        let peak = peak_of_check(&rig.image);
        assert!(peak < MEMORY_MAX, "ploop-img check took {peak} KiB");
        // Nor does reading only take space on the host.
        let backend = rig.serve(&["--read-only"]);
        assert!(fs::metadata(&rig.image).unwrap().blocks() < 64);
        drop(start_front_end(backend.socket()));
        let peak = peak_of(backend.pid()).unwrap();
        assert!(peak < MEMORY_MAX, "the daemon took {peak} KiB");
        backend.stop();
    }
    image(&rig.image, 2048, 0);
    let backend = rig.serve(&[]);
    expect_service(&mut start_front_end(backend.socket()));
    let peak = peak_of(backend.pid()).unwrap();
    assert!(peak < MEMORY_MAX, "the daemon took {peak} KiB");
    backend.stop();
}
