//! What can go wrong with images off line, in words for the person at the prompt.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::format::{
    DescriptorError, EditError, ForeignFormat, Guid, HeaderError, Sector, TooLarge,
};
use crate::ploop::{BitmapError, OpenError};
use crate::storage::lock::LockError;

/// Why an operation on an image failed. The text says what to do where something
/// can be done.
#[derive(Debug, Error)]
pub enum ImageError {
    /// A system call failed.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// Of the file or folder.
        path: PathBuf,
        /// In words: "open", "read the BAT".
        action: &'static str,
        /// Of the system.
        source: io::Error,
    },
    /// A snapshot is no more, and its file is still there, or a power cut may bring back the
    /// descriptor that names it.
    #[error("the snapshot is deleted, but not all of that is done: {0}")]
    DeletedBut(#[source] Box<ImageError>),
    /// A FIFO, a device, a socket or a symbolic link in place of an image.
    #[error("{}: is {kind}, expected {expected}", path.display())]
    WrongKind {
        /// Of what is there.
        path: PathBuf,
        /// "a FIFO".
        kind: &'static str,
        /// "an image file".
        expected: &'static str,
    },
    /// A folder without a descriptor.
    #[error("{}: is a folder without a DiskDescriptor.xml, so it is not a ploop disk", .0.display())]
    NoDescriptor(PathBuf),
    /// Somebody else uses the image.
    #[error("{}: {source}; stop it first", path.display())]
    Locked {
        /// Of the image file.
        path: PathBuf,
        /// Who.
        source: LockError,
        /// Whether reading without a lock would help.
        shareable: bool,
    },
    /// Locking itself failed.
    #[error("{}: {source}", path.display())]
    Lock {
        /// Of the image file.
        path: PathBuf,
        /// Why.
        source: LockError,
    },
    /// The descriptor changed again and again while it was opened, or a level was emptied that
    /// was being read without a lock.
    #[error("{}: another process keeps changing this disk; try again when it is done", .0.display())]
    Busy(PathBuf),
    /// The descriptor says something that cannot be.
    #[error("{}: {source}", path.display())]
    Descriptor {
        /// Of the descriptor.
        path: PathBuf,
        /// What.
        source: DescriptorError,
    },
    /// A file without the signature of a ploop image.
    #[error("{}: {}", path.display(), not_ploop(path, *format))]
    NotPloop {
        /// Of the file.
        path: PathBuf,
        /// What it is instead; `None`: nothing that shows, so perhaps a raw disk.
        format: Option<ForeignFormat>,
    },
    /// A source that looks like an image of another format.
    #[error("{}: looks like a {format} image; {}, or say -f raw if it is raw", path.display(),
        convert_with_qemu(path, *format))]
    ForeignSource {
        /// Of the file.
        path: PathBuf,
        /// What it looks like.
        format: ForeignFormat,
    },
    /// The header says something that cannot be.
    #[error("{}: {source}", path.display())]
    Header {
        /// Of the image file.
        path: PathBuf,
        /// What.
        source: HeaderError,
    },
    /// The header says that data starts where it cannot.
    #[error("{}: {source}; 'ploop-img check --repair all' recomputes it", path.display())]
    FirstBlock {
        /// Of the image file.
        path: PathBuf,
        /// What.
        source: HeaderError,
    },
    /// A disk that the image would not hold.
    #[error("{}: {source}{remedy}", path.display())]
    TooLarge {
        /// Of the image.
        path: PathBuf,
        /// What it holds.
        source: TooLarge,
        /// In words, after "; ", what would hold it.
        remedy: String,
    },
    /// The file ends inside header or BAT.
    #[error("{}: is cut off: {len} bytes long, its header and BAT alone take {needed}", path.display())]
    CutOff {
        /// Of the image file.
        path: PathBuf,
        /// In bytes.
        len: u64,
        /// In bytes.
        needed: u64,
    },
    /// A level of a chain does not fit the one above it.
    #[error("{}: does not fit the image above it: {why}", path.display())]
    Misfit {
        /// Of the lower image file.
        path: PathBuf,
        /// What differs.
        why: &'static str,
    },
    /// A level of a chain lost the started cluster at its end to a tool that rounds
    /// disk sizes down.
    #[error(
        "{}: its disk of {} sectors was cut in the image above it to whole clusters, {} sectors: \
         another tool that made a snapshot rounds down; 'ploop-img check --repair all' makes the \
         disk whole again",
        path.display(), disk_size.0, above.0
    )]
    CutDisk {
        /// Of the lower image file.
        path: PathBuf,
        /// Of the lower image.
        disk_size: Sector,
        /// Of the upper image.
        above: Sector,
    },
    /// A plain image is shorter than its disk.
    #[error("{}: is {len} bytes long, its disk takes {}", path.display(), disk_size.bytes())]
    PlainTooShort {
        /// Of the plain image file.
        path: PathBuf,
        /// In bytes.
        len: u64,
        /// By the descriptor.
        disk_size: Sector,
    },
    /// An image is to be changed by itself that belongs to a bundle.
    #[error(
        "{}: belongs to the disk {}, which has {images} image{}; give that path instead",
        path.display(),
        bundle.display(),
        if *images == 1 { "" } else { "s" }
    )]
    Member {
        /// Of the image file.
        path: PathBuf,
        /// The folder.
        bundle: PathBuf,
        /// How many images the disk has.
        images: usize,
    },
    /// A bare image was given where only a bundle will do.
    #[error("{}: is a bare image; snapshots need a bundle: make one with 'ploop-img convert'", .0.display())]
    NotABundle(PathBuf),
    /// The image was left in use by a crash.
    #[error(
        "{}: was not closed cleanly; check it with 'ploop-img check', and repair it with \
         'ploop-img check --repair all'",
        .0.display()
    )]
    InUse(PathBuf),
    /// A conversion between versions was cut off.
    #[error(
        "{}: a change of the format version was cut off half-way; finish it with \
         'ploop-img check --repair all'",
        .0.display()
    )]
    Converting(PathBuf),
    /// BAT entries that cannot be right.
    #[error(
        "{}: {count} BAT entries are wrong (the first: {first}); look at them with \
         'ploop-img check', and repair them with 'ploop-img check --repair all'",
        path.display()
    )]
    Corrupt {
        /// Of the image file.
        path: PathBuf,
        /// How many.
        count: u32,
        /// The first, in words.
        first: String,
    },
    /// Something is there already where something new shall be made.
    #[error("{}: already exists; remove it first, or choose another name", .0.display())]
    Exists(PathBuf),
    /// The snapshot tree does not allow it.
    #[error("{}: {source}", path.display())]
    Edit {
        /// Of the bundle.
        path: PathBuf,
        /// Why not.
        source: EditError,
    },
    /// No snapshot of that name.
    #[error("{}: there is no snapshot {guid}; 'ploop-img snapshot list' lists the snapshots", path.display())]
    NoSnapshot {
        /// Of the bundle.
        path: PathBuf,
        /// As asked for.
        guid: Guid,
    },
    /// What is now, in place of a snapshot to compare it with.
    #[error(
        "{}: {guid} is the present state, not a snapshot of what was before; 'ploop-img snapshot \
         list' lists the snapshots",
        path.display()
    )]
    PresentState {
        /// Of the bundle.
        path: PathBuf,
        /// Of the top.
        guid: Guid,
    },
    /// Two states of which neither came from the other.
    #[error(
        "{}: {} does not lie on snapshot {guid}, so its images do not tell what has changed \
         since; 'ploop-img snapshot list' shows what lies on what",
        path.display(),
        above.map_or("the present state".to_owned(), |above| format!("snapshot {above}"))
    )]
    NotBelow {
        /// Of the bundle.
        path: PathBuf,
        /// Of the snapshot that is not below.
        guid: Guid,
        /// Of the snapshot that does not lie on it; `None`: the top.
        above: Option<Guid>,
    },
    /// What was asked for cannot be done with this image.
    #[error("{}: {why}", path.display())]
    Unsupported {
        /// Of the image.
        path: PathBuf,
        /// What, why, and what to do instead.
        why: String,
    },
    /// Something cannot be done to its dirty bitmaps.
    #[error("{}: {source}", path.display())]
    Bitmap {
        /// Of the image file.
        path: PathBuf,
        /// Why.
        source: BitmapError,
    },
    /// The engine cannot open it.
    #[error("{}: {source}", path.display())]
    Engine {
        /// Of the image file.
        path: PathBuf,
        /// Why.
        source: OpenError,
    },
    /// A signal ended the operation.
    #[error("{}: interrupted; {state}", path.display())]
    Interrupted {
        /// Of the image.
        path: PathBuf,
        /// What there is now.
        state: &'static str,
    },
}

