//! Snapshots of disks that run on files of the host, read from beside.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use super::*;
use crate::format::{ClusterSize, Descriptor, InUse, Sector, Version};
use crate::image::{self, Access, OpenImage, OpenMode};
use crate::ploop::{Chain, Command, EngineError, Options, Queue, Request, Running};
use crate::storage::{AlignedBuf, HostOptions, Segments};

pub(in crate::served) const CLUSTER: ClusterSize = ClusterSize::MIN;
/// Of the disk, in clusters.
pub(in crate::served) const CLUSTERS: u64 = 24;
const SIZE: Sector = Sector(CLUSTERS * CLUSTER.sectors());

/// A bundle whose disk is served.
pub(in crate::served) struct Rig {
    running: Option<Running<HostDisk>>,
    pub(in crate::served) bundle: Bundle,
    /// Of all files; dropped last.
    locks: Vec<ImageLock>,
    folder: tempfile::TempDir,
}

impl Rig {
    pub(in crate::served) fn new(version: Version) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        image::create(&path, SIZE, CLUSTER).unwrap();
        if version == Version::V1 {
            image::change_version(&path, version).unwrap();
        }
        Self::serve(folder, Options::default())
    }

    /// A raw image with something behind the end of its disk.
    pub(in crate::served) fn raw() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        image::create(&path, SIZE, CLUSTER).unwrap();
        fs::write(
            path.join("root.hds"),
            vec![0x77; SIZE.bytes() as usize + 4096],
        )
        .unwrap();
        let xml = path.join(Descriptor::FILE_NAME);
        let text = fs::read_to_string(&xml).unwrap();
        assert!(text.contains("Compressed"));
        fs::write(xml, text.replace("Compressed", "Plain")).unwrap();
        Self::serve(folder, Options::default())
    }

    fn serve(folder: tempfile::TempDir, options: Options) -> Self {
        let opened =
            image::open(&folder.path().join("disk"), OpenMode::new(Access::Serve)).unwrap();
        let OpenImage {
            files,
            chain,
            bundle,
            locks,
            ..
        } = opened;
        Self {
            running: Some(run(files, &chain, options)),
            bundle: bundle.unwrap(),
            locks,
            folder,
        }
    }

    pub(in crate::served) fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    pub(in crate::served) fn engine(&self) -> Arc<Engine<HostDisk>> {
        self.running.as_ref().expect("it runs").engine().clone()
    }

    pub(in crate::served) fn create(&mut self) -> Result<Guid, SnapshotError> {
        let call_off = CallOff::default();
        let engine = self.engine();
        let created = create(
            &engine,
            &mut self.bundle,
            (&NewSnapshot::default(), &[]),
            &call_off,
        )?;
        self.locks.last_mut().unwrap().stop_writing().unwrap();
        self.locks.push(created.lock);
        Ok(created.guid)
    }

    /// What another process reads of a snapshot.
    pub(in crate::served) fn read_snapshot(&self, guid: Guid) -> Vec<u8> {
        let mode = OpenMode::new(Access::Read).snapshot(Some(guid));
        let opened = image::open(&self.path(), mode).unwrap();
        let mut options = Options::default();
        options.read_only = true;
        let running = run(opened.files, &opened.chain, options);
        let bytes = read_all(running.engine());
        running.close().unwrap();
        bytes
    }

    pub(in crate::served) fn close(&mut self) {
        if let Some(running) = self.running.take() {
            assert_eq!(running.close(), Ok(()));
        }
        self.locks.clear();
    }

    /// Closes the disk, and has it checked and served again.
    pub(in crate::served) fn serve_again(mut self) -> Self {
        self.close();
        let mode = OpenMode::new(Access::Read);
        let report = image::check(&self.path(), None, mode, &()).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        self.serve_again_unchecked()
    }

    pub(in crate::served) fn serve_again_unchecked(mut self) -> Self {
        self.close();
        let Self { folder, .. } = self;
        Self::serve(folder, Options::default())
    }

    pub(in crate::served) fn files(&self) -> Vec<String> {
        let names = fs::read_dir(self.path()).unwrap();
        let mut names: Vec<_> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_unstable();
        names
    }

    pub(in crate::served) fn old_top(&self, guid: Guid) -> PathBuf {
        let image = self.bundle.descriptor().image(guid).unwrap();
        self.path().join(&image.file)
    }
}

