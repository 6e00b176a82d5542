//! One side that is ready to run: a server on an image, and a device open on it.
//!
//! Knows how to start, load, verify and end it. Must not know rounds or ratios.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::bed::Bed;
use crate::client::{Device, Shape, Target};
use crate::content::{BLOCK, Generation};
use crate::contestant::{Contestant, Launch, Programs};
use crate::image::Image;
use crate::run::{self, Outcome, Plan};
use crate::scratch;
use crate::server::{self, Ending, Server};
use crate::workload::{Action, Cache, Start, Workload};

/// The generation that images are prepared with.
pub const PREPARED: Generation = 1;

/// Blocks of a written image that are compared whole at the end.
const SAMPLED: usize = 256;

/// Requests that fill an image: large, a few at a time.
const FILL: Shape = Shape {
    queues: 1,
    depth: 8,
    buffer_bytes: 1 << 20,
    cache: Cache::WriteBack,
};

/// A server with a client attached; or, for the plain file, the client alone.
pub struct Station {
    // In the order in which they must go.
    device: Device,
    server: Option<Server>,
    _socket_dir: TempDir,
}

/// What a run took, beside its outcome.
pub struct Used {
    /// CPU time of the server; `None` without one.
    pub server_cpu: Option<Duration>,
    /// CPU time of this process.
    pub client_cpu: Duration,
}

/// The queues and buffers that a workload needs.
pub fn shape(workload: &Workload) -> Shape {
    Shape {
        queues: workload.queues,
        depth: workload.depth,
        buffer_bytes: workload.request_bytes,
        cache: workload.cache,
    }
}

/// Writes an image full, through the server that it is for.
///
/// # Errors
/// The server's.
pub fn fill(programs: &Programs, bed: Bed, contestant: Contestant, image: &Image) -> Result<()> {
    Station::filled(programs, bed, contestant, image)?.stop()?;
    Ok(())
}

impl Station {
    /// Starts the server of `image` and connects.
    ///
    /// # Errors
    /// The server does not start, or something on the way to its device.
    pub fn open(
        programs: &Programs,
        bed: Bed,
        contestant: Contestant,
        image: &Image,
        shape: Shape,
    ) -> Result<Self> {
        Self::open_with(programs, bed, contestant, image, shape, |command| command)
    }

    /// As [`Self::open`], with the server's command changed by `wrap`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(
        programs: &Programs,
        bed: Bed,
        contestant: Contestant,
        image: &Image,
        shape: Shape,
        wrap: impl FnOnce(Command) -> Command,
    ) -> Result<Self> {
        let socket_dir = scratch::for_socket()?;
        let socket = socket_dir.path().join("s");
        let launch = Launch {
            image: &image.path,
            backing: &image.backing,
            socket: &socket,
            bed,
            queues: shape.queues,
            write_through: shape.cache == Cache::WriteThrough,
        };
        let (device, server) = match contestant.command(programs, launch) {
            Some(command) => {
                let command = wrap(command);
                let server = Server::start(contestant.label(), command, socket_dir.path())?;
                let mut server = server.of_peer(contestant.is_peer());
                let device =
                    server.once_listening(|| Device::open(Target::Socket(&socket), shape))?;
                (device, Some(server))
            }
            None => {
                let target = Target::File {
                    path: &image.path,
                    direct: bed.is_direct(),
                };
                (Device::open(target, shape)?, None)
            }
        };
        Ok(Self {
            device,
            server,
            _socket_dir: socket_dir,
        })
    }

    /// As [`Self::open`], and writes the image full.
    ///
    /// # Errors
    /// As [`Self::open`], and a write that fails.
    pub fn filled(
        programs: &Programs,
        bed: Bed,
        contestant: Contestant,
        image: &Image,
    ) -> Result<Self> {
        let mut station = Self::open(programs, bed, contestant, image, FILL)?;
        run::fill(&mut station.device, PREPARED, FILL.buffer_bytes as usize)
            .map_err(|error| station.explain(error))
            .with_context(|| format!("filling the image of {}", contestant.label()))?;
        Ok(station)
    }

    /// The server; `None` for the plain file.
    pub fn server(&self) -> Option<&Server> {
        self.server.as_ref()
    }

    /// Runs a workload, and flushes what it wrote if that was not part of it: it
    /// shall not weigh on the next run.
    ///
    /// # Errors
    /// A request that fails, or a server that does.
    pub fn run(&mut self, workload: &Workload, plan: &Plan) -> Result<(Outcome, Used)> {
        self.run_unexplained(workload, plan)
            .map_err(|error| self.explain(error))
    }

    fn run_unexplained(&mut self, workload: &Workload, plan: &Plan) -> Result<(Outcome, Used)> {
        let server_before = self.server_cpu()?;
        let client_before = server::cpu_time(std::process::id())?;
        let outcome = run::run(&mut self.device, workload, plan)?;
        let client_cpu = server::cpu_time(std::process::id())? - client_before;
        let server_cpu = match (server_before, self.server_cpu()?) {
            (Some(before), Some(after)) => Some(after - before),
            _ => None,
        };
        if let Some(server) = &mut self.server {
            server.check_alive()?;
        }
        if workload.action.writes() && !workload.flush_counts() {
            self.device.flush()?;
        }
        let used = Used {
            server_cpu,
            client_cpu,
        };
        Ok((outcome, used))
    }

    fn server_cpu(&self) -> Result<Option<Duration>> {
        self.server.as_ref().map(Server::cpu_time).transpose()
    }

    /// Compares some of what a run has just written, and what lies beside it where
    /// it was copied from below.
    ///
    /// # Errors
    /// A difference, or a read that fails.
    pub fn verify_run(
        &mut self,
        workload: &Workload,
        outcome: &Outcome,
        generation: Generation,
    ) -> Result<()> {
        if matches!(workload.action, Action::Read | Action::Discard) {
            return Ok(());
        }
        let written = outcome.written.iter().copied();
        run::verify(&mut self.device, written, &(generation..=generation))?;
        if workload.start == Start::Overlay {
            let beside = outcome.written.iter().map(|block| block + 1);
            run::verify(&mut self.device, beside, &(PREPARED..=PREPARED))?;
        }
        Ok(())
    }

    /// Compares some blocks of a disk that was written full once, and since then
    /// up to `generation`.
    ///
    /// # Errors
    /// A difference, or a read that fails.
    pub fn verify_sample(&mut self, generation: Generation) -> Result<()> {
        let blocks = self.device.capacity() / BLOCK as u64;
        let sample: Vec<u64> = (0..SAMPLED).map(|_| fastrand::u64(..blocks)).collect();
        run::verify(&mut self.device, sample, &(PREPARED..=generation))
    }

    fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        match &mut self.server {
            Some(server) => server.explain(error),
            None => error,
        }
    }

    /// Disconnects and ends the server.
    ///
    /// # Errors
    /// It does not end as it should.
    pub fn stop(self) -> Result<Ending> {
        drop(self.device);
        self.server.map_or(Ok(Ending::Clean), Server::stop)
    }
}

#[cfg(test)]
mod tests;
