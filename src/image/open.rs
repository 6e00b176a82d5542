//! From a path to open, locked image files in the order that they stack.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::bundle::{Bundle, Location};
use super::delta::{read_header, read_header_for_repair};
use super::error::{ImageError, IoContext, Result};
use super::file::HostImage;
use super::folder::open_regular;
use crate::format::{
    ClusterSize, Descriptor, ForeignFormat, Guid, Header, HeaderError, Image, ImageKind,
    SECTOR_SIZE, Sector,
};
use crate::ploop::{Chain, Level};
use crate::storage::HostFile;
use crate::storage::filesystem;
use crate::storage::lock::{Holder, ImageLock, LockError, LockMode};
use crate::threads;

/// What the image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read it; others may, too.
    Read,
    /// To serve it to a guest that writes.
    Serve,
    /// To change the top off line: nobody else may use it.
    Change,
    /// To change any level off line: nobody else may use any of them.
    Repair,
}

/// How to open an image.
#[derive(Clone, Copy, Debug)]
pub struct OpenMode {
    access: Access,
    snapshot: Option<Guid>,
    force_share: bool,
    shares_locks: bool,
    names_no_holder: bool,
    outlasts_the_dead: bool,
    to_check: bool,
}

impl OpenMode {
    /// The usual way for `access`: the top, under locks.
    pub const fn new(access: Access) -> Self {
        Self {
            access,
            snapshot: None,
            force_share: false,
            shares_locks: false,
            names_no_holder: false,
            outlasts_the_dead: false,
            to_check: false,
        }
    }

    /// A snapshot of a bundle instead of its top; for reading only.
    #[must_use]
    pub const fn snapshot(mut self, snapshot: Option<Guid>) -> Self {
        self.snapshot = snapshot;
        self
    }

    pub(super) const fn wants_snapshot(&self) -> bool {
        self.snapshot.is_some()
    }

    pub(super) const fn is_force_share(&self) -> bool {
        self.force_share
    }

    /// To look for what is wrong: what a check knows how to repair is no reason not
    /// to open it.
    #[must_use]
    pub(super) const fn to_check(mut self) -> Self {
        self.to_check = true;
        self
    }

    fn read_header(self, file: &HostFile) -> Result<Header> {
        match self.to_check {
            true => read_header_for_repair(&image_of(file)?),
            false => read_header(&image_of(file)?),
        }
    }

    /// With locks beside those of a process that is going to give the image over: see
    /// [`ImageLock::share`].
    #[must_use]
    pub const fn share_locks(mut self, shares_locks: bool) -> Self {
        self.shares_locks = shares_locks;
        self
    }

    /// Does not look for the process that is in the way, if one is.
    #[must_use]
    pub const fn names_no_holder(mut self) -> Self {
        self.names_no_holder = true;
        self
    }

    /// Waits for what a killed process has left behind, as who starts to serve does for whom a
    /// guest waits.
    #[must_use]
    pub const fn outlasts_the_dead(mut self) -> Self {
        self.outlasts_the_dead = true;
        self
    }

    /// Without locks, whoever uses the image; for reading only, and what is read
    /// may be of two minds.
    #[must_use]
    pub const fn force_share(mut self, force_share: bool) -> Self {
        self.force_share = force_share;
        self
    }
}

/// The files of a disk, open and locked until this is dropped.
#[derive(Debug)]
pub struct OpenImage {
    /// The image files, base first; only the last may be writable, but for
    /// [`Access::Repair`].
    pub files: Vec<HostFile>,
    /// What each file is.
    pub chain: Chain,
    /// Where they were found, if not by the path of a bare image.
    pub bundle: Option<Bundle>,
    /// The snapshot, or the top, that the last file is; `None` for a bare image.
    pub top: Option<Guid>,
    /// Of all files; drop them last.
    pub locks: Vec<ImageLock>,
}

