//! A server process: started, watched, its use of the machine read, stopped.
//!
//! Knows processes. Must not know images or workloads.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};

/// How long a server may take to listen, and to stop.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often to look.
const TICK: Duration = Duration::from_micros(200);

/// How a server has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As it should; its image is closed.
    Clean,
    /// A peer has failed when all was measured. Its image may not be closed.
    Crash,
}

/// A running server. Killed when dropped, and by the kernel if the benchmark dies.
pub struct Server {
    child: Child,
    stderr: PathBuf,
    label: String,
    /// A bad end of it, when it is told to stop, is none of our business.
    is_peer: bool,
}

impl Server {
    /// Starts `command`; what it says goes to a file in `dir`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start(label: String, mut command: Command, dir: &Path) -> Result<Self> {
        let stderr = dir.join("server.log");
        let log = File::create(&stderr).context("creating the server's log")?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        tie(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("starting {label} ({:?})", command.get_program()))?;
        Ok(Self {
            child,
            stderr,
            label,
            is_peer: false,
        })
    }

    /// Says whether it is a peer's: one that fails while it stops has given its
    /// figures all the same, and that is only said.
    pub fn of_peer(mut self, is_peer: bool) -> Self {
        self.is_peer = is_peer;
        self
    }

    /// Calls `attempt` until it succeeds, as long as the server lives: for what
    /// works only once the server listens.
    ///
    /// # Errors
    /// The server ended, or the last error of `attempt` when the time is up.
    pub fn once_listening<T>(&mut self, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        loop {
            let error = match attempt() {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            self.check_alive()?;
            if start.elapsed() > PATIENCE {
                return Err(self.explain(error.context("the server does not listen")));
            }
            thread::sleep(TICK);
        }
    }

    /// # Errors
    /// The server has ended; with what it said last.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!(
                "{} ended by itself ({status})\n{}",
                self.label,
                self.last_words()
            );
        }
        Ok(())
    }

    /// Adds what the server said last to an error.
    pub fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        match self.check_alive() {
            Err(dead) => error.context(dead),
            Ok(()) => error.context(format!("{}\n{}", self.label, self.last_words())),
        }
    }

    /// Ends it with SIGTERM and waits.
    ///
    /// # Errors
    /// It was gone already, does not stop, or fails and is no peer.
    pub fn stop(mut self) -> Result<Ending> {
        self.check_alive()?;
        rustix::process::kill_process(self.pid()?, Signal::TERM)?;
        let status = self.wait()?;
        if status.success() {
            return Ok(Ending::Clean);
        }
        let what = format!(
            "{} failed to stop cleanly ({status})\n{}",
            self.label,
            self.last_words()
        );
        ensure!(self.is_peer, "{what}");
        eprintln!("warning: {what}");
        Ok(Ending::Crash)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// It does not, for half a minute.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(1));
        }
        bail!(
            "{} does not end for {PATIENCE:?}\n{}",
            self.label,
            self.last_words()
        )
    }

    fn pid(&self) -> Result<Pid> {
        Pid::from_raw(self.child.id() as i32).context("a process without an id")
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// CPU time that all its threads have used, those that ended and the kernel
    /// workers of its rings included.
    ///
    /// # Errors
    /// The process is gone.
    pub fn cpu_time(&self) -> Result<Duration> {
        cpu_time(self.child.id())
    }

    /// The most memory that it ever had resident, in bytes. That includes the
    /// client's buffers, which are mapped into it.
    ///
    /// # Errors
    /// The process is gone.
    pub fn peak_memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .context("reading the server's status")?;
        let kib = field(&status, "VmHWM:").context("no VmHWM: the server has ended")?;
        Ok(kib * 1024)
    }

    /// How often each of its threads has given up the CPU or lost it, so far.
    ///
    /// # Errors
    /// The process is gone.
    pub fn context_switches(&self) -> Result<ContextSwitches> {
        let mut by_thread = HashMap::new();
        for thread in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let thread = thread?;
            // A thread may end meanwhile.
            let Ok(status) = fs::read_to_string(thread.path().join("status")) else {
                continue;
            };
            let voluntary = field(&status, "voluntary_ctxt_switches:").unwrap_or(0);
            let involuntary = field(&status, "nonvoluntary_ctxt_switches:").unwrap_or(0);
            by_thread.insert(thread.file_name(), voluntary + involuntary);
        }
        Ok(ContextSwitches { by_thread })
    }

    fn last_words(&self) -> String {
        let log = fs::read(&self.stderr).unwrap_or_default();
        let tail = &log[log.len().saturating_sub(2000)..];
        if tail.is_empty() {
            return "it said nothing".into();
        }
        format!("it said:\n{}", String::from_utf8_lossy(tail))
    }
}

