//! What was changed is known, and never less than that.

use proptest::prelude::*;

use super::*;
use crate::format::InUse;
use crate::ploop::rule::{self, Rule};
use crate::ploop::tracking::bits::Bits;
use crate::ploop::tracking::{Bitmap, saved};
use crate::ploop::{BitmapAction as Action, BitmapError};
use crate::sim::disk::Faults;

#[allow(dead_code, reason = "integration tests use the rest of it")]
#[path = "../../../tests/common/sockets.rs"]
mod sockets;

const GUID: &str = "c0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5";
const CLUSTERS: u64 = 8;
const DISK: u64 = CLUSTERS * CLUSTER;

fn add(name: &str, granularity: u64, is_persistent: bool) -> Action {
    Action::Add {
        name: name.to_owned(),
        granularity: Some(granularity),
        is_persistent,
        records: true,
    }
}

impl Rig {
    /// As [`Engine::change_bitmaps`], which would wait for threads.
    fn change(&self, actions: &[Action]) -> Result<(), BitmapError> {
        self.control(Control::Suspend).unwrap();
        let changed = self.engine.change_bitmaps_now(actions);
        self.control(Control::Resume).unwrap();
        changed
    }

    /// What is set, in granules.
    fn dirty(&self, name: &str, granularity: u64) -> Vec<u64> {
        let bytes = self.engine.bits_of(name).unwrap();
        let count = self.engine.disk_size().bytes().div_ceil(granularity);
        let is_set = |bit: &u64| bytes[(bit / 8) as usize] >> (bit % 8) & 1 == 1;
        (0..count).filter(is_set).collect()
    }
}

/// A bitmap as it should be.
#[derive(Clone)]
struct Model {
    granularity: u64,
    granules: std::collections::BTreeSet<u64>,
    records: bool,
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64),
    Discard(u64, u64),
    Zero(u64, u64, bool),
    Clear(usize),
    Record(usize, bool),
    Merge(usize, usize),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let sectors = DISK / 512;
    let range = move |most: u64| (0..sectors, 1..most);
    prop_oneof![
        4 => range(40).prop_map(|(at, count)| Step::Write(at, count)),
        2 => range(300).prop_map(|(at, count)| Step::Discard(at, count)),
        2 => (range(300), any::<bool>())
            .prop_map(|((at, count), unmap)| Step::Zero(at, count, unmap)),
        1 => (0..3_usize).prop_map(Step::Clear),
        1 => (0..3_usize, any::<bool>()).prop_map(|(at, on)| Step::Record(at, on)),
        1 => (0..3_usize, 0..3_usize).prop_map(|(to, from)| Step::Merge(to, from)),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn bitmaps_have_what_was_changed_and_nothing_else(
        steps in prop::collection::vec(step(), 1..40),
        levels in 1..3_usize,
    ) {
        let disk = empty_image(Medium::default(), levels, DISK);
        let mut rig = Rig::open(&disk, levels, options());
        let names = ["a1c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5", GUID, "c"];
        let mut models = [512, 4096, 64 << 10].map(|granularity| Model {
            granularity,
            granules: Default::default(),
            records: true,
        });
        let adds: Vec<_> = names.iter().zip(&models).map(|(name, model)| {
            add(name, model.granularity, *name != "c")
        }).collect();
        rig.change(&adds).unwrap();
        for step in steps {
            let range = match step {
                Step::Write(at, count) | Step::Discard(at, count) | Step::Zero(at, count, _) => {
                    let end = (at + count).min(DISK / 512);
                    at * 512..end * 512
                }
                _ => 0..0,
            };
            let len = range.end - range.start;
            match step {
                Step::Write(..) => rig.write(range.start, &vec![7; len as usize]).unwrap(),
                Step::Discard(..) => rig.discard(range.start, len).unwrap(),
                Step::Zero(.., unmap) => rig.zero(range.start, len, unmap).unwrap(),
                Step::Clear(at) => {
                    rig.change(&[Action::Clear(names[at].to_owned())]).unwrap();
                    models[at].granules.clear();
                }
                Step::Record(at, on) => {
                    let name = names[at].to_owned();
                    let action = if on { Action::Enable(name) } else { Action::Disable(name) };
                    rig.change(&[action]).unwrap();
                    models[at].records = on;
                }
                Step::Merge(to, from) => {
                    let (target, source) = (names[to].to_owned(), names[from].to_owned());
                    rig.change(&[Action::Merge { target, sources: vec![source] }]).unwrap();
                    let source = models[from].clone();
                    let unit = models[to].granularity;
                    for granule in source.granules {
                        let start = granule * source.granularity;
                        let end = (start + source.granularity).min(DISK);
                        models[to].granules.extend(start / unit..end.div_ceil(unit));
                    }
                }
                Step::Reopen => {
                    rig = rig.reopen();
                    // That one is not in the image, and all that are record.
                    prop_assert_eq!(rig.engine.bitmaps().len(), 2);
                    rig.change(&[add("c", models[2].granularity, false)]).unwrap();
                    models[2].granules.clear();
                    models.iter_mut().for_each(|model| model.records = true);
                }
            }
            for model in models.iter_mut().filter(|model| model.records && len > 0) {
                let unit = model.granularity;
                model.granules.extend(range.start / unit..range.end.div_ceil(unit));
            }
            for (name, model) in names.iter().zip(&models) {
                let expected: Vec<u64> = model.granules.iter().copied().collect();
                prop_assert_eq!(rig.dirty(name, model.granularity), expected, "{}", name);
            }
        }
    }
}