impl OpenImage {
    /// Whether this is the present state of a bundle, not a snapshot in it, and
    /// no bare image.
    pub fn is_top(&self) -> bool {
        let descriptor = self.bundle.as_ref().map(Bundle::descriptor);
        descriptor.is_some_and(|descriptor| self.top == Some(descriptor.top()))
    }

    /// The names of the levels in their bundle, base first.
    pub fn guids(&self) -> Vec<Option<Guid>> {
        match (&self.bundle, self.top) {
            (Some(bundle), Some(top)) => {
                let chain = bundle.descriptor().chain(top);
                chain.iter().map(|image| Some(image.guid)).collect()
            }
            _ => vec![None; self.files.len()],
        }
    }
}

/// Opens what `path` names: a bare image, a bundle's folder, or its descriptor.
///
/// The headers are checked, and that the levels fit on each other; the BATs are
/// not read.
///
/// # Errors
/// Whatever keeps it from being opened so.
pub fn open(path: &Path, mode: OpenMode) -> Result<OpenImage> {
    match Location::of(path)? {
        Location::Bare(path) => open_bare(path, mode),
        Location::Bundle(bundle) => open_bundle(bundle, mode),
    }
}

/// How often something has to be wrong in a disk that is being served.
pub(super) const LOOKS: u32 = 5;

/// The pause between two looks.
pub(super) const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// What `look` makes of the disk at `path`. Who takes no locks may find the file of a level that is
/// deleted meanwhile with nothing in it: so all is done again, be it that it went well, if the
/// descriptor is another by then. And clusters that move while the entries are read may be seen at
/// two places: what is wrong has to be so at each of [`LOOKS`].
///
/// # Errors
/// As [`open`], and those of `look`.
pub(super) fn look_at<T>(
    path: &Path,
    mode: OpenMode,
    look: impl Fn(OpenImage) -> Result<T>,
) -> Result<T> {
    const TRIES: usize = 10;
    let mut looks_gone_wrong = 0;
    for _ in 1..TRIES {
        let image = open(path, mode)?;
        let known = image.bundle.as_ref();
        let known = known.map(|bundle| (bundle.path().to_owned(), bundle.descriptor().clone()));
        let looked = look(image);
        // What went well may have gone well with a file that was empty by then.
        let is_changed = known.is_some_and(|(path, known)| {
            Bundle::open(&path).is_ok_and(|bundle| *bundle.descriptor() != known)
        });
        let is_corrupt = matches!(looked, Err(ImageError::Corrupt { .. }));
        looks_gone_wrong += u32::from(is_corrupt);
        let may_be_sound = is_corrupt && looks_gone_wrong < LOOKS;
        if !mode.force_share || !(is_changed || may_be_sound) {
            return looked;
        }
        if may_be_sound {
            thread::sleep(LOOK_PAUSE);
        }
    }
    look(open(path, mode)?)
}

fn open_bare(path: PathBuf, mode: OpenMode) -> Result<OpenImage> {
    if mode.snapshot.is_some() {
        return Err(not_a_bundle(&path));
    }
    let writable = mode.access != Access::Read;
    match mode.access {
        Access::Read => {}
        // Those above a lower image would change with it.
        Access::Serve | Access::Repair => refuse_member(&path, 2)?,
        // The descriptor has to follow.
        Access::Change => refuse_member(&path, 1)?,
    }
    let file = open_regular(rustix::fs::CWD, &path, OFlags::empty(), writable, &path)?;
    let file = HostFile {
        file,
        path,
        writable,
    };
    let locks = lock(&file, mode)?.into_iter().collect();
    if let Err(error) = mode.read_header(&file) {
        return Err(refine_error(&file, error));
    }
    Ok(OpenImage {
        files: vec![file],
        chain: Chain {
            levels: vec![Level::Ploop],
        },
        bundle: None,
        top: None,
        locks,
    })
}

/// Of a file without a signature, says what it is instead.
fn refine_error(file: &HostFile, error: ImageError) -> ImageError {
    let no_signature = matches!(
        error,
        ImageError::Header {
            source: HeaderError::Signature,
            ..
        }
    );
    let mut start = [0; Header::LEN];
    match file.file.read_at(&mut start, 0) {
        Ok(len) if no_signature => ImageError::NotPloop {
            path: file.path.clone(),
            format: ForeignFormat::of(&start[..len]),
        },
        _ => error,
    }
}