/// What a file without our signature is, and the command that makes a disk of ours
/// of it in one step.
fn not_ploop(path: &Path, format: Option<ForeignFormat>) -> String {
    match format {
        Some(format) => format!(
            "is a {format} image, not a ploop disk; {}",
            convert_with_qemu(path, format)
        ),
        None => format!(
            "is not a ploop image: it has no signature of one; if it is a raw disk, make a ploop \
             disk of it with 'ploop-img convert -f raw {} {}'",
            shell_word(path),
            shell_word(&path.with_extension("hds"))
        ),
    }
}

/// `qemu-img` writes what we read, so no raw copy is needed in between.
fn convert_with_qemu(path: &Path, format: ForeignFormat) -> String {
    format!(
        "make a ploop disk of it with 'qemu-img convert -f {} -O parallels {} {}'",
        format.qemu_name(),
        shell_word(path),
        shell_word(&path.with_extension("hds"))
    )
}

/// A path as a shell takes it for one word, inside a text in single quotes.
fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+:@%=,".contains(c);
    if !text.starts_with('-') && text.chars().all(is_plain) {
        return text;
    }
    let mut word = String::from('"');
    for c in text.chars() {
        if "\"$`\\".contains(c) {
            word.push('\\');
        }
        word.push(if c.is_control() { '?' } else { c });
    }
    word.push('"');
    word
}

/// The result of an operation on an image.
pub type Result<T> = std::result::Result<T, ImageError>;

/// Adds to an [`io::Error`] what was tried on which file.
pub(super) trait IoContext<T> {
    fn context(self, path: &Path, action: &'static str) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn context(self, path: &Path, action: &'static str) -> Result<T> {
        self.map_err(|source| ImageError::Io {
            path: path.to_owned(),
            action,
            source: source.into(),
        })
    }
}
