//! A terminal, with somebody in front of it.

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// Who looks at it, and types.
pub struct Terminal {
    screen: File,
    columns: NonZero<u16>,
    lines: NonZero<u16>,
    said: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Terminal {
    /// One of so many columns and lines, and the side of it that programs have.
    pub fn new(columns: u16, lines: u16) -> (Self, OwnedFd) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let screen = openpt(flags).unwrap();
        grantpt(&screen).unwrap();
        unlockpt(&screen).unwrap();
        let name = ptsname(&screen, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let line = rustix::fs::open(name.as_c_str(), flags, Mode::empty()).unwrap();
        let size = Winsize {
            ws_row: lines,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&line, size).unwrap();
        let screen = File::from(screen);
        let said = Arc::<Mutex<Vec<u8>>>::default();
        let reader = thread::spawn({
            let (mut screen, said) = (screen.try_clone().unwrap(), Arc::clone(&said));
            move || {
                let mut buffer = [0; 4096];
                // Ends with an error once no program has the terminal any more.
                while let Ok(read @ 1..) = screen.read(&mut buffer) {
                    said.lock().unwrap().extend(&buffer[..read]);
                }
            }
        });
        let terminal = Self {
            screen,
            columns: NonZero::new(columns).unwrap(),
            lines: NonZero::new(lines).unwrap(),
            said,
            reader,
        };
        (terminal, line)
    }

    /// Types this.
    pub fn enter(&mut self, keys: &str) {
        self.screen.write_all(keys.as_bytes()).unwrap();
    }

    /// What is to be seen on it.
    pub fn shown(&self) -> String {
        let mut parser = vt100::Parser::new(self.lines, self.columns, 0);
        parser.process(&self.said.lock().unwrap());
        parser.screen().contents()
    }

    /// All that they have said, when none has it any more.
    pub fn end(self) -> String {
        self.reader.join().unwrap();
        String::from_utf8(std::mem::take(&mut self.said.lock().unwrap())).unwrap()
    }
}
