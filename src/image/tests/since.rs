//! What has changed since a snapshot, against comparing all that was ever read.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::resize::{NewSize, Shrink, resize};
use super::*;

/// What `map_since` gives, each range checked to be one that a copy can be made of.
fn changed_since(disk: &Disk, then: Guid, snapshot: Option<Guid>) -> Result<Vec<MapEntry>> {
    let mode = OpenMode::new(Access::Read).snapshot(snapshot);
    let mut entries = Vec::<MapEntry>::new();
    map_since(&disk.path, mode, then, |entry| {
        let before = entries.last().map_or(0, |last| last.start + last.length);
        assert!(before <= entry.start && entry.length > 0, "{entry:?}");
        entries.push(entry);
    })?;
    Ok(entries)
}

fn clusters_of(entries: &[MapEntry], present: bool) -> BTreeSet<u32> {
    let entries = entries.iter().filter(|entry| entry.present == present);
    let clusters = entries.flat_map(|entry| {
        let cluster = CLUSTER as u64;
        assert!(entry.start.is_multiple_of(cluster) && entry.length.is_multiple_of(cluster));
        (entry.start / cluster) as u32..((entry.start + entry.length) / cluster) as u32
    });
    clusters.collect()
}

#[test]
fn what_levels_above_a_snapshot_have_has_changed() {
    let (disk, [first, second]) = three_levels();
    let changed = |then, snapshot| {
        let entries = changed_since(&disk, then, snapshot).unwrap();
        assert_eq!(clusters_of(&entries, false), BTreeSet::new());
        clusters_of(&entries, true)
    };
    assert_eq!(changed(first, None), BTreeSet::from([1, 2, 3, 4]));
    assert_eq!(changed(second, None), BTreeSet::from([2, 3, 4]));
    assert_eq!(changed(first, Some(second)), BTreeSet::from([1, 3]));
    assert_eq!(changed(second, Some(second)), BTreeSet::new());

    // Each range says where its content is.
    let entries = changed_since(&disk, first, None).unwrap();
    let files = entries.iter().map(|entry| (entry.depth, &entry.filename));
    let second_file = Some(disk.image_file(second));
    let top_file = Some(disk.top_file());
    assert!(files.eq([(1, &second_file), (0, &top_file)]));

    // What was written has changed, even if it reads the same again.
    disk.write([0], 1);
    assert!(clusters_of(&changed_since(&disk, second, None).unwrap(), true).contains(&0));
}

#[test]
fn what_is_behind_the_old_end_has_changed() {
    for raw in [false, true] {
        let disk = match raw {
            true => raw_disk(3),
            false => Disk::new(3),
        };
        disk_with_hole_at_old_end(&disk, raw);
    }
}

fn disk_with_hole_at_old_end(disk: &Disk, raw: bool) {
    let first = snapshot(disk);
    let size = NewSize::Exactly(Sector(6 * CLUSTER_SECTORS));
    resize(&disk.path, size, Shrink::Refused).unwrap();
    disk.write([4], 7);
    let entries = changed_since(disk, first, None).unwrap();
    let ranges = entries.iter().map(|entry| {
        let cluster = CLUSTER as u64;
        let range = (entry.start / cluster, entry.length / cluster);
        (range, entry.present, entry.zero)
    });
    let expected = [
        ((3, 1), false, true),
        ((4, 1), true, false),
        ((5, 1), false, true),
    ];
    assert!(ranges.eq(expected), "raw {raw}: {entries:?}");
}

#[test]
fn what_did_not_come_from_a_snapshot_cannot_be_compared_with_it() {
    let (disk, [first, second]) = three_levels();
    let top = disk.bundle().descriptor().top();
    let refused = |then, snapshot| changed_since(&disk, then, snapshot).unwrap_err();
    assert!(matches!(
        refused(top, None),
        ImageError::PresentState { .. }
    ));
    assert!(matches!(
        refused(top, Some(first)),
        ImageError::PresentState { .. }
    ));
    assert!(matches!(refused(second, Some(first)),
        ImageError::NotBelow { guid, above: Some(above), .. } if (guid, above) == (second, first)));
    let error = refused(Guid::random(), None);
    assert!(matches!(error, ImageError::NoSnapshot { .. }), "{error}");
    switch_snapshot(&disk.path, first).unwrap();
    let error = refused(second, None);
    assert!(
        matches!(error, ImageError::NotBelow { above: None, .. }),
        "{error}"
    );

    let bare = disk.folder.path().join("bare.hds");
    create(&bare, Sector(CLUSTER_SECTORS), ClusterSize::MIN).unwrap();
    let error = map_since(&bare, OpenMode::new(Access::Read), first, |_| ()).unwrap_err();
    assert!(matches!(error, ImageError::NotABundle(_)), "{error}");
}

/// What may happen to a disk. Snapshots are chosen by a number, modulo how many there are.
#[derive(Clone, Debug)]
enum Event {
    Write(BTreeSet<u32>, u8),
    Snapshot,
    Delete(usize),
    Switch(usize),
    Merge(usize, usize),
    Grow(u64),
    Compact,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        5 => (prop::collection::btree_set(0..SHOWN as u32, 1..4), 0..4_u8)
            .prop_map(|(clusters, byte)| Event::Write(clusters, byte)),
        4 => Just(Event::Snapshot),
        1 => any::<usize>().prop_map(Event::Delete),
        1 => any::<usize>().prop_map(Event::Switch),
        1 => any::<(usize, usize)>().prop_map(|(from, to)| Event::Merge(from, to)),
        1 => (1..3_u64).prop_map(Event::Grow),
        1 => Just(Event::Compact),
    ]
}

