//! Small files that claim to be large: what they cost follows from what they hold.

use std::mem::MaybeUninit;
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

/// The most memory in KiB that the process has had.
fn peak_of(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let words = line.unwrap().split_whitespace();
    words.into_iter().nth(1).unwrap().parse().unwrap()
}

/// Lets `ploop-img` check the image; the most memory in KiB that this took.
#[expect(clippy::zombie_processes, reason = "it is waited for by wait4")]
fn peak_of_check(image: &Path) -> u64 {
    let child = ploop_img_command()
        .arg("check")
        .arg(image)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    let mut status = 0;
    let pid = child.id() as libc::pid_t;
    // SAFETY: both pointers are to memory of the right type that lives longer.
    let waited = unsafe { libc::wait4(pid, &mut status, 0, usage.as_mut_ptr()) };
    assert_eq!(waited, pid);
    assert!(libc::WIFEXITED(status), "{status:#x}");
    // SAFETY: zeros are a valid value, and the call has filled it.
    unsafe { usage.assume_init() }.ru_maxrss as u64
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
        let peak = peak_of(backend.pid());
        assert!(peak < MEMORY_MAX, "the daemon took {peak} KiB");
        backend.stop();
    }
    image(&rig.image, 2048, 0);
    let backend = rig.serve(&[]);
    expect_service(&mut start_front_end(backend.socket()));
    let peak = peak_of(backend.pid());
    assert!(peak < MEMORY_MAX, "the daemon took {peak} KiB");
    backend.stop();
}
