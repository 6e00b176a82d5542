//! `top`: all disks that are being served on this host, live in the terminal.
//!
//! - `find`: which those are;
//! - `watch`: what they are doing;
//! - `disks`: in which order they are shown;
//! - `view`: what that looks like.

mod disks;
mod find;
mod view;
mod watch;

use std::collections::BTreeSet;
use std::env;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde::Serialize;
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

pub use disks::Column;

use self::disks::{Disk, Disks, Order};
use self::find::Wanted;
use self::watch::{News, Pace, What};
use crate::args::Output;
use crate::sample::Report;
use crate::show;

/// How often the picture is drawn while nothing is typed.
const TICK: Duration = Duration::from_millis(250);

/// How long one that is to be shown once may take longer than the interval.
const PATIENCE: Duration = Duration::from_secs(3);

/// How many lines a page is.
const PAGE: isize = 10;

/// The longest interval, in seconds.
pub const LONGEST: u64 = 3600;

/// What was asked for.
#[derive(Debug)]
pub struct Options {
    /// Disks, and folders with disks; none: all disks.
    pub paths: Vec<PathBuf>,
    /// Control sockets that cannot be found.
    pub controls: Vec<PathBuf>,
    pub sort: Column,
    pub is_reversed: bool,
    pub interval_seconds: u64,
    pub output: Output,
}

/// Shows them until somebody has seen enough, or once for programs.
///
/// # Errors
/// In words.
pub fn run(options: Options) -> Result<(), String> {
    let order = Order {
        by: options.sort,
        is_reversed: options.is_reversed,
    };
    if options.output == Output::Human {
        require_terminal()?;
    }
    let wanted = Wanted::new(options.paths, options.controls)?;
    let pace = Pace::new(options.interval_seconds);
    match options.output {
        Output::Human => live(wanted, pace, order),
        Output::Json => {
            once(wanted, &pace, order);
            Ok(())
        }
    }
}

fn require_terminal() -> Result<(), String> {
    let instead = "'--output json' shows what they do at present, 'stat --watch' one of them";
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        let what = "top needs a terminal, and standard input or output is none";
        return Err(format!("{what}; {instead}"));
    }
    match env::var("TERM").as_deref() {
        Err(_) | Ok("" | "dumb") => Err(format!(
            "top needs a terminal with a cursor that can be moved, which TERM does not name; {instead}"
        )),
        Ok(_) => Ok(()),
    }
}

/// A disk, for programs.
#[derive(Serialize)]
struct Shown<'a> {
    control: String,
    #[serde(flatten)]
    report: &'a Report,
}

/// What all of them do in one interval, as JSON.
fn once(mut wanted: Wanted, pace: &Pace, order: Order) {
    let sockets = wanted.sockets();
    let (tell, hear) = channel();
    watch::once(sockets.iter().cloned(), pace, &tell);
    let until = Instant::now() + Duration::from_secs(pace.seconds()) + PATIENCE;
    let (mut disks, silent) = hear_each(sockets, &hear, until);
    order.sort(&mut disks);
    let control = |socket: &PathBuf| socket.to_string_lossy().into_owned();
    let shown = disks.iter().map(|disk| {
        let shown = Shown {
            control: control(&disk.socket),
            report: &disk.report,
        };
        // It has string keys and finite numbers.
        serde_json::to_value(shown).unwrap_or_default()
    });
    let silent = silent.iter();
    let silent = silent.map(|it| json!({ "control": control(it), "status": "no answer" }));
    show::json(&Value::Array(shown.chain(silent).collect()));
}

/// What each of them does, and those that do not say so in time.
fn hear_each(
    mut sockets: BTreeSet<PathBuf>,
    hear: &Receiver<News>,
    until: Instant,
) -> (Vec<Disk>, BTreeSet<PathBuf>) {
    let mut disks = Vec::new();
    let mut silent = BTreeSet::new();
    while !sockets.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        let Ok(News { socket, what }) = hear.recv_timeout(left) else {
            break;
        };
        if !sockets.remove(&socket) {
            continue;
        }
        match what {
            What::Did(report) => {
                let now = Instant::now();
                let mut disk = Disk::new(socket, now);
                disk.hear(*report, now);
                disks.push(disk);
            }
            What::Silent => drop(silent.insert(socket)),
            // A dead process has left its socket.
            What::Gone => {}
        }
    }
    silent.extend(sockets);
    (disks, silent)
}