#[test]
fn what_cannot_be_is_refused_as_qemu_does_and_nothing_of_it_is_done() {
    let rig = Rig::new(DISK);
    rig.change(&[add("a", 512, false)]).unwrap();
    let not_found = |name: &str| Err(BitmapError::NotFound(name.to_owned()));
    for (action, error) in [
        (add("", 512, false), BitmapError::NoName),
        (
            add(&"x".repeat(1024), 512, false),
            BitmapError::LongName("x".repeat(1024)),
        ),
        (add("a", 512, false), BitmapError::Exists("a".to_owned())),
        (add("b", 1000, false), BitmapError::Granularity),
        (add("b", 256, false), BitmapError::Granularity),
        (add("b", 512, true), BitmapError::NoGuid("b".to_owned())),
    ] {
        let actions = [Action::Remove("a".to_owned()), add("a", 512, false), action];
        assert_eq!(rig.change(&actions), Err(error));
    }
    for action in [
        Action::Remove("b".to_owned()),
        Action::Clear("b".to_owned()),
        Action::Enable("b".to_owned()),
        Action::Disable("b".to_owned()),
    ] {
        assert_eq!(rig.change(&[action]), not_found("b"));
    }
    let merge = Action::Merge {
        target: "a".to_owned(),
        sources: vec!["c".to_owned()],
    };
    assert_eq!(rig.change(&[merge]), not_found("c"));
    for index in 1..crate::ploop::BITMAPS_MAX {
        rig.change(&[add(&format!("b{index}"), 512, false)])
            .unwrap();
    }
    assert_eq!(
        rig.change(&[add("more", 512, false)]),
        Err(BitmapError::TooMany)
    );
    assert!(
        rig.engine
            .bitmaps()
            .iter()
            .all(|it| it.count == 0 && it.records)
    );
}

#[test]
fn a_write_that_waited_for_space_while_a_bitmap_was_cleared_is_in_it() {
    let rig = Rig::new(DISK);
    rig.change(&[add("a", 4096, false)]).unwrap();
    let used = rig.disk.used_blocks();
    rig.disk
        .change_medium(|medium| medium.capacity = Some(used));
    let waiting = rig.push_write_to(0, CLUSTER, &[5; 512]);
    for _ in 0..200 {
        rig.turn();
    }
    rig.change(&[Action::Clear("a".to_owned())]).unwrap();
    assert_eq!(rig.ended(waiting), None);
    rig.disk.change_medium(|medium| medium.capacity = None);
    assert_eq!(rig.result(waiting), Ok(()));
    assert_eq!(rig.dirty("a", 4096), [CLUSTER / 4096]);
}

