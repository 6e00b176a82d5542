//! A device in this process, on a disk that the test can hold up.

use std::{os::unix::net::UnixListener, sync::Arc, time::Duration};

use tempfile::TempDir;
use vhost_user_ploop::device::{BlockDevice, Connection, Parked, Queues, Serial};
use vhost_user_ploop::format::{ClusterSize, Header, Sector};
use vhost_user_ploop::ploop::{Chain, Engine, Level, Options, Running};
use vhost_user_ploop::storage::{Disk, FileId};

use crate::front_end::{FrontEnd, QUEUES, is_readable};
use crate::held::HeldDisk;

/// Of the disk that tests use.
pub const DISK_SIZE: Sector = Sector(64 << 11);

/// The serial number.
pub const SERIAL: &str = "front-end test";

/// A device in this process, to be connected to.
pub struct Rig {
    pub disk: HeldDisk,
    device: Arc<BlockDevice<HeldDisk>>,
    running: Option<Running<HeldDisk>>,
    listener: UnixListener,
    folder: TempDir,
}

impl Rig {
    /// An empty disk.
    pub fn new() -> Self {
        Self::with_options(Options::default())
    }

    pub fn with_options(options: Options) -> Self {
        let disk = HeldDisk::new();
        make_image(&disk);
        let chain = Chain {
            levels: vec![Level::Ploop],
        };
        let opened = Engine::open(disk.clone(), &chain, options).expect("the image can be opened");
        let running = Running::start(opened).expect("the engine can be started");
        let serial: Serial = SERIAL.parse().unwrap();
        let queues = Queues::new(QUEUES, 128).unwrap();
        let device = BlockDevice::new(Arc::clone(running.engine()), serial, queues);
        let folder = TempDir::new().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        Self {
            disk,
            device: Arc::new(device),
            running: Some(running),
            listener,
            folder,
        }
    }

    /// A front-end with no more than a connection.
    pub fn connect(&self) -> (FrontEnd, Served) {
        let front_end = FrontEnd::connect(&self.folder.path().join("socket"));
        let (socket, _) = self.listener.accept().unwrap();
        let connection =
            Connection::start(Arc::clone(&self.device), socket).expect("a front-end can be served");
        let served = Served {
            connection: Some(connection),
            disk: self.disk.clone(),
        };
        (front_end, served)
    }

    /// A front-end whose rings run.
    pub fn start(&self) -> (FrontEnd, Served) {
        let (mut front_end, served) = self.connect();
        front_end.negotiate(u64::MAX);
        front_end.start_rings();
        (front_end, served)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let closed = self.running.take().map(Running::close);
        if !std::thread::panicking() {
            closed.unwrap().expect("the image can be closed");
        }
    }
}

/// A connection. It ends when this is dropped, even where a test has failed with
/// operations held.
pub struct Served {
    connection: Option<Connection>,
    disk: HeldDisk,
}

impl Served {
    /// See [`Connection::stop`].
    pub fn stop(mut self, parked: Parked) {
        let connection = self.connection.take();
        connection.expect("it is taken once").stop(parked);
    }

    /// Whether all that served the front-end is taken down within that time.
    pub fn has_ended_within(&self, time: Duration) -> bool {
        let connection = self
            .connection
            .as_ref()
            .expect("it is there until it is stopped");
        is_readable(&connection.ended_fd(), time)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if self.connection.is_some() {
            self.disk.let_go();
        }
    }
}

fn make_image(disk: &HeldDisk) {
    let header = Header::new(DISK_SIZE, ClusterSize::DEFAULT).unwrap();
    let data_start = header.geometry().data_start;
    disk.set_len(FileId(0), data_start).unwrap();
    disk.write_all_at(FileId(0), &header.to_bytes(), 0).unwrap();
}
