//! The client that all figures are taken with: one device, its queues, its memory.
//!
//! Everything goes through `blkio`, with the same buffers, whether the device is
//! a vhost-user socket or a plain file (which shows what the host can do). One
//! case cannot: `blkio` always accepts the write cache, so write-through runs
//! speak to the same virtio driver that `blkio` is built on without it
//! ([`write_through`]).
//!
//! Knows offsets, buffers and completions. Must not know workloads or servers.

mod memory;
mod write_through;

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use blkio::{Blkio, Blkioq, ReqFlags};
use rustix::io::Errno;

use crate::workload::Cache;
pub use memory::Slots;
use write_through::WriteThrough;

/// How long a request may take before its server counts as dead.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 3 } else { 20 });

/// Entries of each virtqueue: QEMU's default.
const QUEUE_SIZE: i32 = 128;

/// Most completions that one call gives.
const BATCH: usize = 64;

/// What a device is reached by.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// The socket of a vhost-user-blk back-end.
    Socket(&'a Path),
    /// A file, through io_uring in this process.
    File {
        /// Which.
        path: &'a Path,
        /// O_DIRECT.
        direct: bool,
    },
}

/// The queues to make, and the memory that each can use.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Queues, at least 1.
    pub queues: u32,
    /// Buffers of each queue, one a request in flight.
    pub depth: u32,
    /// Size of a buffer in bytes.
    pub buffer_bytes: u32,
    /// When writes shall complete.
    pub cache: Cache,
}

/// An open device.
pub struct Device {
    lanes: Vec<Lane>,
    capacity: u64,
    // Last: the queues go before the connection that they use.
    _owner: Owner,
}

