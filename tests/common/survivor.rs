//! A driver and its front-end that live on when the daemon does not, with the in-flight region
//! that the front-end keeps.
#![allow(dead_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use crate::common::backend::Backend;
use crate::front_end::*;

/// Status of a request that has succeeded.
const DONE: u8 = 0;

/// A region and its description.
pub type Region = (VhostUserInflight, File);

pub fn ask_for_region(front_end: &mut FrontEnd) -> Region {
    let asked = VhostUserInflight {
        num_queues: QUEUES,
        queue_size: 128,
        ..VhostUserInflight::default()
    };
    front_end.vhost.get_inflight_fd(&asked).unwrap()
}

pub fn set_region(front_end: &mut FrontEnd, region: &Region) -> vhost::Result<()> {
    let fd = region.1.as_raw_fd();
    front_end.vhost.set_inflight_fd(&region.0, fd)
}

/// A driver and its front-end, from the beginning, with a region.
pub fn begin(backend: &Backend) -> (FrontEnd, Region) {
    let mut front_end = FrontEnd::connect(backend.socket());
    front_end.negotiate(u64::MAX);
    front_end.get_config(0, 60);
    let region = ask_for_region(&mut front_end);
    set_region(&mut front_end, &region).unwrap();
    front_end.start_rings();
    (front_end, region)
}

/// The driver goes on, with another connection.
pub fn reconnect(front_end: &mut FrontEnd, backend: &Backend, region: Option<&Region>) {
    // Hangs up first: while one is being served, others are turned away.
    let (nowhere, _) = UnixStream::pair().unwrap();
    front_end.vhost = Frontend::from_stream(nowhere, QUEUES.into());
    // The socket of a process that was killed is there until the next one has replaced it.
    let start = Instant::now();
    front_end.vhost = loop {
        match Frontend::connect(backend.socket(), QUEUES.into()) {
            Ok(vhost) => break vhost,
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}: {}", backend.log()),
        }
        thread::sleep(Duration::from_millis(5));
    };
    front_end.negotiate(u64::MAX);
    if let Some(region) = region {
        set_region(front_end, region).unwrap();
    }
}

pub fn write(front_end: &mut FrontEnd, sector: u64, byte: u8) {
    front_end.fill(DATA, &[byte; 512]);
    let source = [readable(DATA, 512)];
    let answer = front_end.rings[0].run(VIRTIO_BLK_T_OUT, sector, &source);
    assert_eq!(answer, (DONE, 1));
}

pub fn expect(front_end: &mut FrontEnd, sector: u64, byte: u8) {
    front_end.fill(DATA, &[0xee; 512]);
    let target = [writable(DATA, 512)];
    let answer = front_end.rings[0].run(VIRTIO_BLK_T_IN, sector, &target);
    assert_eq!(answer, (DONE, 513));
    assert!(front_end.bytes(DATA, 512) == [byte; 512], "sector {sector}");
}
