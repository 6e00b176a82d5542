//! The log: lines on standard error, which never hold up who writes them.
//!
//! A thread of its own writes them. What reads standard error may be slow, or have
//! stopped reading: then lines wait in a queue, and when that is full they are lost
//! and counted, while the disk goes on being served. And no part of the program, nor of
//! its libraries, has more than so many lines in a while.
//!
//! Knows what a line looks like and where it goes. Must not know what is worth one.

mod limit;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::collections::VecDeque;
use std::env;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::mem;
use std::panic::{self, PanicHookInfo};
use std::process;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use env_filter::Filter;
use jiff::Timestamp;
use log::{Level, LevelFilter, Log, Metadata, Record};
use serde::Serialize;

use self::limit::Limit;
use crate::printable::{Printable, is_obeyed};
use crate::threads::{self, Role};

/// Lines that may wait to be written. With [`MAX_MESSAGE_LEN`] this bounds the memory
/// that they take: 4 MiB, or six times that if JSON has to escape all of it.
const MAX_LINES: usize = 1024;

/// Longest message, in bytes; the rest of a longer one is cut off.
const MAX_MESSAGE_LEN: usize = 4096;

/// How long the end of the program waits for lines to be written.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// What lines look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// As for the journal if standard error is connected to it, else text.
    Auto,
    /// For people: time, level, part of the program, message.
    Text,
    /// For systemd's journal, which adds the time: a priority and the message.
    Journal,
    /// An object on each line: timestamp, level, target, message.
    Json,
}

/// The program's log, started once. It is written to through the macros of `log`.
#[derive(Debug)]
pub struct Logging(Arc<Logger>);

impl Logging {
    /// Starts the log on standard error. Without `level`, RUST_LOG counts, and
    /// without that it is `info`.
    ///
    /// # Errors
    /// There is a logger already, or no thread can be started.
    pub fn start(level: Option<LevelFilter>, format: LogFormat) -> io::Result<Self> {
        let logger = Arc::new(Logger {
            filter: filter(level),
            limit: Limit::default(),
            format: format.resolved(),
            queue: Queue::default(),
        });
        threads::start(Role::Log, "log", {
            let logger = Arc::clone(&logger);
            move || logger.write_forever(&mut io::stderr())
        })?;
        log::set_boxed_logger(Box::new(Arc::clone(&logger))).map_err(io::Error::other)?;
        log::set_max_level(logger.filter.filter());
        Ok(Self(logger))
    }

    /// Says why the program ends, whatever the level of the log.
    pub fn say_failure(&self, why: &str) {
        let line = match self.0.format {
            LogFormat::Auto | LogFormat::Text => format!("vhost-user-ploop: {}", Printable(why)),
            format => format.line(Level::Error, module_path!(), why),
        };
        self.0.queue.push(line);
    }

    /// Ends the whole program when a thread panics: gone without it, the thread would
    /// leave its queue hanging for ever. The image survives this as it survives a
    /// power cut, and the front-end notices it.
    pub fn abort_on_panic(&self) {
        let logger = Arc::clone(&self.0);
        panic::set_hook(Box::new(move |info| {
            logger.report_panic(info);
            logger.queue.wait_until_written(LAST_WAIT);
            process::abort();
        }));
    }

    /// Waits until all lines are written, but not for ever.
    pub fn finish(&self) {
        self.0.queue.wait_until_written(LAST_WAIT);
    }
}

fn filter(level: Option<LevelFilter>) -> Filter {
    let mut builder = env_filter::Builder::new();
    match (level, env::var("RUST_LOG")) {
        (Some(level), _) => builder.filter_level(level),
        (None, Ok(spec)) => builder.parse(&spec),
        (None, Err(_)) => builder.filter_level(LevelFilter::Info),
    };
    builder.build()
}

#[derive(Debug)]
struct Logger {
    filter: Filter,
    limit: Limit,
    format: LogFormat,
    queue: Queue,
}

impl Logger {
    fn write_forever(&self, out: &mut impl Write) {
        loop {
            self.queue.write_next(out, |lost| {
                let text = format!("{lost} log lines were lost: nobody read them in time");
                self.format.line(Level::Warn, module_path!(), &text)
            });
        }
    }

    fn report_panic(&self, info: &PanicHookInfo<'_>) {
        let thread = thread::current();
        let name = thread.name().unwrap_or("?");
        let said = |text: &str| self.format.line(Level::Error, module_path!(), text);
        self.queue.push(said(&format!("thread '{name}' {info}")));
        // As RUST_BACKTRACE says.
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            for line in backtrace.to_string().lines() {
                self.queue.push(said(line));
            }
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.filter.matches(record) {
            return;
        }
        let (level, target) = (record.level(), record.target());
        if let Some(left_out) = self.limit.admit(level, target) {
            if left_out > 0 {
                let text =
                    format!("{left_out} lines of {target} were left out: too many at a time");
                self.queue
                    .push(self.format.line(Level::Warn, module_path!(), &text));
            }
            let message = record.args().to_string();
            let line = self.format.line(level, target, &message);
            self.queue.push(line);
        }
    }

