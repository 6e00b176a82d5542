//! A disk in a folder of its own, and what the tests do with it.

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::common::backend::Backend;
use crate::common::img::{names_in, ploop_img, qemu_img_check, run};
use crate::qemu::{Guest, Image};

/// 1 MiB, in bytes.
pub const MIB: u64 = 1 << 20;

/// A folder with one disk, and the guest image to use it with.
pub struct Rig {
    guest: Image,
    folder: TempDir,
    /// The disk.
    pub disk: PathBuf,
}

impl Rig {
    /// Makes a disk of 1 GiB, a bare image; `None`, said aloud, if this machine
    /// can't run guests.
    pub fn new() -> Option<Self> {
        Self::with_disk("disk.hds")
    }

    /// The same with a bundle.
    pub fn with_bundle() -> Option<Self> {
        Self::with_disk("disk")
    }

    /// The same, which `make` makes: it is told of a folder for what it needs, and where.
    pub fn with_bundle_of(make: &dyn Fn(&Path, &Path)) -> Option<Self> {
        Self::with(|folder| {
            let disk = folder.join("disk");
            make(folder, &disk);
            disk
        })
    }

    /// The disk of [`Rig::new`] in another folder.
    pub fn on(folder: &Path) -> Option<Self> {
        Self::with(|_| {
            let disk = folder.join("disk.hds");
            create(&disk, "1G");
            disk
        })
    }

    /// That of [`Rig::with_bundle`] there.
    pub fn bundle_on(folder: &Path) -> Option<Self> {
        Self::with(|_| {
            let disk = folder.join("disk");
            create(&disk, "1G");
            disk
        })
    }

    fn with_disk(name: &str) -> Option<Self> {
        Self::with(|folder| {
            let disk = folder.join(name);
            create(&disk, "1G");
            disk
        })
    }

    /// With the disk that `make` makes.
    fn with(make: impl FnOnce(&Path) -> PathBuf) -> Option<Self> {
        let guest = Image::find()?;
        let folder = TempDir::new().expect("a folder can be made");
        let disk = make(folder.path());
        Some(Self {
            guest,
            folder,
            disk,
        })
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Serves the disk.
    pub fn serve(&self, options: &[&str]) -> Backend {
        Backend::start(&self.disk, &self.path("vhost.sock"), options)
    }

    /// A guest with no disk yet that runs `script`.
    pub fn guest(&self, script: &str) -> Guest<'_> {
        Guest::new(&self.guest, self.folder.path(), script)
    }

    /// The same that keeps its files in `folder`.
    pub fn guest_in<'a>(&'a self, folder: &'a Path, script: &str) -> Guest<'a> {
        Guest::new(&self.guest, folder, script)
    }

    /// Ends the back-end and looks at what it leaves.
    pub fn close(&self, backend: Backend) {
        backend.stop();
        check(&self.disk);
    }

    /// What the image file takes on the host, in bytes.
    pub fn space(&self) -> u64 {
        fs::metadata(&self.disk).expect("it is there").blocks() * 512
    }

    /// Waits until the image file takes `bytes` or less: space is given back
    /// after the guest has its answer.
    pub fn wait_for_space(&self, bytes: u64) {
        let start = Instant::now();
        while self.space() > bytes {
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "the image takes {} bytes, not the {bytes} that it should",
                self.space()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Whether the image as it is on the host now, with its in-use mark, has
    /// `pattern` in all of the 4 KiB at `offset`, read by another program.
    pub fn qemu_io_finds(&self, pattern: u8, offset: u64) -> bool {
        let copy = self.path("copy.hds");
        fs::copy(&self.disk, &copy).expect("the image can be copied");
        let read = format!("read -P {pattern} {offset} 4k");
        let args = ["-r", "-f", "parallels", "-c", &read].map(OsStr::new);
        let ran = run("qemu-io", args.into_iter().chain([copy.as_os_str()]));
        assert!(ran.stdout.contains("read 4096/4096"), "{ran:?}");
        ran.code == Some(0) && !ran.stdout.contains("Pattern verification failed")
    }
}

/// Makes a disk: a bare image or a bundle, as the name says.
pub fn create(disk: &Path, size: &str) {
    ploop_img(["create".as_ref(), disk.as_os_str(), size.as_ref()]).ok();
}

/// Asks both tools whether a disk is clean: all of a bundle's images.
pub fn check(disk: &Path) {
    ploop_img(["check".as_ref(), disk.as_os_str()]).ok();
    if disk.is_dir() {
        let names = names_in(disk);
        let images = names.iter().filter(|name| name.contains(".hds"));
        images.for_each(|name| qemu_img_check(&disk.join(name)));
    } else {
        qemu_img_check(disk);
    }
}
