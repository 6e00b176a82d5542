//! How a guest outlives this process: what the front-end keeps for us in the memory of
//! its in-flight region, and what may be served when it comes back.
//!
//! The region is the standard part, see [`super::inflight`], and behind it a part of our
//! own, in which the engine remembers what only this process knows, and a word for the
//! cache mode that the driver believes in. The front-end does not look at that part and
//! gives it back with the rest.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;
use vhost::vhost_user::message::VhostUserInflight;

use super::inflight::{InFlightQueue, Layout};
use super::ratelimit::guest_log;
use super::suspended::KeptRegion;
use super::{BlockDevice, MAX_QUEUE_SIZE};
use crate::ploop::TakeOverError;
use crate::storage::{Disk, SharedWords};

/// Of the word for the cache mode: that it is one, and that the cache is on.
const NOTE_MODE: u64 = 1;
const NOTE_ON: u64 = 2;

/// Why a guest cannot go on.
#[derive(Debug, Error)]
pub(super) enum ContinuityError {
    #[error("an in-flight region of {queues} queues with {entries} entries is not supported")]
    Layout { queues: u16, entries: u16 },
    #[error("the in-flight region cannot be made: {0}")]
    Make(io::Error),
    #[error("the in-flight region that came is not one that was made here: {0}")]
    Foreign(io::Error),
    #[error("the in-flight region cannot change while a ring runs")]
    Running,
    #[error(
        "the guest was served by a process that was killed, and what that process knew is lost \
         ({0}): the guest might not find data that it was told had been written. Reset the guest"
    )]
    Lost(TakeOverError),
    #[error(
        "the guest was served by a process that was killed, and its front-end has kept no \
         in-flight region: it may have been told of writes that are lost. Reset the guest"
    )]
    NotKept,
    #[error("the image is not open")]
    NotOpen,
}

/// A region that the front-end has set.
struct Region {
    /// As it was set.
    given: VhostUserInflight,
    file: Arc<File>,
    standard: Arc<SharedWords>,
    layout: Layout,
    own: State,
}

/// Of our own part of a region.
enum State {
    /// The image was not open since it came, or since the image was closed. Of one that
    /// `is_settled` it is known that it adds nothing to what the disk has.
    Unread { is_settled: bool },
    /// Nothing is in it yet.
    Fresh(Option<SharedWords>),
    /// The engine keeps in it what has to outlive us.
    Used,
    /// What came back in it is of no use.
    Unusable(Option<SharedWords>, Option<TakeOverError>),
}

/// See the module's text.
pub(super) struct Continuity<D: Disk> {
    device: Arc<BlockDevice<D>>,
    region: Option<Region>,
}

impl<D: Disk> Continuity<D> {
    /// Without a region.
    pub fn new(device: Arc<BlockDevice<D>>) -> Self {
        Self {
            device,
            region: None,
        }
    }

    /// Makes a region for the front-end to keep. The one before is not needed any more.
    pub fn make(
        &mut self,
        asked: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File), ContinuityError> {
        let (queues, entries) = (asked.num_queues, asked.queue_size);
        let layout = self.layout(queues, entries)?;
        self.forget();
        let (own_at, own_len) = self.own_part(layout);
        let len = own_at + own_len;
        let file = make_file(len).map_err(ContinuityError::Make)?;
        let made = VhostUserInflight {
            mmap_size: len,
            mmap_offset: 0,
            num_queues: queues,
            queue_size: entries,
        };
        Ok((made, file))
    }

