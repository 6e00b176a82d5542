//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vhost_user_ploop::format::{ClusterSize, Guid, Sector, Version};

use vhost_user_ploop::image::{self, DiskFormat, NewSize};

use crate::size::{parse_cluster_size, parse_disk_size, parse_new_size};

/// Makes, checks and changes ploop disk images.
#[derive(Debug, Parser)]
#[command(name = "ploop-img", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
A disk is a bundle, which is a folder with image files and a DiskDescriptor.xml \
that says how they stack, or a bare image file (*.hds). Where a disk is asked \
for, give the folder, the descriptor in it, or the bare image.

Sizes are in bytes, or have a suffix of k, M, G, T, P or E (powers of 1024), as in \
10G or 1.5T.

Examples:
  ploop-img create vm1 10G                    an empty 10 GiB disk in the folder vm1
  ploop-img convert debian.raw vm1 -p         a raw image into a ploop disk
  ploop-img info vm1
  ploop-img check vm1                         0: clean, 2: corrupt, 3: wasted space
  ploop-img convert vm1 backup.raw -O raw     and back

Serve a disk to a guest with vhost-user-ploop.";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make an empty disk
    ///
    /// A PATH that ends in .hds makes a bare image, any other a bundle. What
    /// exists is never overwritten.
    #[command(after_help = "\
Examples:
  ploop-img create vm1 10G
  ploop-img create --cluster-size 64k small.hds 512M")]
    Create {
        /// The folder or the .hds file to make
        path: PathBuf,
        /// Of the guest's disk; rounded up to 512 bytes
        #[arg(value_parser = parse_disk_size)]
        size: Sector,
        /// A power of two from 32k to 64M: what the disk is allocated in
        #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = parse_cluster_size)]
        cluster_size: ClusterSize,
    },
    /// Show what a disk is
    Info {
        #[command(flatten)]
        disk: Disk,
        /// All levels of the chain, the top first
        #[arg(long)]
        backing_chain: bool,
        #[command(flatten)]
        format: OutputFormat,
    },
    /// Look for errors and wasted space, and repair them
    ///
    /// Looks at every image file of a disk. Exits with 0 if it is clean, 1 if it
    /// could not be checked, 2 if something is wrong, 3 if only space is wasted;
    /// after a repair, with what is left.
    #[command(after_help = "\
Examples:
  ploop-img check vm1
  ploop-img check --repair leaks vm1          give wasted space back, touch nothing else
  ploop-img check --repair all vm1            after a crash of the host, or if data is wrong")]
    Check {
        #[command(flatten)]
        disk: Disk,
        /// What to repair
        #[arg(short, long, value_name = "WHAT", value_enum)]
        repair: Option<Repair>,
        #[command(flatten)]
        format: OutputFormat,
    },
    /// Show which file holds which part of a disk
    Map {
        #[command(flatten)]
        disk: Disk,
        #[command(flatten)]
        format: OutputFormat,
    },
    /// Copy a disk into another format
    ///
    /// Holes and zeros are left out on both sides. All levels of a bundle, or of
    /// a snapshot in it, become one image.
    #[command(after_help = "\
Examples:
  ploop-img convert debian.raw vm1 -p         raw into a bundle
  ploop-img convert vm1 copy.hds              a bundle into one bare image
  ploop-img convert --format-version 2 vm1    in place, the format of the kernel's driver
  ploop-img convert -O raw vm1 /tmp/disk      into a raw image of any name

Without -f, a bundle is a ploop disk, and so is a file that ends in .hds and has \
the header of one; other files are raw unless they look like another format. \
Without -O, a TARGET that ends in .raw or .img is raw; one that ends in .hds is \
a bare ploop image, any other a bundle. One that ends in .qcow2, .vmdk or the like \
needs -O: no such image is made.")]
    Convert {
        /// A bundle, a bare image, or a raw image
        source: PathBuf,
        /// What to make; must not exist
        #[arg(required_unless_present = "format_version")]
        target: Option<PathBuf>,
        /// Change the version of the format of SOURCE in place: 1 or 2
        #[arg(long, value_name = "VERSION", value_parser = parse_version,
            conflicts_with_all = ["target", "source_format", "target_format", "cluster_size",
                "snapshot", "force_share", "progress"])]
        format_version: Option<Version>,
        /// What SOURCE is, instead of looking at it
        #[arg(short = 'f', long, value_name = "FORMAT", value_enum)]
        source_format: Option<Format>,
        /// What to make, instead of going by the name of TARGET
        #[arg(short = 'O', long, value_name = "FORMAT", value_enum)]
        target_format: Option<Format>,
        /// Of a ploop TARGET: a power of two from 32k to 64M; that of SOURCE, or 1M
        #[arg(long, value_name = "SIZE", value_parser = parse_cluster_size)]
        cluster_size: Option<ClusterSize>,
        /// A snapshot of SOURCE instead of its present state
        #[arg(long, value_name = "GUID")]
        snapshot: Option<Guid>,
        /// Read SOURCE even if a guest writes to it; the copy may be of no use
        #[arg(short = 'U', long)]
        force_share: bool,
        /// Show progress even where standard error is no terminal
        #[arg(short, long)]
        progress: bool,
    },
    /// Make a disk larger, while no guest uses it
    ///
    /// The guest has to grow its partitions and file systems itself. Making a disk
    /// smaller is refused: it would cut off what is there.
    #[command(after_help = "\
