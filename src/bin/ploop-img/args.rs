//! The command line.

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Args, FromArgMatches, Parser, Subcommand, ValueEnum};
use vhost_user_ploop::device::ThrottleLimits;
use vhost_user_ploop::format::{ClusterSize, Guid, Sector, SnapshotNotes, Version};

use vhost_user_ploop::image::{self, DiskFormat, NewSize};

use crate::bitmap::Bitmap;
use crate::size::{parse_bytes, parse_cluster_size, parse_disk_size, parse_new_size};
use crate::top::{Column, LONGEST};

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

Sizes are in bytes, or have a suffix of k, M, G, T, P or E (powers of 1024, as with \
qemu-img), as in 10G or 1.5T. KiB to EiB are powers of 1024, too, and kB to EB powers \
of 1000: 10GiB is 10G, 10GB is 10000000000 bytes.

Exit codes: 0 if all went well, 1 if not, wrong usage included. check and compare \
have more, as qemu-img has.

Options of qemu-img that make no difference here are accepted: -f parallels \
everywhere (ploop and parallels are the same), -t and -T (what is made is stable on \
disk in any case), -W, -C and -m (there is one copy at a time), -S other than 0 (holes \
are found in blocks of 4 KiB), --preallocation=off. Of -q and -p, -q counts.

Examples:
  ploop-img create vm1 10G                    an empty 10 GiB disk in the folder vm1
  ploop-img convert debian.raw vm1 -p         a raw image into a ploop disk
  ploop-img info vm1
  ploop-img check vm1                         0: clean, 2: corrupt, 3: wasted space
  ploop-img convert vm1 backup.raw -O raw     and back
  ploop-img compare vm1 backup.raw            0: alike, 1: different

SIGUSR1 makes a command that takes long say how far it is.

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
        /// The size of the guest's disk, rounded up to whole clusters
        #[arg(value_parser = parse_disk_size)]
        size: Sector,
        #[command(flatten)]
        cluster: Cluster,
        /// Print nothing but errors
        #[arg(short, long)]
        quiet: bool,
        /// Always ploop
        #[arg(short = 'f', long, value_name = "FORMAT", value_enum)]
        format: Option<PloopOnly>,
    },
    /// Show what a disk is
    Info {
        #[command(flatten)]
        disk: Disk,
        /// All levels of the chain, the top first
        #[arg(short, long)]
        backing_chain: bool,
        /// And how much of each part of the disk is read from which level, as bars: of blocks
        /// if the locale has UTF-8, else of ASCII
        #[arg(long)]
        picture: bool,
        #[command(flatten)]
        format: OutputFormat,
    },
    /// Look for errors and wasted space, and repair them
    ///
    /// Looks at every image file of a disk. Exits with 0 if it is clean, 1 if it
    /// could not be checked, 2 if something is wrong, 3 if only space is wasted;
    /// after a repair, with what is left.
    ///
    /// A disk that is being served is checked as well, if the process that serves it can be
    /// found, but for space that is wasted; it cannot be repaired.
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
        /// The socket of the --control of the process that serves the disk, if one does
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,
        /// Print nothing but errors: the exit code tells
        #[arg(short, long)]
        quiet: bool,
        /// Accepted for compatibility; has no effect
        #[arg(
            short = 'T',
            value_name = "CACHE",
            value_enum,
            hide_possible_values = true
        )]
        source_cache: Option<Cache>,
        #[command(flatten)]
        format: OutputFormat,
    },
    /// Compare what two disks read as
    ///
    /// Exits with 0 if they are alike, 1 if they differ (and where wrong usage keeps
    /// them from being compared), 2 if one cannot be opened, 4 if one cannot be read.
    /// Where one is larger, the rest of it has to be zeros.
    #[command(after_help = "\
