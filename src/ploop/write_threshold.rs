//! A place in the top's file: the first time that something behind it is used, somebody is
//! told, once.
//!
//! It is looked at where a cluster is given out, and nowhere else: to write again to what is
//! mapped costs nothing. It outlives engines, as one may follow another in a process.

use std::sync::Arc;

use super::sync::atomic::{AtomicU64, Ordering};
use crate::notices::{Notice, Notices};

/// See the module's text.
#[derive(Debug, Default)]
pub struct WriteThreshold {
    /// 0 is none.
    bytes: AtomicU64,
    notices: Option<Arc<Notices>>,
}

impl WriteThreshold {
    /// None yet. `notices` is where it is told of.
    pub fn new(notices: Arc<Notices>) -> Self {
        Self {
            bytes: AtomicU64::new(0),
            notices: Some(notices),
        }
    }

    /// In bytes from the start of the file; 0 if there is none, or it was told of.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Another one, or none. Who has set it looks how much of the file is used already: what
    /// was given out before is not looked at again. (SeqCst: of the two one sees the other.)
    pub fn set(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::SeqCst);
    }

    /// The file is used up to this byte.
    #[inline]
    pub(super) fn check(&self, end: u64) {
        let bytes = self.bytes.load(Ordering::SeqCst);
        if bytes != 0 && end > bytes {
            self.tell(bytes, end);
        }
    }

    #[cold]
    fn tell(&self, mut bytes: u64, end: u64) {
        while bytes != 0 && end > bytes {
            // Once, whoever else finds the same; if there is another one by now, that counts.
            let given_up =
                self.bytes
                    .compare_exchange(bytes, 0, Ordering::SeqCst, Ordering::SeqCst);
            match given_up {
                Ok(_) => {
                    if let Some(notices) = &self.notices {
                        notices.post(Notice::WriteThreshold {
                            threshold: bytes,
                            exceeded_by: end - bytes,
                        });
                    }
                    return;
                }
                Err(now) => bytes = now,
            }
        }
    }
}

#[cfg(all(test, not(ploop_loom)))]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_of_once_and_only_behind_it() {
        let notices = Arc::new(Notices::new().unwrap());
        let threshold = WriteThreshold::new(Arc::clone(&notices));
        threshold.check(u64::MAX);
        threshold.set(4096);
        threshold.check(4096);
        assert_eq!((threshold.bytes(), notices.take()), (4096, vec![]));
        threshold.check(4097);
        threshold.check(5000);
        let told = Notice::WriteThreshold {
            threshold: 4096,
            exceeded_by: 1,
        };
        assert_eq!((threshold.bytes(), notices.take()), (0, vec![told]));
        threshold.set(u64::MAX);
        threshold.check(u64::MAX);
        threshold.set(0);
        threshold.check(u64::MAX);
        assert_eq!(notices.take(), []);
    }
}
