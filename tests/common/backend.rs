//! The daemon as a test sees it: a process, its socket and its log.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use super::sockets;

/// How long the daemon may take to open its socket or to end. Generous: the
/// tests run beside each other on small machines.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running `vhost-user-ploop`. Dropped without [`Backend::stop`], it is
/// killed.
pub struct Backend {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    /// The socket is made under another name: see [`sockets::is_listened_on_as_moved`].
    is_moved: bool,
}

impl Backend {
    /// Serves `image` on `socket` and returns once the socket is there. The log
    /// goes beside the socket. `options` follow on the command line.
    ///
    /// # Panics
    ///
    /// If the daemon ends or its socket does not appear in time.
    pub fn start<S: AsRef<OsStr>>(image: &Path, socket: &Path, options: &[S]) -> Self {
        let mut backend = Self::spawn(image, socket, options);
        backend.wait_for_socket();
        backend
    }

    /// The same below a limit of `prlimit(1)`.
    ///
    /// # Panics
    ///
    /// As [`Backend::start`].
    pub fn start_below(limit: &str, image: &Path, socket: &Path, options: &[String]) -> Self {
        let mut command = Command::new("prlimit");
        command.arg(limit);
        Self::start_by(command, image, socket, options)
    }

    /// The same by a program that runs the one which its last arguments name.
    ///
    /// # Panics
    ///
    /// As [`Backend::start`].
    pub fn start_by<S: AsRef<OsStr>>(
        mut command: Command,
        image: &Path,
        socket: &Path,
        options: &[S],
    ) -> Self {
        command.arg(env!("CARGO_BIN_EXE_vhost-user-ploop"));
        let mut backend = Self::spawn_as(command, image, socket, options);
        backend.wait_for_socket();
        backend
    }

    /// The same by a command that has more to it.
    ///
    /// # Panics
    ///
    /// As [`Backend::start`].
    pub fn start_as<S: AsRef<OsStr>>(
        command: Command,
        image: &Path,
        socket: &Path,
        options: &[S],
    ) -> Self {
        let mut backend = Self::spawn_as(command, image, socket, options);
        backend.wait_for_socket();
        backend
    }

    fn spawn<S: AsRef<OsStr>>(image: &Path, socket: &Path, options: &[S]) -> Self {
        let command = Command::new(env!("CARGO_BIN_EXE_vhost-user-ploop"));
        Self::spawn_as(command, image, socket, options)
    }

    fn spawn_as<S: AsRef<OsStr>>(
        mut command: Command,
        image: &Path,
        socket: &Path,
        options: &[S],
    ) -> Self {
        let log = socket.with_extension("log");
        let log_file = open_log(&log);
        command.arg("--socket-path").arg(socket);
        Self::spawn_logging(command, image, socket, log, log_file, options)
    }

    fn spawn_logging<S: AsRef<OsStr>>(
        mut command: Command,
        image: &Path,
        socket: &Path,
        log: PathBuf,
        log_file: File,
        options: &[S],
    ) -> Self {
        let child = command
            .arg("--blk-file")
            .arg(image)
            .args(options)
            .stdin(Stdio::null())
            .stdout(log_file.try_clone().expect("a descriptor can be copied"))
            .stderr(log_file)
            .spawn()
            .expect("the daemon can be started");
        Self {
            child,
            socket: socket.to_owned(),
            log,
            is_moved: options.iter().any(|option| {
                let option = option.as_ref().to_string_lossy();
                option.starts_with("--socket-")
            }),
        }
    }

    /// Starts a process that is to take over from this one, which listens on `upgrades`.
    /// Its log is the same.
    pub fn spawn_successor(&self, image: &Path, upgrades: &Path, options: &[&str]) -> Self {
        let command = Command::new(env!("CARGO_BIN_EXE_vhost-user-ploop"));
        self.spawn_successor_by(command, image, upgrades, options)
    }

    /// The same by what `command` starts, when it is given the daemon's arguments.
    pub fn spawn_successor_by(
        &self,
        mut command: Command,
        image: &Path,
        upgrades: &Path,
        options: &[&str],
    ) -> Self {
        command.arg("--take-over").arg(upgrades);
        let log_file = open_log(&self.log);
        let (socket, log) = (&self.socket, self.log.clone());
        Self::spawn_logging(command, image, socket, log, log_file, options)
    }