Examples:
  ploop-img compare vm1 backup.raw
  ploop-img compare --snapshot '{8d7ad97f-5a3b-4a0b-9d4c-0f8c6ad4f9a1}' vm1 then.raw
  ploop-img compare -s vm1 copy.hds           sizes and allocation, too")]
    Compare {
        /// A bundle, a bare or raw image, or a block device
        first: PathBuf,
        /// The same
        second: PathBuf,
        /// What FIRST is, instead of looking at it
        #[arg(short = 'f', long = "a-format", value_name = "FORMAT", value_enum)]
        first_format: Option<Format>,
        /// What SECOND is, instead of looking at it
        #[arg(short = 'F', long = "b-format", value_name = "FORMAT", value_enum)]
        second_format: Option<Format>,
        /// A snapshot of FIRST instead of its present state
        #[arg(long, value_name = "GUID")]
        snapshot: Option<Guid>,
        /// A snapshot of SECOND instead of its present state
        #[arg(long, value_name = "GUID")]
        second_snapshot: Option<Guid>,
        /// Different sizes or allocation make a difference, too
        #[arg(short, long)]
        strict: bool,
        /// Read them even if a guest writes to them
        #[arg(short = 'U', long)]
        force_share: bool,
        /// Accepted for compatibility; has no effect
        #[arg(
            short = 'T',
            value_name = "CACHE",
            value_enum,
            hide_possible_values = true
        )]
        source_cache: Option<Cache>,
        #[command(flatten)]
        verbosity: Verbosity,
    },
    /// Say how long the file of a new image would be
    ///
    /// The required size is what a conversion takes at most: zeros that only reading
    /// tells are counted. Holes in the file are counted, the descriptor of a bundle is
    /// not.
    #[command(after_help = "\
Examples:
  ploop-img measure --size 100G
  ploop-img measure debian.raw
  ploop-img measure -O raw vm1")]
    Measure {
        /// A bundle, a bare or raw image, or a block device that would be copied
        #[arg(required_unless_present = "size")]
        source: Option<PathBuf>,
        /// The size of an empty disk, in place of SOURCE
        #[arg(short, long, value_name = "SIZE", value_parser = parse_disk_size,
            conflicts_with_all = ["source", "source_format", "snapshot", "force_share"])]
        size: Option<Sector>,
        /// What SOURCE is, instead of looking at it
        #[arg(short = 'f', long, value_name = "FORMAT", value_enum)]
        source_format: Option<Format>,
        /// What would be made
        #[arg(
            short = 'O',
            long,
            value_name = "FORMAT",
            value_enum,
            default_value = "ploop"
        )]
        target_format: Format,
        #[command(flatten)]
        cluster: Cluster,
        /// A snapshot of SOURCE instead of its present state
        #[arg(short = 'l', long, value_name = "GUID")]
        snapshot: Option<Guid>,
        /// Read SOURCE even if a guest writes to it
        #[arg(short = 'U', long)]
        force_share: bool,
        #[command(flatten)]
        format: OutputFormat,
    },
    /// Show which file holds which part of a disk
    ///
    /// With --since, only what has changed since a snapshot that the disk lies on, to the
    /// cluster: what was written or discarded, even if it reads the same again, and what is
    /// behind the end that the disk had then.
    ///
    /// A disk that is being served is shown as it is when the command begins, if the process
    /// that serves it can be found: what was written until then is flushed first. What the
    /// guest changes meanwhile may be shown, or not.
    #[command(after_help = "\