/// A copy of the cluster takes it in, and nobody plans it anew. Both wait for space at first, which
/// comes while the bitmap is cleared.
#[test]
fn neither_is_one_forgotten_that_a_copy_takes_in() {
    let disk = empty_image(Medium::default(), 2, DISK);
    let base = Rig::open(&disk, 1, options());
    base.write(0, &[1; CLUSTER as usize]).unwrap();
    base.control(Control::Close).unwrap();
    drop(base);
    let clear = [Action::Clear("a".to_owned())];
    let mut waited = 0;
    for turns in 0..40 {
        let rig = Rig::open(&disk, 2, options());
        rig.change(&[add("a", 4096, false)]).unwrap();
        let writes = [0, 4096].map(|at| rig.push_write_to(0, at, &[5; 512]));
        (0..turns).for_each(|_| rig.turn());
        rig.control(Control::Suspend).unwrap();
        (0..200).for_each(|_| rig.turn());
        rig.engine.change_bitmaps_now(&clear).unwrap();
        let ended = writes.map(|tag| rig.ended(tag));
        let wait = ended.map(|ended| ended.is_none());
        rig.control(Control::Resume).unwrap();
        for (tag, ended) in writes.into_iter().zip(ended) {
            assert_eq!(ended.unwrap_or_else(|| rig.result(tag)), Ok(()));
        }
        let expected: Vec<u64> = (0..2).filter(|index| wait[*index as usize]).collect();
        assert_eq!(rig.dirty("a", 4096), expected, "{turns}");
        waited += u32::from(wait == [true; 2]);
        drop(rig);
        disk.power_off();
        disk.power_on();
    }
    assert!(waited > 0);
}

#[test]
fn a_disk_does_not_grow_beyond_what_its_bitmaps_can_tell() {
    let rig = Rig::new(DISK);
    rig.change(&[add("a", 512, false)]).unwrap();
    let grow = |bytes: u64| rig.control(Control::PrepareGrowth(Sector(bytes / 512)));
    assert_eq!(grow((512 << 29) + CLUSTER), Err(EngineError::FineBitmap));
    rig.change(&[Action::Remove("a".to_owned())]).unwrap();
    grow((512 << 29) + CLUSTER).unwrap();
}

/// All of them are lost when the image is closed, else.
#[test]
fn a_disk_does_not_grow_beyond_what_the_image_can_say_of_its_bitmaps() {
    let rig = Rig::new(128 << 30);
    let other = GUID.replace("c0", "a1");
    let both = [add(GUID, 512, true), add(&other, 512, true)];
    rig.change(&both).unwrap();
    let grow = |rig: &Rig, bytes: u64| {
        rig.control(Control::PrepareGrowth(Sector(bytes / 512)))?;
        rig.control(Control::CommitGrowth)
    };
    assert_eq!(grow(&rig, 256 << 30), Err(EngineError::ManyBitmaps));
    let rig = rig.reopen();
    assert_eq!(rig.engine.bitmaps().len(), 2);
    // Those that are not in the image are no hindrance.
    rig.change(&[Action::Remove(other), add("a", 512, false)])
        .unwrap();
    grow(&rig, 256 << 30).unwrap();
    assert_eq!(rig.reopen().engine.bitmaps().len(), 1);
}

#[test]
fn what_is_written_to_where_a_disk_has_grown_is_known() {
    let rig = Rig::new(DISK);
    rig.change(&[add(GUID, 4096, true)]).unwrap();
    // More than one segment of the log.
    let size = 64 << 30;
    rig.control(Control::PrepareGrowth(Sector(size / 512)))
        .unwrap();
    rig.control(Control::CommitGrowth).unwrap();
    rig.write(DISK - 512, &[1; 1024]).unwrap();
    rig.write(size - 512, &[1; 512]).unwrap();
    let expected = [DISK / 4096 - 1, DISK / 4096, size / 4096 - 1];
    assert_eq!(rig.dirty(GUID, 4096), expected);
    let rig = rig.reopen();
    assert_eq!(rig.dirty(GUID, 4096), expected);
}

