//! Points at which a thread can be preempted while others run.
//!
//! A test that drives all threads of the engine by itself gives each its turn, and a
//! turn is not interrupted: what happens between two steps of one thread would never
//! be seen. So each thread says where it is ([`point`]), and a test can have others go
//! on there. Outside tests this is nothing.

#![cfg_attr(
    ploop_loom,
    allow(unused_imports, dead_code, reason = "the models have no hooks")
)]

#[cfg(test)]
pub(crate) use hooks::{Hook, each, once};

/// Here others may have run when this returns.
#[cfg(not(test))]
#[inline(always)]
pub(super) const fn point(_: &'static str) {}

/// Here others may have run when this returns.
#[cfg(test)]
pub(super) use hooks::point;

#[cfg(test)]
mod hooks {
    use std::cell::RefCell;
    use std::rc::Rc;

    type Others = Rc<dyn Fn(&'static str)>;

    thread_local! {
        static OTHERS: RefCell<Option<Others>> = const { RefCell::new(None) };
    }

    pub fn point(at: &'static str) {
        let others = OTHERS.with(|others| others.borrow().clone());
        if let Some(others) = others {
            others(at);
        }
    }

    /// For as long as it lives, others run at the points of this thread.
    #[must_use = "nobody is preempted any more when it is dropped"]
    pub(crate) struct Hook;

    impl Drop for Hook {
        fn drop(&mut self) {
            OTHERS.with(|others| others.borrow_mut().take());
        }
    }

    /// At each point, called by its name, this runs. It may come to points itself.
    pub(crate) fn each(others: impl Fn(&'static str) + 'static) -> Hook {
        OTHERS.with(|slot| *slot.borrow_mut() = Some(Rc::new(others)));
        Hook
    }

    /// The first time that anybody comes to this point, `others` runs.
    pub(crate) fn once(at: &'static str, others: impl FnOnce() + 'static) -> Hook {
        let others = RefCell::new(Some(others));
        each(move |here| {
            let due = if here == at { others.take() } else { None };
            if let Some(others) = due {
                others();
            }
        })
    }
}