fn run(files: Vec<HostFile>, chain: &Chain, options: Options) -> Running<HostDisk> {
    let disk = HostDisk::new(files, HostOptions::default()).unwrap();
    Running::start(Engine::open(disk, chain, options).unwrap()).unwrap()
}

fn command(queue: &mut Queue<HostDisk>, command: Command) -> Result<(), EngineError> {
    queue.push(Request { tag: 1, command });
    let mut done = Vec::new();
    while done.is_empty() {
        queue.submit();
        queue.poll(&mut done);
        thread::yield_now();
    }
    done[0].result
}

fn segments(memory: &mut AlignedBuf) -> Segments {
    let mut segments = Segments::new();
    // SAFETY: the request has ended before the memory is used again.
    unsafe { segments.push(memory.as_mut_ptr(), memory.len()) };
    segments
}

pub(in crate::served) fn write(queue: &mut Queue<HostDisk>, start: Sector, byte: u8, len: usize) {
    let mut memory = AlignedBuf::from_slice(4096, &vec![byte; len]);
    let data = segments(&mut memory);
    command(queue, Command::Write { start, data }).unwrap();
}

pub(in crate::served) fn read_all(engine: &Arc<Engine<HostDisk>>) -> Vec<u8> {
    let mut queue = engine.queue().unwrap();
    let mut memory = AlignedBuf::from_slice(4096, &vec![0xa5; SIZE.bytes() as usize]);
    let (start, data) = (Sector(0), segments(&mut memory));
    command(&mut queue, Command::Read { start, data }).unwrap();
    memory.to_vec()
}

/// One cluster after the other has another byte.
pub(in crate::served) fn fill(engine: &Arc<Engine<HostDisk>>, byte: u8, every: u64) {
    let mut queue = engine.queue().unwrap();
    for cluster in (0..CLUSTERS).step_by(every as usize) {
        let start = Sector(cluster * CLUSTER.sectors());
        write(&mut queue, start, byte, 4096);
    }
}

fn check_snapshots_of(mut rig: Rig) {
    let engine = rig.engine();
    fill(&engine, 1, 2);
    let at_first = read_all(&engine);
    let first = rig.create().unwrap();
    assert_eq!(read_all(&engine), at_first);
    let old_top = fs::read(rig.old_top(first)).unwrap();
    fill(&engine, 2, 3);
    let at_second = read_all(&engine);
    assert_ne!(at_second, at_first);
    let second = rig.create().unwrap();
    fill(&engine, 3, 5);
    let mut queue = engine.queue().unwrap();
    command(&mut queue, Command::Flush).unwrap();
    drop(queue);
    let now = read_all(&engine);
    assert_eq!(rig.read_snapshot(first), at_first);
    assert_eq!(rig.read_snapshot(second), at_second);
    assert_eq!(fs::read(rig.old_top(first)).unwrap(), old_top);
    drop(engine);
    let mut rig = rig.serve_again();
    assert_eq!(read_all(&rig.engine()), now);
    assert_eq!(rig.read_snapshot(first), at_first);
    assert_eq!(rig.read_snapshot(second), at_second);
    let chain: Vec<_> = rig.bundle.descriptor().chain(Guid::TOP);
    let guids: Vec<_> = chain.iter().map(|image| image.guid).collect();
    assert_eq!(guids, [first, second, Guid::TOP]);
    rig.close();
}

#[test]
fn a_snapshot_is_what_was_written_and_the_disk_goes_on() {
    for version in [Version::V1, Version::V2] {
        check_snapshots_of(Rig::new(version));
    }
}

#[test]
fn a_raw_disk_goes_on_in_a_delta() {
    let rig = Rig::raw();
    let path = rig.path().join("root.hds");
    check_snapshots_of(rig);
    // Gone with the rig; it had what was behind the disk cut off by then.
    assert!(!path.exists());
}

#[test]
fn what_lies_behind_a_raw_disk_is_cut_off() {
    let mut rig = Rig::raw();
    let guid = rig.create().unwrap();
    let len = fs::metadata(rig.old_top(guid)).unwrap().len();
    assert_eq!(len, SIZE.bytes());
    rig.close();
}

