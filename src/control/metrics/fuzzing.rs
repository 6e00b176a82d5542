//! What the fuzz target reaches of it: one client and its socket, and what is read of the
//! bytes that it has sent. Built with `--cfg fuzzing` only.

use std::fmt;
use std::os::fd::OwnedFd;

use super::client::{self, Stay};
use super::http::{self, Format};

/// Most bytes of a question.
pub const MAX_HEAD: usize = http::MAX_HEAD;

/// One that asks.
pub struct Client(client::Client);

impl Client {
    /// One that has connected.
    pub fn new(socket: OwnedFd) -> Self {
        Self(client::Client::new(socket))
    }

    /// Does what can be done for it now, and says whether it stays. The page is asked for as
    /// OpenMetrics, or not.
    pub fn serve(&mut self, page: &dyn Fn(bool) -> Result<String, fmt::Error>) -> bool {
        let page = |format| page(format == Format::OpenMetrics);
        self.0.serve(&page) == Stay::Stays
    }
}

/// What is sent in answer to these bytes, unless more is waited for.
pub fn answer(bytes: &[u8], page: &dyn Fn(bool) -> Result<String, fmt::Error>) -> Option<Vec<u8>> {
    let question = http::read(bytes)?;
    let page = |format| page(format == Format::OpenMetrics);
    Some(http::answer(question, page))
}
