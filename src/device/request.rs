//! From a descriptor chain to a checked request, and from its end to the answer.
//!
//! Everything here was written by the guest: nothing is believed. A chain becomes
//! either a [`Request`], whose ranges lie on the disk and whose memory lies in the
//! guest's memory, or a [`Rejected`] that says what is wrong. The layout of the
//! descriptors is free (virtio 1.2, 2.7.4): header, data and status byte may share
//! descriptors or be cut over several.

use smallvec::SmallVec;
use thiserror::Error;
use virtio_bindings::virtio_blk;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};

use super::MAX_QUEUE_SIZE;
use super::statistics::Kind;
use crate::format::{SECTOR_SIZE, Sector};
use crate::ploop::{Command, EngineError, SectorRange};
use crate::storage::Segments;

/// Bytes of `struct virtio_blk_outhdr`: type, reserved, sector.
const HEADER_LEN: usize = 16;

/// `VIRTIO_BLK_T_BARRIER`, a flag in the type from before the standard: the request
/// must not overtake others. SLOF, the firmware of pseries machines, sets it on all
/// it sends and waits for each. QEMU's own devices ignore it, too.
const TYPE_BARRIER: u32 = 1 << 31;

/// Bytes of `struct virtio_blk_discard_write_zeroes`: sector, count, flags.
const RANGE_LEN: usize = 16;

/// Most descriptors of a chain. A driver must not make one longer than the queue size
/// (virtio 1.2, 2.7.5.3.1), but Linux does with a small ring and an indirect table, up
/// to `seg_max` and two; so the size of the largest ring holds for all.
pub(super) const MAX_CHAIN: usize = MAX_QUEUE_SIZE as usize;

/// Bytes of the answer to `VIRTIO_BLK_T_GET_ID`.
pub(super) const ID_LEN: usize = virtio_blk::VIRTIO_BLK_ID_BYTES as usize;

/// The status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = virtio_blk::VIRTIO_BLK_S_OK as u8,
    IoError = virtio_blk::VIRTIO_BLK_S_IOERR as u8,
    Unsupported = virtio_blk::VIRTIO_BLK_S_UNSUPP as u8,
}

impl Status {
    /// What the guest hears of how the engine fared: the only place where that is
    /// decided. virtio-blk has one word for all failures.
    pub fn of(result: &Result<(), EngineError>) -> Self {
        match result {
            Ok(()) => Self::Ok,
            Err(_) => Self::IoError,
        }
    }
}

/// What is wrong with a request.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(super) enum RequestError {
    #[error("the descriptor chain loops, points outside its table or holds more than 4 GiB")]
    BrokenChain,
    #[error(
        "the descriptor chain is longer than the longest ring: more than {MAX_CHAIN} descriptors"
    )]
    ChainTooLong,
    #[error("a readable descriptor follows a writable one")]
    OutOfOrder,
    #[error("{len} bytes at guest address {addr:#x} lie outside the guest's memory")]
    OutsideMemory { addr: u64, len: u32 },
    #[error("the descriptor chain has no room for the status byte")]
    NoStatus,
    #[error("the request header is too short: {0} bytes")]
    NoHeader(usize),
    #[error("unknown request type {0:#x}")]
    UnknownType(u32),
    #[error("the data length, {0} bytes, is not a whole number of sectors")]
    DataLength(usize),
    #[error("{count} sectors at sector {start} reach past the end of the disk at {disk_size}")]
    PastEnd {
        start: u64,
        count: u64,
        disk_size: u64,
    },
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("{0} bytes are not a whole number of ranges, or are too many")]
    RangesLength(usize),
    #[error("a range of {0} sectors is longer than allowed")]
    RangeLength(u32),
    #[error("unknown flags {0:#x} for this request type")]
    UnknownFlags(u32),
}

impl RequestError {
    /// What the guest hears of it.
    pub fn status(&self) -> Status {
        match self {
            Self::UnknownType(_) | Self::UnknownFlags(_) => Status::Unsupported,
            _ => Status::IoError,
        }
    }
}

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// End of the disk.
    pub disk_size: Sector,
    /// Whether writes, discards and write-zeroes are refused.
    pub read_only: bool,
    /// Most ranges that a discard or write-zeroes may have.
    pub max_ranges: u32,
    /// Most sectors that such a range may have.
    pub max_range_sectors: u32,
}

/// What a checked request asks for.
#[derive(Debug)]
pub(super) enum Operation {
    /// Something for the engine.
    Engine(Command),
    /// The serial number, into this memory.
    GetId(Segments),
}

/// A request whose every part was checked.
#[derive(Debug)]
pub(super) struct Request {
    pub operation: Operation,
    pub reply: Reply,
}

