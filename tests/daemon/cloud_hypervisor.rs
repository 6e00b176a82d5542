//! The messages of cloud-hypervisor, in its order, where it moves a guest to another host,
//! pauses it or connects again; with an image that is open only while a ring runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::common::backend::Backend;
use crate::death::{CLUSTER, Region, ask_for_region, expect, set_region, write};
use crate::front_end::*;
use crate::hand_over::{Hosts, bare, bundle, is_free};
use crate::{OK, wait_for};

const PAGE: u64 = 4096;

/// What a front-end can do with a disk. Where the back-end has a state of its own, which ours
/// has not, it stops the rings and asks for that.
fn protocol() -> VhostUserProtocolFeatures {
    use VhostUserProtocolFeatures as Feature;
    let features = [
        Feature::CONFIG,
        Feature::MQ,
        Feature::CONFIGURE_MEM_SLOTS,
        Feature::REPLY_ACK,
        Feature::INFLIGHT_SHMFD,
        Feature::LOG_SHMFD,
        Feature::DEVICE_STATE,
    ];
    features.into_iter().collect()
}

/// A guest and what runs it.
struct Vmm {
    front_end: FrontEnd,
    /// That were negotiated when the guest was booted, wherever that was.
    features: u64,
    protocol: VhostUserProtocolFeatures,
    /// In-flight; it does not go along with the guest.
    region: Option<Region>,
}

impl Vmm {
    /// Starts a guest.
    fn boot(backend: &Backend) -> Self {
        let mut front_end = FrontEnd::connect(backend.socket());
        let vhost = &mut front_end.vhost;
        vhost.set_owner().unwrap();
        let features = vhost.get_features().unwrap() & !LOG_ALL;
        let protocol = vhost.get_protocol_features().unwrap() & protocol();
        assert!(!protocol.contains(VhostUserProtocolFeatures::DEVICE_STATE));
        vhost.set_protocol_features(protocol).unwrap();
        vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert!(vhost.get_queue_num().unwrap() >= QUEUES.into());
        front_end.get_config(0, 60);
        let mut vmm = Self {
            front_end,
            features,
            protocol,
            region: None,
        };
        vmm.start();
        vmm
    }

    /// For a guest that is there already, which knows what the disk is like.
    fn negotiate(&mut self) {
        let vhost = &mut self.front_end.vhost;
        vhost.set_owner().unwrap();
        vhost.get_features().unwrap();
        vhost.set_protocol_features(self.protocol).unwrap();
        vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }

    /// Each ring is said to go on at its available index, whatever has an answer.
    fn start(&mut self) {
        let front_end = &mut self.front_end;
        front_end.vhost.set_features(self.features).unwrap();
        front_end.set_memory(3);
        for index in 0..QUEUES.into() {
            front_end.vhost.set_vring_num(index, RING_SIZE).unwrap();
        }
        let region = self.region.take();
        let region = region.unwrap_or_else(|| ask_for_region(front_end));
        set_region(front_end, &region).unwrap();
        self.region = Some(region);
        for index in 0..QUEUES.into() {
            front_end.set_addresses(index, false);
            let (vhost, ring) = (&front_end.vhost, &front_end.rings[index]);
            vhost.set_vring_base(index, ring.avail_idx()).unwrap();
            vhost.set_vring_call(index, ring.call()).unwrap();
            vhost.set_vring_kick(index, &ring.kick).unwrap();
        }
        self.enable(true);
    }

    /// All that is done for a pause, or after one.
    fn enable(&mut self, enable: bool) {
        for index in 0..QUEUES.into() {
            let vhost = &mut self.front_end.vhost;
            vhost.set_vring_enable(index, enable).unwrap();
        }
    }

    fn hang_up(&mut self) {
        let (nowhere, _) = UnixStream::pair().unwrap();
        self.front_end.vhost = Frontend::from_stream(nowhere, QUEUES.into());
    }

    fn reconnect(&mut self, backend: &Backend) {
        let connected = Frontend::connect(backend.socket(), QUEUES.into());
        self.front_end.vhost = connected.unwrap();
        self.negotiate();
        self.start();
    }