/// Keeps the connection, and the memory that the queues use, alive.
enum Owner {
    Blkio(#[expect(dead_code, reason = "only kept alive")] Blkio),
    WriteThrough(#[expect(dead_code, reason = "only kept alive")] write_through::Connection),
}

/// One queue and its buffers, for one thread. A request is known by the index of
/// its buffer, its tag.
pub struct Lane {
    queue: Queue,
    /// The buffers.
    pub slots: Slots,
    /// Flags of each write.
    write_flags: ReqFlags,
    in_flight: usize,
    /// Waiting has failed: there is no point in waiting for more.
    is_dead: bool,
}

enum Queue {
    Blkio(Blkioq),
    WriteThrough(WriteThrough),
}

impl Device {
    /// Connects and sets up the queues.
    ///
    /// # Errors
    /// Whatever the driver finds wrong, a back-end that is not there included.
    pub fn open(target: Target<'_>, shape: Shape) -> Result<Self> {
        match (target, shape.cache) {
            (Target::Socket(path), Cache::WriteThrough) => Self::open_write_through(path, shape),
            (Target::Socket(_), Cache::WriteBack) => {
                Self::open_blkio(target, shape, ReqFlags::empty())
            }
            (Target::File { .. }, Cache::WriteBack) => {
                Self::open_blkio(target, shape, ReqFlags::empty())
            }
            (Target::File { .. }, Cache::WriteThrough) => {
                Self::open_blkio(target, shape, ReqFlags::FUA)
            }
        }
    }

    fn open_blkio(target: Target<'_>, shape: Shape, write_flags: ReqFlags) -> Result<Self> {
        let mut blkio = connect(target)?;
        blkio.set_i32("num-queues", i32::try_from(shape.queues)?)?;
        if let Target::Socket(_) = target {
            blkio.set_i32("queue-size", QUEUE_SIZE)?;
        }
        let capacity = blkio.get_u64("capacity")?;
        let queues = blkio.start().context("starting the queues")?.queues;

        let lane_bytes = shape.depth as usize * shape.buffer_bytes as usize;
        let region = blkio
            .alloc_mem_region(memory::round_up_to_page(lane_bytes * queues.len()))
            .context("allocating the buffers")?;
        blkio
            .map_mem_region(&region)
            .context("sharing the buffers")?;
        let lanes = queues
            .into_iter()
            .enumerate()
            .map(|(index, queue)| Lane {
                queue: Queue::Blkio(queue),
                // SAFETY: the region is mapped while any of its queues lives
                // (each holds the registry that unmaps it), the lane keeps its
                // queue as long as the slots, and each lane has its own part.
                slots: unsafe {
                    Slots::new(
                        region.addr + index * lane_bytes,
                        shape.depth,
                        shape.buffer_bytes,
                    )
                },
                write_flags,
                in_flight: 0,
                is_dead: false,
            })
            .collect();
        Ok(Self {
            lanes,
            capacity,
            _owner: Owner::Blkio(blkio),
        })
    }

    fn open_write_through(path: &Path, shape: Shape) -> Result<Self> {
        let (connection, queues) = write_through::connect(path, shape, QUEUE_SIZE as u16)?;
        let lanes = queues
            .into_iter()
            .enumerate()
            .map(|(index, queue)| Lane {
                queue: Queue::WriteThrough(queue),
                slots: connection.slots(index, shape),
                write_flags: ReqFlags::empty(),
                in_flight: 0,
                is_dead: false,
            })
            .collect();
        Ok(Self {
            lanes,
            capacity: connection.capacity(),
            _owner: Owner::WriteThrough(connection),
        })
    }

    /// Size of the disk in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The queues, to be driven each by a thread.
    pub fn lanes(&mut self) -> &mut [Lane] {
        &mut self.lanes
    }

    /// Flushes the disk and waits for it. Needs queues that have nothing in flight.
    ///
    /// # Errors
    /// The server's, or none in time.
    pub fn flush(&mut self) -> Result<()> {
        let lane = &mut self.lanes[0];
        lane.flush(0);
        lane.drain().context("flush")
    }
}

/// Opens what `target` names, up to where its properties can be read.
fn connect(target: Target<'_>) -> Result<Blkio> {
    let driver = match target {
        Target::Socket(_) => "virtio-blk-vhost-user",
        Target::File { .. } => "io_uring",
    };
    let mut blkio = Blkio::new(driver)?;
    let (Target::Socket(path) | Target::File { path, .. }) = target;
    let path = path.to_str().context("the path is not UTF-8")?;
    blkio.set_str("path", path)?;
    if let Target::File { direct, .. } = target {
        blkio.set_bool("direct", direct)?;
    }
    blkio
        .connect()
        .with_context(|| format!("connecting to {path}"))?;
    Ok(blkio)
}

impl Lane {
    /// Requests started and not yet given out by [`Self::wait`].
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Queues a read of the `len` first bytes of buffer `tag` from `offset`.
    pub fn read(&mut self, offset: u64, len: usize, tag: usize) {
        let buffer = self.slots.pointer(tag, len);
        self.in_flight += 1;
        match &mut self.queue {
            Queue::Blkio(queue) => queue.read(offset, buffer, len, tag, ReqFlags::empty()),
            Queue::WriteThrough(queue) => queue.read(offset, buffer, len, tag),
        }
    }

    /// Queues a write of the `len` first bytes of buffer `tag` to `offset`.
    pub fn write(&mut self, offset: u64, len: usize, tag: usize) {
        let buffer = self.slots.pointer(tag, len);
        self.in_flight += 1;
        match &mut self.queue {
            Queue::Blkio(queue) => queue.write(offset, buffer, len, tag, self.write_flags),
            Queue::WriteThrough(queue) => queue.write(offset, buffer, len, tag),
        }
    }

    /// Queues a discard.
    pub fn discard(&mut self, offset: u64, len: u64, tag: usize) {
        self.in_flight += 1;
        match &mut self.queue {
            Queue::Blkio(queue) => queue.discard(offset, len, tag, ReqFlags::empty()),
            Queue::WriteThrough(queue) => queue.discard(offset, len, tag),
        }
    }

    /// Queues a flush.
    pub fn flush(&mut self, tag: usize) {
        self.in_flight += 1;
        match &mut self.queue {
            Queue::Blkio(queue) => queue.flush(tag, ReqFlags::empty()),
            Queue::WriteThrough(queue) => queue.flush(tag),
        }
    }

    /// Starts what was queued, waits until something is complete, and appends
    /// the tags of all that is to `done`.
    ///
    /// # Errors
    /// A request that failed, or none that completed in time.
    pub fn wait(&mut self, done: &mut Vec<usize>) -> Result<()> {
        ensure!(self.in_flight > 0, "waiting for nothing");
        let before = done.len();
        let result = match &mut self.queue {
            Queue::Blkio(queue) => wait_blkio(queue, done),
            Queue::WriteThrough(queue) => queue.wait(PATIENCE, done),
        };
        self.is_dead |= result.is_err();
        result?;
        self.in_flight -= done.len() - before;
        Ok(())
    }

    /// Waits until nothing is in flight.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub fn drain(&mut self) -> Result<()> {
        let mut done = Vec::new();
        while self.in_flight > 0 {
            self.wait(&mut done)?;
        }
        Ok(())
    }
}

impl Drop for Lane {
    /// What is in flight uses the buffers. Something is only left after an error,
    /// which was reported, so another one adds nothing.
    fn drop(&mut self) {
        if !self.is_dead {
            let _ = self.drain();
        }
    }
}

fn wait_blkio(queue: &mut Blkioq, done: &mut Vec<usize>) -> Result<()> {
    let mut completions = [const { MaybeUninit::uninit() }; BATCH];
    let mut patience = PATIENCE;
    let count = match queue.do_io(&mut completions, 1, Some(&mut patience), None) {
        Ok(count) => count,
        Err(error) if error.errno().raw_os_error() == Errno::TIME.raw_os_error() => {
            bail!("no completion in {PATIENCE:?}: the server is gone or hangs")
        }
        Err(error) => return Err(error).context("waiting for completions"),
    };
    for completion in &completions[..count] {
        // SAFETY: `do_io` has filled the first `count`.
        let completion = unsafe { completion.assume_init_ref() };
        if completion.ret != 0 {
            return Err(std::io::Error::from_raw_os_error(-completion.ret))
                .context("a request failed");
        }
        done.push(completion.user_data);
    }
    Ok(())
}