Examples:
  ploop-img map vm1
  ploop-img map --output json vm1
  ploop-img map --picture vm1.svg vm1
  ploop-img map --since '{8d7ad97f-5a3b-4a0b-9d4c-0f8c6ad4f9a1}' vm1")]
    Map {
        #[command(flatten)]
        disk: Disk,
        /// Only what has changed since this snapshot
        #[arg(long, value_name = "GUID")]
        since: Option<Guid>,
        /// Instead, draw which level each part of the disk is read from, and what is where in
        /// the files: as SVG or PNG, by the name of the FILE, which is replaced if it is there
        #[arg(long, value_name = "FILE", conflicts_with = "since")]
        picture: Option<PathBuf>,
        /// The socket of the --control of the process that serves the disk, if one does
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,
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
  ploop-img convert -n vm1 /dev/vg/vm1        into a block device
  ploop-img convert vm1 - | zstd > vm1.zst    raw, to standard output
  zstdcat vm1.zst | ploop-img convert - vm2   and back

Without -f, a bundle is a ploop disk, and so is a file that ends in .hds and has \
the header of one; other files are raw unless they look like another format. \
Without -O, a TARGET that ends in .raw or .img is raw; one that ends in .hds is \
a bare ploop image, any other a bundle. One that ends in .qcow2, .vmdk or the like \
needs -O: no such image is made. A file named - is ./-.")]
    Convert(Box<Convert>),
    /// Make a disk larger or smaller, while no guest uses it
    ///
    /// The guest has to grow its partitions and file systems itself, or shrink them
    /// before. A disk that is being served grows all the same, if the process that serves
    /// it can be found; the guest sees it at once. Making a disk smaller gives up what is
    /// behind its new end, so it takes --shrink; a disk with snapshots, or one that is
    /// being served, cannot be made smaller.
    #[command(after_help = "\
Examples:
  ploop-img resize vm1 20G
  ploop-img resize vm1 +512M
  ploop-img resize --shrink vm1 -5G")]
    Resize {
        /// A bundle's folder, its DiskDescriptor.xml, or a bare image
        path: PathBuf,
        /// The new size, or by how much to change it; rounded up to whole clusters
        // What starts with a - is a size.
        #[arg(value_name = "[+-]SIZE", value_parser = parse_new_size, allow_hyphen_values = true)]
        size: NewSize,
        /// Give up what is behind the new end of a smaller disk
        #[arg(long)]
        shrink: bool,
        /// The socket of the --control of the process that serves the disk, if one does
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,
        /// Print nothing but errors
        #[arg(short, long)]
        quiet: bool,
        /// Always ploop
        #[arg(short = 'f', value_name = "FORMAT", value_enum)]
        format: Option<PloopOnly>,
        /// Accepted for compatibility; has no effect
        #[arg(long, value_name = "MODE", value_parser = ["off"])]
        preallocation: Option<String>,
    },
    /// Keep, show, delete and go back to states of a disk
    ///
    /// The letters of qemu-img work as well: they name a snapshot by its GUID, or by a
    /// description that no other has.
    #[command(
        args_conflicts_with_subcommands = true,
        after_help = "\
Examples:
  ploop-img snapshot create --description 'before the upgrade' vm1
  ploop-img snapshot list vm1
  ploop-img convert --snapshot '{8d7ad97f-5a3b-4a0b-9d4c-0f8c6ad4f9a1}' vm1 then.raw
  ploop-img snapshot switch vm1 '{8d7ad97f-5a3b-4a0b-9d4c-0f8c6ad4f9a1}'
  ploop-img snapshot delete vm1 '{8d7ad97f-5a3b-4a0b-9d4c-0f8c6ad4f9a1}'"
    )]
    Snapshot {
        #[command(subcommand)]
        what: Option<Snapshot>,
        #[command(flatten)]
        letters: Letters,
    },
    /// Say what of a disk was changed since some moment: dirty bitmaps
    ///
    /// A bitmap says it for a backup that copies only that. It is in the image when nobody serves
    /// the disk, and 'qemu-nbd --bitmap' reads it there. One that is not there any more has to be
    /// taken for 'everything was changed': after a crash there are none, nor after an image was
    /// changed off line. Of a disk that is being served, the process that serves it does it.
    #[command(after_help = "\
Examples:
  ploop-img bitmap add vm1                    prints the name of the new one
  ploop-img bitmap add vm1 c0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5 -g 64k
  ploop-img bitmap list vm1
  ploop-img bitmap clear vm1 c0c2bdc4-2c5c-4bb5-8f53-40eb0b5bb5f5")]
    Bitmap {
        #[command(subcommand)]
        what: Bitmap,
    },
    /// Show what a guest does with its disk at present
    ///
    /// Asks the process that serves the disk. It is found by itself where the host has a
    /// run-time folder for that (/run/vhost-user-ploop, or PLOOP_RUNTIME_DIR). Without --watch
    /// all is shown since that process began; with it, what has been done in each interval,
    /// as long as the disk is served, by whichever process.
    ///
    /// Latencies (p50, p99: half of the requests took no longer, and 99 of 100) are from the
    /// guest's ring to its answer. depth is how many requests were under way on average, flight
    /// how many are at the moment; dirty are pages of the block allocation table that are to be
    /// written, syncs/s what the metadata took; parked are writes that wait for space on the
    /// host; the disk size is what the image takes there.
    #[command(after_help = "\