#[test]
fn the_old_top_is_closed_and_short_and_the_new_one_has_its_owner() {
    let mut rig = Rig::new(Version::V2);
    let path = rig.path().join("root.hds");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    fill(&rig.engine(), 1, 1);
    let guid = rig.create().unwrap();
    let mode = OpenMode::new(Access::Read).snapshot(Some(guid));
    let opened = image::open(&rig.path(), mode).unwrap();
    let file = image::HostImage::new(opened.files[0].file.try_clone().unwrap(), path);
    let header = image::read_header(&file).unwrap();
    assert_eq!(header.in_use, InUse::Closed);
    let data = CLUSTERS * CLUSTER.bytes();
    let len = opened.files[0].file.metadata().unwrap().len();
    assert_eq!(len, header.geometry().data_start + data);
    let top = rig.bundle.descriptor().image(Guid::TOP).unwrap();
    let top = fs::metadata(rig.path().join(&top.file)).unwrap();
    assert_eq!(top.mode() & 0o777, 0o640);
    rig.close();
}

#[test]
fn a_snapshot_that_is_called_off_leaves_nothing() {
    let mut rig = Rig::new(Version::V2);
    let engine = rig.engine();
    let call_off = CallOff::default();
    assert!(call_off.call_off(&engine));
    let new = NewSnapshot::default();
    let made = create(&engine, &mut rig.bundle, (&new, &[]), &call_off);
    assert!(matches!(made, Err(SnapshotError::CalledOff)), "{made:?}");
    assert_eq!(rig.files(), [Descriptor::FILE_NAME, "root.hds"]);
    drop(engine);
    rig.create().unwrap();
    rig.close();
}

/// The last look at it finds another one, when requests are held already.
#[test]
fn a_disk_whose_descriptor_was_changed_goes_on_as_it_was() {
    let mut rig = Rig::new(Version::V2);
    let engine = rig.engine();
    fill(&engine, 1, 2);
    let before = read_all(&engine);
    let header = engine.header_on_top().unwrap();
    let guid = Guid::random();
    let new = NewSnapshot::default();
    let delta = engine
        .disk()
        .with_top(|top, path| NewDelta::above(&rig.bundle, (top, path), &header, guid, &new))
        .unwrap();
    let descriptor = rig.bundle.prepare(delta.descriptor().clone()).unwrap();
    let hold = Hold::begin(&engine).unwrap();
    let xml = rig.folder.path().join("disk").join(Descriptor::FILE_NAME);
    let text = fs::read_to_string(&xml).unwrap();
    fs::write(&xml, text.replace("root.hds", "other.hds")).unwrap();
    let named = name(descriptor);
    assert!(matches!(named, Err(SnapshotError::Image(_))), "{named:?}");
    drop(hold);
    fs::write(&xml, text).unwrap();
    assert_eq!(read_all(&engine), before);
    fill(&engine, 2, 2);
    assert_ne!(read_all(&engine), before);
    drop(engine);
    delta.remove(&rig.bundle);
    rig.create().unwrap();
    rig.serve_again().close();
}

#[test]
fn a_chain_becomes_no_longer_than_it_may_be() {
    let mut rig = Rig::new(Version::V2);
    for _ in 1..Descriptor::LEVELS_MAX {
        rig.create().unwrap();
    }
    let made = rig.create();
    let too_deep = matches!(made, Err(SnapshotError::Engine(EngineError::TooDeep)));
    assert!(too_deep, "{made:?}");
    fill(&rig.engine(), 1, 2);
    rig.serve_again().close();
}

#[test]
fn no_snapshot_is_made_of_a_disk_that_is_read_or_suspended() {
    let mut rig = Rig::new(Version::V2);
    rig.engine().suspend().unwrap();
    assert_eq!(rig.engine().close_top().wait(), Err(EngineError::Suspended));
    rig.engine().resume();
    assert_eq!(rig.engine().keep_top().wait(), Err(EngineError::TopInUse));
    rig.close();
    let mut options = Options::default();
    options.read_only = true;
    let Rig { folder, .. } = rig;
    let mut rig = Rig::serve(folder, options);
    let made = rig.create();
    let is_read_only = matches!(made, Err(SnapshotError::Engine(EngineError::ReadOnly)));
    assert!(is_read_only, "{made:?}");
    assert_eq!(rig.files(), [Descriptor::FILE_NAME, "root.hds"]);
    rig.close();
}

