//! Migrations that are cancelled or fail, at each stage that one goes through.

use std::io::{ErrorKind, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{CLOSED, Host, OPENED, PATIENCE, end_of};
use crate::qemu::Running;
use crate::rig::Rig;

/// When a migration comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// At once, before or after the first of the memory is sent.
    Setup,
    /// While memory is sent and the guest runs.
    Active,
    /// The guest stands still, and somebody else may do something to the disk.
    PreSwitchover,
    /// The last is being sent, while QEMU listens to nobody.
    Device,
}

impl Stage {
    pub const ALL: [Self; 4] = [Self::Setup, Self::Active, Self::PreSwitchover, Self::Device];

    const fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
        }
    }
}

/// How it comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Cancelled,
    /// The other side hangs up.
    Failed,
}

const TAKES: u8 = 0;
const HOLDS: u8 = 1;
const ENDS: u8 = 2;

/// Who listens where a guest is sent to, and takes what comes, though no guest goes on there.
struct Sink {
    order: Arc<AtomicU8>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    fn listen(path: &Path) -> Self {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).expect("a socket can be made");
        listener.set_nonblocking(true).unwrap();
        let order = Arc::new(AtomicU8::new(TAKES));
        let given = Arc::clone(&order);
        let thread = thread::spawn(move || Self::take(&listener, &given));
        Self {
            order,
            thread: Some(thread),
        }
    }

    fn take(listener: &UnixListener, order: &AtomicU8) {
        let mut source: Option<UnixStream> = None;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match (order.load(Ordering::SeqCst), &mut source) {
                (ENDS, _) => return,
                (HOLDS, _) => thread::sleep(Duration::from_millis(5)),
                (_, Some(socket)) => match socket.read(&mut buffer) {
                    Ok(0) => thread::sleep(Duration::from_millis(5)),
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    // The source has hung up.
                    Err(_) => thread::sleep(Duration::from_millis(5)),
                },
                (_, none) => match listener.accept() {
                    Ok((socket, _)) => {
                        let time = Some(Duration::from_millis(5));
                        socket.set_read_timeout(time).unwrap();
                        *none = Some(socket);
                    }
                    Err(_) => thread::sleep(Duration::from_millis(5)),
                },
            }
        }
    }

    /// Takes no more, and stays.
    fn hold(&self) {
        self.order.store(HOLDS, Ordering::SeqCst);
        // What it has begun to read may be taken still.
        thread::sleep(Duration::from_millis(20));
    }

    fn hang_up(&mut self) {
        self.order.store(ENDS, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.hang_up();
    }
}

/// Where the migration is, in QEMU's word.
fn stage_of(source: &Running) -> String {
    let said = source.migration();
    let line = said.lines().find(|line| line.contains("tatus: "));
    let word = line.and_then(|line| line.split("tatus: ").nth(1));
    word.unwrap_or_default().trim().to_owned()
}

fn wait_for_stage(source: &Running, stage: Stage) {
    let start = Instant::now();
    loop {
        let at = stage_of(source);
        if at == stage.name() {
            return;
        }
        let is_over = ["completed", "failed", "cancelled"].contains(&&*at);
        assert!(!is_over && start.elapsed() < PATIENCE, "{stage:?}: {at}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// The guest is to be migrated, and goes on where it is.
pub fn comes_to_nothing(rig: &Rig, guest: &Running, host: &Host, stage: Stage, end: End) {
    let path = host.folder.join("sink");
    let mut sink = Sink::listen(&path);
    let closed = host.has_said(CLOSED);
    let opened = host.has_said(OPENED);
    let bandwidth = match stage {
        Stage::Setup | Stage::Active => "1M",
        Stage::PreSwitchover | Stage::Device => "10G",
    };
    guest.command(&format!("migrate_set_parameter max-bandwidth {bandwidth}"));
    guest.command("migrate_set_capability pause-before-switchover on");
    guest.migrate(&path);
    if stage != Stage::Setup {
        let before_end = match stage {
            Stage::Device => Stage::PreSwitchover,
            stage => stage,
        };
        wait_for_stage(guest, before_end);
    }
    let stands_still = matches!(stage, Stage::PreSwitchover | Stage::Device);
    if stands_still {
        host.wait_to_say(CLOSED, closed + 1);
        // Anybody may have it.
        crate::rig::check(&rig.disk);
    }
    let go_on = "migrate_continue pre-switchover";
    match (stage, end) {
        (Stage::Device, End::Cancelled) => guest.tell(&[go_on, "migrate_cancel"]),
        (_, End::Cancelled) => guest.tell(&["migrate_cancel"]),
        (Stage::Device, End::Failed) => {
            sink.hold();
            guest.tell(&[go_on]);
            thread::sleep(Duration::from_millis(300));
            sink.hang_up();
        }
        (_, End::Failed) => {
            sink.hang_up();
            if stands_still {
                guest.tell(&[go_on]);
            }
        }
    }
    let said = end_of(guest);
    match end {
        // The command came too late, and nobody else has the guest.
        End::Cancelled if stage == Stage::Device && said.contains("completed") => guest.resume(),
        End::Cancelled => assert!(said.contains("cancelled"), "{stage:?}: {said}"),
        End::Failed => assert!(said.contains("failed"), "{stage:?}: {said}"),
    }
    eprintln!("{stage:?}, {end:?}: {}", stage_of(guest));
    let start = Instant::now();
    while !guest.runs() {
        assert!(start.elapsed() < PATIENCE, "{stage:?}: it stands still");
        thread::sleep(Duration::from_millis(20));
    }
    let times = usize::from(stands_still);
    host.wait_to_say(OPENED, opened + times);
    assert_eq!(host.has_said(CLOSED), closed + times, "{stage:?}");
    guest.command("migrate_set_capability pause-before-switchover off");
    guest.command("migrate_set_parameter max-bandwidth 10G");
    thread::sleep(Duration::from_millis(300));
}