fn live(wanted: Wanted, pace: Pace, order: Order) -> Result<(), String> {
    // Notes would be written into the picture.
    log::set_max_level(log::LevelFilter::Off);
    let words = |error: io::Error| format!("cannot show disks live: {error}");
    let is_to_end = Arc::new(AtomicBool::new(false));
    end_by_signal(Arc::clone(&is_to_end)).map_err(words)?;
    let (tell, hear) = channel();
    watch::watch(wanted, &pace, &tell).map_err(words)?;
    let mut terminal = ratatui::try_init().map_err(words)?;
    let shown = show_live(&mut terminal, App::new(order, pace), &hear, &is_to_end);
    // What the terminal was before matters more than why.
    let restored = ratatui::try_restore();
    shown.and(restored).map_err(words)
}

/// Ends the program at a signal, as `q` does. Who waits for a key may not come to see it: a
/// terminal that has gone, or has sent half a key, keeps him for ever.
fn end_by_signal(is_to_end: Arc<AtomicBool>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGHUP, SIGINT])?;
    let wait = move || {
        if signals.forever().next().is_some() {
            is_to_end.store(true, Ordering::Relaxed);
            thread::sleep(2 * TICK);
            let _ = ratatui::try_restore();
            process::exit(0);
        }
    };
    thread::Builder::new().name("signals".into()).spawn(wait)?;
    Ok(())
}

fn show_live(
    terminal: &mut DefaultTerminal,
    mut app: App,
    hear: &Receiver<News>,
    is_to_end: &AtomicBool,
) -> io::Result<()> {
    while !is_to_end.load(Ordering::Relaxed) {
        for news in hear.try_iter() {
            app.hear(news);
        }
        let now = app.stopped_at.unwrap_or_else(Instant::now);
        terminal.draw(|frame| view::draw(frame, &app, now))?;
        if event::poll(TICK)?
            && let Event::Key(key) = event::read()?
            && app.obey(key) == Flow::Ends
        {
            break;
        }
    }
    Ok(())
}

/// Whether it goes on after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    GoesOn,
    Ends,
}

/// All that the picture is made of.
#[derive(Debug)]
struct App {
    disks: Disks,
    pace: Pace,
    shows_help: bool,
    /// Since when the picture stands still.
    stopped_at: Option<Instant>,
}

impl App {
    fn new(order: Order, pace: Pace) -> Self {
        Self {
            disks: Disks::new(order),
            pace,
            shows_help: false,
            stopped_at: None,
        }
    }

    fn hear(&mut self, news: News) {
        if self.stopped_at.is_none() {
            self.disks.hear(news, Instant::now());
        }
    }

