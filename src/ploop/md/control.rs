//! What is asked of the whole image: suspend, resume, barriers, hand-over, a new top, close.
//!
//! One thing at a time, in the order in which it was asked for. Each goes through the same
//! stages: what began before ends, a flush, and then what is its own, which is elsewhere.

use std::mem;
use std::sync::atomic::Ordering;

use super::grow::Growing;
use super::{MdOp, MdWriter, Waiter};
use crate::ploop::EngineError;
use crate::ploop::control::{Control, Outcome};
use crate::ploop::rule::{self, Rule};
use crate::storage::Disk;

/// A control operation under way.
pub(super) struct ControlJob {
    pub what: Control,
    pub outcome: Outcome,
    pub stage: ControlStage,
}

pub(super) enum ControlStage {
    Grace(u64),
    Flush,
    Flushed(Result<(), EngineError>),
}

impl<D: Disk> MdWriter<D> {
    pub(super) fn is_closing(&self) -> bool {
        self.closed
            || self.control.front().is_some_and(|job| {
                job.what.is_end() && matches!(job.stage, ControlStage::Flushed(_))
            })
    }

    /// Whether it is to be closed, or has been.
    pub(super) fn is_ending(&self) -> bool {
        self.is_closing() || (self.control.front()).is_some_and(|job| job.what.is_end())
    }

    /// Whether the file is to be changed by rounds alone: it is about to be somebody else's,
    /// or nobody's.
    pub(super) fn leaves_file_alone(&self) -> bool {
        let job = self.control.front();
        self.is_top_closed || job.is_some_and(|job| job.what.leaves_file_alone())
    }

    /// Whether anything but a round changes the file, which no sync of a round waits for.
    fn is_changing_the_file(&self) -> bool {
        let is_of_round = |op: &MdOp| matches!(op, MdOp::Pages(_) | MdOp::Sync);
        self.growing.is_some() || !self.ops.iter().all(|(_, op)| is_of_round(op))
    }

    pub(super) fn begin_control(&mut self, what: Control, outcome: Outcome) {
        if self.closed {
            return outcome.set(Err(EngineError::Stopped));
        }
        self.control.push_back(ControlJob {
            what,
            outcome,
            stage: ControlStage::Grace(0),
        });
        if self.control.len() == 1 {
            self.start_control();
        }
    }

    fn start_control(&mut self) {
        let what = self.control.front().map(|job| job.what);
        if what == Some(Control::CloseTop)
            && let Err(error) = self.check_may_close_top()
        {
            return self.end_control(Err(error));
        }
        let Some(job) = self.control.front_mut() else {
            return;
        };
        self.is_paused |= job.what == Control::Suspend;
        let holds = match job.what {
            Control::Suspend => true,
            what if what.is_end() => true,
            Control::CloseTop => rule::kept(Rule::HeldForNewTop),
            _ => false,
        };
        if holds {
            self.engine.set_suspended(true);
        }
        job.stage = ControlStage::Grace(self.engine.epochs.advance());
    }

    pub(super) fn step_control(&mut self) {
        // What ends after the sync of an image that is passed on, or is not the top any more, is
        // not as stable as its mark.
        let is_changing = self.leaves_file_alone() && self.is_changing_the_file();
        let may_change_top = self.may_change_top();
        let Some(job) = self.control.front_mut() else {
            return;
        };
        match job.stage {
            _ if job.what == Control::Resume => {
                self.is_paused = false;
                self.go_on(Ok(()));
            }
            _ if matches!(job.what, Control::SwitchTop | Control::KeepTop) => {
                if may_change_top {
                    let is_new = job.what == Control::SwitchTop;
                    self.end_hold(is_new);
                }
            }
            ControlStage::Grace(epoch) => {
                // In this order: a queue that has not seen the suspension yet may
                // dispatch a pio until it leaves its epoch.
                let awaits_io =
                    job.what != Control::Barrier || rule::kept(Rule::ReadsEndBeforeFileGoes);
                let is_quiet = (self.engine.epochs.all_reached(epoch) || !awaits_io)
                    && !is_changing
                    && (job.what == Control::Barrier
                        || (self.engine.dispatched.load(Ordering::Acquire) == 0
                            && !self.growing.as_ref().is_some_and(Growing::has_locked)));
                if is_quiet && job.what == Control::CloseTop {
                    if may_change_top {
                        self.flush_top();
                    }
                } else if is_quiet && job.what == (Control::HandOver { trims: false }) {
                    if may_change_top {
                        self.flush_in_haste();
                    }
                } else if is_quiet {
                    job.stage = ControlStage::Flush;
                    self.waiters.push(Waiter::Control);
                }
            }
            ControlStage::Flush => {}
            ControlStage::Flushed(Err(error)) if job.what.can_go_on() => {
                self.go_on(Err(error));
            }
            ControlStage::Flushed(Ok(())) if job.what == Control::CloseTop => {
                if !self.ops.is_empty() {
                    return;
                }
                match self.close_top() {
                    Ok(()) => self.end_control(Ok(())),
                    Err(error) => {
                        // Said before, if it went wrong.
                        let _ = self.keep_top();
                        self.go_on(Err(error));
                    }
                }
            }
            ControlStage::Flushed(_) if let Control::HandOver { trims } = job.what => {
                if self.ops.is_empty() {
                    self.hand_over(trims);
                }
            }
            ControlStage::Flushed(result) if matches!(job.what, Control::Close | Control::Pass) => {
                let is_passed = job.what == Control::Pass;
                // Holes being punched and space being added must be over before
                // the tail is cut, or somebody else has the file.
                if self.ops.is_empty() {
                    let result = result.and_then(|()| self.close_file(is_passed));
                    self.closed = true;
                    let job = self.control.pop_front();
                    self.dismiss();
                    // Last: who hears of it finds an engine that has ended.
                    if let Some(job) = job {
                        job.outcome.set(result);
                    }
                }
            }
            ControlStage::Flushed(result) => self.end_control(result),
        }
    }

    /// There is a new top, or the old one is kept.
    fn end_hold(&mut self, is_new: bool) {
        if !self.is_top_closed {
            return self.end_control(Err(EngineError::TopInUse));
        }
        let switched = is_new.then(|| self.switch_top());
        let result = match switched {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => self.keep_top().and(Err(error)),
            None => self.keep_top(),
        };
        self.go_on(result);
    }

    /// Requests are taken again, unless somebody else wants them held.
    pub(super) fn go_on(&mut self, result: Result<(), EngineError>) {
        if !self.is_paused && !self.is_top_closed {
            self.engine.end_suspension();
            let pios = self.space.take_all();
            self.try_again(pios);
        }
        self.end_control(result);
    }

    fn end_control(&mut self, result: Result<(), EngineError>) {
        if let Some(job) = self.control.pop_front() {
            job.outcome.set(result);
        }
        self.start_control();
    }

    /// Nothing that waits now will get what it waits for.
    pub(super) fn dismiss(&mut self) {
        self.fail_hopeless();
        for pio in self.space.take_all() {
            pio.home.complete(Err(EngineError::Stopped));
        }
        let mut waiters = mem::take(&mut self.waiters);
        let flushes = self.space.take_flushes();
        waiters.extend(flushes.into_iter().map(Waiter::Queue));
        self.answer(waiters, Err(EngineError::Stopped));
        for job in mem::take(&mut self.control) {
            job.outcome.set(Err(EngineError::Stopped));
        }
        self.fail_growth(EngineError::Stopped);
        self.engine.end_md();
    }
}
