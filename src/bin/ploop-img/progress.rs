//! A progress bar, and Ctrl-C.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vhost_user_ploop::image::Progress;

/// Shows how far a copy is: a bar on a terminal, lines elsewhere if asked for.
pub struct Bar {
    bar: ProgressBar,
    /// Prints a line for each so many percent; 0: none.
    line_percent: u64,
    total: AtomicU64,
    shown: AtomicU64,
    cancelled: Arc<AtomicBool>,
}

impl Bar {
    /// Also catches the signals that ask a program to end, so that what is half
    /// made can be removed.
    pub fn new(force: bool) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            None,
            if is_terminal {
                ProgressDrawTarget::stderr()
            } else {
                ProgressDrawTarget::hidden()
            },
        );
        let template = "{bar:40} {percent:>3}%  {bytes}/{total_bytes}  {bytes_per_sec}  {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            // The second one ends the program where it is: a sync may take long.
            // Without them it just ends, and may leave a passing file.
            let flag = || Arc::clone(&cancelled);
            let _ = signal_hook::flag::register_conditional_shutdown(signal, 1, flag());
            let _ = signal_hook::flag::register(signal, flag());
        }
        Self {
            bar,
            line_percent: if force && !is_terminal { 5 } else { 0 },
            total: AtomicU64::new(0),
            shown: AtomicU64::new(0),
            cancelled,
        }
    }
}

impl Progress for Bar {
    fn begin(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.bar.set_length(total);
        self.bar.tick();
    }

    fn done(&self, bytes: u64) {
        self.bar.set_position(bytes);
        if self.line_percent == 0 {
            return;
        }
        let total = self.total.load(Ordering::Relaxed).max(1);
        let percent = (u128::from(bytes) * 100 / u128::from(total)) as u64;
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
        self.bar.finish_and_clear();
    }
}