    /// Takes a region that was made here, perhaps by a process that is gone. Of one that
    /// `is_settled` it is known that it adds nothing to what the disk has.
    pub fn take(
        &mut self,
        given: &VhostUserInflight,
        file: File,
        is_settled: bool,
    ) -> Result<Option<bool>, ContinuityError> {
        let layout = self.layout(given.num_queues, given.queue_size)?;
        if given.mmap_offset != 0 {
            let why = io::Error::new(io::ErrorKind::InvalidInput, "it begins elsewhere");
            return Err(ContinuityError::Foreign(why));
        }
        let file = Arc::new(file);
        let standard = SharedWords::map(Arc::clone(&file), 0, layout.words());
        let standard = Arc::new(standard.map_err(ContinuityError::Foreign)?);
        let mut region = Region {
            given: *given,
            file,
            standard,
            layout,
            own: State::Unread { is_settled },
        };
        let mode = self.read(&mut region)?;
        self.region = Some(region);
        Ok(mode)
    }

    /// The image has been opened for a guest that is about to be served: looks at what of
    /// the region could not be understood without. Gives back the cache mode that it has.
    pub fn image_opened(&mut self) -> Result<Option<bool>, ContinuityError> {
        let mut region = self.region.take();
        let mode = match &mut region {
            Some(region) => self.read(region),
            None => Ok(None),
        };
        self.region = region;
        self.device.image().forget_left_memory();
        mode
    }

    /// The image was closed, and has all that the region remembers.
    pub fn image_closed(&mut self) {
        if let Some(region) = &mut self.region
            && !matches!(region.own, State::Fresh(_))
        {
            region.own = State::Unread { is_settled: false };
        }
    }

    /// Looks at our own part of a region, if nobody has and the image is open. Gives back the
    /// cache mode that it has.
    fn read(&self, region: &mut Region) -> Result<Option<bool>, ContinuityError> {
        let (State::Unread { is_settled }, Some(engine)) = (&region.own, self.device.engine())
        else {
            return Ok(None);
        };
        let (own_at, own_len) = self.own_part(region.layout);
        // The disk may have grown since the region was made.
        lengthen(&region.file, own_at + own_len).map_err(ContinuityError::Foreign)?;
        let words = own_len as usize / size_of::<u64>();
        let own = SharedWords::map(Arc::clone(&region.file), own_at, words);
        let own = own.map_err(ContinuityError::Foreign)?;
        let is_fresh = !is_settled
            && own
                .word(0)
                .is_none_or(|word| word.load(Ordering::Relaxed) == 0);
        if is_fresh {
            region.own = State::Fresh(Some(own));
            return Ok(None);
        }
        let again = own.map_again().map_err(ContinuityError::Foreign)?;
        let taken = match is_settled {
            true => engine.take_back(own),
            false => engine.take_over(own),
        };
        region.own = match taken {
            Ok(()) => State::Used,
            Err(error) => State::Unusable(Some(again), Some(error)),
        };
        let is_used = matches!(region.own, State::Used);
        Ok(is_used.then(|| self.noted_mode()).flatten())
    }

    fn layout(&self, queues: u16, entries: u16) -> Result<Layout, ContinuityError> {
        if queues == 0
            || queues > self.device.num_queues()
            || entries == 0
            || entries > MAX_QUEUE_SIZE
        {
            return Err(ContinuityError::Layout { queues, entries });
        }
        Ok(Layout { queues, entries })
    }

    /// Where in a region our own part begins, and its length, in bytes.
    fn own_part(&self, layout: Layout) -> (u64, u64) {
        let at = SharedWords::aligned(layout.len());
        let engine = self.device.engine();
        let len = engine.map(|engine| engine.remembered_len());
        // Else it is made longer when it turns out to be too short.
        let len = len.unwrap_or_else(|| self.device.image().shape().remembered_len());
        (at, len)
    }

    /// The part of one queue.
    pub fn queue(&self, index: usize) -> Option<InFlightQueue> {
        let region = self.region.as_ref()?;
        InFlightQueue::new(Arc::clone(&region.standard), region.layout, index)
    }