    fn obey(&mut self, key: KeyEvent) -> Flow {
        if key.kind == KeyEventKind::Release {
            return Flow::GoesOn;
        }
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c' | 'd') if is_control => return Flow::Ends,
            KeyCode::Esc | KeyCode::Char('h' | '?') if self.shows_help => self.shows_help = false,
            KeyCode::Char('q') | KeyCode::Esc => return Flow::Ends,
            KeyCode::Char('h' | '?') => self.shows_help = true,
            KeyCode::Up | KeyCode::Char('k') => self.disks.move_selection(-1),
            KeyCode::Down | KeyCode::Char('j') => self.disks.move_selection(1),
            KeyCode::PageUp => self.disks.move_selection(-PAGE),
            KeyCode::PageDown => self.disks.move_selection(PAGE),
            KeyCode::Home => self.disks.select(0),
            KeyCode::End => self.disks.select(usize::MAX),
            KeyCode::Left | KeyCode::Char('<') => self.sort_by_next(-1),
            KeyCode::Right | KeyCode::Char('>') => self.sort_by_next(1),
            KeyCode::Char('r') => {
                let Order { by, is_reversed } = self.disks.order();
                let is_reversed = !is_reversed;
                self.disks.set_order(Order { by, is_reversed });
            }
            KeyCode::Char('+') => self.pace.set((self.pace.seconds() + 1).min(LONGEST)),
            KeyCode::Char('-') => self.pace.set((self.pace.seconds() - 1).max(1)),
            KeyCode::Char(' ') => {
                self.stopped_at = match self.stopped_at {
                    None => Some(Instant::now()),
                    Some(_) => None,
                };
            }
            _ => {}
        }
        Flow::GoesOn
    }

    fn sort_by_next(&mut self, by: isize) {
        let Order {
            by: column,
            is_reversed,
        } = self.disks.order();
        self.disks.set_order(Order {
            by: column.next(by),
            is_reversed,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::disks::tests::{DEPTH, did};
    use super::*;

    /// Of disks that have read so much in a second.
    pub fn app(reads: &[(&str, u64)]) -> App {
        let mut app = App::new(DEPTH, Pace::new(1));
        for (name, reads) in reads {
            app.hear(did(name, *reads));
        }
        app
    }

    fn press(app: &mut App, code: KeyCode) -> Flow {
        app.obey(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn keys_do_what_the_help_says() {
        let mut app = app(&[("a", 1000), ("b", 2000), ("c", 3000)]);
        let selected = |app: &App| app.disks.selected().unwrap().socket.display().to_string();
        assert_eq!(selected(&app), "c");
        for (key, expected) in [
            (KeyCode::Down, "b"),
            (KeyCode::PageDown, "a"),
            (KeyCode::Up, "b"),
            (KeyCode::Home, "c"),
            (KeyCode::End, "a"),
            (KeyCode::PageUp, "c"),
        ] {
            assert_eq!(press(&mut app, key), Flow::GoesOn);
            assert_eq!(selected(&app), expected, "{key:?}");
        }
        press(&mut app, KeyCode::Char('r'));
        assert_eq!(app.disks.all()[0].socket.to_str(), Some("a"));
        press(&mut app, KeyCode::Right);
        assert_eq!(app.disks.order().by, Column::Depth.next(1));
        press(&mut app, KeyCode::Left);
        assert_eq!(app.disks.order().by, Column::Depth);
        for (key, seconds) in [('+', 2), ('-', 1), ('-', 1)] {
            press(&mut app, KeyCode::Char(key));
            assert_eq!(app.pace.seconds(), seconds);
        }
        // What comes while it stands still is not shown.
        press(&mut app, KeyCode::Char(' '));
        app.hear(did("d", 9));
        assert_eq!(app.disks.all().len(), 3);
        press(&mut app, KeyCode::Char(' '));
        app.hear(did("d", 9));
        assert_eq!(app.disks.all().len(), 4);
        press(&mut app, KeyCode::Char('?'));
        assert!(app.shows_help);
        assert_eq!(press(&mut app, KeyCode::Esc), Flow::GoesOn);
        assert!(!app.shows_help);
        assert_eq!(press(&mut app, KeyCode::Char('x')), Flow::GoesOn);
        let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(app.obey(control_c), Flow::Ends);
        for key in [KeyCode::Char('q'), KeyCode::Esc] {
            assert_eq!(press(&mut app, key), Flow::Ends);
        }
    }

    #[test]
    fn who_does_not_answer_in_time_is_known_as_silent() {
        let (tell, hear) = channel();
        let sockets = ["a", "b", "c", "d"].map(PathBuf::from);
        let news = |name: &str, what| News {
            socket: name.into(),
            what,
        };
        for news in [
            news("b", What::Gone),
            news("c", What::Silent),
            did("a", 5),
            did("a", 6),
        ] {
            tell.send(news).unwrap();
        }
        let (disks, silent) = hear_each(sockets.into(), &hear, Instant::now());
        assert_eq!(disks.len(), 1);
        assert_eq!(disks[0].report.reads.operations_per_second, 5.0);
        assert_eq!(silent, ["c", "d"].map(PathBuf::from).into());
    }
}
