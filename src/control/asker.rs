//! The other end of a control socket: a program that asks a running disk.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;

use super::reach::connect_in_time;

/// Longest line that is read, in bytes.
const MAX_LINE: u64 = 16 << 20;

/// Why nothing was heard.
#[derive(Debug, Error)]
pub enum AskError {
    /// Nobody listens there, most likely.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It has gone, or does not answer.
    #[error("the process that serves the disk does not answer: {0}")]
    Io(#[from] io::Error),
    /// It speaks another language.
    #[error("what listens there is not a control socket")]
    Odd,
    /// What has become of a job is not known.
    #[error("the job is no longer there, and how it has ended was not told")]
    JobGone,
    /// It does not know the command, and says so.
    #[error("{0}")]
    Unknown(String),
    /// It says why.
    #[error("{0}")]
    Refused(String),
}

/// A connection.
#[derive(Debug)]
pub struct Asker {
    socket: UnixStream,
    lines: BufReader<UnixStream>,
    /// See [`Self::PATIENCE`].
    patience: Duration,
    /// Of a job whose end shall not be missed.
    heeded: Option<Heeded>,
}

/// A job, and how it has ended, if it has.
#[derive(Debug)]
struct Heeded {
    id: String,
    end: Option<JobEnd>,
}

/// How a job has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobEnd {
    /// It has done all.
    Well,
    /// Somebody wanted that.
    Cancelled,
    /// Why, in words.
    Failed(String),
}

impl Asker {
    /// How long an answer may take.
    pub const PATIENCE: Duration = Duration::from_secs(10);

    /// Connects and introduces itself.
    ///
    /// # Errors
    /// See [`AskError`].
    pub fn connect(path: &Path) -> Result<Self, AskError> {
        Self::connect_within(path, Self::PATIENCE)
    }

    /// The same for who waits no longer than that for any answer.
    ///
    /// # Errors
    /// See [`AskError`].
    pub fn connect_within(path: &Path, patience: Duration) -> Result<Self, AskError> {
        let failed = |source: io::Error| match source.kind() {
            // Somebody listens.
            io::ErrorKind::TimedOut => AskError::Io(source),
            _ => AskError::Connect {
                path: path.to_owned(),
                source,
            },
        };
        let socket = connect_in_time(path, patience).map_err(failed)?;
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(patience))?;
        socket.set_write_timeout(Some(patience))?;
        let lines = BufReader::new(socket.try_clone()?);
        let mut asker = Self {
            socket,
            lines,
            patience,
            heeded: None,
        };
        if asker.hear()?["QMP"].is_null() {
            return Err(AskError::Odd);
        }
        asker.ask("qmp_capabilities")?;
        Ok(asker)
    }

    /// What a command without arguments returns.
    ///
    /// # Errors
    /// See [`AskError`].
    pub fn ask(&mut self, command: &str) -> Result<Value, AskError> {
        self.ask_with(command, json!({}))
    }

    /// What a command returns.
    ///
    /// # Errors
    /// See [`AskError`].
    pub fn ask_with(&mut self, command: &str, arguments: Value) -> Result<Value, AskError> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.socket.write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut line = self.hear()?;
            if !line["event"].is_null() {
                self.heed(&line);
                continue;
            }
            if let Some(desc) = line["error"]["desc"].as_str() {
                let desc = desc.to_owned();
                return Err(match line["error"]["class"].as_str() {
                    Some("CommandNotFound") => AskError::Unknown(desc),
                    _ => AskError::Refused(desc),
                });
            }
            return match line.get_mut("return") {
                Some(value) => Ok(value.take()),
                None => Err(AskError::Odd),
            };
        }
    }

    /// What a command returns that may take any time.
    ///
    /// # Errors
    /// See [`AskError`].
    pub fn ask_patiently(&mut self, command: &str, arguments: Value) -> Result<Value, AskError> {
        self.socket.set_read_timeout(None)?;
        let answer = self.ask_with(command, arguments);
        self.socket.set_read_timeout(Some(self.patience))?;
        answer
    }

    /// Remembers how this job ends from now on: others may dismiss it.
    pub fn heed_job(&mut self, id: &str) {
        let id = id.to_owned();
        self.heeded = Some(Heeded { id, end: None });
    }

    /// How that has ended, if it was told before the last answer.
    pub fn job_end(&self) -> Option<&JobEnd> {
        self.heeded.as_ref()?.end.as_ref()
    }

    fn heed(&mut self, event: &Value) {
        let Some(heeded) = &mut self.heeded else {
            return;
        };
        let data = &event["data"];
        if data["device"] != heeded.id {
            return;
        }
        heeded.end = match (event["event"].as_str(), data["error"].as_str()) {
            (Some("BLOCK_JOB_COMPLETED"), Some(why)) => Some(JobEnd::Failed(why.to_owned())),
            (Some("BLOCK_JOB_COMPLETED"), None) => Some(JobEnd::Well),
            (Some("BLOCK_JOB_CANCELLED"), _) => Some(JobEnd::Cancelled),
            _ => return,
        };
    }

    fn hear(&mut self) -> Result<Value, AskError> {
        let mut line = Vec::new();
        (&mut self.lines)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)?;
        if !line.ends_with(b"\n") {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        serde_json::from_slice(&line).map_err(|_| AskError::Odd)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};

    use super::*;

    #[test]
    fn nobody_waits_for_ever_for_a_process_that_accepts_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&listener, 0).unwrap();
        let _first = UnixStream::connect(&path).unwrap();
        let asked = Asker::connect_within(&path, Duration::from_millis(30));
        match asked.unwrap_err() {
            AskError::Io(error) => assert_eq!(error.kind(), io::ErrorKind::TimedOut),
            error => panic!("{error}"),
        }
    }

    #[test]
    fn the_end_of_a_job_is_not_missed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut asker = Asker {
            lines: BufReader::new(ours.try_clone().unwrap()),
            socket: ours,
            patience: Asker::PATIENCE,
            heeded: None,
        };
        let end = |event: &str, id: &str, error: Option<&str>| {
            let mut data = json!({ "device": id });
            if let Some(error) = error {
                data["error"] = error.into();
            }
            json!({ "event": event, "data": data })
        };
        let other = end("BLOCK_JOB_COMPLETED", "other", None);
        let told = [
            (other.clone(), None),
            (end("BLOCK_JOB_COMPLETED", "mine", None), Some(JobEnd::Well)),
            (other, Some(JobEnd::Well)),
            (
                end("BLOCK_JOB_COMPLETED", "mine", Some("no")),
                Some(JobEnd::Failed("no".to_owned())),
            ),
            (
                end("BLOCK_JOB_CANCELLED", "mine", None),
                Some(JobEnd::Cancelled),
            ),
        ];
        asker.heed_job("mine");
        for (event, expected) in told {
            let mut theirs = theirs.try_clone().unwrap();
            let teller = thread::spawn(move || {
                let answer = json!({ "return": [] });
                write!(theirs, "{event}\r\n{answer}\r\n").unwrap();
            });
            assert_eq!(asker.ask("query-jobs").unwrap(), json!([]));
            teller.join().unwrap();
            assert_eq!(asker.job_end(), expected.as_ref());
        }
    }
}