Examples:
  ploop-img stat vm1
  ploop-img stat vm1 --watch                  a line each second
  ploop-img stat vm1 --watch 10 --output json
  ploop-img stat vm1 --control /run/vm1.qmp")]
    Stat {
        /// A bundle's folder, its DiskDescriptor.xml, or a bare image
        path: PathBuf,
        /// The socket of the process's --control
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,
        /// Go on, with a line every so many seconds
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
              value_parser = clap::value_parser!(u64).range(1..=86400))]
        watch: Option<u64>,
        #[command(flatten)]
        format: OutputFormat,
    },
    /// Show all disks that are being served on this host, live
    ///
    /// Finds the processes that serve them as 'stat' does, shows those that the user may ask,
    /// and those that come later as well. Keys sort the list, by a column, and select a disk,
    /// of which more is shown; h says which. Columns that the terminal has no room for are
    /// left out.
    #[command(after_help = "\
Examples:
  ploop-img top
  ploop-img top /vz/private --sort p99        the disks in a folder
  ploop-img top vm1 vm2 --interval 5
  ploop-img top --output json                 what all of them do in one second, once")]
    Top {
        /// Disks, and folders whose disks to show; without any, all
        #[arg(value_name = "FOLDER|PATH")]
        paths: Vec<PathBuf>,
        /// The socket of a --control that is not found by the disk; can be given several times
        #[arg(long, value_name = "PATH")]
        control: Vec<PathBuf>,
        /// The column to sort by, the highest first
        #[arg(
            short,
            long,
            value_name = "COLUMN",
            value_enum,
            default_value = "depth"
        )]
        sort: Column,
        /// The lowest first
        #[arg(short, long)]
        reverse: bool,
        /// Seconds between updates
        #[arg(short, long, value_name = "SECONDS", default_value = "1",
              value_parser = clap::value_parser!(u64).range(1..=LONGEST))]
        interval: u64,
        #[command(flatten)]
        format: OutputFormat,
    },
    /// Show or change the limits on what a guest may do with its disk
    ///
    /// Asks the process that serves the disk, as 'stat' does, and shows the limits that hold
    /// then, as its --throttle takes them. Without any option nothing is changed. What is not
    /// named stays as it is, and 0 lifts a limit, with its burst. They hold until they are
    /// changed again or the process ends; one that takes over keeps them.
    #[command(after_help = "\
Examples:
  ploop-img throttle vm1
  ploop-img throttle vm1 --iops 500 --bps 100M
  ploop-img throttle vm1 --iops-max 2000 --iops-max-length 10
  ploop-img throttle vm1 --none               as fast as the host can")]
    Throttle {
        /// A bundle's folder, its DiskDescriptor.xml, or a bare image
        path: PathBuf,
        /// The socket of the process's --control
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,
        /// Lift all limits but those that are given with it
        #[arg(long)]
        none: bool,
        #[command(flatten)]
        limits: Limits,
        #[command(flatten)]
        format: OutputFormat,
    },
    /// Give back the space of zeros and of gaps
    ///
    /// Of a disk that is being served the process that serves it does it for the top level,
    /// while the guest runs; snapshots stay what they are. Ctrl-C ends it there, too: what was
    /// gained so far stays.
    Compact {
        /// A bundle's folder, its DiskDescriptor.xml, or a bare image
        path: PathBuf,
        /// The control socket of the process that serves the disk, if it cannot be found
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,
        #[command(flatten)]
        verbosity: Verbosity,
    },
}