/// A chain that is no request.
#[derive(Debug)]
pub(super) struct Rejected {
    pub error: RequestError,
    /// What it was to be, if that can be told.
    pub kind: Option<Kind>,
    /// Absent when the chain has no place for a status byte.
    pub reply: Option<Reply>,
}

/// The duty to answer a request. It ends with [`Self::finish`] or
/// [`Self::abandon`]; a debug build panics when one is merely dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Reply {
    status: StatusByte,
    /// Bytes for data in front of the status byte.
    room: u64,
    /// Of them, those that a success has filled, from the first.
    data_len: u32,
}

/// Where a status byte goes, in the guest's memory.
#[derive(Debug)]
struct StatusByte(*mut u8);

// SAFETY: it is an address. Whoever called `parse` promised that what is there stays
// mapped, for any thread.
unsafe impl Send for StatusByte {}

impl StatusByte {
    fn write(&self, status: Status) {
        // SAFETY: `parse` found the byte in guest memory that may be written, and was
        // promised that it stays mapped until the reply is gone. Nothing here has
        // references to guest memory.
        unsafe { self.0.write_volatile(status as u8) };
    }
}

impl Reply {
    /// To a request that was in no ring, with no more to be written than its status.
    ///
    /// # Safety
    /// The byte must stay mapped and writable until the reply is gone.
    #[cfg(test)]
    pub unsafe fn at(status: *mut u8) -> Self {
        Self {
            status: StatusByte(status),
            room: 0,
            data_len: 0,
        }
    }

    /// Writes the status byte. Returns the length for the used ring: so many bytes
    /// were written for certain, counted from the first that could be (virtio 1.2,
    /// 2.7.8.2). The status byte is the last, so it counts when all before it were
    /// written; after an error none may have been.
    pub fn finish(self, status: Status) -> u32 {
        let data_len = if status == Status::Ok {
            self.data_len
        } else {
            0
        };
        let is_whole = u64::from(data_len) == self.room;
        self.status.write(status);
        std::mem::forget(self);
        data_len + u32::from(is_whole)
    }

    /// Leaves the request without an answer.
    pub fn abandon(self) {
        std::mem::forget(self);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        debug_assert!(
            std::thread::panicking(),
            "a request was dropped without an answer"
        );
    }
}

/// Reads a request from a descriptor chain in `memory`.
///
/// # Safety
/// `memory` must stay mapped until the operation of the request has completed and
/// is gone, and the reply as well.
pub(super) unsafe fn parse<M: GuestMemory>(
    chain: DescriptorChain<&M>,
    memory: &M,
    limits: &Limits,
) -> Result<Request, Rejected> {
    let mut parts = Parts::default();
    // SAFETY: the caller promises what is asked for.
    let gathered = unsafe { parts.gather(chain, memory) };
    let Some(status) = parts.status_byte(memory) else {
        let error = gathered.err().unwrap_or(RequestError::NoStatus);
        let kind = parts.kind();
        return Err(Rejected {
            error,
            kind,
            reply: None,
        });
    };
    let kind = parts.kind();
    let mut reply = Reply {
        status,
        room: parts.room,
        data_len: 0,
    };
    match gathered.and_then(|()| parts.into_operation(limits)) {
        Ok((operation, data_len)) => {
            reply.data_len = data_len;
            Ok(Request { operation, reply })
        }
        Err(error) => Err(Rejected {
            error,
            kind,
            reply: Some(reply),
        }),
    }
}

/// A chain taken apart.
#[derive(Default)]
struct Parts {
    header: [u8; HEADER_LEN],
    /// How much of the header the chain had.
    header_len: usize,
    /// To be read, behind the header.
    from_guest: Segments,
    /// To be written, in front of the status byte.
    to_guest: Segments,
    /// Bytes to be written, without the status byte.
    room: u64,
    /// The last descriptor to be written: its last byte is the status byte.
    last_writable: Option<Descriptor>,
}

