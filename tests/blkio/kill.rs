//! The daemon killed at random moments under load. A kill takes away what is in the
//! daemon's memory, above all mappings that are not written yet; power cuts take more:
//! see `power_cut`.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use crate::client::{Client, DEPTH, Lane};
use crate::common::img::expect_no_corruption;
use crate::model::Model;
use crate::write_through::Relay;
use crate::{Rig, expect_image, models, read_back};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// How often the daemon is killed.
const KILLS: u64 = 50;

/// The longest load before a kill.
const LOAD_MS: u64 = 300;

const LANES: usize = 4;

/// What is varied from one life of the daemon to the next.
const OPTIONS: [&[&str]; 6] = [
    &[],
    &["--cache", "writeback"],
    &["--writeback-delay", "0"],
    &["--aio", "psync"],
    &["--runners", "1", "--writeback-delay", "5"],
    &["--cache", "writeback", "--aio", "psync"],
];

/// One image, whose daemon is killed again and again.
struct Killed {
    rig: Rig,
    models: Vec<Model>,
    rng: SmallRng,
    /// Sectors that a completed change had reached and a kill could take it from.
    at_risk: usize,
    /// Kills that came while requests were in flight.
    in_flight: u64,
}

impl Killed {
    fn new(cluster: &str, seed: u64) -> Self {
        let rig = Rig::ploop_img("16M", cluster);
        Self {
            models: models(LANES, 16 << 20, seed),
            rng: SmallRng::seed_from_u64(seed),
            rig,
            at_risk: 0,
            in_flight: 0,
        }
    }

    /// One life of the daemon: it opens what the one before has left, everything is
    /// as it should be, and it goes on under load until it is killed.
    fn live(&mut self, options: &[&str], write_through: bool) {
        let load_ms = self.rng.random_range(0..LOAD_MS);
        eprintln!("{options:?}, write-through: {write_through}, killed after {load_ms} ms");
        let backend = self.rig.serve(options);
        let relay = write_through.then(|| Relay::start(backend.socket()));
        let socket = relay.as_ref().map_or(backend.socket(), Relay::socket);
        let mut client = Client::connect(socket, LANES);
        read_back(&mut client, &mut self.models);
        for model in &mut self.models {
            model.survived();
            model.set_write_through(write_through);
        }
        load_and_kill(&mut client, &mut self.models, load_ms, || backend.kill());
        drop(client);
        drop(relay);
        // What a killed daemon leaves, the next one replaces; but the test would
        // take it for the next one's.
        fs::remove_file(&self.rig.socket).unwrap();
        let in_flight = |model: &Model| model.in_flight() > 0;
        self.in_flight += u64::from(self.models.iter().any(in_flight));
        self.at_risk += self.models.iter_mut().map(Model::killed).sum::<usize>();
        expect_no_corruption(&self.rig.image, &self.rig.image);
    }

    /// A last life, which ends in order.
    fn close(mut self) {
        let backend = self.rig.serve(&[]);
        let mut client = Client::connect(backend.socket(), LANES);
        let bytes = read_back(&mut client, &mut self.models);
        drop(client);
        backend.stop();
        expect_image(&self.rig, &bytes);
    }
}

/// `kill` ends the daemon in the midst of a load.
pub fn load_and_kill(client: &mut Client, models: &mut [Model], load_ms: u64, kill: impl FnOnce()) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for (lane, model) in client.lanes.iter_mut().zip(models) {
            let over = &over;
            scope.spawn(move || load_until(lane, model, over));
        }
        thread::sleep(Duration::from_millis(load_ms));
        let _over = Over(&over);
        kill();
    });
}

/// Says that it is over, also when a test fails: or the load would go on for ever.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Goes on until nothing ends any more because it is over.
fn load_until(lane: &mut Lane, model: &mut Model, over: &AtomicBool) {
    loop {
        // Before it is looked what has ended.
        let is_over = over.load(Ordering::Acquire);
        while model.in_flight() < DEPTH {
            model.start(lane);
        }
        match lane.wait_for(1, Duration::from_millis(20)) {
            Some(ended) => {
                for (tag, result) in ended {
                    assert_eq!(result, 0, "request {tag} failed");
                    model.ended(lane, tag);
                }
            }
            None if is_over => return,
            None => (),
        }
    }
}

#[test]
fn a_kill_costs_nothing_that_was_flushed() {
    let seed = rand::random();
    // Shown if the test fails. The moments of the kills are the host's all the same.
    eprintln!("seed {seed:#x}");
    let mut killed = Killed::new("64K", seed);
    for kill in 0..KILLS {
        eprint!("kill {kill}: ");
        let options = OPTIONS[kill as usize % OPTIONS.len()];
        // In every third turn of the options, so that each is tried both ways.
        let write_through = (kill as usize / OPTIONS.len()) % 3 == 2;
        killed.live(options, write_through);
    }
    eprintln!("{} sectors at risk", killed.at_risk);
    // Or nothing was put to the test.
    assert!(killed.in_flight > KILLS / 2, "{} kills", killed.in_flight);
    assert!(killed.at_risk > 0);
    killed.close();
}
