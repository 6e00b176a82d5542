//! Where a copied disk goes: a new raw file, a new ploop image, or a stream.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{BLOCK, ZEROS, write_data};
use crate::format::is_zero;
use crate::format::{ClusterSize, Geometry, HostCluster, Sector};
use crate::image::create::new_header;
use crate::image::error::{IoContext, Result};
use crate::image::file::{HostImage, ImageFile};
use crate::image::size::whole_clusters;

/// Part of a disk.
#[derive(Clone, Copy)]
pub struct Piece<'a> {
    /// Where it starts, in bytes of the disk: a multiple of the output's unit.
    pub start: u64,
    /// A multiple of the output's unit; zeros behind the end of the disk.
    pub bytes: &'a [u8],
    /// How many of the bytes belong to the disk.
    pub len: usize,
}

impl<'a> Piece<'a> {
    /// What belongs to the disk.
    pub fn inside(&self) -> &'a [u8] {
        &self.bytes[..self.len]
    }
}

/// Takes a disk piece by piece, in ascending order.
pub trait Output {
    /// What there is to know of it in the end.
    type Made;

    /// Pieces start at multiples of it and are multiples of it long, in bytes.
    fn unit(&self) -> u64;

    /// What is not written, or written as zeros, shall read as zeros.
    fn write(&mut self, piece: Piece<'_>) -> Result<()>;

    /// The disk is complete, and as large as that.
    fn finish(&mut self, size: Sector) -> Result<Self::Made>;
}

/// A new file, byte for byte the disk.
pub struct RawOutput<'a> {
    pub file: &'a HostImage,
    /// Zeros are written, too.
    pub keep_zeros: bool,
}

impl Output for RawOutput<'_> {
    type Made = ();

    fn unit(&self) -> u64 {
        BLOCK as u64
    }

    fn write(&mut self, piece: Piece<'_>) -> Result<()> {
        match self.keep_zeros {
            true => {
                let written = self.file.write_all_at(piece.inside(), piece.start);
                written.context(self.file.path(), "write")
            }
            false => write_data(self.file, piece.inside(), piece.start),
        }
    }

    fn finish(&mut self, size: Sector) -> Result<()> {
        let set = self.file.set_len(size.bytes());
        set.context(self.file.path(), "set the length")
    }
}

/// A new ploop image. Clusters are allocated one after the other, as data comes;
/// header and BAT are written in the end.
pub struct PloopOutput<'a> {
    file: &'a HostImage,
    /// For messages.
    path: PathBuf,
    cluster: ClusterSize,
    keep_zeros: bool,
    /// Where each guest cluster is; 0: nowhere.
    hosts: Vec<HostCluster>,
    next: HostCluster,
}

impl<'a> PloopOutput<'a> {
    /// `size` is that of the disk, where it is known: then data need not make way
    /// for the BAT in the end.
    pub fn new(
        file: &'a HostImage,
        path: &Path,
        cluster: ClusterSize,
        size: Option<Sector>,
        keep_zeros: bool,
    ) -> Result<Self> {
        let first = match size {
            Some(size) => new_header(path, size, cluster)?
                .geometry()
                .first_host_cluster(),
            None => HostCluster(1),
        };
        Ok(Self {
            file,
            path: path.to_owned(),
            cluster,
            keep_zeros,
            hosts: Vec::new(),
            next: first,
        })
    }

    fn offset(&self, host: HostCluster) -> u64 {
        u64::from(host.0) << self.cluster.shift()
    }

    /// Writes clusters that follow each other on the disk and in the file.
    fn write_run(&self, bytes: &[u8], clusters: Range<usize>, host: HostCluster) -> Result<()> {
        let cluster = self.cluster.bytes() as usize;
        let bytes = &bytes[clusters.start * cluster..clusters.end * cluster];
        match self.keep_zeros {
            true => {
                let written = self.file.write_all_at(bytes, self.offset(host));
                written.context(self.file.path(), "write")
            }
            false => write_data(self.file, bytes, self.offset(host)),
        }
    }