impl Parts {
    /// # Safety
    /// As for [`parse`].
    unsafe fn gather<M: GuestMemory>(
        &mut self,
        chain: DescriptorChain<&M>,
        memory: &M,
    ) -> Result<(), RequestError> {
        let mut result = Ok(());
        let mut ended = false;
        let mut count = 0_usize;
        for descriptor in chain {
            ended = !descriptor.has_next();
            count += 1;
            if count > MAX_CHAIN {
                // Where it would have ended is not looked for: that is work, too.
                self.last_writable = None;
                return Err(RequestError::ChainTooLong);
            }
            if descriptor.len() == 0 {
                continue;
            }
            if descriptor.is_write_only() {
                self.room += u64::from(descriptor.len()) - u64::from(self.last_writable.is_none());
                let before = self.last_writable.replace(descriptor);
                if let Some(data) = before.filter(|_| result.is_ok()) {
                    // SAFETY: the caller promises what is asked for.
                    result = unsafe {
                        resolve(
                            memory,
                            data.addr(),
                            data.len(),
                            Permissions::Write,
                            &mut self.to_guest,
                        )
                    };
                }
            } else if result.is_ok() {
                // SAFETY: as above.
                result = unsafe { self.add_readable(&descriptor, memory) };
            }
        }
        if !ended {
            // Where the chain would have ended is not known, hence no status byte.
            self.last_writable = None;
            return Err(RequestError::BrokenChain);
        }
        if let Some(last) = self.last_writable.filter(|_| result.is_ok()) {
            // SAFETY: as above.
            result = unsafe {
                resolve(
                    memory,
                    last.addr(),
                    last.len() - 1,
                    Permissions::Write,
                    &mut self.to_guest,
                )
            };
        }
        result
    }

    /// # Safety
    /// As for [`parse`].
    unsafe fn add_readable<M: GuestMemory>(
        &mut self,
        descriptor: &Descriptor,
        memory: &M,
    ) -> Result<(), RequestError> {
        if self.last_writable.is_some() {
            return Err(RequestError::OutOfOrder);
        }
        let missing = &mut self.header[self.header_len..];
        let header_part = missing.len().min(descriptor.len() as usize);
        let outside = || RequestError::OutsideMemory {
            addr: descriptor.addr().0,
            len: descriptor.len(),
        };
        memory
            .read_slice(&mut missing[..header_part], descriptor.addr())
            .map_err(|_| outside())?;
        self.header_len += header_part;
        let rest_at = descriptor
            .addr()
            .checked_add(header_part as u64)
            .ok_or_else(outside)?;
        let rest = descriptor.len() - header_part as u32;
        // SAFETY: the caller promises what is asked for.
        unsafe {
            resolve(
                memory,
                rest_at,
                rest,
                Permissions::Read,
                &mut self.from_guest,
            )
        }
    }

    /// The status byte, if there is one and it is guest memory.
    fn status_byte<M: GuestMemory>(&self, memory: &M) -> Option<StatusByte> {
        let last = self.last_writable?;
        let addr = last.addr().checked_add(u64::from(last.len() - 1))?;
        let mut slices = memory.get_slices(addr, 1, Permissions::Write).ok()?;
        let byte = slices.next()?.ok()?;
        Some(StatusByte(byte.ptr_guard_mut().as_ptr()))
    }

    /// What is asked for counts as.
    fn kind(&self) -> Option<Kind> {
        if self.header_len < HEADER_LEN {
            return None;
        }
        match self.request_type() {
            virtio_blk::VIRTIO_BLK_T_IN => Some(Kind::Read),
            virtio_blk::VIRTIO_BLK_T_OUT | virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                Some(Kind::Write)
            }
            virtio_blk::VIRTIO_BLK_T_FLUSH => Some(Kind::Flush),
            virtio_blk::VIRTIO_BLK_T_DISCARD => Some(Kind::Unmap),
            _ => None,
        }
    }

    fn request_type(&self) -> u32 {
        let [t0, t1, t2, t3, ..] = self.header;
        u32::from_le_bytes([t0, t1, t2, t3]) & !TYPE_BARRIER
    }

    /// Checks what is asked for. The number is that of the bytes that it will
    /// have written to guest memory.
    fn into_operation(self, limits: &Limits) -> Result<(Operation, u32), RequestError> {
        if self.header_len < HEADER_LEN {
            return Err(RequestError::NoHeader(self.header_len));
        }
        let [_, _, _, _, _, _, _, _, sector @ ..] = self.header;
        let start = Sector(u64::from_le_bytes(sector));
        match self.request_type() {
            virtio_blk::VIRTIO_BLK_T_IN => {
                let data = self.to_guest;
                check_data(start, &data, limits)?;
                // A chain has less than 4 GiB.
                let len = data.len() as u32;
                Ok((Operation::Engine(Command::Read { start, data }), len))
            }
            virtio_blk::VIRTIO_BLK_T_OUT => {
                check_writable(limits)?;
                let data = self.from_guest;
                check_data(start, &data, limits)?;
                Ok((Operation::Engine(Command::Write { start, data }), 0))
            }
            virtio_blk::VIRTIO_BLK_T_FLUSH => Ok((Operation::Engine(Command::Flush), 0)),
            virtio_blk::VIRTIO_BLK_T_GET_ID => get_id(self.to_guest),
            virtio_blk::VIRTIO_BLK_T_DISCARD => {
                let (ranges, _) = ranges(&self.from_guest, 0, limits)?;
                Ok((Operation::Engine(Command::Discard { ranges }), 0))
            }
            virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES => {
                let known = virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                let (ranges, unmap) = ranges(&self.from_guest, known, limits)?;
                Ok((Operation::Engine(Command::WriteZeroes { ranges, unmap }), 0))
            }
            other => Err(RequestError::UnknownType(other)),
        }
    }
}

