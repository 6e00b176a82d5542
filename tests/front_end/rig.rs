//! A device in this process, on a disk that the test can hold up.

use std::{fmt, io, os::unix::net::UnixListener, sync::Arc, time::Duration};

use tempfile::TempDir;
use vhost_user_ploop::device::{
    BlockDevice, Connection, ConnectionError, NotSuspended, Parked, Queues, Serial, Suspended,
    ThrottleLimits,
};
use vhost_user_ploop::format::{ClusterSize, Header, Sector};
use vhost_user_ploop::ploop::{Chain, Engine, Level, Options, Running};
use vhost_user_ploop::served::{self, CallOff};
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

    /// Makes the disk larger while it is served to this front-end.
    pub fn grow(&self, served: &Served, size: Sector) -> Sector {
        let engine = self.running.as_ref().expect("it runs").engine();
        let grown = served::grow(engine, None, size, &CallOff::default());
        served.connection.as_ref().unwrap().config_changed();
        grown.expect("the disk can grow")
    }

    /// Lets limits hold, as they are written on the command line; none with an empty text.
    pub fn limit(&self, limits: &str) {
        let limits = match limits {
            "" => ThrottleLimits::default(),
            limits => limits.parse().unwrap(),
        };
        self.device.throttle().set(limits).unwrap();
    }

    /// A front-end with no more than a connection.
    pub fn connect(&self) -> (FrontEnd, Served) {
        let front_end = FrontEnd::connect(&self.folder.path().join("socket"));
        let (socket, _) = self.listener.accept().unwrap();
        let connection =
            Connection::start(Arc::clone(&self.device), socket).expect("a front-end can be served");
        (front_end, self.served(connection))
    }

    fn served(&self, connection: Connection) -> Served {
        Served {
            connection: Some(connection),
            disk: self.disk.clone(),
        }
    }

    /// Serves a front-end on that was left.
    pub fn resume(&self, suspended: Suspended) -> Result<Served, ConnectionError> {
        let resumed = Connection::resume(Arc::clone(&self.device), suspended)?;
        Ok(self.served(resumed.begin()))
    }

    /// Makes all ready to serve a front-end on, and does not.
    pub fn resume_and_drop(&self, suspended: Suspended) {
        let resumed = Connection::resume(Arc::clone(&self.device), suspended);
        drop(resumed.expect("it can be served on"));
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

/// A connection that was left, or one that could not be, and why.
pub type Suspension = Result<Suspended, (Served, io::Error)>;

impl Served {
    /// See [`Connection::suspend`]. The front-end must be there.
    pub fn suspend(mut self) -> Suspension {
        let connection = self.connection.take();
        match connection.expect("it is taken once").suspend() {
            Ok(suspended) => Ok(suspended.expect("the front-end is there")),
            Err(NotSuspended { connection, why }) => {
                self.connection = Some(connection);
                Err((self, why))
            }
        }
    }

    /// See [`Connection::stop`].
    pub fn stop(mut self, parked: Parked) {
        let connection = self.connection.take();
        connection.expect("it is taken once").stop(parked);
    }

    /// See [`Connection::config_changed`].
    pub fn config_changed(&self) {
        let connection = self.connection.as_ref();
        connection
            .expect("it is there until it is stopped")
            .config_changed();
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

impl fmt::Debug for Served {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a connection")
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