    /// The same, which succeeds: returns the other process, when this one has ended.
    ///
    /// # Panics
    ///
    /// If this one does not end with status 0, or the other one ends.
    pub fn taken_over(self, image: &Path, upgrades: &Path, options: &[&str]) -> Self {
        let command = Command::new(env!("CARGO_BIN_EXE_vhost-user-ploop"));
        self.taken_over_by(command, image, upgrades, options)
    }

    /// The same by what `command` starts, when it is given the daemon's arguments.
    ///
    /// # Panics
    ///
    /// As [`Backend::taken_over`].
    pub fn taken_over_by(
        self,
        command: Command,
        image: &Path,
        upgrades: &Path,
        options: &[&str],
    ) -> Self {
        let successor = self.spawn_successor_by(command, image, upgrades, options);
        self.gives_way_to(successor)
    }

    /// Waits until one that was [spawned](Self::spawn_successor) has taken over.
    ///
    /// # Panics
    ///
    /// As [`Backend::taken_over`].
    pub fn gives_way_to(mut self, mut successor: Self) -> Self {
        let status = self.wait();
        assert!(status.success(), "{status}:\n{}", self.log());
        let ended = successor.child.try_wait().expect("it is a child");
        assert_eq!(ended, None, "{}", self.log());
        successor
    }

