//! A client without a guest: `blkio`, one lane for each queue.

use std::{mem::MaybeUninit, path::Path, ptr, time::Duration};

use blkio::{Blkio, Blkioq, ReqFlags, iovec};

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Entries of each virtqueue.
const QUEUE_SIZE: i32 = 128;

/// Requests that a lane can have in flight, one for each buffer.
pub const DEPTH: usize = 24;

/// Bytes of a buffer.
pub const BUFFER: usize = 64 << 10;

/// A piece of a write that there is not.
const NO_PIECE: iovec = iovec {
    iov_base: ptr::null_mut(),
    iov_len: 0,
};

/// A connection.
pub struct Client {
    pub lanes: Vec<Lane>,
    /// Of the disk, in bytes.
    pub capacity: u64,
    // Last: the queues go before the connection that they use.
    _blkio: Blkio,
}

/// One queue and its buffers.
pub struct Lane {
    queue: Blkioq,
    buffers: *mut u8,
    /// Of a write from several places: they stay where they are while it is under way.
    pieces: Box<[iovec; 2]>,
}

// SAFETY: the pointers are to a mapping that no thread is tied to, and each lane has
// a part of its own.
unsafe impl Send for Lane {}

impl Client {
    /// Connects with so many queues.
    pub fn connect(socket: &Path, queues: usize) -> Self {
        Self::connect_as(socket, queues, false)
    }

    /// The same to a disk that cannot be written to.
    pub fn connect_read_only(socket: &Path, queues: usize) -> Self {
        Self::connect_as(socket, queues, true)
    }

    fn connect_as(socket: &Path, queues: usize, read_only: bool) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", socket.to_str().unwrap()).unwrap();
        blkio.set_bool("read-only", read_only).unwrap();
        blkio.connect().unwrap();
        blkio.set_i32("num-queues", queues as i32).unwrap();
        blkio.set_i32("queue-size", QUEUE_SIZE).unwrap();
        let capacity = blkio.get_u64("capacity").unwrap();
        let started = blkio.start().unwrap().queues;
        let region = blkio.alloc_mem_region(queues * DEPTH * BUFFER).unwrap();
        blkio.map_mem_region(&region).unwrap();
        let base = ptr::with_exposed_provenance_mut::<u8>(region.addr);
        let lanes = started.into_iter().enumerate();
        Self {
            lanes: lanes
                .map(|(index, queue)| Lane {
                    queue,
                    buffers: base.wrapping_add(index * DEPTH * BUFFER),
                    pieces: Box::new([NO_PIECE; 2]),
                })
                .collect(),
            capacity,
            _blkio: blkio,
        }
    }
}

/// A request that has ended: its tag, and 0 or a negative error number.
pub type Ended = (usize, i32);

impl Lane {
    fn buffer(&self, tag: usize, len: usize) -> *mut u8 {
        assert!(tag < DEPTH && len <= BUFFER);
        self.buffers.wrapping_add(tag * BUFFER)
    }

    /// Reads into buffer `tag`.
    pub fn read(&mut self, offset: u64, len: usize, tag: usize) {
        let buffer = self.buffer(tag, len);
        self.queue.read(offset, buffer, len, tag, ReqFlags::empty());
    }

    /// What has been read.
    pub fn bytes(&self, tag: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let from = self.buffer(tag, len);
        // SAFETY: `buffer` has checked that the range is ours; the request that
        // used it has ended.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), len) };
        bytes
    }

    /// Writes by way of buffer `tag`.
    pub fn write(&mut self, offset: u64, bytes: &[u8], tag: usize) {
        let buffer = self.buffer(tag, bytes.len());
        // SAFETY: `buffer` has checked that the range is ours; no request uses it.
        unsafe { buffer.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        let flags = ReqFlags::empty();
        self.queue.write(offset, buffer, bytes.len(), tag, flags);
    }

    /// The same from two places: half of it by way of the buffer of the next tag, which
    /// must be free too. One such request at a time.
    pub fn write_in_pieces(&mut self, offset: u64, bytes: &[u8], tag: usize) {
        let halves = bytes.split_at(bytes.len() / 2);
        *self.pieces = [(tag, halves.0), (tag + 1, halves.1)].map(|(tag, half)| {
            let buffer = self.buffer(tag, half.len());
            // SAFETY: as in `write`.
            unsafe { buffer.copy_from_nonoverlapping(half.as_ptr(), half.len()) };
            iovec {
                iov_base: buffer.cast(),
                iov_len: half.len(),
            }
        });
        let flags = ReqFlags::empty();
        let pieces = self.pieces.as_ptr();
        self.queue.writev(offset, pieces, 2, tag, flags);
    }

    pub fn discard(&mut self, offset: u64, len: u64, tag: usize) {
        self.queue.discard(offset, len, tag, ReqFlags::empty());
    }

    pub fn write_zeroes(&mut self, offset: u64, len: u64, may_unmap: bool, tag: usize) {
        let flags = if may_unmap {
            ReqFlags::empty()
        } else {
            ReqFlags::NO_UNMAP
        };
        self.queue.write_zeroes(offset, len, tag, flags);
    }

    pub fn flush(&mut self, tag: usize) {
        self.queue.flush(tag, ReqFlags::empty());
    }

    /// Starts what was asked for and gives what has ended, at least `min`.
    ///
    /// # Panics
    /// If that takes too long.
    pub fn wait(&mut self, min: usize) -> Vec<Ended> {
        self.wait_for(min, PATIENCE).expect("requests end in time")
    }

    /// The same; `None` if it takes longer than that, or the connection has failed.
    pub fn wait_for(&mut self, min: usize, mut time: Duration) -> Option<Vec<Ended>> {
        let mut ended = [const { MaybeUninit::uninit() }; DEPTH];
        let count = self
            .queue
            .do_io(&mut ended, min, Some(&mut time), None)
            .ok()?;
        let ended = ended[..count].iter().map(|completion| {
            // SAFETY: `do_io` has filled so many.
            let completion = unsafe { completion.assume_init_ref() };
            (completion.user_data, completion.ret)
        });
        Some(ended.collect())
    }
}
