//! Options that change what front-ends and guests see.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::{Rig, expect_service, set_word, start_front_end, wait_for};

#[test]
fn the_socket_is_for_whom_it_is_said_to_be_for() {
    let rig = Rig::new();
    let group = rustix::process::getegid().as_raw().to_string();
    let backend = rig.serve(&["--socket-mode=620", "--socket-group", &group]);
    let mode = fs::metadata(&rig.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o620);
    expect_service(&mut start_front_end(backend.socket()));
    backend.stop();
}

#[test]
fn rings_below_qemus_are_warned_of() {
    let rig = Rig::new();
    let backend = rig.serve(&["--queue-size=64"]);
    wait_for("the warning", || backend.log().contains("queue-size=64"));
    backend.stop();
    let rig = Rig::new();
    let backend = rig.serve(&["--queue-size=128"]);
    wait_for("the log", || backend.log().contains("ready"));
    assert!(!backend.log().contains("WARN"), "{}", backend.log());
    backend.stop();
}

#[test]
fn blocks_can_have_4096_bytes() {
    let rig = Rig::new();
    let backend = rig.serve(&["--logical-block-size=4096"]);
    let mut front_end = start_front_end(backend.socket());
    assert_eq!(front_end.get_config(20, 4), 4096_u32.to_le_bytes());
    expect_service(&mut front_end);
    drop(front_end);
    backend.stop();

    // One sector less.
    set_word(&rig.image, 36, 64 * 2048 - 1);
    let file = format!("--blk-file={}", rig.image.display());
    let said = rig.refused(&["--logical-block-size=4096", &file]);
    assert!(said.contains("67108352 bytes"), "{said}");
    assert!(said.contains("4096"), "{said}");
    rig.serve(&["--logical-block-size=512"]).stop();
}