    fn flush(&self) {
        self.queue.wait_until_written(LAST_WAIT);
    }
}

/// A line of [`LogFormat::Json`].
#[derive(Serialize)]
struct JsonLine<'a> {
    timestamp: String,
    level: &'a str,
    target: &'a str,
    message: &'a str,
}

impl LogFormat {
    fn resolved(self) -> Self {
        match self {
            Self::Auto if is_journal() => Self::Journal,
            Self::Auto => Self::Text,
            chosen => chosen,
        }
    }

    fn line(self, level: Level, target: &str, message: &str) -> String {
        let timestamp = || format!("{:.3}", Timestamp::now());
        let message = cut(message);
        match self {
            Self::Auto | Self::Text => {
                let (timestamp, message) = (timestamp(), Printable(message));
                format!("[{timestamp} {level:<5} {target}] {message}")
            }
            Self::Journal => format!("<{}>{}", priority(level), Printable(message)),
            Self::Json => {
                let line = JsonLine {
                    timestamp: timestamp(),
                    level: &level.as_str().to_lowercase(),
                    target,
                    message,
                };
                let text = serde_json::to_string(&line).unwrap_or_default();
                harmless_json(&text)
            }
        }
    }
}

/// The level as sd-daemon(3) numbers it.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// Whether standard error is the journal's stream: systemd.exec(5), JOURNAL_STREAM.
fn is_journal() -> bool {
    env::var("JOURNAL_STREAM").is_ok_and(|stream| {
        rustix::fs::fstat(io::stderr())
            .is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
    })
}

/// JSON without what a terminal obeys: serde escapes what JSON has to.
fn harmless_json(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_obeyed(c) {
            // None of them is beyond U+FFFF.
            let _ = write!(out, "\\u{:04x}", c as u32);
        } else {
            out.push(c);
        }
    }
    out
}

/// The beginning of a text, up to [`MAX_MESSAGE_LEN`].
fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_MESSAGE_LEN);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Lines on their way to the thread that writes them.
#[derive(Debug, Default)]
struct Queue {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    entries: VecDeque<Entry>,
    /// Lines that found no room since the last one that did.
    lost: u64,
    /// An entry is being written.
    is_writing: bool,
}

#[derive(Debug)]
enum Entry {
    Line(String),
    /// So many lines are missing here.
    Lost(u64),
}

impl Waiting {
    fn is_idle(&self) -> bool {
        self.is_empty() && !self.is_writing
    }

    fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.lost == 0
    }

    fn next(&mut self) -> Entry {
        let next = self.entries.pop_front();
        next.unwrap_or_else(|| Entry::Lost(mem::take(&mut self.lost)))
    }
}

impl Queue {
    /// Never held while anything is written.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line, or counts it as lost. Does not wait.
    fn push(&self, line: String) {
        let mut waiting = self.lock();
        if waiting.entries.len() >= MAX_LINES {
            waiting.lost += 1;
            return;
        }
        if waiting.lost > 0 {
            let lost = mem::take(&mut waiting.lost);
            waiting.entries.push_back(Entry::Lost(lost));
        }
        waiting.entries.push_back(Entry::Line(line));
        self.changed.notify_all();
    }

    /// Waits for an entry and writes it; `say_lost` makes a line of an
    /// [`Entry::Lost`].
    fn write_next(&self, out: &mut impl Write, say_lost: impl FnOnce(u64) -> String) {
        let none = |waiting: &mut Waiting| waiting.is_empty();
        let waited = self.changed.wait_while(self.lock(), none);
        let mut waiting = waited.unwrap_or_else(PoisonError::into_inner);
        let entry = waiting.next();
        waiting.is_writing = true;
        drop(waiting);
        let mut line = match entry {
            Entry::Line(line) => line,
            Entry::Lost(lost) => say_lost(lost),
        };
        line.push('\n');
        // There is nobody to tell that the log cannot be written.
        let _ = out.write_all(line.as_bytes());
        self.lock().is_writing = false;
        self.changed.notify_all();
    }

    fn wait_until_written(&self, at_most: Duration) {
        let busy = |waiting: &mut Waiting| !waiting.is_idle();
        let _ = self.changed.wait_timeout_while(self.lock(), at_most, busy);
    }
}

#[cfg(test)]
#[path = "logging/tests.rs"]
mod tests;
