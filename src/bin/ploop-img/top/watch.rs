//! Asks the processes of all disks, each by a thread of its own: one that does not answer
//! keeps no other from being shown.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use vhost_user_ploop::control::{AskError, Asker};

use super::find::Wanted;
use crate::sample::{Report, Sample};

/// How often is looked for disks that have come.
const SEARCH: Duration = Duration::from_secs(2);

/// The first interval: nobody wants to wait for the rates of disks that he sees.
const FIRST: Duration = Duration::from_millis(300);

/// What a thread needs, which is little.
const STACK: usize = 256 << 10;

/// Something that was heard.
#[derive(Debug)]
pub struct News {
    /// Where the process of the disk listens.
    pub socket: PathBuf,
    pub what: What,
}

/// Of a disk.
#[derive(Debug)]
pub enum What {
    /// What it has done in an interval.
    Did(Box<Report>),
    /// Its process does not answer.
    Silent,
    /// Nobody listens there any more.
    Gone,
}

/// How long intervals are, which can be changed.
#[derive(Clone, Debug)]
pub struct Pace(Arc<AtomicU64>);

impl Pace {
    pub fn new(seconds: u64) -> Self {
        Self(Arc::new(AtomicU64::new(seconds)))
    }

    pub fn seconds(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub fn set(&self, seconds: u64) {
        self.0.store(seconds, Ordering::Relaxed);
    }

    fn pause(&self) -> Duration {
        Duration::from_secs(self.seconds())
    }
}

/// Who is being asked.
type Asked = Arc<Mutex<HashSet<PathBuf>>>;

/// Tells of all disks that are wanted, those that come later as well, as long as the program
/// runs. Returns at once.
///
/// # Errors
/// When there can be no more threads.
pub fn watch(mut wanted: Wanted, pace: &Pace, tell: &Sender<News>) -> std::io::Result<()> {
    let (pace, tell) = (pace.clone(), tell.clone());
    let asked = Asked::default();
    let search = move || loop {
        for socket in wanted.sockets() {
            if lock(&asked).insert(socket.clone()) {
                start(socket, FIRST, &pace, &tell, &asked);
            }
        }
        thread::sleep(SEARCH);
    };
    thread::Builder::new().name("search".into()).spawn(search)?;
    Ok(())
}

/// Tells of what each of these has done in one interval.
pub fn once(sockets: impl Iterator<Item = PathBuf>, pace: &Pace, tell: &Sender<News>) {
    let asked = Asked::default();
    for socket in sockets {
        start(socket, pace.pause(), pace, tell, &asked);
    }
}

fn lock(asked: &Asked) -> std::sync::MutexGuard<'_, HashSet<PathBuf>> {
    asked.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start(socket: PathBuf, first: Duration, pace: &Pace, tell: &Sender<News>, asked: &Asked) {
    let builder = thread::Builder::new().name("ask".into()).stack_size(STACK);
    let ask = {
        let (socket, pace) = (socket.clone(), pace.clone());
        let (tell, asked) = (tell.clone(), Arc::clone(asked));
        move || {
            ask_on_and_on(&socket, first, &pace, &tell);
            lock(&asked).remove(&socket);
        }
    };
    if builder.spawn(ask).is_err() {
        lock(asked).remove(&socket);
        let what = What::Silent;
        // Nobody may listen any more.
        let _ = tell.send(News { socket, what });
    }
}

/// Until nobody is there to be asked, or to be told.
fn ask_on_and_on(socket: &Path, first: Duration, pace: &Pace, tell: &Sender<News>) {
    let mut last = None;
    loop {
        let is_first = last.is_none();
        let what = match ask(socket, &mut last) {
            Ok(Some(report)) => Some(What::Did(Box::new(report))),
            Ok(None) => None,
            Err(AskError::Connect { .. }) => Some(What::Gone),
            Err(_) => {
                // Another process may have taken over; if it does not answer either, nobody
                // does.
                last = None;
                is_first.then_some(What::Silent)
            }
        };
        let is_gone = matches!(what, Some(What::Gone));
        if let Some(what) = what {
            let socket = socket.to_owned();
            if tell.send(News { socket, what }).is_err() || is_gone {
                return;
            }
        }
        thread::sleep(if is_first { first } else { pace.pause() });
    }
}

/// What has been done since the last time; `None` at the first.
fn ask(socket: &Path, last: &mut Option<(Asker, Sample)>) -> Result<Option<Report>, AskError> {
    match last {
        Some((asker, before)) => {
            let now = Sample::take(asker)?;
            let report = Report::of(before, &now);
            *before = now;
            Ok(Some(report))
        }
        None => {
            let mut asker = Asker::connect(socket)?;
            let sample = Sample::take(&mut asker)?;
            *last = Some((asker, sample));
            Ok(None)
        }
    }
}