    /// To be asked before a ring starts; `is_under_way` says whether its driver has used
    /// it before. From then on the engine is in service.
    pub fn admit(&mut self, is_under_way: bool) -> Result<(), ContinuityError> {
        let is_under_way = is_under_way || self.has_been_served();
        let engine = self.device.engine().ok_or(ContinuityError::NotOpen)?;
        match self.region.as_mut().map(|region| &mut region.own) {
            Some(State::Used) => return Ok(()),
            Some(State::Unread { .. }) => return Err(ContinuityError::NotOpen),
            Some(State::Unusable(_, error)) if is_under_way => {
                return Err(error
                    .take()
                    .map_or(ContinuityError::NotKept, ContinuityError::Lost));
            }
            None | Some(State::Fresh(_)) if is_under_way && engine.awaits_take_over() => {
                return Err(ContinuityError::NotKept);
            }
            Some(State::Fresh(words) | State::Unusable(words, _)) => {
                let remembered = words.take().map(|words| engine.remember_in(words));
                if let Some(Err(error)) = remembered {
                    return Err(ContinuityError::Make(error));
                }
            }
            None => {
                engine.begin();
                // Of a front-end that was here before and may come back: its requests that are
                // under way must not run over what is written from now on.
                self.forget();
                return Ok(());
            }
        }
        if let Some(region) = &mut self.region {
            region.own = State::Used;
        }
        Ok(())
    }

    /// Whether somebody has served a ring with the region before, whatever the front-end
    /// says of its index.
    fn has_been_served(&self) -> bool {
        let queues = self
            .region
            .as_ref()
            .map_or(0, |region| region.layout.queues);
        let mut queues = (0..usize::from(queues)).filter_map(|index| self.queue(index));
        queues.any(|queue| queue.is_old())
    }

    /// What the driver believes of its cache.
    pub fn note_mode(&self, cache_is_on: bool) {
        // The memory that the engine has may be another front-end's.
        if !matches!(
            &self.region,
            Some(Region {
                own: State::Used,
                ..
            })
        ) {
            return;
        }
        let on = if cache_is_on { NOTE_ON } else { 0 };
        if let Some(engine) = self.device.engine() {
            engine.set_note(NOTE_MODE | on);
        }
    }

    fn noted_mode(&self) -> Option<bool> {
        let note = self.device.engine()?.note()?;
        (note & NOTE_MODE != 0).then_some(note & NOTE_ON != 0)
    }

    /// Whether there is a region that the front-end keeps.
    pub fn is_kept(&self) -> bool {
        self.region.is_some()
    }

    /// The region as it was set, with a copy of its descriptor.
    ///
    /// # Errors
    /// Any of `fcntl(2)`.
    pub fn export(&self) -> io::Result<Option<KeptRegion>> {
        let export = |region: &Region| {
            Ok(KeptRegion {
                given: region.given,
                file: region.file.try_clone()?,
                is_used: matches!(region.own, State::Used),
            })
        };
        self.region.as_ref().map(export).transpose()
    }

    /// No ring runs any more, and the region may be gone without a word: makes stable
    /// what it remembers.
    pub fn settle(&self) {
        // One that is closed has everything.
        let settled = self.device.engine().map(|engine| engine.settle());
        if let Some(Err(error)) = settled {
            guest_log!(
                self.device.host_limit(),
                Error,
                "what completed could not be made stable: {error}"
            );
        }
    }

    /// The device is reset, or another region is asked for: the front-end has given this
    /// one up.
    pub fn forget(&mut self) {
        // Also the region of a connection before this one.
        let engine = self.device.engine();
        let note = engine.as_ref().and_then(|engine| engine.note());
        if self.region.take().is_some() || note.is_some() {
            self.settle();
            if let Some(engine) = engine {
                engine.forget();
            }
        }
    }
}

fn make_file(len: u64) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("ploop-in-flight", flags)?);
    file.set_len(len)?;
    // It may become longer, see `lengthen`.
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

/// The front-end keeps the descriptor and what it knows of the length; it does not mind
/// what comes behind.
fn lengthen(file: &File, len: u64) -> io::Result<()> {
    if file.metadata()?.len() < len {
        file.set_len(len)?;
    }
    Ok(())
}

#[cfg(all(test, not(ploop_loom)))]
mod tests;
