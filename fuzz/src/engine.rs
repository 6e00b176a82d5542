//! An engine whose threads are all driven by one.

use std::time::Duration;

use vhost_user_ploop::format::Sector;
use vhost_user_ploop::ploop::{
    Command, Engine, EngineError, MdWriter, Opened, Queue, Request, Runner,
};
use vhost_user_ploop::storage::Segments;

use crate::disk::MemDisk;

/// Steps after which a request should have ended: more than any takes.
const STEPS_MAX: u64 = 100_000;

/// See the module's text.
pub struct Driven {
    queue: Queue<MemDisk>,
    runners: Vec<Runner<MemDisk>>,
    md: MdWriter<MemDisk>,
    steps: u64,
}

impl Driven {
    pub fn new(opened: Opened<MemDisk>) -> Self {
        Self {
            queue: Engine::queue(&opened.engine).expect("there is no other queue"),
            runners: opened.runners,
            md: opened.md,
            steps: 0,
        }
    }

    /// What the disk has there.
    pub fn read(&mut self, start: Sector, sectors: usize) -> Result<Vec<u8>, EngineError> {
        let mut bytes = vec![0xaa; 512 * sectors];
        let data = segments(&mut bytes);
        self.run(Command::Read { start, data })?;
        Ok(bytes)
    }

    pub fn write(&mut self, start: Sector, bytes: &mut [u8]) -> Result<(), EngineError> {
        let data = segments(bytes);
        self.run(Command::Write { start, data })
    }

    /// One request from its start to its end.
    pub fn run(&mut self, command: Command) -> Result<(), EngineError> {
        let first = self.steps;
        self.queue.push(Request { tag: 0, command });
        let mut done = Vec::new();
        loop {
            self.steps += 1;
            let now = Duration::from_millis(self.steps);
            self.queue.submit();
            self.queue.poll(&mut done);
            for runner in &mut self.runners {
                runner.poll(now);
            }
            self.md.poll(now);
            if let Some(done) = done.pop() {
                return done.result;
            }
            assert!(self.steps - first < STEPS_MAX, "a request never ends");
        }
    }
}

fn segments(bytes: &mut [u8]) -> Segments {
    let mut segments = Segments::new();
    // SAFETY: each request is run to its end before its caller gets the bytes back.
    unsafe { segments.push(bytes.as_mut_ptr(), bytes.len()) };
    segments
}