    /// Waits until one that was [spawned](Self::spawn_successor) has taken over, or cannot.
    /// Returns which of the two serves, and whether it is that one.
    ///
    /// # Panics
    ///
    /// If none ends in time, or not as it should.
    pub fn settle_with(mut self, mut successor: Self) -> (Self, bool) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is a child") {
                assert!(status.success(), "{status}:\n{}", self.log());
                return (successor, true);
            }
            if let Some(status) = successor.child.try_wait().expect("it is a child") {
                assert_eq!(status.code(), Some(1), "{status}:\n{}", self.log());
                return (self, false);
            }
            assert!(start.elapsed() < PATIENCE, "{}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Asks the daemon to end after it has given everything away, and waits for it.
    ///
    /// # Panics
    ///
    /// If it does not end in time or not with status 0, or takes the socket with it.
    pub fn stop_leaving_socket(mut self) {
        self.signal(Signal::TERM);
        let status = self.wait();
        assert!(status.success(), "{status}:\n{}", self.log());
        assert!(self.socket.exists(), "{}", self.log());
    }

    /// Waits for the end of a daemon that somebody else has asked to end.
    ///
    /// # Panics
    ///
    /// If it does not end in time or not with status 0, or leaves its socket behind.
    pub fn ends(mut self) {
        let status = self.wait();
        let log = self.log();
        assert!(status.success(), "the daemon's {status}:\n{log}");
        assert!(!self.socket.exists(), "the socket was left behind:\n{log}");
    }

    /// Waits until the daemon ends by itself, for another one to be started. Gives its log.
    ///
    /// # Panics
    ///
    /// If it does not end in time, ends with another status, or leaves its socket behind.
    pub fn ends_to_be_started_anew(mut self) -> String {
        let status = self.wait();
        let log = self.log();
        assert_eq!(status.code(), Some(75), "the daemon's {status}:\n{log}");
        assert!(!log.contains("panicked at"), "the daemon panicked:\n{log}");
        assert!(!self.socket.exists(), "the socket was left behind:\n{log}");
        log
    }

    /// Asks a daemon to end that has lost its lock, unless it ends by itself to be started anew,
    /// and waits for it. Gives its log.
    ///
    /// # Panics
    ///
    /// If it does not end in time, or in another way.
    pub fn stop_after_loss(mut self) -> String {
        self.signal(Signal::TERM);
        let status = self.wait();
        let log = self.log();
        assert!(
            matches!(status.code(), Some(1 | 75)),
            "the daemon's {status}:\n{log}"
        );
        assert!(!log.contains("panicked at"), "the daemon panicked:\n{log}");
        log
    }

    /// Waits for the end of a process that is to fail.
    ///
    /// # Panics
    ///
    /// If it does not end in time, or not with status 1.
    pub fn fails(mut self) {
        let status = self.wait();
        assert_eq!(status.code(), Some(1), "{status}:\n{}", self.log());
    }

    fn wait_for_socket(&mut self) {
        let start = Instant::now();
        let is_listened_on = match self.is_moved {
            true => sockets::is_listened_on_as_moved,
            false => sockets::is_listened_on,
        };
        while !is_listened_on(&self.socket) {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                panic!("the daemon ended with {status}:\n{}", self.log());
            }
            assert!(
                start.elapsed() < PATIENCE,
                "no socket appeared:\n{}",
                self.log()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the daemon has said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until the daemon has said something: its log is written behind its back.
    ///
    /// # Panics
    ///
    /// If it does not say it in time.
    #[track_caller]
    pub fn expect_to_say(&self, what: &str) {
        let start = Instant::now();
        while !self.log().contains(what) {
            assert!(start.elapsed() < PATIENCE, "{what}?\n{}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Asks the daemon to end, as an operator would, and waits for it.
    ///
    /// # Panics
    ///
    /// If it does not end in time or not with status 0, panicked on the way, or
    /// leaves its socket behind.
    pub fn stop(mut self) {
        self.signal(Signal::TERM);
        let status = self.wait();
        let log = self.log();
        assert!(status.success(), "SIGTERM: the daemon's {status}:\n{log}");
        assert!(!log.contains("panicked at"), "the daemon panicked:\n{log}");
        assert!(!self.socket.exists(), "the socket was left behind:\n{log}");
    }

    /// Asks the daemon to end where it cannot end well, and waits for it. Gives its
    /// log.
    ///
    /// # Panics
    ///
    /// If it does not end in time, ends with status 0, or panicked on the way.
    pub fn stop_with_failure(mut self) -> String {
        self.signal(Signal::TERM);
        let status = self.wait();
        let log = self.log();
        assert_eq!(status.code(), Some(1), "the daemon's {status}:\n{log}");
        assert!(!log.contains("panicked at"), "the daemon panicked:\n{log}");
        log
    }

    /// The signal that the daemon dies from.
    ///
    /// # Panics
    ///
    /// If it ends otherwise, or not in time.
    pub fn wait_for_signal(mut self) -> i32 {
        let status = self.wait();
        status.signal().expect("a signal ends it")
    }

    /// That the daemon does not serve `image`. Returns its log.
    ///
    /// # Panics
    ///
    /// If its socket appears, or it panics.
    pub fn refuses<S: AsRef<OsStr>>(image: &Path, socket: &Path, options: &[S]) -> String {
        let mut backend = Self::spawn(image, socket, options);
        let status = backend.wait();
        let log = backend.log();
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(!socket.exists(), "{log}");
        log
    }

    /// Kills the daemon with no chance to clean up.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        self.wait();
    }

    /// The same, but it need not have gone yet: what it has asked the kernel for may
    /// have to end first. It runs no instruction of its own any more.
    pub fn kill_without_waiting(self) -> Corpse {
        self.signal(Signal::KILL);
        // No thread of its that another processor runs sees the signal later.
        thread::sleep(Duration::from_millis(5));
        Corpse(self)
    }

    /// Asks the daemon to end where it cannot end well, and waits until it runs no
    /// instruction of its own any more; what it has asked the kernel for may go on.
    ///
    /// # Panics
    ///
    /// If that takes longer than `time`.
    pub fn terminate(self, time: Duration) -> Corpse {
        let start = Instant::now();
        self.signal(Signal::TERM);
        while !self.is_defunct() {
            assert!(start.elapsed() < time, "it goes on:\n{}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
        Corpse(self)
    }

    /// Whether its first thread has ended, as all do when the process does.
    fn is_defunct(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid()));
        let stat = stat.expect("it has not been waited for");
        let (_, fields) = stat.rsplit_once(')').expect("the name ends");
        fields.trim_start().starts_with('Z')
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("a child can be signalled");
    }

    fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "the daemon does not end:\n{}",
                self.log()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn open_log(log: &Path) -> File {
    let options = File::options().create(true).append(true).open(log);
    options.expect("the log can be opened")
}

/// A daemon that has been killed. Dropped, it is waited for.
pub struct Corpse(Backend);

impl Corpse {
    /// What the daemon has said.
    pub fn log(&self) -> String {
        self.0.log()
    }
}

impl Drop for Corpse {
    fn drop(&mut self) {
        self.0.wait();
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log());
            eprintln!("its threads:\n{}", threads(self.child.id()).join("\n"));
        }
        // Fails if it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What each thread of a process waits for: its name, the kernel's function and the system
/// call with its arguments. Empty if it has ended.
fn threads(pid: u32) -> Vec<String> {
    let of = |task: &Path| {
        ["comm", "wchan", "syscall"]
            .map(|file| fs::read_to_string(task.join(file)).unwrap_or_default())
            .map(|text| text.trim().to_owned())
            .join(" ")
    };
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks.map(|task| of(&task.path())).collect()
}
