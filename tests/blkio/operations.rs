//! A disk is changed in every way that there is, in a loop, while two queues write to it; it and
//! each of its snapshots are what the model says all the while, and after the death of the daemon
//! amid a change.
//!
//! A snapshot is what was acknowledged at one moment: so it holds what was completed before it
//! was asked for, and nothing that began after the answer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Instant;
use std::{env, fs, thread, time::Duration};

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng};
use serde_json::{Value, json};

use super::*;
use crate::client::Lane;
use crate::common::img::{LEAKS, names_in, ploop_img};
use crate::common::qmp::Qmp;
use crate::model::Picture;

const LANES: usize = 2;

/// Of the disk at first, of which the models know, and at last, in MiB.
const SMALLEST: u64 = 8;
const LARGEST: u64 = 256;

const MOST_SNAPSHOTS: usize = 6;

/// Changes in one life of the daemon, and lives, unless it is said how long it is to go on.
const CHANGES: u32 = 9;
const LIVES: u64 = 2;

/// The same where that is said: a process makes 126 snapshots at most.
const CHANGES_OF_LONG_LIFE: u32 = 120;

/// A job may take so long: tests run beside each other.
const PATIENCE: Duration = Duration::from_secs(120);

struct Shot {
    guid: String,
    /// One of each lane.
    pictures: Vec<Picture>,
}

/// What a lane is to do between two requests.
type Errand = Box<dyn FnOnce(&mut Model) + Send>;

/// The lanes, under load.
struct Lanes {
    errands: Vec<Sender<Errand>>,
}

impl Lanes {
    fn each<T: Send + 'static>(&self, what: fn(&mut Model) -> T) -> Vec<T> {
        let answers = self.errands.iter().map(|lane| {
            let (tell, answer) = channel();
            let errand = Box::new(move |model: &mut Model| {
                let _ = tell.send(what(model));
            });
            lane.send(errand).expect("the lane goes on");
            answer
        });
        let answers: Vec<_> = answers.collect();
        let answers = answers.iter().map(|answer| answer.recv());
        answers.collect::<Result<_, _>>().expect("the lanes go on")
    }
}

/// Until nobody has any more errands, or the daemon is dead.
fn keep_busy(lane: &mut Lane, model: &mut Model, errands: &Receiver<Errand>, is_dead: &AtomicBool) {
    loop {
        match errands.try_recv() {
            Ok(errand) => errand(model),
            Err(TryRecvError::Disconnected) if !is_dead.load(Ordering::Acquire) => break,
            Err(_) => {}
        }
        while model.in_flight() < DEPTH {
            model.start(lane);
        }
        // Or else nothing that has ended is waiting to be seen.
        let was_dead = is_dead.load(Ordering::Acquire);
        match lane.wait_for(1, Duration::from_millis(200)) {
            Some(ended) => {
                for (tag, result) in ended {
                    assert_eq!(result, 0, "request {tag} failed");
                    model.ended(lane, tag);
                }
            }
            None if was_dead => return,
            None => {}
        }
    }
    model.finish(lane);
}

struct Life {
    rig: Rig,
    shots: Vec<Shot>,
    models: Vec<Model>,
    rng: SmallRng,
    size: u64,
    /// How often each was done.
    done: [u64; 6],
}

impl Life {
    fn new(cluster: &str, seed: u64) -> Self {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let rig = Rig {
            image: folder.path().join("bundle"),
            socket: folder.path().join("socket"),
            folder,
        };
        let (path, size) = (rig.image.to_str().unwrap(), format!("{SMALLEST}M"));
        ploop_img(["create", "--cluster-size", cluster, path, &size]).ok();
        Self {
            rig,
            shots: Vec::new(),
            models: models(LANES, SMALLEST * MIB, seed),
            rng: SmallRng::seed_from_u64(seed),
            size: SMALLEST * MIB,
            done: [0; 6],
        }
    }