#[test]
fn whoever_opens_the_image_next_has_the_bitmaps_unless_it_was_not_closed() {
    let end = [
        Control::Close,
        Control::Pass,
        Control::HandOver { trims: true },
        Control::HandOver { trims: false },
    ];
    for what in end {
        let rig = Rig::new(DISK);
        rig.change(&[add(GUID, 4096, true), add("b", 512, false)])
            .unwrap();
        rig.write(3 * CLUSTER, &[1; 512]).unwrap();
        rig.control(what).unwrap();
        let disk = rig.disk.clone();
        drop(rig);
        if what != Control::Pass {
            // Of one that is passed on, the mark is not stable yet.
            disk.power_off();
            disk.power_on();
        }
        let rig = Rig::open(&disk, 1, options());
        let all = rig.engine.bitmaps();
        assert_eq!((all.len(), &*all[0].name), (1, GUID), "{what:?}");
        assert!(all[0].records && all[0].is_persistent);
        assert_eq!(rig.dirty(GUID, 4096), [3 * CLUSTER / 4096]);
        assert_eq!(rig.read(3 * CLUSTER, 512), [1; 512]);
        // What was written there is not what new clusters read as.
        for cluster in 0..CLUSTERS {
            rig.write(cluster * CLUSTER + 512, &[2; 512]).unwrap();
            assert_eq!(rig.read(cluster * CLUSTER + 1024, 31 << 10), [0; 31 << 10]);
        }
        assert!(
            rig.cut().engine.bitmaps().is_empty(),
            "they would miss that"
        );
    }
}

#[test]
fn an_image_that_cannot_be_handed_over_is_served_on_with_its_bitmaps() {
    for faults in [0.3, 1.0] {
        for _ in 0..20 {
            let rig = Rig::new(DISK);
            rig.change(&[add(GUID, 512, true)]).unwrap();
            rig.write(0, &[1; 512]).unwrap();
            rig.flush().unwrap();
            let outcome = rig.engine.control(Control::HandOver { trims: true });
            rig.disk
                .change_medium(|medium| medium.faults.write = faults);
            for _ in 0..10_000 {
                if outcome.get().is_some() {
                    break;
                }
                rig.poll_md();
                rig.step_disk();
            }
            rig.disk
                .change_medium(|medium| medium.faults = Faults::default());
            if outcome.get() == Some(Ok(())) {
                continue;
            }
            assert!(!rig.engine.is_suspended());
            for cluster in 0..CLUSTERS {
                rig.write(cluster * CLUSTER + 512, &[2; 512]).unwrap();
                assert_eq!(rig.read(cluster * CLUSTER + 1024, 31 << 10), [0; 31 << 10]);
            }
            assert_eq!(rig.dirty(GUID, 512).len() as u64, CLUSTERS + 1);
            // Else it could not be marked as in use again.
            if rig.flush().is_ok() {
                assert_eq!(rig.reopen().dirty(GUID, 512).len() as u64, CLUSTERS + 1);
            }
        }
    }
}

/// The power goes after so many changes of the disk while the image is closed. Whether there are
/// bitmaps then, which must not miss anything; and whether it was closed before.
fn cut_while_closing(seed: u64, changes: u64) -> Result<(bool, bool), String> {
    let disk = SimDisk::new(1, Medium::default(), seed);
    let header = Header::new(
        Sector(DISK / 512),
        ClusterSize::from_bytes(CLUSTER).unwrap(),
    );
    let header = header.unwrap();
    disk.prepare(FileId(0), 0, &header.to_bytes());
    disk.set_len(FileId(0), header.geometry().data_start)
        .unwrap();
    disk.sync(FileId(0)).unwrap();
    let rig = Rig::open(&disk, 1, options());
    rig.change(&[add(GUID, 512, true)]).unwrap();
    let written = [0, 5, 6, 100, 511];
    for sector in written {
        rig.write(sector * 512, &[1; 512]).unwrap();
    }
    disk.cut_after(Some(changes));
    let outcome = rig.engine.control(Control::Close);
    for _ in 0..2_000 {
        if outcome.get().is_some() || !disk.is_powered() {
            break;
        }
        rig.turn();
    }
    let is_closed = outcome.get() == Some(Ok(()));
    let rig = rig.cut();
    match rig.engine.bitmaps().len() {
        0 => Ok((false, is_closed)),
        _ if rig.dirty(GUID, 512) == written => Ok((true, is_closed)),
        _ => Err(format!("{:?} of {written:?}", rig.dirty(GUID, 512))),
    }
}

