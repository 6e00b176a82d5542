//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vhost_user_ploop::format::{ClusterSize, Guid, Sector};

use crate::size::{parse_cluster_size, parse_disk_size};

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

Sizes are in bytes, or have a suffix of k, M, G, T, P or E (powers of 1024).

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
