//! A disk whose operations wait until the test lets them go.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::FileExt,
    },
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vhost_user_ploop::storage::{Buffer, Completion, Disk, FileId, Io, Op};

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// In bytes.
const BLOCK: u32 = 4096;

/// One file in memory. Clones share it: one is for the engine, one for the test.
#[derive(Clone)]
pub struct HeldDisk(Arc<Shared>);

struct Shared {
    file: File,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    is_held: bool,
    is_full: bool,
    /// Transfers of guest memory that wait to be let go.
    waiting: usize,
    syncs: usize,
    /// Woken when operations are let go.
    wakes: Vec<Arc<OwnedFd>>,
}

impl HeldDisk {
    /// An empty file.
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            file: tempfile::tempfile().expect("a file can be made"),
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// Lets no operation happen from now on.
    pub fn hold(&self) {
        self.state().is_held = true;
    }

    /// Lets all happen that wait, and those to come.
    pub fn let_go(&self) {
        let mut state = self.state();
        state.is_held = false;
        for wake in &state.wakes {
            signal(wake);
        }
    }

    /// Waits until so many transfers of guest memory are being held.
    pub fn wait_for_held(&self, count: usize) {
        let state = self.state();
        let (state, timeout) = self
            .0
            .changed
            .wait_timeout_while(state, PATIENCE, |state| state.waiting < count)
            .unwrap();
        let came = state.waiting;
        // A panic with the lock held would stop the engine's threads as well.
        drop(state);
        assert!(!timeout.timed_out(), "{came} of {count} transfers came");
    }

    /// How many transfers of guest memory are being held.
    pub fn held(&self) -> usize {
        self.state().waiting
    }

    /// Whether there is space for more than what is allocated.
    pub fn set_full(&self, is_full: bool) {
        self.state().is_full = is_full;
    }

    /// Syncs and stable writes so far.
    pub fn syncs(&self) -> usize {
        self.state().syncs
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    fn perform(&self, op: &mut Op) -> io::Result<()> {
        match op {
            Op::Read { offset, buffer, .. } => {
                let mut bytes = vec![0; buffer.len()];
                self.read_zero_padded(&mut bytes, *offset)?;
                match buffer {
                    Buffer::Client(segments) => segments.copy_from(0, &bytes),
                    Buffer::Owned(own) => own.copy_from_slice(&bytes),
                }
                Ok(())
            }
            Op::Write {
                offset,
                buffer,
                dsync,
                ..
            } => {
                let mut bytes = vec![0; buffer.len()];
                match buffer {
                    Buffer::Client(segments) => segments.copy_to(0, &mut bytes),
                    Buffer::Owned(own) => bytes.copy_from_slice(own),
                }
                self.check_space(*offset + bytes.len() as u64)?;
                self.state().syncs += usize::from(*dsync);
                self.0.file.write_all_at(&bytes, *offset)
            }
            Op::Clone { .. } => Err(io::ErrorKind::Unsupported.into()),
            Op::Zero { offset, len, .. } => {
                self.0.file.write_all_at(&vec![0; *len as usize], *offset)
            }
            Op::Allocate { offset, len, .. } => self.allocate_now(*offset + *len),
            Op::Sync { .. } => {
                self.state().syncs += 1;
                Ok(())
            }
        }
    }

    fn allocate_now(&self, end: u64) -> io::Result<()> {
        self.check_space(end)?;
        if end > self.0.file.metadata()?.len() {
            self.0.file.set_len(end)?;
        }
        Ok(())
    }

    /// A full disk cannot hold more than the length of the file.
    fn check_space(&self, end: u64) -> io::Result<()> {
        if self.state().is_full && end > self.0.file.metadata()?.len() {
            return Err(Errno::NOSPC.into());
        }
        Ok(())
    }

    fn read_zero_padded(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let mut at = 0;
        while at < bytes.len() {
            match self.0.file.read_at(&mut bytes[at..], offset + at as u64)? {
                0 => break,
                len => at += len,
            }
        }
        bytes[at..].fill(0);
        Ok(())
    }
}

impl Disk for HeldDisk {
    type Io = HeldIo;

    fn open_io(&self, _depth: u32) -> io::Result<HeldIo> {
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        self.state().wakes.push(Arc::clone(&wake));
        Ok(HeldIo {
            disk: self.clone(),
            queued: Vec::new(),
            started: Vec::new(),
            wake,
        })
    }

    fn len(&self, _file: FileId) -> io::Result<u64> {
        Ok(self.0.file.metadata()?.len())
    }

    fn set_len(&self, _file: FileId, len: u64) -> io::Result<()> {
        self.0.file.set_len(len)
    }

    fn allocate(&self, _file: FileId, offset: u64, len: u64) -> io::Result<()> {
        self.allocate_now(offset + len)
    }

    fn read_exact_at(&self, _file: FileId, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.file.read_exact_at(bytes, offset)
    }

    fn write_all_at(&self, _file: FileId, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.file.write_all_at(bytes, offset)
    }

    fn sync(&self, _file: FileId) -> io::Result<()> {
        self.state().syncs += 1;
        Ok(())
    }

    fn zero_granularity(&self) -> u32 {
        BLOCK
    }
}

/// One thread's access.
pub struct HeldIo {
    disk: HeldDisk,
    queued: Vec<(u64, Op)>,
    /// They happen when they are reaped, so that what they need has to be there
    /// until then.
    started: Vec<(u64, Op)>,
    wake: Arc<OwnedFd>,
}

impl Io for HeldIo {
    fn queue(&mut self, tag: u64, op: Op) -> Result<(), Op> {
        self.queued.push((tag, op));
        Ok(())
    }

    fn submit(&mut self) {
        if self.queued.is_empty() {
            return;
        }
        let mut state = self.disk.state();
        state.waiting += transfers(&self.queued);
        self.started.append(&mut self.queued);
        if !state.is_held {
            signal(&self.wake);
        }
        drop(state);
        self.disk.0.changed.notify_all();
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let mut state = self.disk.state();
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        if state.is_held {
            return;
        }
        state.waiting -= transfers(&self.started);
        drop(state);
        for (tag, mut op) in self.started.drain(..) {
            let result = self.disk.perform(&mut op).map_err(|error| {
                let code = error.raw_os_error().unwrap_or(libc::EIO);
                Errno::from_raw_os_error(code)
            });
            done.push(Completion { tag, result, op });
        }
    }

    fn in_flight(&self) -> usize {
        self.queued.len() + self.started.len()
    }

    fn completion_fd(&self) -> Option<RawFd> {
        Some(self.wake.as_raw_fd())
    }
}

/// How many of them read or fill guest memory.
fn transfers(ops: &[(u64, Op)]) -> usize {
    let is_transfer = |op: &Op| {
        matches!(op, Op::Read { buffer, .. } | Op::Write { buffer, .. }
            if matches!(buffer, Buffer::Client(_)))
    };
    ops.iter().filter(|(_, op)| is_transfer(op)).count()
}

fn signal(event: &OwnedFd) {
    rustix::io::write(event, &1_u64.to_ne_bytes()).expect("an event can be signalled");
}