Examples:
  ploop-img resize vm1 20G
  ploop-img resize vm1 +512M")]
    Resize {
        /// A bundle's folder, its DiskDescriptor.xml, or a bare image
        path: PathBuf,
        /// The new size, or by how much to grow; rounded up to 512 bytes
        // A size below zero gets an answer of its own.
        #[arg(value_name = "[+]SIZE", value_parser = parse_new_size, allow_hyphen_values = true)]
        size: NewSize,
    },
    /// Keep, show, delete and go back to states of a disk
    #[command(after_help = "\
Examples:
  ploop-img snapshot create vm1
  ploop-img snapshot list vm1
  ploop-img convert --snapshot '{8d7ad97f-5a3b-4a0b-9d4c-0f8c6ad4f9a1}' vm1 then.raw
  ploop-img snapshot switch vm1 '{8d7ad97f-5a3b-4a0b-9d4c-0f8c6ad4f9a1}'
  ploop-img snapshot delete vm1 '{8d7ad97f-5a3b-4a0b-9d4c-0f8c6ad4f9a1}'")]
    Snapshot {
        #[command(subcommand)]
        what: Snapshot,
    },
    /// Give back the space of zeros and of gaps
    Compact {
        /// A bundle's folder, its DiskDescriptor.xml, or a bare image
        path: PathBuf,
        /// Show progress even where standard error is no terminal
        #[arg(short, long)]
        progress: bool,
    },
}

fn parse_version(text: &str) -> Result<Version, String> {
    match text {
        "1" => Ok(Version::V1),
        "2" => Ok(Version::V2),
        _ => Err(format!("'{text}' is no version of the format: give 1 or 2")),
    }
}

/// What to do with snapshots.
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Keep the present state under a name
    ///
    /// What the guest writes from then on goes into a new image file. Prints the
    /// GUID of the snapshot.
    Create {
        /// A bundle's folder, or its DiskDescriptor.xml
        path: PathBuf,
        /// The name, instead of a random one
        #[arg(long)]
        guid: Option<Guid>,
    },
    /// Show all snapshots, each indented below what it lies on
    List {
        /// A bundle's folder, or its DiskDescriptor.xml
        path: PathBuf,
        #[command(flatten)]
        format: OutputFormat,
    },
    /// Delete a snapshot; the disk and all other snapshots stay what they are
    ///
    /// What lies on it gets its content. One that several others lie on is
    /// refused. Cut off in the middle, 'check --repair leaks' finishes it.
    Delete {
        /// A bundle's folder, or its DiskDescriptor.xml
        path: PathBuf,
        /// Which
        guid: Guid,
        /// Show progress even where standard error is no terminal
        #[arg(short, long)]
        progress: bool,
    },
    /// Go back to a snapshot; what was written since the last one is lost
    ///
    /// To keep it, create another snapshot first.
    Switch {
        /// A bundle's folder, or its DiskDescriptor.xml
        path: PathBuf,
        /// To which
        guid: Guid,
    },
    /// Delete all snapshots of the chain, or a range of it, in one go
    ///
    /// Their content goes down into one image; the disk stays what it is. Cut off in
    /// the middle, 'check --repair leaks' finishes it.
    Merge {
        /// A bundle's folder, or its DiskDescriptor.xml
        path: PathBuf,
        /// The first to go, instead of the base
        #[arg(long, value_name = "GUID")]
        from: Option<Guid>,
        /// What all of them are merged into, and stays, instead of the present state
        #[arg(long, value_name = "GUID")]
        to: Option<Guid>,
        /// Show progress even where standard error is no terminal
        #[arg(short, long)]
        progress: bool,
    },
}

/// A format of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Byte for byte
    Raw,
    /// A ploop image or bundle
    Ploop,
}

impl From<Format> for DiskFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Ploop => Self::Ploop,
        }
    }
}

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Repair {
    /// Space that nothing uses
    Leaks,
    /// Everything that can be
    All,
}

impl From<Repair> for image::Repair {
    fn from(repair: Repair) -> Self {
        match repair {
            Repair::Leaks => Self::Leaks,
            Repair::All => Self::All,
        }
    }
}

/// Which disk to read.
#[derive(Debug, Args)]
pub struct Disk {
    /// A bundle's folder, its DiskDescriptor.xml, or a bare image
    pub path: PathBuf,
    /// A snapshot of the bundle instead of its present state
    #[arg(long, value_name = "GUID")]
    pub snapshot: Option<Guid>,
    /// Read it even if a guest writes to it; what is shown may be out of date
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

/// How to show results.
#[derive(Debug, Args)]
pub struct OutputFormat {
    /// How to show it
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "human")]
    pub output: Output,
}

/// For whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Human,
    /// For programs, with the keys that qemu-img has
    Json,
}
