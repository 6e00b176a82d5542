//! A connection that nobody serves at the moment: all that another process, or this one
//! later, needs to go on where it was left.
//!
//! All rings have been drained, so there is no request in it but those that could not
//! end: they wait for space, or their ring's memory was away. What it costs to hand
//! over does not depend on the guest's memory, which is only mapped again.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{VhostUserInflight, VhostUserLog, VhostUserMemoryRegion};

use super::MAX_QUEUES;
use super::memory_table::MAX_REGIONS;
use super::requests::Used;
use super::write_cache::WriteCache;
use crate::format::Sector;
use crate::parcel::{ParcelError, Reader, Writer};

/// See the module's text.
pub struct Suspended {
    pub(super) socket: UnixStream,
    /// By which the front-end is told of changes.
    pub(super) channel: Option<OwnedFd>,
    pub(super) session: SessionState,
}

/// What messages have made of the connection.
pub(super) struct SessionState {
    pub is_owned: bool,
    /// Of the last message that said so.
    pub negotiated: Option<u64>,
    pub protocol_features: Option<u64>,
    /// Those that are in force: none after a reset.
    pub acked_features: u64,
    pub write_cache: WriteCache,
    /// The size of the disk that the front-end has read, and at which it was told to.
    pub read_size: Option<Sector>,
    pub told_size: Option<Sector>,
    pub regions: Vec<(VhostUserMemoryRegion, File)>,
    pub in_flight: Option<KeptRegion>,
    pub log: Option<(VhostUserLog, File)>,
    pub rings: Vec<RingState>,
    /// See [`Suspended::set_settled`].
    pub is_settled: bool,
}

/// The in-flight region that the front-end keeps.
pub(super) struct KeptRegion {
    pub given: VhostUserInflight,
    pub file: File,
    /// Whether the engine has remembered in it what the disk did not have. Another process
    /// finds that out for itself.
    pub is_used: bool,
}

/// What is known of a ring.
#[derive(Debug)]
pub(super) struct RingState {
    pub size: u16,
    /// Guest addresses.
    pub table: u64,
    pub avail: u64,
    pub used: u64,
    pub next_avail: u16,
    pub used_ring_in_log: Option<u64>,
    pub is_enabled: bool,
    pub kick: Option<OwnedFd>,
    pub call: Option<OwnedFd>,
    pub error: Option<OwnedFd>,
    /// Could not be put into the used ring.
    pub unanswered: Vec<Used>,
    /// Were taken and could not end; oldest first.
    pub unfinished: Vec<u16>,
}

impl Suspended {
    /// Whether the front-end keeps an in-flight region in which this process has remembered
    /// what the disk did not have.
    pub fn has_used_region(&self) -> bool {
        let region = self.session.in_flight.as_ref();
        region.is_some_and(|region| region.is_used)
    }

    /// All that the front-end was told of has been made stable since, and nobody has served
    /// it: what its in-flight region says of the disk does not count, whoever has written it
    /// meanwhile.
    pub fn set_settled(&mut self) {
        self.session.is_settled = true;
    }

    /// The same with descriptors of its own, in case that somebody cannot go on with it.
    ///
    /// # Errors
    /// If there are not enough descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        let channel = self.channel.as_ref().map(OwnedFd::try_clone);
        Ok(Self {
            socket: self.socket.try_clone()?,
            channel: channel.transpose()?,
            session: self.session.try_clone()?,
        })
    }

    /// Writes it down, to be handed to another process.
    pub(crate) fn write<'a>(&'a self, to: &mut Writer<'a>) {
        to.file(self.socket.as_fd());
        to.optional(self.channel.as_ref(), |to, channel| {
            to.file(channel.as_fd());
        });
        self.session.write(to);
    }

    /// What another process has written.
    ///
    /// # Errors
    /// If it cannot be.
    pub(crate) fn read(from: &mut Reader) -> Result<Self, ParcelError> {
        Ok(Self {
            socket: from.socket()?,
            channel: from.optional(Reader::file)?,
            session: SessionState::read(from)?,
        })
    }
}

impl SessionState {
    fn try_clone(&self) -> io::Result<Self> {
        let regions = self.regions.iter();
        let regions = regions.map(|(region, file)| Ok((*region, file.try_clone()?)));
        let in_flight = self.in_flight.as_ref().map(KeptRegion::try_clone);
        let log = self.log.as_ref();
        let log = log.map(|(log, file)| {
            let given = VhostUserLog::new(log.mmap_size, log.mmap_offset);
            Ok::<_, io::Error>((given, file.try_clone()?))
        });
        Ok(Self {
            regions: regions.collect::<io::Result<_>>()?,
            in_flight: in_flight.transpose()?,
            log: log.transpose()?,
            rings: self
                .rings
                .iter()
                .map(RingState::try_clone)
                .collect::<io::Result<_>>()?,
            ..*self
        })
    }