/// Says why there are no snapshots at `path`, where there is no bundle.
pub(super) fn not_a_bundle(path: &Path) -> ImageError {
    let look = path.metadata().context(path, "look at");
    match look.and_then(|_| refuse_member(path, 1)) {
        Err(error) => error,
        Ok(()) => ImageError::NotABundle(path.to_owned()),
    }
}

/// Refuses an image that is one of `images` or more of the bundle it lies in.
fn refuse_member(path: &Path, images: usize) -> Result<()> {
    match bundle_around(path) {
        Some(bundle) if bundle.descriptor().images().len() >= images => Err(ImageError::Member {
            path: path.to_owned(),
            bundle: bundle.path().to_owned(),
            images: bundle.descriptor().images().len(),
        }),
        _ => Ok(()),
    }
}

/// The bundle that the image file at `path` lies in and belongs to, if there is one that
/// can be read.
pub fn bundle_around(path: &Path) -> Option<Bundle> {
    let folder = path.parent()?;
    let folder = match folder.as_os_str().is_empty() {
        true => Path::new("."),
        false => folder,
    };
    let bundle = Bundle::open(folder).ok()?;
    let mut images = bundle.descriptor().images().iter();
    let is_member = images.any(|image| Some(image.file.as_os_str()) == path.file_name());
    is_member.then_some(bundle)
}

fn open_bundle(bundle: Bundle, mode: OpenMode) -> Result<OpenImage> {
    const TRIES: usize = 5;
    let path = bundle.path().to_owned();
    let mut bundle = bundle;
    for _ in 0..TRIES {
        let top = mode.snapshot.unwrap_or(bundle.descriptor().top());
        let opened = open_files(&bundle, mode).and_then(|(files, locks)| {
            let chain = check_chain(bundle.descriptor(), top, &files, mode)?;
            Ok((files, locks, chain))
        });
        // What the descriptor said before the locks were taken may be history, and a file gone that
        // it has named, or without them empty.
        if bundle.is_current()? {
            let (files, locks, chain) = opened?;
            if mode.access != Access::Read {
                // A process that was killed may have put this descriptor in place, and not
                // have come to making that stable.
                bundle.folder().sync()?;
            }
            return Ok(OpenImage {
                chain,
                files,
                bundle: Some(bundle),
                top: Some(top),
                locks,
            });
        }
        drop(opened);
        bundle = Bundle::open(&path)?;
    }
    Err(ImageError::Busy(path))
}

fn open_files(bundle: &Bundle, mode: OpenMode) -> Result<(Vec<HostFile>, Vec<ImageLock>)> {
    let descriptor = bundle.descriptor();
    let top = mode.snapshot.unwrap_or(descriptor.top());
    bundle.require(top)?;
    if top != descriptor.top() && mode.access != Access::Read {
        return Err(ImageError::Unsupported {
            path: bundle.path().to_owned(),
            why: format!("snapshot {top} can only be read, others may depend on it"),
        });
    }
    let chain = descriptor.chain(top);
    let open = |image: &Image, patience| {
        let writable = match mode.access {
            Access::Read => false,
            Access::Serve | Access::Change => image.guid == top,
            Access::Repair => true,
        };
        let file = open_level(bundle, image, writable)?;
        let lock = lock_within(&file, mode, patience)?;
        Ok((file, lock))
    };
    // Each of a level's locks is a question to a server, so all levels are locked at once. Who
    // has to wait for somebody starts from the base, as everybody does then: of two that have a
    // level each and wait for the other one's, none would come to an end.
    let at_once = threads::side_by_side(chain.iter(), |image| open(image, Duration::ZERO));
    let opened: Vec<_> = match at_once.into_iter().collect() {
        Err(ImageError::Locked { .. }) => {
            let one_by_one = chain.iter().map(|image| open(image, PATIENCE));
            one_by_one.collect::<Result<_>>()?
        }
        opened => opened?,
    };
    let (files, locks): (_, Vec<_>) = opened.into_iter().unzip();
    Ok((files, locks.into_iter().flatten().collect()))
}