fn cuts_while_closing() -> Result<(usize, usize), String> {
    let mut seen = (0, 0);
    let mut all = 0;
    while !cut_while_closing(0, all)?.1 {
        all += 1;
    }
    // The last of them are bits, extension and mark.
    for changes in all.saturating_sub(4)..=all {
        for seed in 0..60 {
            match cut_while_closing(seed, changes)? {
                (true, _) => seen.0 += 1,
                (false, _) => seen.1 += 1,
            }
        }
    }
    Ok(seen)
}

#[test]
fn a_power_cut_leaves_all_of_a_bitmap_or_none() {
    let (whole, none) = cuts_while_closing().unwrap();
    assert!(whole > 10 && none > 10, "{whole}, {none}");
    let broken = rule::broken(Rule::BitmapsBeforeMark, cuts_while_closing);
    assert!(broken.is_err(), "the test would not notice");
}

#[test]
fn a_bitmap_that_is_not_right_has_everything_set() {
    use crate::format::{BitmapId, DirtyBitmap, Extension, InUse};

    let cluster = ClusterSize::from_bytes(CLUSTER).unwrap();
    let right = DirtyBitmap {
        size: Sector(DISK / 512),
        id: BitmapId::parse(GUID).unwrap(),
        granularity: 8,
        l1: vec![0],
    };
    let all = DISK / 4096;
    type Change = fn(&mut DirtyBitmap);
    let cases: [(Change, Option<u64>); 7] = [
        (|_| {}, Some(0)),
        (|it| it.l1 = vec![1], Some(all)),
        (|it| it.size = Sector(8), Some(all)),
        (|it| it.l1 = vec![0, 0], Some(all)),
        (|it| it.l1 = vec![1 << 40], Some(all)),
        (|it| it.l1 = vec![u64::MAX], Some(all)),
        (|it| it.granularity = 3, None),
    ];
    for (change, expected) in cases {
        let mut bitmap = right.clone();
        change(&mut bitmap);
        let mut header = Header::new(Sector(DISK / 512), cluster).unwrap();
        let at = header.geometry().data_start;
        header.in_use = InUse::ClosedWithExtension;
        header.extension = Sector(at / 512);
        let extension = Extension {
            bitmaps: vec![bitmap.clone(), bitmap],
            unknown: Vec::new(),
        };
        let mut bytes = extension.to_bytes(cluster).unwrap();
        for is_whole in [true, false] {
            let disk = SimDisk::new(1, Medium::default(), 1);
            bytes[100] ^= u8::from(!is_whole);
            disk.prepare(FileId(0), at, &bytes);
            disk.prepare(FileId(0), 0, &header.to_bytes());
            let loaded = saved::load(&disk, FileId(0), &header);
            let expected = expected.filter(|_| is_whole);
            assert_eq!(
                loaded.len(),
                usize::from(expected.is_some()),
                "no name twice"
            );
            assert_eq!(loaded.first().map(|it| it.bits.count()), expected);
        }
    }
}

/// More than the address space of 64 bits is told of by a cluster of bits.
#[test]
fn a_granularity_without_bounds_is_no_danger() {
    use crate::format::{BitmapId, DirtyBitmap, Extension, InUse};

    let cluster = ClusterSize::from_bytes(2 << 20).unwrap();
    let mut header = Header::new(Sector((2 << 20) / 512), cluster).unwrap();
    let at = header.geometry().data_start;
    header.in_use = InUse::ClosedWithExtension;
    for offset in [at / 512, u64::MAX, u64::MAX / 512 + 1] {
        header.extension = Sector(offset);
        let bitmap = DirtyBitmap {
            size: header.geometry().disk_size,
            id: BitmapId::parse(GUID).unwrap(),
            granularity: 1 << 31,
            l1: vec![1],
        };
        let extension = Extension {
            bitmaps: vec![bitmap],
            unknown: Vec::new(),
        };
        let disk = SimDisk::new(1, Medium::default(), 1);
        disk.prepare(FileId(0), at, &extension.to_bytes(cluster).unwrap());
        disk.prepare(FileId(0), 0, &header.to_bytes());
        let loaded = saved::load(&disk, FileId(0), &header);
        assert_eq!(loaded.len(), usize::from(offset == at / 512));
    }
}