/// Limits that are to be changed, by their names.
#[derive(Clone, Debug)]
pub struct Limits(pub Vec<(&'static str, u64)>);

/// Their names, the options, and what they are.
const LIMITS: [(&str, &str, &str); 19] = [
    ("bps", "bps", "Bytes a second"),
    ("bps_rd", "bps-rd", "Bytes of reads a second"),
    ("bps_wr", "bps-wr", "Bytes of writes a second"),
    ("iops", "iops", "Operations a second"),
    ("iops_rd", "iops-rd", "Reads a second"),
    ("iops_wr", "iops-wr", "Writes and discards a second"),
    ("bps_max", "bps-max", "Bytes a second in a burst"),
    ("bps_rd_max", "bps-rd-max", "Of reads"),
    ("bps_wr_max", "bps-wr-max", "Of writes"),
    ("iops_max", "iops-max", "Operations a second in a burst"),
    ("iops_rd_max", "iops-rd-max", "Reads"),
    ("iops_wr_max", "iops-wr-max", "Writes and discards"),
    (
        "bps_max_length",
        "bps-max-length",
        "How many seconds a burst of bytes may last",
    ),
    ("bps_rd_max_length", "bps-rd-max-length", "Of reads"),
    ("bps_wr_max_length", "bps-wr-max-length", "Of writes"),
    (
        "iops_max_length",
        "iops-max-length",
        "How many seconds a burst of operations may last",
    ),
    ("iops_rd_max_length", "iops-rd-max-length", "Of reads"),
    (
        "iops_wr_max_length",
        "iops-wr-max-length",
        "Of writes and discards",
    ),
    (
        "iops_size",
        "iops-size",
        "An operation of more bytes counts as several of so many",
    ),
];

impl FromArgMatches for Limits {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let value = |&(name, ..): &(&'static str, &str, &str)| {
            let value = matches.get_one::<u64>(name)?;
            Some((name, *value))
        };
        Ok(Self(LIMITS.iter().filter_map(value).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Limits {
    fn augment_args(command: clap::Command) -> clap::Command {
        let option = |&(name, option, help): &(&'static str, &'static str, &'static str)| {
            let arg = Arg::new(name)
                .long(option)
                .help(help)
                .help_heading("Limits");
            // As --throttle has it, too.
            let arg = if name == option { arg } else { arg.alias(name) };
            match (ThrottleLimits::is_of_bytes(name), name.ends_with("length")) {
                (true, _) => arg.value_name("BYTES").value_parser(parse_bytes),
                (_, true) => arg
                    .value_name("SECONDS")
                    .value_parser(clap::value_parser!(u64)),
                _ => arg
                    .value_name("NUMBER")
                    .value_parser(clap::value_parser!(u64)),
            }
        };
        command.args(LIMITS.iter().map(option))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

/// What to copy where.
#[derive(Debug, Args)]
pub struct Convert {
    /// A bundle, a bare or raw image, or a block device; -: raw, from standard input
    pub source: PathBuf,
    /// What to make; must not exist. -: raw, to standard output
    #[arg(required_unless_present = "format_version")]
    pub target: Option<PathBuf>,
    /// Change the version of the format of SOURCE in place: 1 or 2
    #[arg(long, value_name = "VERSION", value_parser = parse_version,
        conflicts_with_all = ["target", "source_format", "target_format", "cluster_size",
            "options", "no_create", "snapshot", "force_share", "progress"])]
    pub format_version: Option<Version>,
    /// What SOURCE is, instead of looking at it
    #[arg(short = 'f', long, value_name = "FORMAT", value_enum)]
    pub source_format: Option<Format>,
    /// What to make, instead of going by the name of TARGET
    #[arg(short = 'O', long, value_name = "FORMAT", value_enum)]
    pub target_format: Option<Format>,
    /// Write into TARGET, which is there and large enough
    ///
    /// A raw file, a block device, or a ploop disk without snapshots. What it holds
    /// behind the end of SOURCE stays.
    #[arg(short, long)]
    pub no_create: bool,
    #[command(flatten)]
    pub cluster: Cluster,
    /// A snapshot of SOURCE instead of its present state
    #[arg(short = 'l', long, value_name = "GUID")]
    pub snapshot: Option<Guid>,
    /// Read SOURCE even if a guest writes to it; the copy may be of no use
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// 0: allocate all of TARGET, zeros included; anything else has no effect
    #[arg(short = 'S', value_name = "SIZE", value_parser = parse_bytes)]
    pub sparse_size: Option<u64>,
    /// Accepted for compatibility; has no effect
    #[arg(
        short = 't',
        value_name = "CACHE",
        value_enum,
        hide_possible_values = true
    )]
    pub target_cache: Option<Cache>,
    /// Accepted for compatibility; has no effect
    #[arg(
        short = 'T',
        value_name = "CACHE",
        value_enum,
        hide_possible_values = true
    )]
    pub source_cache: Option<Cache>,
    /// Accepted for compatibility; has no effect
    #[arg(short = 'W')]
    pub out_of_order: bool,
    /// Accepted for compatibility; has no effect
    #[arg(short = 'C')]
    pub copy_offloading: bool,
    /// Accepted for compatibility; has no effect
    #[arg(short = 'm', value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub parallel: Option<u8>,
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// How much to print.
#[derive(Debug, Args)]
pub struct Verbosity {
    /// Show progress even where standard error is no terminal
    #[arg(short, long)]
    pub progress: bool,
    /// Print nothing but errors, and show no progress, also with -p
    #[arg(short, long)]
    pub quiet: bool,
}

/// The cluster size of a new image.
#[derive(Debug, Args)]
pub struct Cluster {
    /// What a ploop disk is allocated in, a power of two from 32k to 64M; that of a
    /// ploop SOURCE, or 1M
    #[arg(long, value_name = "SIZE", value_parser = parse_cluster_size)]
    cluster_size: Option<ClusterSize>,
    /// cluster_size=SIZE, the same as qemu-img says it
    #[arg(short = 'o', long, value_name = "OPTIONS", value_parser = parse_options,
        conflicts_with = "cluster_size")]
    options: Option<ClusterSize>,
}

