//! A block device that logs every write to another one (the device mapper's
//! `log-writes`), by the kernel's own interface.

use std::fs::{self, File};
use std::mem::size_of;
use std::path::{Path, PathBuf};

use rustix::io;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// The interface's oldest version: all that is used here is in it.
const VERSION: [u32; 3] = [4, 0, 0];

/// Room for what follows a header: a table of one line, or a message.
const PAYLOAD: usize = 512;

/// `struct dm_ioctl`.
#[repr(C)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
}

/// What a request hands over.
#[repr(C)]
struct Request {
    header: Header,
    payload: [u8; PAYLOAD],
}

const fn number(command: u8) -> Opcode {
    opcode::read_write::<Header>(0xfd, command)
}

const DEV_CREATE: Opcode = number(3);
const DEV_REMOVE: Opcode = number(4);
/// Without the flag that says so, it does not suspend but resume.
const DEV_SUSPEND: Opcode = number(6);
const TABLE_LOAD: Opcode = number(9);
const TARGET_MSG: Opcode = number(14);

/// The device. It has to be removed for its log to be whole.
pub struct Device {
    control: File,
    minor: u64,
}

impl Device {
    /// Passes everything on to `device` and logs it on `log`.
    pub fn create(device: &Path, log: &Path) -> Self {
        let control = File::options()
            .read(true)
            .write(true)
            .open("/dev/mapper/control");
        let mut new = Self {
            control: control.expect("the kernel has a device mapper"),
            minor: 0,
        };
        let created = new.request::<DEV_CREATE>(0, &[]).expect("it can be made");
        // The upper bits lie above those of the major number.
        new.minor = created.dev & 0xff | created.dev >> 12 & 0xfff_ff00;
        let name = device.file_name().expect("a device has a name");
        let size = Path::new("/sys/class/block").join(name).join("size");
        let size = fs::read_to_string(size).expect("the device has a size");
        let sectors: u64 = size.trim().parse().expect("a size is a number");
        // `struct dm_target_spec` and its text.
        let mut table = Vec::new();
        table.extend(0_u64.to_ne_bytes());
        table.extend(sectors.to_ne_bytes());
        table.extend([0; 8]);
        table.extend(*b"log-writes\0\0\0\0\0\0");
        table.extend(format!("{} {}\0", device.display(), log.display()).bytes());
        new.request::<TABLE_LOAD>(1, &table)
            .expect("the kernel has log-writes");
        new.request::<DEV_SUSPEND>(0, &[]).expect("it can start");
        new
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        format!("/dev/dm-{}", self.minor).into()
    }

    /// Puts a name into the log: after all flushes that are over by now.
    pub fn mark(&self, name: &str) {
        // `struct dm_target_msg`: of the target at sector 0.
        let mut message = vec![0; 8];
        message.extend(format!("mark {name}\0").bytes());
        self.request::<TARGET_MSG>(0, &message)
            .expect("it takes marks");
    }

    /// Ends it, with all that it still has to log.
    pub fn remove(&self) {
        self.request::<DEV_REMOVE>(0, &[])
            .expect("nobody uses it any more");
    }

    fn request<const OPCODE: Opcode>(&self, targets: u32, payload: &[u8]) -> io::Result<Header> {
        let mut request = Request {
            header: Header {
                version: VERSION,
                data_size: size_of::<Request>() as u32,
                data_start: size_of::<Header>() as u32,
                target_count: targets,
                open_count: 0,
                flags: 0,
                event_nr: 0,
                padding: 0,
                dev: 0,
                name: [0; 128],
                uuid: [0; 129],
                data: [0; 7],
            },
            payload: [0; PAYLOAD],
        };
        request.header.name[..6].copy_from_slice(b"replay");
        request.payload[..payload.len()].copy_from_slice(payload);
        // SAFETY: the opcode is one of the device mapper's, which reads and writes as
        // many bytes as `data_size` says, and all of these are in `request`.
        let updater = unsafe { Updater::<OPCODE, Request>::new(&mut request) };
        // SAFETY: `updater` is for the requests of this file.
        unsafe { ioctl(&self.control, updater) }?;
        Ok(request.header)
    }
}