    fn start_log(&mut self) -> Log {
        let log = self.renew_log();
        let vhost = &self.front_end.vhost;
        vhost.set_features(self.features | LOG_ALL).unwrap();
        self.set_logging(true);
        log
    }

    fn stop_log(&mut self) {
        self.set_logging(false);
        self.front_end.vhost.set_features(self.features).unwrap();
    }

    fn set_logging(&mut self, on: bool) {
        for index in 0..QUEUES.into() {
            self.front_end.set_addresses(index, on);
        }
    }

    /// To read one log, it gives another.
    fn renew_log(&self) -> Log {
        let log = Log {
            file: tempfile::tempfile().unwrap(),
            // As many bytes as it needs, and no whole pages of them.
            len: (FAR + REGION_LEN - 1) / (8 * PAGE) + 1,
        };
        log.file.set_len(log.len).unwrap();
        let region = VhostUserDirtyLogRegion {
            mmap_size: log.len,
            mmap_offset: 0,
            mmap_handle: log.file.as_raw_fd(),
        };
        self.front_end.vhost.set_log_base(0, Some(region)).unwrap();
        log
    }

    /// All pages of the guest's memory, by number.
    fn pages(&self) -> Vec<u64> {
        let regions = self.front_end.memory.iter();
        let pages = regions.flat_map(|region| {
            let start = region.start_addr().0 / PAGE;
            start..start + region.len() / PAGE
        });
        pages.collect()
    }

    /// Those that the driver writes, of which the hypervisor knows by itself.
    fn pages_of_driver(&self) -> Vec<u64> {
        let rings = self.front_end.rings.iter();
        let used: Vec<_> = rings.map(|ring| ring.used() / PAGE).collect();
        // Those of the ring whose requests are all answered.
        let statuses = STATUSES / PAGE;
        let is_drivers =
            |page: &u64| *page < FAR / PAGE && !used.contains(page) && *page != statuses;
        self.pages().into_iter().filter(is_drivers).collect()
    }

    fn page(&self, page: u64) -> Vec<u8> {
        self.front_end.bytes(page * PAGE, PAGE as usize)
    }

    /// Has the device write to a page that the driver does not touch.
    fn read_to(&mut self, page: u64) {
        let target = [writable(page * PAGE, 512)];
        let answer = self.front_end.rings[0].run(VIRTIO_BLK_T_IN, 3 * CLUSTER, &target);
        assert_eq!(answer, (OK, 513));
    }
}

/// Of memory that was written.
struct Log {
    file: File,
    len: u64,
}