/// Opens one image file of a bundle.
pub(super) fn open_level(bundle: &Bundle, image: &Image, writable: bool) -> Result<HostFile> {
    Ok(HostFile {
        file: bundle.folder().open_image(&image.file, writable)?,
        path: bundle.path().join(&image.file),
        writable,
    })
}

/// Locks an image file for what the disk is opened for.
pub(super) fn lock(file: &HostFile, mode: OpenMode) -> Result<Option<ImageLock>> {
    lock_within(file, mode, PATIENCE)
}

fn lock_within(file: &HostFile, mode: OpenMode, patience: Duration) -> Result<Option<ImageLock>> {
    let lock_mode = match mode.access {
        Access::Read if mode.force_share => return Ok(None),
        Access::Serve if file.writable => LockMode::ReadWrite,
        Access::Change | Access::Repair if file.writable => LockMode::Exclusive,
        _ => LockMode::ReadOnly,
    };
    if mode.shares_locks {
        let lock = ImageLock::share(&file.file, lock_mode);
        return lock.map(Some).map_err(|source| ImageError::Lock {
            path: file.path.clone(),
            source,
        });
    }
    let shareable = mode.access == Access::Read;
    let names_holder = !mode.names_no_holder && patience == PATIENCE;
    let error = |source| lock_error(file, shareable, names_holder, source);
    let locked = match lock_patiently(&file.file, lock_mode, patience) {
        Err(held) if names_holder && mode.outlasts_the_dead => {
            outlast_the_dead(file, lock_mode, held)
        }
        locked => locked,
    };
    locked.map(Some).map_err(error)
}

/// Locks a file for a server after all if what is in the way belongs to no process: one that
/// was killed on a busy host may leave I/O behind that takes long, and a guest waits.
fn outlast_the_dead(
    file: &HostFile,
    mode: LockMode,
    held: LockError,
) -> std::result::Result<ImageLock, LockError> {
    let is_of_this_host = !filesystem::may_be_shared(&file.file);
    match held.identify_holder(&file.file) {
        LockError::Writer(Holder { pid: None, .. })
        | LockError::Exclusive(Holder { pid: None, .. })
            if is_of_this_host =>
        {
            log::warn!(
                "{} is locked by no process that can be seen; waiting for what one that was \
                 killed has left behind, for {} s at most",
                file.path.display(),
                PATIENCE_WITH_THE_DEAD.as_secs(),
            );
            lock_patiently(&file.file, mode, PATIENCE_WITH_THE_DEAD)
        }
        held => Err(held),
    }
}

/// How long a writer that is in the way is given to go. Of one that was killed, I/O
/// may still be under way, and keeps the locks until it has ended (see
/// `storage/host/uring.rs`).
const PATIENCE: Duration = Duration::from_secs(1);

/// The same for a server where nobody is to be seen who has them.
const PATIENCE_WITH_THE_DEAD: Duration = Duration::from_secs(15);

/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// Locks a file, and says it well if somebody is in the way. `shareable` is
/// whether the user could do without a lock.
pub(super) fn lock_file(file: &HostFile, mode: LockMode, shareable: bool) -> Result<ImageLock> {
    let error = |source| lock_error(file, shareable, true, source);
    lock_patiently(&file.file, mode, PATIENCE).map_err(error)
}

/// Locks a file as one that is only read, for a process that has given up the rights to find
/// out who is in the way.
pub(super) fn lock_to_read(file: &HostFile) -> Result<ImageLock> {
    let error = |source| lock_error(file, false, false, source);
    lock_patiently(&file.file, LockMode::ReadOnly, PATIENCE).map_err(error)
}

