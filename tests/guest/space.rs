//! Space that the guest has no more use for.

use crate::rig::{MIB, Rig};

#[test]
fn gives_space_back_on_fstrim() {
    let Some(rig) = Rig::new() else { return };
    let backend = rig.serve(&[]);
    let mut guest = rig
        .guest(
            r"
            # ext4 trims what was deleted only when its journal is done with it.
            trim() {
                umount /mnt
                mount /dev/vda /mnt
                fstrim /mnt
            }
            mkfs.ext4 -q /dev/vda
            mount /dev/vda /mnt
            fio --name=big --filename=/mnt/big --rw=write --bs=1M --size=300M --minimal
            for n in $(seq 200); do dd if=/mnt/big of=/mnt/$n bs=64k count=1 2>/dev/null; done
            sync
            meet_host full
            rm /mnt/big
            trim
            meet_host trimmed
            # Every other one: holes smaller than a cluster.
            for n in $(seq 1 2 200); do rm /mnt/$n; done
            trim
            meet_host thinned
            umount /mnt
            e2fsck -fn /dev/vda
            ",
        )
        .disk(backend.socket(), "")
        .boot();
    guest.wait_at("full");
    let full = rig.space();
    assert!(full > 300 * MIB);
    guest.go_on();

    guest.wait_at("trimmed");
    rig.wait_for_space(full - 290 * MIB);
    let trimmed = rig.space();
    guest.go_on();

    guest.wait_at("thinned");
    rig.wait_for_space(trimmed - 100 * 65536 * 9 / 10);
    guest.go_on();
    guest.finish();
    rig.close(backend);
}

#[test]
fn discards_and_zeroes_what_it_is_asked_to() {
    let Some(rig) = Rig::new() else { return };
    let backend = rig.serve(&[]);
    rig.guest(
        r#"
        # bytes OFFSET LENGTH: how many of them are not zero
        filled() {
            dd if=/dev/vda bs=512 skip=$(($1 / 512)) count=$(($2 / 512)) 2>/dev/null | tr -d '\0' | wc -c
        }
        M=1048576
        tr '\0' y </dev/zero | dd of=/dev/vda bs=1M count=12 iflag=fullblock conv=fsync
        blkdiscard -o $((2 * M)) -l $((2 * M)) /dev/vda
        blkdiscard -o $((5 * M + 65536)) -l 131072 /dev/vda
        blkdiscard -z -o $((6 * M)) -l $M /dev/vda
        blkdiscard -z -o $((7 * M + 512)) -l 1536 /dev/vda
        fallocate -p -o $((8 * M)) -l $M /dev/vda
        fallocate -p -o $((10 * M - 4096)) -l 8192 /dev/vda
        echo 3 >/proc/sys/vm/drop_caches

        [ "$(filled 0 $((2 * M)))" = $((2 * M)) ]
        [ "$(filled $((2 * M)) $((2 * M)))" = 0 ]
        [ "$(filled $((4 * M)) $M)" = $M ]
        [ "$(filled $((5 * M)) $M)" = $((M - 131072)) ]
        [ "$(filled $((5 * M + 65536)) 131072)" = 0 ]
        [ "$(filled $((6 * M)) $M)" = 0 ]
        [ "$(filled $((7 * M)) $M)" = $((M - 1536)) ]
        [ "$(filled $((7 * M + 512)) 1536)" = 0 ]
        [ "$(filled $((8 * M)) $M)" = 0 ]
        [ "$(filled $((9 * M)) $((2 * M)))" = $((2 * M - 8192)) ]
        [ "$(filled $((11 * M)) $((2 * M)))" = $M ]
        "#,
    )
    .disk(backend.socket(), "")
    .run();
    rig.close(backend);
}
