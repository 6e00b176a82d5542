use std::fs;

use proptest::prelude::*;

use super::*;
use crate::storage::filesystem::refuses_seek;

fn image(path: &Path) -> HostImage {
    let file = File::options().read(true).write(true).open(path);
    HostImage::new(file.expect("open"), path.to_owned())
}

/// On a file system where direct I/O has demands.
fn folder() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    tempfile::tempdir_in(target).expect("a folder")
}

#[test]
fn who_does_not_know_holes_has_data_everywhere() {
    for refusal in [Errno::OPNOTSUPP, Errno::INVAL] {
        assert!(refuses_seek(refusal));
    }
    for other in [Errno::NXIO, Errno::IO, Errno::BADF] {
        assert!(!refuses_seek(other));
    }
    // The kernel's own files refuse to look for data.
    let map = File::open("/proc/self/maps").expect("open");
    let image = HostImage::new(map, "/proc/self/maps".into());
    assert_eq!(image.next_data(0).expect("no error"), None);
    assert!(!image.tells_holes());
}

#[test]
fn zeros_are_written_where_no_hole_can_be_made() {
    let folder = folder();
    let path = folder.path().join("image");
    for (start, len) in [
        (0, 1),
        (7, 0),
        (100, 64 << 10),
        (1, (64 << 10) + 1),
        (0, 200_000),
    ] {
        fs::write(&path, vec![1; 200_002]).expect("write");
        write_zeros(&image(&path), start..start + len).expect("write");
        let content = fs::read(&path).expect("read");
        assert_eq!(content.len(), 200_002);
        let is_right = |(at, byte): (usize, &u8)| {
            let is_inside = (start..start + len).contains(&(at as u64));
            *byte == u8::from(!is_inside)
        };
        assert!(
            content.iter().enumerate().all(is_right),
            "{len} from {start}"
        );
    }
}

#[test]
fn zeros_that_are_written_take_no_space() {
    use std::os::unix::fs::MetadataExt;

    let folder = folder();
    let path = folder.path().join("image");
    let image = image(&path_of_new(&path));
    image.set_len(1 << 20).expect("set the length");
    image.write_all_at(&[1; 8192], 300_000).expect("write");
    image.sync().expect("sync");
    let before = fs::metadata(&path).expect("look");
    write_zeros(&image, 100..(2 << 20)).expect("write");
    image.sync().expect("sync");
    let after = fs::metadata(&path).expect("look");
    assert_eq!(
        (after.len(), after.blocks()),
        (before.len(), before.blocks())
    );
    let content = fs::read(&path).expect("read");
    assert!(content.iter().all(|byte| *byte == 0));
}

fn path_of_new(path: &Path) -> PathBuf {
    fs::write(path, []).expect("write");
    path.to_owned()
}

#[test]
fn the_file_is_as_long_as_it_was_made_and_its_data_is_found() {
    let folder = folder();
    let path = folder.path().join("image");
    fs::write(&path, [1; 4096]).expect("write");
    for image in [image(&path), image(&path).around_the_cache()] {
        image.set_len(1 << 20).expect("set the length");
        assert_eq!(image.file_len().expect("length"), 1 << 20);
        assert_eq!(fs::metadata(&path).expect("look").len(), 1 << 20);
        image.write_all_at(&[2; 4096], 512 << 10).expect("write");
        let found = |offset| image.next_data(offset).expect("seek");
        assert_eq!(found(0), Some(0..4096));
        assert_eq!(found(5000), Some(512 << 10..(512 << 10) + 4096));
        assert_eq!(found(600 << 10), None);
        assert_eq!(found(2 << 20), None);
        assert!(image.tells_holes());
        image.punch(512 << 10..(512 << 10) + 4096).expect("punch");
        assert_eq!(found(5000), None);
        image.set_len(4096).expect("set the length");
        assert_eq!(fs::metadata(&path).expect("look").len(), 4096);
    }
}

#[test]
fn a_sync_that_the_kernel_refuses_is_no_success() {
    // The kernel's own files cannot be synced.
    let map = File::open("/proc/self/maps").expect("open");
    let image = HostImage::new(map, "/proc/self/maps".into());
    let error = image.sync().expect_err("it was never asked");
    assert_eq!(Errno::from_io_error(&error), Some(Errno::INVAL));
}

#[test]
fn what_goes_around_the_cache_is_in_no_cache() {
    let folder = folder();
    let path = folder.path().join("image");
    fs::write(&path, [1; 10_000]).expect("write");
    let direct = image(&path).around_the_cache();
    assert!(direct.direct.is_some());
    let mut read = [0; 3];
    direct.read_exact_at(&mut read, 9_997).expect("read");
    assert_eq!(read, [1; 3]);
    assert!(direct.read_exact_at(&mut read, 9_998).is_err());
    // The files of a snapshot are only read.
    let file = File::open(&path).expect("open");
    let lower = HostImage::new(file, path).around_the_cache();
    lower.read_exact_at(&mut read, 0).expect("read");
    assert_eq!(read, [1; 3]);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 32,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn both_ways_do_the_same(
        len in 0..20_000_usize,
        changes in prop::collection::vec((0..20_000_u64, 0..9_000_usize, 0..4_u8), 1..8),
    ) {
        let folder = folder();
        let paths = ["cached", "direct"].map(|name| folder.path().join(name));
        for path in &paths {
            fs::write(path, vec![1; len]).expect("write");
        }
        let images = [image(&paths[0]), image(&paths[1]).around_the_cache()];
        for (step, &(offset, len, what)) in changes.iter().enumerate() {
            let byte = step as u8 + 2;
            let results = images.each_ref().map(|image| {
                let mut read = vec![0; len];
                match what {
                    0 => image.set_len(offset).expect("set the length"),
                    1 => image.write_all_at(&vec![byte; len], offset).expect("write"),
                    2 => {
                        let end = image.file_len().expect("length");
                        let end = end.min(offset + len as u64);
                        image.punch(offset.min(end)..end).expect("punch");
                    }
                    _ => return image.read_exact_at(&mut read, offset).is_ok().then_some(read),
                }
                None
            });
            prop_assert_eq!(&results[0], &results[1]);
            let content = paths.each_ref().map(|path| fs::read(path).expect("read"));
            prop_assert!(content[0] == content[1]);
        }
    }
}

#[test]
fn a_file_that_cannot_be_looked_through_is_an_error() {
    let (reader, _writer) = rustix::pipe::pipe().expect("a pipe");
    let pipe = HostImage::new(File::from(reader), "a pipe".into());
    let error = pipe.next_data(0).expect_err("it cannot be sought in");
    assert_eq!(Errno::from_io_error(&error), Some(Errno::SPIPE));
    assert!(pipe.tells_holes());
}

/// Of what was lost a server may tell only the description that wrote it.
#[cfg(not(ploop_loom))]
#[test]
fn a_sync_hears_of_what_was_lost_around_the_cache() {
    use crate::storage::one_file_fs::{Answers, OneFileFs};
    let Some(served) = OneFileFs::mount() else {
        return;
    };
    let image = image(&served.path());
    assert!(image.direct.is_some());
    let loses_writes = true;
    served.answer(Answers {
        loses_writes,
        ..Answers::default()
    });
    for sync in [HostImage::sync, HostImage::sync_all] {
        image.write_all_at(&[7; 4096], 0).expect("write");
        sync(&image).expect_err("it is lost");
        sync(&image).expect("it was told");
    }
}
