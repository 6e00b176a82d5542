//! A client of a control socket: one question after another.
//!
//! Knows QMP as far as both servers speak it. Must not know what is asked.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// How long an answer may take, and a server to listen.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection that may ask.
pub struct Qmp {
    stream: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects, once there is somebody to connect to.
    ///
    /// # Errors
    /// Nobody listens, or it is not a control socket.
    pub fn connect(path: &Path) -> Result<Self> {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if start.elapsed() < PATIENCE => thread::sleep(Duration::from_millis(1)),
                Err(error) => return Err(error).context("connecting to the control socket"),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
        };
        let greeting = qmp.hear()?;
        ensure!(greeting.get("QMP").is_some(), "no greeting: {greeting}");
        qmp.ask("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// What is returned to this. Events are not listened to.
    ///
    /// # Errors
    /// The command fails, or nobody answers.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{line}").context(command.to_owned())?;
        loop {
            let mut answer = self.hear().context(command.to_owned())?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
        }
    }

    fn hear(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line)? > 0, "hung up");
        Ok(serde_json::from_str(&line)?)
    }
}