    /// Serves the disk, which is what it is to be, and changes it so many times; then the daemon
    /// ends, or is killed amid a job.
    fn live(&mut self, changes: u32, is_killed: bool) {
        let control = self.rig.folder.path().join("control");
        let _ = fs::remove_file(&control);
        let _ = fs::remove_file(&self.rig.socket);
        let option = format!("--control={}", control.display());
        let backend = self.rig.serve(&[&option]);
        let mut client = Client::connect(backend.socket(), LANES);
        assert_eq!(client.capacity, self.size);
        let found = read_back(&mut client, &mut self.models);
        let mut beyond = found[(SMALLEST * MIB) as usize..].chunks(SECTOR);
        assert!(beyond.all(|sector| sector == [0; SECTOR]));
        for model in &mut self.models {
            model.survived();
        }
        let mut qmp = Qmp::connect(&control);
        let is_dead = AtomicBool::new(false);
        let mut models = std::mem::take(&mut self.models);
        let mut backend = Some(backend);
        thread::scope(|scope| {
            let mut errands = Vec::new();
            for (lane, model) in client.lanes.iter_mut().zip(&mut models) {
                let (errand, todo) = channel();
                errands.push(errand);
                let is_dead = &is_dead;
                scope.spawn(move || keep_busy(lane, model, &todo, is_dead));
            }
            let lanes = Lanes { errands };
            for _ in 0..changes {
                self.change(&mut qmp, &lanes);
            }
            if is_killed {
                self.begin_job(&mut qmp);
                thread::sleep(Duration::from_micros(self.rng.random_range(0..60_000)));
                if let Some(backend) = backend.take() {
                    backend.kill();
                }
                is_dead.store(true, Ordering::Release);
            }
        });
        self.models = models;
        drop(client);
        match backend {
            Some(backend) => {
                drop(qmp);
                backend.stop();
                self.expect_all();
                self.expect_sound();
            }
            None => {
                for model in &mut self.models {
                    model.killed();
                }
                // Until it is served again nothing is known of the one that was being deleted.
                let left = self.listed();
                self.shots.retain(|shot| left.contains(&shot.guid));
                assert_eq!(left.len(), self.shots.len(), "{left:?}");
            }
        }
    }

    fn change(&mut self, qmp: &mut Qmp, lanes: &Lanes) {
        let choice = self.rng.random_range(0..10);
        let kind = match choice {
            _ if self.shots.len() < 2 => 0,
            0..3 if self.shots.len() < MOST_SNAPSHOTS => 0,
            0..5 => 1,
            5 => 2,
            6 => 3,
            7 if self.size < LARGEST * MIB => 4,
            _ => 5,
        };
        self.done[kind] += 1;
        match kind {
            0 => self.take(qmp, lanes),
            1 => {
                let index = self.rng.random_range(0..self.shots.len());
                let shot = self.shots.remove(index);
                end_job(qmp, "snapshot-delete", json!({ "guid": shot.guid }));
            }
            2 => {
                let from = self.rng.random_range(0..self.shots.len());
                let to = self.rng.random_range(from..=self.shots.len());
                let mut range = json!({ "from": self.shots[from].guid });
                if let Some(to) = self.shots.get(to) {
                    range["to"] = to.guid.as_str().into();
                }
                end_job(qmp, "snapshot-merge", range);
                self.shots.drain(from..to);
            }
            3 => end_job(qmp, "compact", json!({})),
            4 => {
                let by = self.rng.random_range(1..16) * MIB;
                qmp.ask("grow", json!({ "by": by }));
                self.size += by;
            }
            _ => {
                // The models are the lanes' meanwhile; whose sector is whose they all know.
                let judges = models(LANES, SMALLEST * MIB, 0);
                let shot = self.shots.choose(&mut self.rng).expect("there are two");
                self.expect(shot, &judges);
            }
        }
        assert_eq!(self.listed().len(), self.shots.len());
    }

    fn take(&mut self, qmp: &mut Qmp, lanes: &Lanes) {
        lanes.each(Model::begin_picture);
        let answer = qmp.ask("snapshot-create", json!({}));
        let pictures = lanes.each(Model::end_picture);
        let guid = answer["guid"].as_str().unwrap().to_owned();
        self.shots.push(Shot { guid, pictures });
    }

    /// One that goes on for a while.
    fn begin_job(&mut self, qmp: &mut Qmp) {
        let shot = self.shots.choose(&mut self.rng);
        let (what, mut arguments) = match (self.rng.random_range(0..3), shot) {
            (0, Some(shot)) => ("snapshot-merge", json!({ "from": shot.guid })),
            (1, Some(shot)) => ("snapshot-delete", json!({ "guid": shot.guid })),
            _ => ("compact", json!({})),
        };
        arguments["job-id"] = JOB.into();
        qmp.ask(what, arguments);
    }