/// Whoever writes knows what was acknowledged before, and what was asked for after.
#[test]
fn a_snapshot_under_load_is_what_was_acknowledged_at_one_moment() {
    let mut rig = Rig::new(Version::V2);
    let engine = rig.engine();
    let is_over = Arc::new(AtomicBool::new(false));
    let ended: Arc<[AtomicU32; 2]> = Arc::default();
    let begun: Arc<[AtomicU32; 2]> = Arc::default();
    let writer = |index: usize| {
        let (engine, is_over) = (engine.clone(), is_over.clone());
        let (ended, begun) = (ended.clone(), begun.clone());
        thread::spawn(move || {
            let mut queue = engine.queue().unwrap();
            for number in 1_u32.. {
                let at = u64::from(number % 12) * 2 + index as u64;
                let mut memory = AlignedBuf::from_slice(4096, &number.to_le_bytes().repeat(1024));
                let start = Sector(at * CLUSTER.sectors());
                let data = segments(&mut memory);
                begun[index].store(number, Ordering::SeqCst);
                command(&mut queue, Command::Write { start, data }).unwrap();
                ended[index].store(number, Ordering::SeqCst);
                if is_over.load(Ordering::SeqCst) {
                    return;
                }
            }
        })
    };
    let writers = [0, 1].map(writer);
    let mut snapshots = Vec::new();
    for _ in 0..8 {
        while ended[0].load(Ordering::SeqCst) % 7 != 3 {
            thread::yield_now();
        }
        let before = [0, 1].map(|index: usize| ended[index].load(Ordering::SeqCst));
        let guid = rig.create().unwrap();
        let after = [0, 1].map(|index: usize| begun[index].load(Ordering::SeqCst));
        snapshots.push((guid, before, after));
    }
    is_over.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.join().unwrap();
    }
    for (guid, before, after) in snapshots {
        let bytes = rig.read_snapshot(guid);
        for index in 0..2 {
            let number_at = |slot: u32| {
                let cluster = u64::from(slot) * 2 + index as u64;
                let at = (cluster * CLUSTER.bytes()) as usize;
                let words = bytes[at..at + 4096].chunks_exact(4);
                let mut words = words.map(|word| u32::from_le_bytes(word.try_into().unwrap()));
                let first = words.next().unwrap();
                assert!(words.all(|word| word == first), "a write in two parts");
                first
            };
            // Writes of a queue come one after the other: up to one of them all are there,
            // and none behind it.
            let last = (0..12).map(number_at).max().unwrap();
            assert!((before[index]..=after[index]).contains(&last));
            for slot in 0..12 {
                // Of one that was not reached there is nothing.
                let expected = last.saturating_sub((last + 12 - slot) % 12);
                assert_eq!(
                    number_at(slot),
                    expected,
                    "slot {slot} of {index} at {last}"
                );
            }
        }
    }
    drop(engine);
    rig.serve_again().close();
}

#[test]
fn a_disk_that_has_grown_keeps_its_size_above_a_snapshot() {
    let mut rig = Rig::new(Version::V2);
    let engine = rig.engine();
    let larger = Sector(2 * SIZE.0);
    let grown = crate::served::grow(&engine, Some(&mut rig.bundle), larger, &CallOff::default());
    assert_eq!(grown.unwrap(), larger);
    let mut queue = engine.queue().unwrap();
    write(&mut queue, Sector(larger.0 - 8), 7, 4096);
    rig.create().unwrap();
    let mut memory = AlignedBuf::from_slice(4096, &[0; 4096]);
    let (start, data) = (Sector(larger.0 - 8), segments(&mut memory));
    command(&mut queue, Command::Read { start, data }).unwrap();
    assert_eq!(memory.to_vec(), [7; 4096]);
    assert_eq!(engine.disk_size(), larger);
    drop((queue, engine));
    let mut rig = rig.serve_again();
    assert_eq!(rig.engine().disk_size(), larger);
    rig.close();
}