impl Log {
    /// Pages, by number.
    fn marked(&self) -> Vec<u64> {
        let mut bytes = vec![0; self.len as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        let is_marked = |page: &u64| bytes[(page / 8) as usize] & 1 << (page % 8) != 0;
        (0..self.len * 8).filter(is_marked).collect()
    }
}

/// Pages that were sent, as they were then.
#[derive(Default)]
struct Sent(BTreeMap<u64, Vec<u8>>);

impl Sent {
    fn add(&mut self, vmm: &Vmm, pages: Vec<u64>) {
        self.0
            .extend(pages.into_iter().map(|page| (page, vmm.page(page))));
    }
}

/// Requests that nobody has taken from their ring yet.
const WAITING: u64 = 3;

/// Sends the guest away, some of whose requests wait in a ring. The image is nobody's then.
fn send(source: &mut Vmm, image: &std::path::Path, round: u8, is_logged: bool) -> Sent {
    let mut sent = Sent::default();
    // On the same host it gives descriptors of the memory, and has nothing logged.
    let log = is_logged.then(|| {
        let mut log = source.start_log();
        sent.add(source, source.pages());
        for pass in 0..3_u8 {
            write(&mut source.front_end, 3 * CLUSTER, 10 * round + pass);
            source.read_to(FAR / PAGE + u64::from(pass));
            let next = source.renew_log();
            sent.add(source, log.marked());
            log = next;
        }
        source.read_to(FAR / PAGE + 3);
        log
    });
    source.front_end.fill(DATA, &[100 + round; 512]);
    for cluster in 0..WAITING {
        let (ring, data) = (&mut source.front_end.rings[1], [readable(DATA, 512)]);
        ring.request(VIRTIO_BLK_T_OUT, (20 + cluster) * CLUSTER, &data);
    }
    source.enable(false);
    assert!(is_free(image));
    if let Some(log) = log {
        let last = source.renew_log();
        sent.add(source, log.marked());
        sent.add(source, source.pages_of_driver());
        assert_eq!(last.marked(), [] as [u64; 0]);
    } else {
        sent.add(source, source.pages());
    }
    sent
}

/// Goes on with the guest of another host.
fn receive(source: &Vmm, sent: &Sent, to: &Backend) -> Vmm {
    let mut target = Vmm {
        front_end: FrontEnd::connect(to.socket()),
        features: source.features,
        protocol: source.protocol,
        region: None,
    };
    target.negotiate();
    for (page, bytes) in &sent.0 {
        target.front_end.fill(page * PAGE, bytes);
    }
    let pages = source.pages().into_iter();
    let missing: Vec<_> = pages
        .filter(|page| source.page(*page) != target.page(*page))
        .collect();
    assert!(missing.is_empty(), "{missing:x?}");
    target.front_end.go_on_as(source.front_end.driver());
    target.start();
    target
}

/// What waited in a ring is done, once.
fn expect_waiting(vmm: &mut Vmm, byte: u8) {
    let ring = &mut vmm.front_end.rings[1];
    for _ in 0..WAITING {
        let (head, len) = ring.wait_used();
        assert_eq!((ring.status(head), len), (OK, 1));
    }
    assert_eq!(ring.take_used(), None);
    for cluster in 0..WAITING {
        expect(&mut vmm.front_end, (20 + cluster) * CLUSTER, byte);
    }
}

#[test]
fn a_guest_goes_from_one_host_to_another_and_back() {
    for rig in [bare(), bundle()] {
        let hosts = Hosts::of(rig);
        let mut vmm = Vmm::boot(&hosts.one);
        write(&mut vmm.front_end, 5 * CLUSTER, 5);
        for round in 0..4 {
            let to = [&hosts.other, &hosts.one][usize::from(round) % 2];
            let sent = send(&mut vmm, &hosts.rig.image, round, round < 2);
            // Only then does the other one connect.
            vmm.hang_up();
            let mut target = receive(&vmm, &sent, to);
            // It resumes what it has started.
            target.enable(true);
            expect_waiting(&mut target, 100 + round);
            expect(&mut target.front_end, 5 * CLUSTER, 5);
            if round < 2 {
                expect(&mut target.front_end, 3 * CLUSTER, 10 * round + 2);
            }
            vmm = target;
        }
        drop(vmm);
        wait_for("the end of the front-end", || is_free(&hosts.rig.image));
        hosts.end();
    }
}

#[test]
fn a_migration_that_comes_to_nothing_leaves_the_guest_where_it_is() {
    let hosts = Hosts::of(bundle());
    let image = &hosts.rig.image;
    let mut vmm = Vmm::boot(&hosts.one);
    // Before the guest is paused.
    vmm.start_log();
    write(&mut vmm.front_end, CLUSTER, 1);
    vmm.stop_log();
    expect(&mut vmm.front_end, CLUSTER, 1);

    // When it is.
    send(&mut vmm, image, 1, true);
    vmm.enable(true);
    expect_waiting(&mut vmm, 101);
    vmm.stop_log();
    expect(&mut vmm.front_end, CLUSTER, 1);

    // When it has given the disk up, and the other one has had it.
    for is_logged in [true, false] {
        let sent = send(&mut vmm, image, 2, is_logged);
        vmm.hang_up();
        let target = receive(&vmm, &sent, &hosts.other);
        drop(target);
        wait_for("the end of the front-end", || is_free(image));
        vmm.reconnect(&hosts.one);
        expect_waiting(&mut vmm, 102);
        expect(&mut vmm.front_end, CLUSTER, 1);
    }
    drop(vmm);
    wait_for("the end of the front-end", || is_free(image));
    hosts.end();
}