/// Has the kernel kill the program if the benchmark dies. Ctrl-C is for the benchmark
/// alone, which then stops the program.
pub fn tie(command: &mut Command) {
    command.process_group(0);
    // SAFETY: prctl is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            Ok(())
        });
    }
}

/// The context switches of the threads of a process at some time.
pub struct ContextSwitches {
    by_thread: HashMap<OsString, u64>,
}

impl ContextSwitches {
    /// How many more they are than at an earlier time. Those of a thread that has
    /// ended since are not known any more and not counted.
    pub fn since(&self, earlier: &Self) -> u64 {
        self.by_thread
            .iter()
            .map(|(thread, now)| now - earlier.by_thread.get(thread).copied().unwrap_or(0))
            .sum()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The number after `name` at the start of a line of a status file.
fn field(status: &str, name: &str) -> Option<u64> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// CPU time of a whole process, to the nanosecond (/proc/PID/stat counts the same
/// in units of 10 ms, too coarse for a run of a second).
///
/// # Errors
/// There is no such process.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let mut clock = 0;
    // SAFETY: writes one clockid_t.
    let error = unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &raw mut clock) };
    if error != 0 {
        return Err(std::io::Error::from_raw_os_error(error)).context("the server's CPU clock");
    }
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(std::io::Error::last_os_error()).context("the server's CPU time");
    }
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let status = "VmPeak:\t 10 kB\nVmHWM:\t 7 kB\nvoluntary_ctxt_switches:\t3\n";
        assert_eq!(field(status, "VmHWM:"), Some(7));
        assert_eq!(field(status, "voluntary_ctxt_switches:"), Some(3));
        assert_eq!(field(status, "VmSwap:"), None);
    }

    #[test]
    fn a_thread_that_has_ended_takes_nothing_away() {
        let at = |threads: &[(&str, u64)]| ContextSwitches {
            by_thread: threads
                .iter()
                .map(|&(thread, count)| (thread.into(), count))
                .collect(),
        };
        let before = at(&[("1", 10), ("2", 100)]);
        let after = at(&[("1", 15), ("3", 2)]);
        assert_eq!(after.since(&before), 7);
    }

    #[test]
    fn a_server_that_ends_is_reported_with_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such disk >&2; exit 3"]);
        let mut server = Server::start("it".into(), command, dir.path()).unwrap();
        let error = server
            .once_listening(|| -> Result<()> { bail!("not yet") })
            .unwrap_err();
        assert!(error.to_string().contains("no such disk"), "{error}");
    }

    #[test]
    fn a_bad_end_is_an_error_unless_it_is_a_peers() {
        for is_peer in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let ready = dir.path().join("ready");
            let mut command = Command::new("sh");
            let script = "trap 'kill -s KILL $$' TERM; : >\"$0\"; while :; do sleep 0.01; done";
            command.args(["-c", script]).arg(&ready);
            let server = Server::start("it".into(), command, dir.path()).unwrap();
            while !ready.exists() {
                thread::sleep(TICK);
            }
            let ending = server.of_peer(is_peer).stop();
            assert_eq!(ending.ok(), is_peer.then_some(Ending::Crash));
        }
    }

    #[test]
    fn cpu_time_is_that_of_the_process_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; sleep 60",
        ]);
        let server = Server::start("it".into(), command, dir.path()).unwrap();
        let start = Instant::now();
        while server.cpu_time().unwrap() < Duration::from_millis(1) {
            assert!(start.elapsed() < PATIENCE, "no CPU time is counted");
            thread::sleep(TICK);
        }
        assert!(server.peak_memory().unwrap() > 0);
    }
}
