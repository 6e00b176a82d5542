//! What is said on standard error: errors, and what the library logs.

use std::fmt::Display;

use log::{LevelFilter, Log, Metadata, Record};
use vhost_user_ploop::printable::Printable;

/// A line, with the program's name in front.
pub fn say(text: impl Display) {
    eprintln!("ploop-img: {}", Printable(text));
}

/// From now on, what the library does beyond what it was asked for is said.
pub fn start() {
    // It fails only if there is a log already.
    if log::set_logger(&Notes).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

struct Notes;

impl Log for Notes {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Not what libraries below ours have to say.
        metadata.level() <= log::Level::Info && metadata.target().starts_with("vhost_user_ploop")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            say(record.args());
        }
    }

    fn flush(&self) {}
}
