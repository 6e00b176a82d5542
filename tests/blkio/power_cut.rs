//! The power cut at random moments under load, below the daemon: a file system of our
//! own loses what was not synced. What was flushed must be there, whichever way the
//! daemon asks the kernel.

use std::path::{Path, PathBuf};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;

use crate::client::Client;
use crate::common::{
    backend::Backend,
    img::{expect_no_corruption, names_in, ploop_img},
};
use crate::frail_fs::FrailFs;
use crate::kill::load_and_kill;
use crate::model::Model;
use crate::write_through::Relay;
use crate::{MIB, REQUESTS, Rig, load, models, read_back};

const LANES: usize = 3;

const DISK: u64 = 24 * MIB;

/// The longest load before a cut.
const LOAD_MS: u64 = 200;

/// How often the power is cut in one test.
const CUTS: usize = 9;

/// One disk, whose host loses its power again and again.
struct Cut {
    fs: FrailFs,
    /// The file that is written to.
    top: String,
    /// What is served: that file, or the folder that it is in.
    is_bundle: bool,
    models: Vec<Model>,
    rng: SmallRng,
    /// Sectors that a completed change had reached and a cut could take it from.
    at_risk: usize,
    /// Cuts that could take back bytes which had been written.
    unsynced: usize,
}

impl Cut {
    /// A single image. `None`, which is said on the terminal, without FUSE.
    fn single(seed: u64) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let image = folder.path().join("disk.hds");
        create(&image);
        let models = models(LANES, DISK, seed);
        Self::new(folder.path(), "disk.hds", models, seed)
    }

    /// A disk with data under a snapshot. The same.
    fn chain(seed: u64) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let rig = Rig {
            image: folder.path().join("bundle"),
            socket: folder.path().join("socket"),
            folder,
        };
        create(&rig.image);
        let mut models = models(LANES, DISK, seed);
        let backend = rig.serve(&[]);
        let mut client = Client::connect(backend.socket(), LANES);
        load(&mut client, &mut models, REQUESTS);
        read_back(&mut client, &mut models);
        drop(client);
        backend.stop();
        for model in &mut models {
            model.survived();
        }
        ploop_img(["snapshot", "create", rig.image.to_str().unwrap()]).ok();
        let names = names_in(&rig.image);
        let top = names.iter().find(|name| name.starts_with("root.hds."));
        Self::new(&rig.image, top.expect("there is a delta"), models, seed)
    }

    fn new(files: &Path, top: &str, models: Vec<Model>, seed: u64) -> Option<Self> {
        Some(Self {
            fs: FrailFs::mount(files, seed)?,
            top: top.to_owned(),
            is_bundle: top != "disk.hds",
            models,
            rng: SmallRng::seed_from_u64(seed),
            at_risk: 0,
            unsynced: 0,
        })
    }

    fn served(&self) -> PathBuf {
        if self.is_bundle {
            self.fs.root().to_owned()
        } else {
            self.fs.path(&self.top)
        }
    }

    /// One life of the host: the daemon opens what the cut before has left, everything
    /// is as it should be, and it goes on under load until the next one.
    fn live(mut self, options: &[&str], write_through: bool) -> Self {
        let load_ms = self.rng.random_range(0..LOAD_MS);
        eprintln!("{options:?}, write-through: {write_through}, cut after {load_ms} ms");
        expect_no_corruption(&self.served(), &self.fs.path(&self.top));
        let place = TempDir::new().unwrap();
        let backend = Backend::start(&self.served(), &place.path().join("socket"), options);
        let relay = write_through.then(|| Relay::start(backend.socket()));
        let socket = relay.as_ref().map_or(backend.socket(), Relay::socket);
        let mut client = Client::connect(socket, LANES);
        read_back(&mut client, &mut self.models);
        for model in &mut self.models {
            model.survived();
            model.set_write_through(write_through);
        }
        let Self { fs, top, .. } = self;
        let (mut left, mut unsynced) = (None, false);
        load_and_kill(&mut client, &mut self.models, load_ms, || {
            left = Some(fs.cut_power(|fs| {
                unsynced = fs.has_unsynced_bytes(&top);
                backend.kill_without_waiting()
            }));
        });
        drop(client);
        drop(relay);
        Self {
            fs: left.expect("the power was cut"),
            top,
            unsynced: self.unsynced + usize::from(unsynced),
            at_risk: self.at_risk + self.models.iter_mut().map(Model::killed).sum::<usize>(),
            ..self
        }
    }

    /// [`CUTS`] lives, with and without write-through; more, on a host so busy that
    /// hardly anything was written in them.
    fn live_often(mut self, options: &[&str]) {
        for cut in 0..5 * CUTS {
            if cut >= CUTS && self.at_risk > 0 {
                break;
            }
            eprint!("cut {cut}: ");
            self = self.live(options, cut % 3 == 2);
        }
        eprintln!(
            "{} sectors at risk, {} cuts took bytes",
            self.at_risk, self.unsynced
        );
        // Or nothing was put to the test.
        assert!(self.at_risk > 0);
        let place = TempDir::new().unwrap();
        let backend = Backend::start::<&str>(&self.served(), &place.path().join("socket"), &[]);
        let mut client = Client::connect(backend.socket(), LANES);
        read_back(&mut client, &mut self.models);
        drop(client);
        backend.stop();
        expect_no_corruption(&self.served(), &self.fs.path(&self.top));
    }
}

fn create(image: &Path) {
    let (image, size) = (image.to_str().unwrap(), DISK.to_string());
    ploop_img(["create", image, &size, "--cluster-size", "64K"]).ok();
}

/// Cuts the power under single images and chains.
fn expect_flushed_data_to_survive(options: &[&str]) {
    let seed = rand::random();
    // Shown if the test fails. The moments of the cuts are the host's all the same.
    eprintln!("seed {seed:#x}");
    for make in [Cut::single, Cut::chain] {
        if let Some(cut) = make(seed) {
            cut.live_often(options);
        }
    }
}

#[test]
fn a_power_cut_takes_nothing_flushed_with_io_uring() {
    expect_flushed_data_to_survive(&["--aio", "io_uring"]);
}

#[test]
fn a_power_cut_takes_nothing_flushed_with_plain_calls() {
    expect_flushed_data_to_survive(&["--aio", "psync", "--writeback-delay", "5"]);
}

#[test]
fn a_power_cut_takes_nothing_flushed_behind_the_page_cache() {
    let options = [
        "--cache",
        "writeback",
        "--aio",
        "io_uring",
        "--writeback-delay",
        "0",
    ];
    expect_flushed_data_to_survive(&options);
}

#[test]
fn a_power_cut_takes_nothing_flushed_with_plain_calls_behind_the_page_cache() {
    expect_flushed_data_to_survive(&["--cache", "writeback", "--aio", "psync"]);
}