/// Whoever opens the image loses none of it.
#[test]
fn an_image_that_needs_what_is_not_known_is_left_alone() {
    use md5::{Digest, Md5};

    const NECESSARY: u64 = 1;
    let cluster = ClusterSize::from_bytes(CLUSTER).unwrap();
    let mut header = Header::new(Sector(4 * CLUSTER / 512), cluster).unwrap();
    let at = header.geometry().data_start;
    header.in_use = InUse::ClosedWithExtension;
    header.extension = Sector(at / 512);
    for flags in [0, NECESSARY] {
        let mut extension = vec![0; CLUSTER as usize];
        extension[..8].copy_from_slice(&0xAB23_4CEF_23DC_EA87_u64.to_le_bytes());
        extension[24..32].copy_from_slice(&5_u64.to_le_bytes());
        extension[32..40].copy_from_slice(&flags.to_le_bytes());
        let checksum = Md5::digest(&extension[24..]);
        extension[8..24].copy_from_slice(&checksum);
        let disk = SimDisk::new(1, Medium::default(), 1);
        disk.prepare(FileId(0), at, &extension);
        disk.prepare(FileId(0), 0, &header.to_bytes());
        for read_only in [true, false] {
            let before = disk.read_live(FileId(0), 0, Header::LEN);
            let options = Options {
                read_only,
                ..options()
            };
            let chain = Chain {
                levels: vec![Level::Ploop],
            };
            let opened = Engine::open(disk.clone(), &chain, options);
            let refused = opened.err().map(|error| format!("{error:?}"));
            assert_eq!(refused.is_some(), flags == NECESSARY, "{refused:?}");
            if let Some(error) = refused {
                assert!(error.contains("Necessary(5)"), "{error}");
                assert_eq!(disk.read_live(FileId(0), 0, Header::LEN), before);
            }
        }
    }
}