impl Disk {
    fn snapshots(&self) -> Vec<Guid> {
        let bundle = self.bundle();
        let top = bundle.descriptor().top();
        let shots = bundle.descriptor().shots().iter().map(|shot| shot.guid);
        shots.filter(|guid| *guid != top).collect()
    }

    /// Events that are refused, such as the removal of what several snapshots lie on, are
    /// none.
    fn meet(&self, event: &Event) {
        let snapshots = self.snapshots();
        let chosen = |number: usize| snapshots.get(number % snapshots.len().max(1)).copied();
        match event {
            Event::Write(clusters, byte) => {
                let size = self.bundle().descriptor().disk_size;
                let clusters = clusters.iter().copied();
                let there = |cluster: &u32| u64::from(*cluster) * CLUSTER_SECTORS < size.0;
                let clusters: Vec<_> = clusters.filter(there).collect();
                match self.bundle().descriptor().images().len() {
                    1 if !self.is_expandable() => self.write_raw(&clusters, *byte),
                    _ => self.write(clusters, *byte),
                }
            }
            Event::Snapshot => drop(create_snapshot(&self.path, None, None).unwrap()),
            Event::Delete(number) => {
                let _ = chosen(*number).map(|guid| delete_snapshot(&self.path, guid, &()));
            }
            Event::Switch(number) => {
                let _ = chosen(*number).map(|guid| switch_snapshot(&self.path, guid));
            }
            Event::Merge(from, to) => {
                let _ = merge_snapshots(&self.path, chosen(*from), chosen(*to), &());
            }
            Event::Grow(clusters) => {
                let more = NewSize::GrowBy(Sector(clusters * CLUSTER_SECTORS));
                resize(&self.path, more, Shrink::Refused).unwrap();
            }
            Event::Compact => drop(compact(&self.path, &())),
        }
    }

    fn is_expandable(&self) -> bool {
        let bytes = fs::read(self.top_file()).unwrap();
        bytes.starts_with(b"Withou")
    }

    fn write_raw(&self, clusters: &[u32], byte: u8) {
        let file = fs::OpenOptions::new().write(true).open(self.top_file());
        let file = file.unwrap();
        for cluster in clusters {
            let offset = u64::from(*cluster) * CLUSTER as u64;
            file.write_all_at(&[byte; CLUSTER], offset).unwrap();
        }
    }

    /// The clusters that the levels of a chain have, each by its own file.
    fn mapped(&self, chain: &[Guid]) -> BTreeSet<u32> {
        let mut mapped = BTreeSet::new();
        for guid in chain {
            let path = self.image_file(*guid);
            let file = HostImage::new(fs::File::open(&path).unwrap(), path);
            let delta = Delta::load(file).unwrap();
            let entries = 0..delta.geometry().entries;
            mapped.extend(entries.filter(|guest| delta.lookup(GuestCluster(*guest)).is_some()));
        }
        mapped
    }
}

/// Compares every state of the disk with every snapshot that it lies on, and with the others.
fn compare_all(disk: &Disk) {
    let bundle = disk.bundle();
    let descriptor = bundle.descriptor();
    let states = disk.snapshots().into_iter().map(Some).chain([None]);
    let states: Vec<(Option<Guid>, Vec<u8>)> =
        states.map(|state| (state, disk.read(state))).collect();
    for (state, content) in &states {
        let chain = descriptor.chain(state.unwrap_or(descriptor.top()));
        let chain: Vec<Guid> = chain.iter().map(|image| image.guid).collect();
        for (then, old) in states.iter().filter_map(|(g, c)| Some(((*g)?, c))) {
            let entries = changed_since(disk, then, *state);
            let Some(index) = chain.iter().position(|guid| *guid == then) else {
                assert!(matches!(entries, Err(ImageError::NotBelow { .. })));
                continue;
            };
            let entries = entries.unwrap();
            let mapped = clusters_of(&entries, true);
            assert_eq!(mapped, disk.mapped(&chain[index + 1..]), "{entries:?}");
            // Behind the old end all is given, mapped or not.
            let changed = &mapped | &clusters_of(&entries, false);
            let before: BTreeMap<u32, u8> = (0..).zip(old.iter().copied()).collect();
            for (cluster, now) in (0..).zip(content) {
                let same = before.get(&cluster) == Some(now);
                assert!(same || changed.contains(&cluster), "{cluster}: {entries:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn whatever_differs_from_a_snapshot_has_changed_since(
        raw: bool,
        v1: bool,
        events in prop::collection::vec(event(), 1..14),
    ) {
        let disk = match raw {
            true => raw_disk(4),
            false => Disk::new(4),
        };
        if v1 && !raw {
            change_version(&disk.path, Version::V1).unwrap();
        }
        for event in &events {
            disk.meet(event);
            compare_all(&disk);
        }
    }
}