    /// Moves the data that lies where header and BAT will be to the end.
    fn make_way(&mut self, first: HostCluster) -> Result<()> {
        let mut buffer = vec![0; self.cluster.bytes() as usize];
        self.next = self.next.max(first);
        for guest in 0..self.hosts.len() {
            let host = self.hosts[guest];
            if host == HostCluster(0) || host >= first {
                continue;
            }
            let read = self.file.read_exact_at(&mut buffer, self.offset(host));
            read.context(self.file.path(), "read")?;
            self.write_run(&buffer, 0..1, self.next)?;
            self.hosts[guest] = self.next;
            self.next.0 += 1;
        }
        let punched = self.file.punch(0..self.offset(first));
        punched.context(self.file.path(), "punch a hole")
    }
}

impl Output for PloopOutput<'_> {
    type Made = Geometry;

    fn unit(&self) -> u64 {
        self.cluster.bytes()
    }

    fn write(&mut self, piece: Piece<'_>) -> Result<()> {
        let first_guest = (piece.start / self.unit()) as usize;
        let clusters = piece.len.div_ceil(self.unit() as usize);
        self.hosts.resize(first_guest + clusters, HostCluster(0));
        let mut run = 0..0;
        let mut run_host = self.next;
        let pieces = piece.bytes.chunks_exact(self.unit() as usize);
        for (index, cluster) in pieces.take(clusters).enumerate() {
            if !self.keep_zeros && is_zero(cluster) {
                continue;
            }
            self.hosts[first_guest + index] = self.next;
            if run.end != index {
                self.write_run(piece.bytes, run, run_host)?;
                (run, run_host) = (index..index, self.next);
            }
            run.end = index + 1;
            self.next.0 += 1;
        }
        self.write_run(piece.bytes, run, run_host)
    }

    fn finish(&mut self, size: Sector) -> Result<Geometry> {
        let path = self.file.path();
        let size = whole_clusters(&self.path, size, self.cluster);
        let mut header = new_header(&self.path, size, self.cluster)?;
        let geometry = *header.geometry();
        // A file that ends in a hole ends where its last cluster does.
        let end = self.offset(self.next);
        self.file.set_len(end).context(path, "set the length")?;
        if self.hosts.iter().any(|host| host.0 != 0) {
            header.clear_empty();
        }
        self.make_way(geometry.first_host_cluster())?;
        let end = self.offset(self.next);
        self.file.set_len(end).context(path, "set the length")?;
        let mut bytes = header.to_bytes().to_vec();
        let entry = |host: &HostCluster| match host {
            HostCluster(0) => 0,
            host => geometry.bat_value(*host),
        };
        bytes.extend(self.hosts.iter().flat_map(|host| entry(host).to_le_bytes()));
        write_data(self.file, &bytes, 0)?;
        Ok(geometry)
    }
}

/// A pipe, a socket or whatever else takes bytes in order.
pub struct StreamOutput<W> {
    stream: W,
    /// For messages.
    path: PathBuf,
    written: u64,
}

impl StreamOutput<File> {
    /// Standard output.
    pub fn standard() -> Result<Self> {
        let path = PathBuf::from("standard output");
        let same = rustix::io::dup(std::io::stdout()).context(&path, "open")?;
        Ok(Self {
            stream: File::from(same),
            path,
            written: 0,
        })
    }
}

impl<W: Write> StreamOutput<W> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.stream.write_all(bytes);
        written.context(&self.path, "write")?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn zeros_to(&mut self, end: u64) -> Result<()> {
        while self.written < end {
            let len = (end - self.written).min(ZEROS.len() as u64);
            self.put(&ZEROS[..len as usize])?;
        }
        Ok(())
    }
}

impl<W: Write> Output for StreamOutput<W> {
    type Made = ();

    fn unit(&self) -> u64 {
        BLOCK as u64
    }

    fn write(&mut self, piece: Piece<'_>) -> Result<()> {
        self.zeros_to(piece.start)?;
        self.put(piece.inside())
    }

    fn finish(&mut self, size: Sector) -> Result<()> {
        self.zeros_to(size.bytes())?;
        self.stream.flush().context(&self.path, "write")
    }
}