    /// The names of the snapshots, by the descriptor.
    fn listed(&self) -> Vec<String> {
        let path = self.rig.image.to_str().unwrap();
        let list = ploop_img(["snapshot", "list", "--output=json", path]).ok();
        let list: Vec<Value> = serde_json::from_str(&list).unwrap();
        let shots = list.iter().filter(|shot| shot["current"] != true);
        let guids = shots.map(|shot| shot["guid"].as_str().unwrap().to_owned());
        guids.collect()
    }

    /// Another process reads what is in the snapshot.
    fn expect(&self, shot: &Shot, models: &[Model]) {
        let copy = self.rig.folder.path().join("copy");
        let path = self.rig.image.to_str().unwrap();
        let to = copy.to_str().unwrap();
        let args = ["convert", "-O", "raw", "--snapshot", &shot.guid, path, to];
        ploop_img(args).ok();
        let bytes = fs::read(&copy).unwrap();
        fs::remove_file(&copy).unwrap();
        for (model, picture) in models.iter().zip(&shot.pictures) {
            model.check_picture(picture, &bytes);
        }
    }

    fn expect_all(&self) {
        let guids: Vec<_> = self.shots.iter().map(|shot| shot.guid.clone()).collect();
        assert_eq!(self.listed(), guids);
        for shot in &self.shots {
            self.expect(shot, &self.models);
        }
    }

    /// Every image by itself, and all of them together. Clusters that were on their way back
    /// when a snapshot was made are left in it.
    fn expect_sound(&self) {
        let path = &self.rig.image;
        let found = ploop_img(["check", "--output=json", path.to_str().unwrap()]);
        let report: Value = serde_json::from_str(&found.stdout).unwrap();
        assert_eq!(report["corruptions"], 0, "{found:?}");
        assert!(matches!(found.code, Some(0 | LEAKS)), "{found:?}");
        let names = names_in(path).into_iter();
        let images: Vec<_> = names.filter(|name| name.contains(".hds")).collect();
        assert_eq!(images.len(), self.shots.len() + 1, "{images:?}");
        if require_tool("qemu-img") {
            images
                .iter()
                .for_each(|image| qemu_img_check(&path.join(image)));
        }
    }
}

const JOB: &str = "job";

fn end_job(qmp: &mut Qmp, what: &str, mut arguments: Value) {
    arguments["job-id"] = JOB.into();
    arguments["auto-dismiss"] = false.into();
    qmp.ask(what, arguments);
    let start = Instant::now();
    let job = loop {
        let job = qmp.ask("query-jobs", json!({}))[0].clone();
        if job["status"] == "concluded" {
            break job;
        }
        assert!(start.elapsed() < PATIENCE, "{job}");
        thread::sleep(Duration::from_millis(5));
    };
    assert!(job["error"].is_null(), "{what}: {job}");
    qmp.ask("job-dismiss", json!({ "id": JOB }));
}

/// `PLOOP_OPERATIONS_SECONDS=N` has it go on for so long, `PLOOP_OPERATIONS_SEED=N` do other
/// things.
fn number(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    Some(value.parse().expect("a number"))
}

#[test]
fn a_disk_that_is_changed_in_every_way_is_true_to_the_model_with_its_snapshots() {
    let seed = number("PLOOP_OPERATIONS_SEED").unwrap_or(31);
    let time = number("PLOOP_OPERATIONS_SECONDS").map(Duration::from_secs);
    let mut life = Life::new("32K", seed);
    let start = Instant::now();
    let changes = time.map_or(CHANGES, |_| CHANGES_OF_LONG_LIFE);
    for number in 0.. {
        let is_over = time.map_or(number == LIVES, |time| start.elapsed() > time);
        let is_killed = !is_over && number % 2 == 1;
        life.live(changes, is_killed);
        eprintln!(
            "{} s, life {number}: {:?} snapshots, deletions, merges, compactions, growths, looks",
            start.elapsed().as_secs(),
            life.done
        );
        if is_over {
            break;
        }
    }
    assert!(life.done.iter().all(|count| *count > 0), "{:?}", life.done);
}
