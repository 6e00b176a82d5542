#!/usr/bin/env bash
# Shows the whole way once: makes a ploop disk, serves it to a guest under QEMU
# which partitions it, formats it, fills it, trims it and verifies it; then a
# second guest, which finds everything again; then what the image looks like to
# ploop-img and to qemu-img.
#
# usage: qemu/demo.sh
#
#   KEEP=1   keep the disk and the guests' consoles in target/demo
#   ACCEL=A  QEMU's accelerator, tcg unless said otherwise
#
# Exit status 0: every step did what it should. Nothing is left running.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
# shellcheck source=qemu/tools.sh
. qemu/tools.sh

target=${CARGO_TARGET_DIR:-$repo/target}
work=$target/demo
disk=$work/disk
socket=$work/vhost.sock
backend_pid=
guest_pid=

heading() { printf '\n== %s\n' "$*"; }
die() { printf '\ndemo.sh: FAILED: %s\n' "$*" >&2; exit 1; }

cleanup() {
    local status=$? pid
    trap - EXIT
    for pid in $guest_pid $backend_pid; do
        kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null
    done
    if [ "$status" -ne 0 ]; then
        echo "demo.sh: what the programs said is in $work" >&2
    elif [ -z "${KEEP:-}" ]; then
        rm -rf "$work"
    fi
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

prepare() {
    heading "Tools, build, guest"
    qemu/install-tools.sh demo
    cargo build --release --locked --bins
    qemu/guest/build.sh "$target/guest"
    backend=$target/release/vhost-user-ploop
    img=$target/release/ploop-img
    rm -rf "$work"
    mkdir -p "$work"
}

image_file() {
    find "$disk" -type f ! -name '*.xml' ! -name '*.lock' | head -n 1
}

# KiB that the host has given to the image.
space_kib() {
    du -k "$(image_file)" | cut -f1
}

start_backend() {
    "$backend" --socket-path="$socket" --blk-file="$disk" --serial=ploop-demo \
        >"$work/backend.log" 2>&1 &
    backend_pid=$!
    for _ in $(seq 100); do
        # The socket is there a moment before anybody listens on it.
        [[ $(grep " 00010000 " /proc/net/unix) == *" $socket"* ]] && return
        kill -0 "$backend_pid" 2>/dev/null || break
        sleep 0.1
    done
    cat "$work/backend.log" >&2
    die "the back-end did not open its socket"
}

stop_backend() {
    local status=0
    kill -TERM "$backend_pid"
    wait "$backend_pid" || status=$?
    backend_pid=
    [ "$status" -eq 0 ] || { cat "$work/backend.log" >&2; die "the back-end ended with status $status"; }
    [ ! -e "$socket" ] || die "the back-end left its socket behind"
}

# A vhost-user back-end reads and writes the guest's memory itself: the memory has to be
# shared. An emulated timer may seem dead while the machine is busy: no_timer_check.
start_qemu() {
    timeout 600 qemu-system-x86_64 \
        -nodefaults -no-user-config -no-reboot -display none -serial stdio \
        -accel "${ACCEL:-tcg}" -cpu max -smp 2 \
        -machine q35,memory-backend=mem -m 512M \
        -object memory-backend-memfd,id=mem,size=512M,share=on \
        -kernel "$target/guest/vmlinuz" -initrd "$work/initrd" \
        -append "console=ttyS0 quiet panic=-1 no_timer_check" \
        -chardev socket,id=ploop,path="$socket" \
        -device vhost-user-blk-pci,chardev=ploop \
        </dev/null &
    guest_pid=$!
}

stop_qemu() {
    kill "$guest_pid" 2>/dev/null || true
    wait "$guest_pid" || true
    guest_pid=
}

# Waits until the guest on this console begins its script or QEMU ends. Succeeds if its
# kernel complains of a timer before that.
has_dead_timer() {
    while kill -0 "$guest_pid" 2>/dev/null && ! grep -aq '^guest: script begins' "$1"; do
        ! grep -aq "timer wakeup didn't happen" "$1" || return 0
        sleep 0.2
    done
    return 1
}

# boot NAME: runs the script on standard input in a guest.
boot() {
    local name=$1 console=$work/$1.console machine status=0
    mkdir -p "$work/$name"
    cat >"$work/$name/script"
    (cd "$work/$name" && echo script | cpio --quiet -o -H newc) |
        cat "$target/guest/initrd.cpio" - >"$work/initrd"
    # On a busy host the timer of an emulated processor may be dead from the start
    # (tests/guest/qemu.rs): another machine then.
    for machine in 1 2 3; do
        start_qemu >"$console" 2>&1
        if [ "$machine" -eq 3 ] || ! has_dead_timer "$console"; then
            break
        fi
        echo "an emulated timer is dead: another machine"
        stop_qemu
    done
    wait "$guest_pid" || status=$?
    guest_pid=
    grep -a '^=> ' "$console" | tr -d '\r' || true
    if [ "$status" -ne 0 ] || ! grep -aq '^guest: script ended with status 0' "$console"; then
        tail -n 40 "$console" >&2
        die "the guest of $name failed (QEMU's status: $status)"
    fi
}

demo() {
    heading "ploop-img create"
    "$img" create "$disk" 2G
    start_backend
    echo "vhost-user-ploop serves $disk on $socket"

    heading "First boot: partition, format, write, trim, verify"
    boot first-boot <<'GUEST'
echo "=> $(uname -sr) sees /dev/vda, serial $(cat /sys/block/vda/serial), $(($(cat /sys/block/vda/size) / 2048)) MiB, $(ls /sys/block/vda/mq | wc -l) queue(s)"
printf 'n\np\n1\n2048\n\nw\n' | fdisk -u /dev/vda >/dev/null
mkfs.ext4 -q -L ploop /dev/vda1
mount /dev/vda1 /mnt
echo "=> /dev/vda1 partitioned, formatted with ext4 and mounted"

mkdir /mnt/files /mnt/scrap
for n in 1 2 3 4 5 6 7 8; do
    head -c 4000000 /dev/urandom >/mnt/files/$n
done
(cd /mnt/files && sha256sum ?) >/mnt/sums
echo "=> $(ls /mnt/files | wc -l) files with $(du -sm /mnt/files | cut -f1) MiB written, checksums kept beside them"

head -c 200000000 /dev/zero | tr '\0' x >/mnt/scrap/big
sync
rm -r /mnt/scrap
# ext4 can trim the blocks only when the deletion is through its journal.
umount /mnt
mount /dev/vda1 /mnt
echo "=> a file of 200 MB written, synced and deleted"
echo "=> fstrim: $(fstrim -v /mnt)"

fio --name=verify --filename=/mnt/fio --size=48M --rw=randrw --bsrange=4k-64k \
    --ioengine=libaio --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 \
    --randseed=7 --group_reporting --minimal >/tmp/fio.out
echo "=> fio: 48 MiB random reads and writes, every block verified"
umount /mnt
sync
e2fsck -fn /dev/vda1 >/dev/null 2>&1
echo "=> e2fsck: clean; power off"
GUEST

    heading "Second boot: everything still there?"
    boot second-boot <<'GUEST'
e2fsck -fn /dev/vda1 >/dev/null 2>&1
echo "=> e2fsck: clean"
mount /dev/vda1 /mnt
cd /mnt/files
sha256sum -c ../sums >/dev/null
echo "=> $(ls | wc -l) files, checksums as written"
fio --name=verify --filename=/mnt/fio --size=48M --rw=randrw --bsrange=4k-64k \
    --ioengine=libaio --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 \
    --randseed=7 --verify_only --minimal >/tmp/fio.out
echo "=> fio: the blocks of the first boot verified"
cd /
umount /mnt
GUEST

    heading "Stopping the back-end (SIGTERM)"
    stop_backend
    echo "ended with status 0, socket removed"
    local space_mib=$(($(space_kib) / 1024))
    echo "the image file takes $space_mib MiB on the host"
    # Some 80 MiB of files and the file system's own; 200 MB more without the trim.
    [ "$space_mib" -lt 200 ] || die "the trimmed space did not come back"

    heading "ploop-img info"
    "$img" info "$disk"
    heading "ploop-img check"
    "$img" check "$disk"
    heading "qemu-img check"
    qemu-img check -f parallels "$(image_file)"
}

prepare
started=$SECONDS
demo
printf '\ndemo.sh: everything as it should be, %d seconds after the build\n' $((SECONDS - started))
