//! The daemon as a test sees it: a process, its socket and its log.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// How long the daemon may take to open its socket or to end. Generous: the
/// tests run beside each other on small machines.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running `vhost-user-ploop`. Dropped without [`Backend::stop`], it is
/// killed.
pub struct Backend {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
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

    fn spawn<S: AsRef<OsStr>>(image: &Path, socket: &Path, options: &[S]) -> Self {
        let log = socket.with_extension("log");
        let log_file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .expect("the log can be opened");
        let child = Command::new(env!("CARGO_BIN_EXE_vhost-user-ploop"))
            .arg("--socket-path")
            .arg(socket)
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
        }
    }

    fn wait_for_socket(&mut self) {
        let start = Instant::now();
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

    fn signal(&self, signal: Signal) {
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

/// Whether connections to a socket are accepted: it is there a moment before.
fn is_listened_on(socket: &Path) -> bool {
    /// `__SO_ACCEPTCON`, as the kernel prints it.
    const LISTENS: &str = "00010000";
    let sockets = fs::read_to_string("/proc/net/unix").expect("the kernel lists its sockets");
    // It may have been made under another name, through a descriptor of its folder, and
    // be moved into its place when it listens.
    let is_it = |line: &str| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let path = fields.get(7).map(Path::new);
        let is_here = path.is_some_and(|path| path == socket || path.starts_with("/proc/self/fd"));
        fields.get(3) == Some(&LISTENS) && is_here
    };
    socket.exists() && sockets.lines().any(is_it)
}

/// A daemon that has been killed. Dropped, it is waited for.
pub struct Corpse(Backend);

impl Drop for Corpse {
    fn drop(&mut self) {
        self.0.wait();
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log());
        }
        // Fails if it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
