//! Disks that are plugged into machines that run.

use crate::rig::Rig;

/// `verify SEED` writes and compares.
const VERIFY: &str = "
    verify() {
        fio --name=job --filename=/dev/vda --size=8M --rw=randrw --bs=16k --ioengine=libaio \\
            --direct=1 --iodepth=8 --verify=crc32c --verify_fatal=1 --randseed=$1 --minimal
    }
";

#[test]
fn a_disk_that_another_machine_has_cannot_be_plugged_in_and_both_go_on() {
    let (Some(owner), Some(other)) = (Rig::new(), Rig::new()) else {
        return;
    };
    let of_owner = owner.serve(&[]);
    let of_other = other.serve(&[]);
    let script = format!("{VERIFY}verify 1\nmeet_host served\nverify 2");
    let mut first = owner.guest(&script).disk(of_owner.socket(), "").boot();
    let script = format!(
        "{VERIFY}verify 3
         meet_host served
         [ ! -e /dev/vdb ]
         verify 4
         meet_host ready
         for second in $(seq 60); do [ -e /dev/vdb ] || sleep 1; done
         dd if=/dev/vdb of=/dev/null bs=1M count=8"
    );
    let mut second = other
        .guest(&script)
        .disk(of_other.socket(), "")
        .slot("free_slot")
        .boot();
    first.wait_at("served");
    second.wait_at("served");

    let socket = of_owner.socket().to_str().expect("test paths are UTF-8");
    let chardev = format!("chardev-add socket,id=taken,path={socket}");
    let device = "device_add vhost-user-blk-pci,chardev=taken,id=more,bus=free_slot,num-queues=1";
    // Again and again: nothing may stay of one that fails.
    for attempt in 1..=3 {
        second.command(&chardev);
        let said = second.command(device);
        assert!(said.contains("Error:"), "{said}");
        second.command("chardev-remove taken");
        let turned_away = of_owner.log().matches("turned away").count();
        assert!(turned_away >= attempt, "{}", of_owner.log());
    }
    second.go_on();
    second.wait_at("ready");
    first.go_on();
    first.finish();

    // Nobody has it any more.
    second.command(&chardev);
    let said = second.command(device);
    assert!(!said.contains("Error"), "{said}");
    second.go_on();
    second.finish();
    other.close(of_other);
    owner.close(of_owner);
}