fn lock_error(
    file: &HostFile,
    shareable: bool,
    names_holder: bool,
    source: LockError,
) -> ImageError {
    let path = file.path.clone();
    match source {
        LockError::Io(_) => ImageError::Lock { path, source },
        source => ImageError::Locked {
            path,
            source: match names_holder {
                true => source.identify_holder(&file.file),
                false => source,
            },
            shareable,
        },
    }
}

fn lock_patiently(
    file: &File,
    mode: LockMode,
    patience: Duration,
) -> std::result::Result<ImageLock, LockError> {
    let start = Instant::now();
    loop {
        match ImageLock::acquire(file, mode) {
            Err(LockError::Writer(_) | LockError::Exclusive(_)) if start.elapsed() < patience => {
                thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

/// For work through [`ImageFile`](super::ImageFile), on the same open file.
pub(super) fn image_of(file: &HostFile) -> Result<HostImage> {
    let same = file.file.try_clone().context(&file.path, "open")?;
    Ok(HostImage::new(same, file.path.clone()))
}

fn check_chain(
    descriptor: &Descriptor,
    top: Guid,
    files: &[HostFile],
    mode: OpenMode,
) -> Result<Chain> {
    let chain = descriptor.chain(top).into_iter().zip(files);
    let headers = threads::side_by_side(chain.clone(), |(image, file)| match image.kind {
        ImageKind::Plain => None,
        ImageKind::Expandable => Some(mode.read_header(file)),
    });
    // From the top down: each limits what is below.
    let mut above: Option<(Sector, u32)> = None;
    let mut levels = Vec::new();
    for ((image, file), header) in chain.zip(headers).rev() {
        let level = match header {
            None => {
                let disk_size = above.map_or(descriptor.disk_size, |(disk_size, _)| disk_size);
                let is_disk = image.guid == descriptor.top();
                Level::Plain {
                    size: plain_size(file, disk_size, is_disk)?,
                    cluster: descriptor.cluster,
                }
            }
            Some(header) => {
                above = Some(check_expandable(
                    descriptor.cluster,
                    above,
                    file,
                    header,
                    mode,
                )?);
                Level::Ploop
            }
        };
        levels.push(level);
    }
    levels.reverse();
    Ok(Chain { levels })
}

/// Disk size and number of entries of an expandable image that fits.
fn check_expandable(
    cluster: ClusterSize,
    above: Option<(Sector, u32)>,
    file: &HostFile,
    header: Result<Header>,
    mode: OpenMode,
) -> Result<(Sector, u32)> {
    let misfit = |why| {
        Err(ImageError::Misfit {
            path: file.path.clone(),
            why,
        })
    };
    let header = header?;
    let geometry = header.geometry();
    if geometry.cluster != cluster {
        return misfit("its cluster size is not that of the descriptor");
    }
    if let Some((disk_size, entries)) = above {
        let is_cut = cluster.round_down(geometry.disk_size) == disk_size;
        if geometry.disk_size > disk_size && is_cut && !mode.to_check {
            return Err(ImageError::CutDisk {
                path: file.path.clone(),
                disk_size: geometry.disk_size,
                above: disk_size,
            });
        }
        if geometry.disk_size > disk_size && !is_cut {
            return misfit("its disk is larger");
        }
        if u64::from(geometry.entries) > geometry.disk_clusters().max(entries.into()) {
            return misfit("its BAT is longer");
        }
    }
    Ok((geometry.disk_size, geometry.entries))
}

/// How much of a disk is in a plain image: all of it if it `is_disk`. Else the disk
/// may have grown above it.
pub(super) fn plain_size(file: &HostFile, disk_size: Sector, is_disk: bool) -> Result<Sector> {
    let len = file.file.metadata().context(&file.path, "look at")?.len();
    let in_file = Sector(len / SECTOR_SIZE);
    if is_disk && in_file < disk_size {
        return Err(ImageError::PlainTooShort {
            path: file.path.clone(),
            len,
            disk_size,
        });
    }
    Ok(in_file.min(disk_size))
}

#[cfg(test)]
mod tests;
