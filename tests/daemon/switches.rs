//! Disks go back to a snapshot between two guests, or who serves them says what it takes.

use std::process::Command;

use serde_json::json;
use vhost::VhostBackend;

use crate::common::qmp::Qmp;
use crate::control::{control, serve};
use crate::deletions::*;
use crate::front_end::FrontEnd;
use crate::start_front_end;
use crate::stat::Host;

const SWITCH: &str = "snapshot-switch";

/// The guest is shut down.
fn leave(front_end: FrontEnd, qmp: &mut Qmp) {
    for index in 0..front_end.rings.len() {
        front_end.vhost.get_vring_base(index).unwrap();
    }
    drop(front_end);
    qmp.event("FRONT_END_GONE");
}

fn switch(host: &Host, guid: &str) -> Command {
    let image = host.rig.image.to_str().unwrap();
    let mut command = ploop_img(host, &["snapshot", "switch", image, guid]);
    command.arg("--control").arg(control(&host.rig));
    command
}

fn size(front_end: &mut FrontEnd) -> u64 {
    let config = front_end.get_config(0, 8);
    u64::from_le_bytes(config[..8].try_into().unwrap()) * 512
}

#[test]
fn who_has_the_image_open_says_what_it_takes() {
    let host = host();
    let backend = serve(&host.rig, &[]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&host.rig));
    let (guid, byte) = prepare(&mut front_end, &mut qmp);
    let refusal = |qmp: &mut Qmp| {
        let why = desc(&qmp.answer(SWITCH, of(&guid))).to_owned();
        let said = ran(switch(&host, &guid)).fails();
        assert!(said.contains(&why), "{said}");
        why
    };
    let why = refusal(&mut qmp);
    assert!(
        why.contains("shut the guest down and end the process"),
        "{why}"
    );
    expect_disk(&mut front_end, &byte);
    leave(front_end, &mut qmp);
    let why = refusal(&mut qmp);
    assert!(why.contains("may come back"), "{why}");
    let answer = qmp.answer(SWITCH, json!({}));
    assert!(desc(&answer).contains("'guid' is missing"), "{answer}");
    assert_eq!(list(&host.rig.image).len(), 2);
    expect_disk(&mut start_front_end(backend.socket()), &byte);
    backend.stop();
    assert_eq!(ran(switch(&host, &guid)).ok(), "", "nobody uses it");
}

/// The next one finds what there was, and how large it was.
#[test]
fn a_disk_whose_image_is_closed_goes_back_between_two_guests() {
    let host = host();
    let backend = serve(&host.rig, &["--lock=running"]);
    let mut front_end = start_front_end(backend.socket());
    let mut qmp = Qmp::connect(&control(&host.rig));
    let (guid, _) = prepare(&mut front_end, &mut qmp);
    let before = size(&mut front_end);
    let larger = json!({ "device": "disk", "size": before + (16 << 20) });
    qmp.ask("block_resize", larger);
    assert_eq!(size(&mut front_end), before + (16 << 20));
    let said = ran(switch(&host, &guid)).fails();
    assert!(said.contains("shut the guest down; '"), "{said}");
    leave(front_end, &mut qmp);
    let answer = qmp.answer(SWITCH, of(&guid));
    let now = "'ploop-img snapshot switch' does it now";
    assert!(desc(&answer).contains(now), "{answer}");
    assert_eq!(ran(switch(&host, &guid)).ok(), "");
    let mut front_end = start_front_end(backend.socket());
    let byte = |cluster: u64| u8::from(cluster < CLUSTERS / 2);
    expect_disk(&mut front_end, byte);
    assert_eq!(size(&mut front_end), before);
    fill(&mut front_end.rings[0], 1..2, 7);
    leave(front_end, &mut qmp);
    let mut front_end = start_front_end(backend.socket());
    expect_disk(
        &mut front_end,
        |cluster| if cluster == 1 { 7 } else { byte(cluster) },
    );
    // It can be changed on as ever.
    delete(&mut qmp, &guid);
    drop(front_end);
    backend.stop();
    expect_sound(&host.rig.image, 0);
}
