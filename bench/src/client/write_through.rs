//! A vhost-user-blk client that accepts no write cache.
//!
//! It offers neither FLUSH nor CONFIG_WCE, so by virtio 1.2, 5.2.6.2 the device
//! must write through. `blkio` has no way to ask for that; this is the driver that
//! `blkio` uses, waited for in the same way.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use super::{Shape, Slots, memory};

/// The connection and the buffers of all its queues.
pub struct Connection {
    transport: Box<VirtioBlkTransport>,
    capacity: u64,
    buffers: Mapping,
}

/// One queue. Belongs to a [`Connection`], which must outlive it.
pub struct WriteThrough {
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    completed: Arc<EventFd>,
    /// The first request that the driver would not take.
    rejected: Option<std::io::Error>,
}

/// Connects to `socket` and sets up the queues of `shape`.
///
/// # Errors
/// Any of the protocol's or of memory allocation.
pub fn connect(
    socket: &Path,
    shape: Shape,
    queue_size: u16,
) -> Result<(Connection, Vec<WriteThrough>)> {
    let features = (VirtioBlkFeatureFlags::SEG_MAX
        | VirtioBlkFeatureFlags::BLK_SIZE
        | VirtioBlkFeatureFlags::TOPOLOGY
        | VirtioBlkFeatureFlags::MQ
        | VirtioBlkFeatureFlags::DISCARD)
        .bits()
        | (VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX).bits();
    let socket = socket.to_str().context("the path is not UTF-8")?;
    let transport =
        VhostUser::new(socket, features).with_context(|| format!("connecting to {socket}"))?;
    let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
    let config = transport
        .get_config()
        .context("reading the configuration")?;

    let queues =
        VirtioBlkQueue::setup_queues(transport.as_mut(), shape.queues as usize, queue_size)
            .context("starting the queues")?
            .into_iter()
            .enumerate()
            .map(|(index, queue)| WriteThrough {
                queue,
                notifier: transport.get_submission_notifier(index),
                completed: transport.get_completion_fd(index),
                rejected: None,
            })
            .collect();
    let bytes = shape.queues as usize * shape.depth as usize * shape.buffer_bytes as usize;
    let buffers = Mapping::new(memory::round_up_to_page(bytes))?;
    transport
        .map_mem_region(buffers.address, buffers.len, buffers.file.as_raw_fd(), 0)
        .context("sharing the buffers")?;
    let connection = Connection {
        transport,
        capacity: u64::from(config.capacity) * 512,
        buffers,
    };
    Ok((connection, queues))
}

impl Connection {
    /// Size of the disk in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The buffers of a queue.
    pub fn slots(&self, queue: usize, shape: Shape) -> Slots {
        let bytes = shape.depth as usize * shape.buffer_bytes as usize;
        // SAFETY: the mapping was made for `shape`, each queue has its own part,
        // and the device drops its lanes before the connection.
        unsafe {
            Slots::new(
                self.buffers.address + queue * bytes,
                shape.depth,
                shape.buffer_bytes,
            )
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Best effort: the socket is closed next, which ends the sharing anyway.
        let _ = self
            .transport
            .unmap_mem_region(self.buffers.address, self.buffers.len);
    }
}

impl WriteThrough {
    /// Queues a read.
    pub fn read(&mut self, offset: u64, buffer: *mut u8, len: usize, tag: usize) {
        // SAFETY: the buffer is one of the slots, which outlive the request.
        let result = unsafe { self.queue.read_raw(offset, buffer, len, tag) };
        self.note(result);
    }

    /// Queues a write.
    pub fn write(&mut self, offset: u64, buffer: *const u8, len: usize, tag: usize) {
        // SAFETY: the buffer is one of the slots, which outlive the request.
        let result = unsafe { self.queue.write_raw(offset, buffer, len, tag) };
        self.note(result);
    }

    /// Queues a discard.
    pub fn discard(&mut self, offset: u64, len: u64, tag: usize) {
        let result = self.queue.discard(offset, len, tag);
        self.note(result);
    }

    /// Queues a flush.
    pub fn flush(&mut self, tag: usize) {
        let result = self.queue.flush(tag);
        self.note(result);
    }

    fn note(&mut self, result: std::io::Result<()>) {
        if let Err(error) = result {
            self.rejected.get_or_insert(error);
        }
    }

    /// Notifies the device, waits until something is complete, and appends the
    /// tags.
    ///
    /// # Errors
    /// A request that failed, or none that completed within `patience`.
    pub fn wait(&mut self, patience: Duration, done: &mut Vec<usize>) -> Result<()> {
        if let Some(error) = self.rejected.take() {
            return Err(error).context("a request was not taken");
        }
        if self.queue.avail_notif_needed() {
            self.notifier.notify().context("notifying the device")?;
        }
        if self.reap(done)? > 0 {
            return Ok(());
        }
        self.queue.set_used_notif_enabled(true);
        let result = self.sleep_until_reaped(patience, done);
        self.queue.set_used_notif_enabled(false);
        result
    }

    fn sleep_until_reaped(&mut self, patience: Duration, done: &mut Vec<usize>) -> Result<()> {
        let timeout = Timespec {
            tv_sec: patience.as_secs() as i64,
            tv_nsec: patience.subsec_nanos().into(),
        };
        // Looked at again after notifications were enabled, so none is missed.
        while self.reap(done)? == 0 {
            // SAFETY: the descriptor is open as long as the queue.
            let fd = unsafe { BorrowedFd::borrow_raw(self.completed.as_raw_fd()) };
            let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
            if rustix::event::poll(&mut fds, Some(&timeout)).context("poll")? == 0 {
                bail!("no completion in {patience:?}: the server is gone or hangs");
            }
            self.completed.read().context("reading the event")?;
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<usize>) -> Result<usize> {
        let before = done.len();
        for completion in self.queue.completions() {
            if completion.ret != 0 {
                return Err(std::io::Error::from_raw_os_error(-completion.ret))
                    .context("a request failed");
            }
            done.push(completion.context);
        }
        Ok(done.len() - before)
    }
}

/// Anonymous shared memory.
struct Mapping {
    file: OwnedFd,
    address: usize,
    len: usize,
}

impl Mapping {
    fn new(len: usize) -> Result<Self> {
        let file =
            rustix::fs::memfd_create("ploop-bench", MemfdFlags::CLOEXEC).context("memfd_create")?;
        rustix::fs::ftruncate(&file, len as u64).context("ftruncate")?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file.as_fd(),
                0,
            )
        }
        .context("mmap")?;
        Ok(Self {
            file,
            address: address.expose_provenance(),
            len,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let address = ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: it is ours, and nothing uses it any more: the lanes are gone.
        // An error could only mean that it is not mapped.
        let _ = unsafe { rustix::mm::munmap(address, self.len) };
    }
}
