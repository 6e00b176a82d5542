//! Files in memory, for the engine and for off-line work.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;
use vhost_user_ploop::image::ImageFile;
use vhost_user_ploop::storage::{Buffer, Completion, Disk, FileId, Io, Op};

/// What no file gets longer than: the disk is full then.
const LEN_MAX: u64 = 16 << 20;

/// What a hole is made of.
const BLOCK: u32 = 4096;

/// Clones share the files.
#[derive(Clone, Debug, Default)]
pub struct MemDisk(Arc<Mutex<Vec<Vec<u8>>>>);

impl MemDisk {
    /// With these files, base first.
    pub fn new(files: Vec<Vec<u8>>) -> Self {
        Self(Arc::new(Mutex::new(files)))
    }

    /// One of its files for off-line work.
    pub fn image(&self, file: u8) -> MemImage {
        MemImage {
            disk: self.clone(),
            file: FileId(file),
        }
    }

    /// What is in a file.
    pub fn content(&self, file: u8) -> Vec<u8> {
        self.files()[usize::from(file)].clone()
    }

    fn files(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().expect("nobody panics with it")
    }

    fn with<T>(&self, file: FileId, work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        work(&mut self.files()[usize::from(file.0)])
    }

    fn perform(&self, op: &mut Op) -> io::Result<()> {
        let file = op.file();
        match op {
            Op::Read { offset, buffer, .. } => self.with(file, |bytes| {
                let mut there = vec![0; buffer.len()];
                let start = (*offset).min(bytes.len() as u64) as usize;
                let end = (start + there.len()).min(bytes.len());
                there[..end - start].copy_from_slice(&bytes[start..end]);
                match buffer {
                    Buffer::Client(segments) => segments.copy_from(0, &there),
                    Buffer::Owned(own) => own.copy_from_slice(&there),
                }
                Ok(())
            }),
            Op::Write { offset, buffer, .. } => {
                let mut written = vec![0; buffer.len()];
                match buffer {
                    Buffer::Client(segments) => segments.copy_to(0, &mut written),
                    Buffer::Owned(own) => written.copy_from_slice(own),
                }
                self.write_all_at(file, &written, *offset)
            }
            Op::Zero { offset, len, .. } => self.with(file, |bytes| zero(bytes, *offset, *len)),
            Op::Allocate { offset, len, .. } => {
                let end = offset.saturating_add(*len);
                self.with(file, |bytes| grow(bytes, end))
            }
            Op::Clone { .. } => Err(io::ErrorKind::Unsupported.into()),
            Op::Sync { .. } => Ok(()),
        }
    }
}

fn zero(bytes: &mut [u8], offset: u64, len: u64) -> io::Result<()> {
    let end = offset.saturating_add(len).min(bytes.len() as u64);
    let start = offset.min(end);
    bytes[start as usize..end as usize].fill(0);
    Ok(())
}

fn grow(bytes: &mut Vec<u8>, end: u64) -> io::Result<()> {
    if end > LEN_MAX {
        return Err(Errno::NOSPC.into());
    }
    if end > bytes.len() as u64 {
        bytes.resize(end as usize, 0);
    }
    Ok(())
}

impl Disk for MemDisk {
    type Io = MemIo;

    fn open_io(&self, _depth: u32) -> io::Result<MemIo> {
        Ok(MemIo {
            disk: self.clone(),
            queued: Vec::new(),
            done: Vec::new(),
        })
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        Ok(self.with(file, |bytes| bytes.len() as u64))
    }

    fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        self.with(file, |bytes| {
            grow(bytes, len)?;
            bytes.truncate(len as usize);
            Ok(())
        })
    }

    fn read_exact_at(&self, file: FileId, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(file, |bytes| {
            let start = usize::try_from(offset).ok();
            let range = start.and_then(|start| Some(start..start.checked_add(to.len())?));
            let there = range.and_then(|range| bytes.get(range));
            to.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn write_all_at(&self, file: FileId, from: &[u8], offset: u64) -> io::Result<()> {
        self.with(file, |bytes| {
            grow(bytes, offset.saturating_add(from.len() as u64))?;
            bytes[offset as usize..][..from.len()].copy_from_slice(from);
            Ok(())
        })
    }

    fn allocate(&self, _: FileId, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self, _: FileId) -> io::Result<()> {
        Ok(())
    }

    fn zero_granularity(&self) -> u32 {
        BLOCK
    }
}

/// One thread's access: all is done when it is submitted.
pub struct MemIo {
    disk: MemDisk,
    queued: Vec<(u64, Op)>,
    done: Vec<Completion>,
}

impl Io for MemIo {
    fn queue(&mut self, tag: u64, op: Op) -> Result<(), Op> {
        self.queued.push((tag, op));
        Ok(())
    }

    fn submit(&mut self) {
        for (tag, mut op) in self.queued.drain(..) {
            let result = self.disk.perform(&mut op).map_err(|error| {
                let code = error.raw_os_error().unwrap_or(libc::EIO);
                Errno::from_raw_os_error(code)
            });
            self.done.push(Completion { tag, result, op });
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.done);
    }

    fn in_flight(&self) -> usize {
        self.queued.len() + self.done.len()
    }

    fn completion_fd(&self) -> Option<RawFd> {
        None
    }
}

/// See [`MemDisk::image`].
#[derive(Debug)]
pub struct MemImage {
    disk: MemDisk,
    file: FileId,
}

impl ImageFile for MemImage {
    fn path(&self) -> &Path {
        Path::new("image")
    }

    fn file_len(&self) -> io::Result<u64> {
        self.disk.len(self.file)
    }

    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_exact_at(self.file, bytes, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.write_all_at(self.file, bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.set_len(self.file, len)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        self.disk
            .with(self.file, |bytes| zero(bytes, range.start, len))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let len = self.file_len()?;
        Ok((offset < len).then_some(offset..len))
    }
}