    fn write<'a>(&'a self, to: &mut Writer<'a>) {
        to.bool(self.is_owned);
        to.optional(self.negotiated, Writer::u64);
        to.optional(self.protocol_features, Writer::u64);
        to.u64(self.acked_features);
        to.u8(self.write_cache.encode());
        to.optional(self.read_size, |to, size| to.u64(size.0));
        to.optional(self.told_size, |to, size| to.u64(size.0));
        to.count(self.regions.len());
        for (region, file) in &self.regions {
            to.u64(region.guest_phys_addr);
            to.u64(region.memory_size);
            to.u64(region.user_addr);
            to.u64(region.mmap_offset);
            to.file(file.as_fd());
        }
        to.optional(self.in_flight.as_ref(), |to, region| {
            to.u64(region.given.mmap_size);
            to.u16(region.given.num_queues);
            to.u16(region.given.queue_size);
            to.file(region.file.as_fd());
        });
        to.optional(self.log.as_ref(), |to, (log, file)| {
            to.u64(log.mmap_size);
            to.u64(log.mmap_offset);
            to.file(file.as_fd());
        });
        to.count(self.rings.len());
        self.rings.iter().for_each(|ring| ring.write(to));
    }

    fn read(from: &mut Reader) -> Result<Self, ParcelError> {
        let state = Self {
            is_owned: from.bool()?,
            negotiated: from.optional(Reader::u64)?,
            protocol_features: from.optional(Reader::u64)?,
            acked_features: from.u64()?,
            write_cache: WriteCache::decode(from.u8()?)
                .ok_or(ParcelError::Invalid("no cache mode"))?,
            read_size: from.optional(Reader::u64)?.map(Sector),
            told_size: from.optional(Reader::u64)?.map(Sector),
            regions: from.list(read_region)?,
            in_flight: from.optional(|from| {
                let given = VhostUserInflight {
                    mmap_size: from.u64()?,
                    mmap_offset: 0,
                    num_queues: from.u16()?,
                    queue_size: from.u16()?,
                };
                Ok(KeptRegion {
                    given,
                    file: from.file()?.into(),
                    is_used: false,
                })
            })?,
            log: from.optional(|from| {
                let log = VhostUserLog::new(from.u64()?, from.u64()?);
                Ok((log, from.file()?.into()))
            })?,
            rings: from.list(RingState::read)?,
            is_settled: false,
        };
        if state.regions.len() > MAX_REGIONS || state.rings.len() > usize::from(MAX_QUEUES) {
            return Err(ParcelError::Invalid("too many regions or rings"));
        }
        Ok(state)
    }
}

fn read_region(from: &mut Reader) -> Result<(VhostUserMemoryRegion, File), ParcelError> {
    let region = VhostUserMemoryRegion {
        guest_phys_addr: from.u64()?,
        memory_size: from.u64()?,
        user_addr: from.u64()?,
        mmap_offset: from.u64()?,
    };
    Ok((region, from.file()?.into()))
}

impl KeptRegion {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            ..*self
        })
    }
}

impl RingState {
    fn try_clone(&self) -> io::Result<Self> {
        let copy = |event: &Option<OwnedFd>| event.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Self {
            kick: copy(&self.kick)?,
            call: copy(&self.call)?,
            error: copy(&self.error)?,
            unanswered: self.unanswered.clone(),
            unfinished: self.unfinished.clone(),
            ..*self
        })
    }

    fn write<'a>(&'a self, to: &mut Writer<'a>) {
        to.u16(self.size);
        to.u64(self.table);
        to.u64(self.avail);
        to.u64(self.used);
        to.u16(self.next_avail);
        to.optional(self.used_ring_in_log, Writer::u64);
        to.bool(self.is_enabled);
        for event in [&self.kick, &self.call, &self.error] {
            to.optional(event.as_ref(), |to, event| to.file(event.as_fd()));
        }
        to.count(self.unanswered.len());
        for used in &self.unanswered {
            to.u16(used.head);
            to.u32(used.len);
        }
        to.count(self.unfinished.len());
        self.unfinished.iter().for_each(|&head| to.u16(head));
    }

    fn read(from: &mut Reader) -> Result<Self, ParcelError> {
        Ok(Self {
            size: from.u16()?,
            table: from.u64()?,
            avail: from.u64()?,
            used: from.u64()?,
            next_avail: from.u16()?,
            used_ring_in_log: from.optional(Reader::u64)?,
            is_enabled: from.bool()?,
            kick: from.optional(Reader::file)?,
            call: from.optional(Reader::file)?,
            error: from.optional(Reader::file)?,
            unanswered: from.list(|from| {
                let (head, len) = (from.u16()?, from.u32()?);
                Ok(Used { head, len })
            })?,
            unfinished: from.list(Reader::u16)?,
        })
    }
}