impl Cluster {
    /// As asked for in one way or the other.
    pub fn size(&self) -> Option<ClusterSize> {
        self.cluster_size.or(self.options)
    }
}

fn parse_options(text: &str) -> Result<ClusterSize, String> {
    match text.split_once('=') {
        Some(("cluster_size", size)) => parse_cluster_size(size),
        _ => Err(format!(
            "'{text}' is not an option of a new image: give cluster_size=SIZE"
        )),
    }
}

fn parse_description(text: &str) -> Result<String, String> {
    match SnapshotNotes::is_description(text) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "a description is one line of 1 to {} bytes without control characters",
            SnapshotNotes::DESCRIPTION_MAX
        )),
    }
}

/// `snapshot` as `qemu-img` has it.
#[derive(Debug, Args)]
#[command(disable_help_flag = false)]
pub struct Letters {
    /// Show all snapshots; also without any letter
    #[arg(short, long, group = "letter")]
    pub list: bool,
    /// Make a snapshot: of this GUID, or with this description
    #[arg(short, long, group = "letter", value_name = "SNAPSHOT", value_parser = parse_description)]
    pub create: Option<String>,
    /// Go back to a snapshot; what was written since the last one is lost
    #[arg(short, long, group = "letter", value_name = "SNAPSHOT")]
    pub apply: Option<String>,
    /// Delete a snapshot
    #[arg(short, long, group = "letter", value_name = "SNAPSHOT")]
    pub delete: Option<String>,
    /// Print nothing but errors
    #[arg(short, long)]
    pub quiet: bool,
    /// Accepted: a list is shown even if a guest writes to the disk
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Always ploop
    #[arg(short = 'f', value_name = "FORMAT", value_enum)]
    pub format: Option<PloopOnly>,
    /// A bundle's folder, or its DiskDescriptor.xml
    #[arg(required = true)]
    pub path: Option<PathBuf>,
}