/// What QEMU's `nbd` driver calls changed, in bytes.
fn changed_by_qemu(image: &std::path::Path, folder: &std::path::Path) -> Vec<(u64, u64)> {
    use std::process::{Command, Stdio};

    let socket = folder.join("nbd");
    let mut server = Command::new("qemu-nbd")
        .args([
            "--read-only",
            "--format=parallels",
            "--bitmap",
            GUID,
            "--socket",
        ])
        .args([&socket, image])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    for _ in 0..1000 {
        if sockets::is_listened_on(&socket) || server.try_wait().unwrap().is_some() {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    let nbd = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{GUID}",
        socket.display()
    );
    let map = Command::new("qemu-img")
        .args(["map", "--output=json", "--image-opts", &nbd])
        .output()
        .unwrap();
    let _ = server.kill();
    let _ = server.wait();
    let said = String::from_utf8_lossy(&map.stderr);
    assert!(map.status.success(), "{said}");
    let map: serde_json::Value = serde_json::from_slice(&map.stdout).unwrap();
    let extents = map.as_array().unwrap().iter();
    // It takes the bit for that of a hole.
    let changed = extents.filter(|extent| extent["data"] == false);
    let number = |extent: &serde_json::Value, name: &str| extent[name].as_u64().unwrap();
    changed
        .map(|extent| {
            let start = number(extent, "start");
            (start, start + number(extent, "length"))
        })
        .collect()
}

#[test]
fn qemu_reads_bitmaps_as_they_were_saved() {
    let has = |tool: &str| {
        let mut command = std::process::Command::new(tool);
        command.arg("--version").output().is_ok()
    };
    if !has("qemu-nbd") || !has("qemu-img") {
        let required = std::env::var_os("PLOOP_REQUIRE_PEERS");
        let why = "there is no qemu-nbd, or no qemu-img";
        assert!(required.is_none_or(|value| value == "0"), "{why}");
        eprintln!("LEFT OUT: {why}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // A cluster of bits for each 1 GiB.
    let size = 5 << 30;
    let rig = Rig::new(size);
    rig.change(&[add(GUID, 4096, true), add("another", 512, false)])
        .unwrap();
    rig.write(CLUSTER, &[1; 512]).unwrap();
    rig.discard(1 << 30, 1 << 30).unwrap();
    rig.zero((3 << 30) - 4096, 8192, true).unwrap();
    rig.write(size - 512, &[2; 512]).unwrap();
    rig.control(Control::Close).unwrap();
    let image = folder.path().join("image");
    let len = rig.disk.live_len(FileId(0));
    std::fs::write(&image, rig.disk.read_live(FileId(0), 0, len as usize)).unwrap();
    let expected = [
        (CLUSTER, CLUSTER + 4096),
        (1 << 30, 2 << 30),
        ((3 << 30) - 4096, (3 << 30) + 4096),
        (size - 4096, size),
    ];
    assert_eq!(changed_by_qemu(&image, folder.path()), expected);
}

/// What was saved is all that there is: who changes them then would be told of what is lost.
#[test]
fn bitmaps_do_not_change_any_more_once_they_were_given_out() {
    for what in [
        Control::Close,
        Control::Pass,
        Control::HandOver { trims: true },
    ] {
        let rig = Rig::new(DISK);
        rig.change(&[add(GUID, 4096, true)]).unwrap();
        rig.control(what).unwrap();
        let late = rig
            .engine
            .change_bitmaps_now(&[Action::Remove(GUID.to_owned())]);
        assert_eq!(late, Err(BitmapError::Engine(EngineError::Stopped)));
    }
}

#[test]
fn all_bitmaps_together_take_no_more_memory_than_they_may() {
    let rig = Rig::new(128 << 30);
    let fine: Vec<_> = (0..9)
        .map(|index| add(&index.to_string(), 512, false))
        .collect();
    // 2^28 bits each.
    rig.change(&fine[..8]).unwrap();
    assert_eq!(rig.change(&fine[8..]), Err(BitmapError::ManyBits));
    rig.change(&[add("coarse", 65536, false)]).unwrap_err();
    rig.change(&[Action::Remove("0".to_owned()), add("coarse", 65536, false)])
        .unwrap();
    // Nor if the disk becomes larger.
    let grow = |bytes: u64| rig.control(Control::PrepareGrowth(Sector(bytes / 512)));
    assert_eq!(grow(256 << 30), Err(EngineError::FineBitmap));
}

/// Those of an image that somebody else has made are dropped from there on.
#[test]
fn an_image_with_many_fine_bitmaps_takes_no_more_memory_than_it_may() {
    const FILE: FileId = FileId(0);
    let disk = SimDisk::new(1, Medium::default(), 1);
    let cluster = ClusterSize::from_bytes(64 << 10).unwrap();
    let mut header = Header::new(Sector(128 << 30 >> 9), cluster).unwrap();
    disk.set_len(FILE, header.geometry().data_start).unwrap();
    let bitmaps: Vec<_> = (0..15)
        .map(|index| Bitmap {
            name: GUID.replace("c0c2", &format!("{index:04x}")),
            bits: Bits::new(9),
            records: true,
            is_persistent: true,
        })
        .collect();
    let behind = (&*bitmaps, header.geometry().first_host_cluster());
    let saved = saved::save(&disk, FILE, header.geometry(), behind);
    header.extension = saved.and_then(|saved| saved.extension).unwrap();
    header.in_use = InUse::ClosedWithExtension;
    disk.write_all_at(FILE, &header.to_bytes(), 0).unwrap();
    // 2^28 bits each.
    let rig = Rig::open(&disk, 1, options());
    assert_eq!(rig.engine.bitmaps().len(), 8);
}
