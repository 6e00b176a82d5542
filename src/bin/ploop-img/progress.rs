//! A progress bar, SIGUSR1 and Ctrl-C.

use std::fmt;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::{Handle, Signals};
use vhost_user_ploop::image::Progress;

use crate::args::Verbosity;

/// A program dies of SIGUSR1 that does nothing about it. Whoever asks how far it is
/// cannot know whether this is a command that can tell.
pub fn outlive_questions() {
    let _ = signal_hook::flag::register(SIGUSR1, Arc::new(AtomicBool::new(false)));
}

/// Shows how far a copy is: a bar on a terminal, lines elsewhere if asked for, and a
/// line at any time for SIGUSR1.
pub struct Bar {
    bar: ProgressBar,
    /// Prints a line for each so many percent; 0: none.
    line_percent: u64,
    position: Arc<Position>,
    shown: AtomicU64,
    cancelled: Arc<AtomicBool>,
    questions: Option<Handle>,
}

/// How far the operation is.
struct Position {
    done: AtomicU64,
    /// Or [`UNKNOWN`].
    total: AtomicU64,
}

/// Nobody knows how much there is to do: it has not begun, or it comes from a pipe.
const UNKNOWN: u64 = u64::MAX;

impl Bar {
    /// As asked for on the command line.
    pub fn of(verbosity: &Verbosity) -> Self {
        Self::new(verbosity.progress, verbosity.quiet)
    }

    /// Also catches the signals that ask a program to end, so that what is half
    /// made can be removed.
    pub fn new(force: bool, quiet: bool) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            None,
            if is_terminal && !quiet {
                ProgressDrawTarget::stderr()
            } else {
                ProgressDrawTarget::hidden()
            },
        );
        set_style(&bar, "{spinner}  {bytes}  {bytes_per_sec}");
        let cancelled = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // The second one ends the program where it is: a sync may take long.
            // Without them it just ends, and may leave a passing file.
            let flag = || Arc::clone(&cancelled);
            let _ = signal_hook::flag::register_conditional_shutdown(signal, 1, flag());
            let _ = signal_hook::flag::register(signal, flag());
        }
        let position = Arc::new(Position {
            done: AtomicU64::new(0),
            total: AtomicU64::new(UNKNOWN),
        });
        Self {
            questions: answer_questions(bar.clone(), Arc::clone(&position)),
            bar,
            line_percent: if force && !quiet && !is_terminal {
                5
            } else {
                0
            },
            position,
            shown: AtomicU64::new(0),
            cancelled,
        }
    }
}

/// Answers each SIGUSR1 at once, as `qemu-img` does, also while the operation waits
/// for the disk. Without a thread for that, there are no answers.
fn answer_questions(bar: ProgressBar, position: Arc<Position>) -> Option<Handle> {
    let mut signals = Signals::new([SIGUSR1]).ok()?;
    let handle = signals.handle();
    let answer = move || {
        for _ in &mut signals {
            // The bar is drawn anew below the line.
            bar.suspend(|| eprintln!("    {position}"));
        }
    };
    let thread = thread::Builder::new().name("progress".into());
    thread.spawn(answer).ok().map(|_| handle)
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = self.done.load(Ordering::Relaxed);
        match self.total.load(Ordering::Relaxed) {
            UNKNOWN => write!(f, "({done} bytes)"),
            total => {
                let percent = 100.0 * done as f64 / total.max(1) as f64;
                write!(f, "({percent:.2}/100%)")
            }
        }
    }
}

fn set_style(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}

impl Progress for Bar {
    fn begin(&self, total: u64) {
        self.position.total.store(total, Ordering::Relaxed);
        let template = "{bar:40} {percent:>3}%  {bytes}/{total_bytes}  {bytes_per_sec}  {eta}";
        set_style(&self.bar, template);
        self.bar.set_length(total);
        self.bar.tick();
    }

    fn done(&self, bytes: u64) {
        self.position.done.store(bytes, Ordering::Relaxed);
        self.bar.set_position(bytes);
        let total = self.position.total.load(Ordering::Relaxed);
        if self.line_percent == 0 || total == UNKNOWN {
            return;
        }
        let percent = (u128::from(bytes) * 100 / u128::from(total.max(1))) as u64;
        let step = percent / self.line_percent;
        if self.shown.fetch_max(step, Ordering::Relaxed) < step {
            eprintln!("{percent}%");
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(questions) = &self.questions {
            questions.close();
        }
        self.bar.finish_and_clear();
    }
}