/// A host cache mode of `qemu-img`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "known from qemu-img")]
pub enum Cache {
    None,
    Writeback,
    Writethrough,
    Directsync,
    Unsafe,
}

fn parse_version(text: &str) -> Result<Version, String> {
    match text {
        "1" => Ok(Version::V1),
        "2" => Ok(Version::V2),
        _ => Err(format!(
            "'{text}' is not a version of the format: give 1 or 2"
        )),
    }
}

/// What to do with snapshots.
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Keep the present state under a name
    ///
    /// What the guest writes from then on goes into a new image file. Prints the
    /// GUID of the snapshot. Of a disk that is being served one is made all the same, if the
    /// process that serves it can be found: it has what was written until then, as after a
    /// power cut.
    Create {
        /// A bundle's folder, or its DiskDescriptor.xml
        path: PathBuf,
        /// The name, instead of a random one
        #[arg(long)]
        guid: Option<Guid>,
        /// What the snapshot is for, in one line
        #[arg(long, value_name = "TEXT", value_parser = parse_description)]
        description: Option<String>,
        /// The socket of the --control of the process that serves the disk, if one does
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,
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
    /// Of a disk that is being served the process that serves it does it, while the guest runs.
    /// Ctrl-C ends it there, too, and the snapshot stays.
    Delete {
        /// A bundle's folder, or its DiskDescriptor.xml
        path: PathBuf,
        /// The snapshot to delete
        guid: Guid,
        /// The control socket of the process that serves the disk, if it cannot be found
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,
        #[command(flatten)]
        verbosity: Verbosity,
    },
    /// Go back to a snapshot; what was written since the last one is lost
    ///
    /// To keep it, create another snapshot first. No guest may use the disk; the process that
    /// serves it may go on only if it was started with --lock=running.
    Switch {
        /// A bundle's folder, or its DiskDescriptor.xml
        path: PathBuf,
        /// The snapshot to go back to
        guid: Guid,
        /// The control socket of the process that serves the disk, if it cannot be found: that
        /// one says what it takes
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,
    },
    /// Delete all snapshots of the chain, or a range of it, in one go
    ///
    /// Their content goes into one image; the disk stays what it is. Cut off in
    /// the middle, 'check --repair leaks' finishes it.
    /// Of a disk that is being served the process that serves it does it, while the guest runs.
    /// Ctrl-C ends it there, too, and the snapshots stay.
    Merge {
        /// A bundle's folder, or its DiskDescriptor.xml
        path: PathBuf,
        /// The first to go, instead of the base
        #[arg(long, value_name = "GUID")]
        from: Option<Guid>,
        /// What all of them are merged into, and stays, instead of the present state
        #[arg(long, value_name = "GUID")]
        to: Option<Guid>,
        /// The control socket of the process that serves the disk, if it cannot be found
        #[arg(long, value_name = "PATH")]
        control: Option<PathBuf>,
        #[command(flatten)]
        verbosity: Verbosity,
    },
}

/// A format of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Byte for byte
    Raw,
    /// A ploop image or bundle
    #[value(alias = "parallels")]
    Ploop,
}

/// The format of what only a ploop disk can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PloopOnly {
    /// A ploop image or bundle
    #[value(alias = "parallels")]
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
    /// Always ploop
    #[arg(short = 'f', value_name = "FORMAT", value_enum)]
    pub disk_format: Option<PloopOnly>,
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_description_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn limits_are_named_as_the_daemon_names_them() {
        assert_eq!(LIMITS.map(|(name, ..)| name), ThrottleLimits::NUMBERS);
        for (name, option, _) in LIMITS {
            assert_eq!(option.replace('-', "_"), name);
            for option in [option, name] {
                let args = ["ploop-img", "throttle", "x", &format!("--{option}"), "7"];
                let Command::Throttle { limits, none, .. } =
                    Cli::try_parse_from(args).unwrap().command
                else {
                    panic!("another command");
                };
                assert_eq!((limits.0, none), (vec![(name, 7)], false));
            }
        }
    }
}
