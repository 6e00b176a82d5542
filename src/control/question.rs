//! What a control client has asked and another thread finds out: the main loop goes on
//! meanwhile, and whoever asks next does not wait for it.
//!
//! Knows threads and JSON. What is asked is for others to know.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use serde_json::Value;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Makes its descriptor readable when it is dropped.
pub(super) struct Ending(pub Arc<EventFd>);

impl Drop for Ending {
    fn drop(&mut self) {
        // It can only fail when the descriptor is readable anyway.
        let _ = self.0.write(1);
    }
}

/// One that waits for its answer. Its descriptor is readable when that is there.
pub(super) struct Question {
    is_over: Arc<EventFd>,
    answer: Receiver<Result<Value, String>>,
}

/// By which it is answered.
pub(super) struct Answerer {
    tell: SyncSender<Result<Value, String>>,
    /// Dropped last, whatever happens.
    _ending: Ending,
}

impl Question {
    /// # Errors
    /// When there are no more descriptors.
    pub fn new() -> io::Result<(Self, Answerer)> {
        let is_over = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let (tell, answer) = sync_channel(1);
        let answerer = Answerer {
            tell,
            _ending: Ending(Arc::clone(&is_over)),
        };
        Ok((Self { is_over, answer }, answerer))
    }

    /// The answer. Waits for it.
    ///
    /// # Errors
    /// In words.
    pub fn answer(self) -> Result<Value, String> {
        let gone = |_| Err("the thread that was to answer has failed; see the log".to_owned());
        self.answer.recv().unwrap_or_else(gone)
    }
}

impl Answerer {
    /// Answers.
    pub fn answer(self, answer: Result<Value, String>) {
        // Nobody may wait for it any more.
        let _ = self.tell.send(answer);
    }
}

impl AsRawFd for Question {
    fn as_raw_fd(&self) -> RawFd {
        self.is_over.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn it_is_over_when_it_is_answered_or_nobody_will() {
        let (question, answerer) = Question::new().unwrap();
        assert!(question.is_over.read().is_err());
        answerer.answer(Ok(json!(5)));
        assert_eq!(question.is_over.read().unwrap(), 1);
        assert_eq!(question.answer(), Ok(json!(5)));
        let (question, answerer) = Question::new().unwrap();
        drop(answerer);
        assert_eq!(question.is_over.read().unwrap(), 1);
        assert!(question.answer().unwrap_err().contains("has failed"));
        // Who has asked may have gone.
        let (question, answerer) = Question::new().unwrap();
        drop(question);
        answerer.answer(Ok(json!(5)));
    }
}
