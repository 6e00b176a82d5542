//! The other end of a control socket: a program that asks a running disk.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;

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
        let failed = |source| AskError::Connect {
            path: path.to_owned(),
            source,
        };
        let socket = UnixStream::connect(path).map_err(failed)?;
        socket.set_read_timeout(Some(patience))?;
        socket.set_write_timeout(Some(patience))?;
        let lines = BufReader::new(socket.try_clone()?);
        let mut asker = Self {
            socket,
            lines,
            patience,
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