/// Appends the memory behind a guest address to `segments`; several pieces where
/// it crosses from one region of the memory into the next.
///
/// # Safety
/// `memory` must stay mapped as long as `segments` and what is made of them.
unsafe fn resolve<M: GuestMemory>(
    memory: &M,
    addr: GuestAddress,
    len: u32,
    access: Permissions,
    segments: &mut Segments,
) -> Result<(), RequestError> {
    if len == 0 {
        return Ok(());
    }
    let outside = |_| RequestError::OutsideMemory { addr: addr.0, len };
    for slice in memory
        .get_slices(addr, len as usize, access)
        .map_err(outside)?
    {
        let slice = slice.map_err(outside)?;
        // SAFETY: the slice is mapped, and stays so as the caller promises. It is
        // a guest's: nothing here holds references to it.
        unsafe { segments.push(slice.ptr_guard_mut().as_ptr(), slice.len()) };
    }
    Ok(())
}

fn check_writable(limits: &Limits) -> Result<(), RequestError> {
    if limits.read_only {
        return Err(RequestError::ReadOnly);
    }
    Ok(())
}

fn check_data(start: Sector, data: &Segments, limits: &Limits) -> Result<(), RequestError> {
    let len = data.len() as u64;
    if len == 0 || !len.is_multiple_of(SECTOR_SIZE) {
        return Err(RequestError::DataLength(data.len()));
    }
    check_on_disk(start, Sector(len / SECTOR_SIZE), limits)
}

fn check_on_disk(start: Sector, count: Sector, limits: &Limits) -> Result<(), RequestError> {
    match start.0.checked_add(count.0) {
        Some(end) if end <= limits.disk_size.0 => Ok(()),
        _ => Err(RequestError::PastEnd {
            start: start.0,
            count: count.0,
            disk_size: limits.disk_size.0,
        }),
    }
}

fn get_id(mut memory: Segments) -> Result<(Operation, u32), RequestError> {
    if memory.is_empty() {
        return Err(RequestError::DataLength(0));
    }
    let id = memory.take_front(ID_LEN);
    let len = id.len() as u32;
    Ok((Operation::GetId(id), len))
}

/// Reads and checks the ranges of a discard or write-zeroes. The flag is whether
/// all of them may be unmapped.
fn ranges(
    data: &Segments,
    known_flags: u32,
    limits: &Limits,
) -> Result<(SmallVec<[SectorRange; 1]>, bool), RequestError> {
    check_writable(limits)?;
    let count = data.len() / RANGE_LEN;
    if count == 0 || !data.len().is_multiple_of(RANGE_LEN) || count > limits.max_ranges as usize {
        return Err(RequestError::RangesLength(data.len()));
    }
    let mut ranges = SmallVec::with_capacity(count);
    let mut unmap = true;
    for index in 0..count {
        let mut bytes = [0; RANGE_LEN];
        data.copy_to(index * RANGE_LEN, &mut bytes);
        let (range, flags) = range(&bytes, known_flags, limits)?;
        unmap &= flags & virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        ranges.push(range);
    }
    Ok((ranges, unmap))
}

/// One range, which may be empty as nothing forbids that, and its flags. A flag that is not known is said to
/// be just that, whatever else is wrong (virtio 1.2, 5.2.6.2).
fn range(
    bytes: &[u8; RANGE_LEN],
    known_flags: u32,
    limits: &Limits,
) -> Result<(SectorRange, u32), RequestError> {
    let [sector @ .., c0, c1, c2, c3, f0, f1, f2, f3] = *bytes;
    let start = Sector(u64::from_le_bytes(sector));
    let count = u32::from_le_bytes([c0, c1, c2, c3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    if flags & !known_flags != 0 {
        return Err(RequestError::UnknownFlags(flags));
    }
    if count > limits.max_range_sectors {
        return Err(RequestError::RangeLength(count));
    }
    let range = SectorRange {
        start,
        count: Sector(u64::from(count)),
    };
    check_on_disk(range.start, range.count, limits)?;
    Ok((range, flags))
}

#[cfg(test)]
mod tests;
