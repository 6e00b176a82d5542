#!/usr/bin/env bash
# Domains of libvirt and one disk. A domain that comes second is turned away at once,
# whether it starts or the disk is attached to it, while both guests go on; when the first
# is gone, the second gets the disk. A guest goes on after its back-end was killed and
# started again. QEMU, under libvirt's user, gets at a socket that has its group. And a guest
# moves to another libvirtd with a back-end of its own, and back, while it works.
#
# usage: ci/libvirt.sh                the tests
#        ci/libvirt.sh COMMAND...     a command of yours, beside a libvirtd
#
# libvirtd runs in private mount, network and process namespaces, with files and settings
# of its own: one of the machine is not touched, and all is gone when this ends. COMMAND
# finds it with `virsh`, and the folder of this run in $BED. The other one has a namespace of
# each kind but processes, a name and a network address, as if on another host.
#
# Runs as root, without KVM. Installs what is missing (qemu/install-tools.sh).
set -Eeuo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
# shellcheck source=qemu/tools.sh
. qemu/tools.sh

target=$(mkdir -p "${CARGO_TARGET_DIR:-target}" && cd "${CARGO_TARGET_DIR:-target}" && pwd)
# The user and the group of QEMU under Debian's libvirt.
qemu_user=libvirt-qemu
socket=/run/disk.sock
# How QEMU comes back to a back-end, and gets at its socket.
reconnect="<reconnect enabled='yes' timeout='1'/>"
rights=(--socket-mode=660 --socket-group="$qemu_user")
# What enters the namespaces that a back-end is to run in; empty for those of this script.
in_namespaces=()
# Of this host and of the other one.
addresses=(10.79.0.1 10.79.0.2)
# How long something may take that takes a second or two on a machine that is not busy.
patience=300

say() { echo "ci/libvirt.sh: $*"; }
die() { say "FAILED: $*" >&2; exit 1; }

prepare() {
    [ "$(id -u)" = 0 ] || die "libvirtd wants its namespaces from root: run this as root"
    qemu/install-tools.sh libvirt
}

# Enters the namespaces, again in this script.
enter() {
    local code=0
    BED=$(mktemp -d /var/tmp/ploop-libvirt.XXXXXX)
    export BED
    unshare --mount --net --pid --fork --kill-child --mount-proc \
        "$repo/ci/libvirt.sh" inside "$@" || code=$?
    if [ "$code" = 0 ]; then
        rm -rf "$BED"
    else
        say "what the programs said is in $BED" >&2
    fi
    return "$code"
}

# Gives the namespaces folders, users and a libvirtd of their own.
make_bed() {
    local folder libvirtd
    touch "$BED/backend.log"
    # QEMU's user finds its files in here.
    chmod 711 "$BED"
    mkdir -p "$BED"/{etc,log,domains,sockets} /etc/libvirt /var/{lib,cache,log}/libvirt
    for folder in /run /etc/libvirt /var/lib/libvirt /var/cache/libvirt; do
        mount -t tmpfs -o mode=755 private "$folder"
    done
    mount --bind "$BED/log" /var/log/libvirt
    # Where the one host's virsh finds the other's libvirtd.
    mkdir /run/libvirt
    mount --bind "$BED/sockets" /run/libvirt
    # The one of this network, and without control groups: libvirt would make some in those
    # of the machine.
    umount --recursive --lazy /sys
    mount -t sysfs private /sys
    # With the numbers that libvirt's package gives them.
    cp /etc/passwd /etc/group "$BED/etc/"
    getent group "$qemu_user" >/dev/null || echo "$qemu_user:x:64055:" >>"$BED/etc/group"
    getent passwd "$qemu_user" >/dev/null ||
        echo "$qemu_user:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin" >>"$BED/etc/passwd"
    mount --bind "$BED/etc/passwd" /etc/passwd
    mount --bind "$BED/etc/group" /etc/group
    # virtlogd would be one more process to start.
    cat >/etc/libvirt/qemu.conf <<SETTINGS
user = "$qemu_user"
group = "$qemu_user"
stdio_handler = "file"
# Two hosts use the files of a domain, and each would remember an owner of its own.
remember_owner = 0
SETTINGS
    # There is no polkit. And a guest is not moved between hosts of one number or name.
    cat >/etc/libvirt/libvirtd.conf <<SETTINGS
auth_unix_rw = "none"
host_uuid = "$(cat /proc/sys/kernel/random/uuid)"
SETTINGS
    libvirtd --pid-file /run/libvirtd.pid >"$BED/log/libvirtd" 2>&1 &
    libvirtd=$!
    export LIBVIRT_DEFAULT_URI=qemu:///system
    until timeout 60 virsh uri >/dev/null 2>&1; do
        kill -0 "$libvirtd" 2>/dev/null || { cat "$BED/log/libvirtd" >&2; die "libvirtd has ended"; }
        sleep 0.1
    done
}

# Another host, whose files are in $BED/other: its namespaces, a libvirtd in them, and a network
# between the two.
make_other_host() {
    local started=$SECONDS
    mkdir "$BED/other"
    BED=$BED/other unshare --mount --net --uts "$repo/ci/libvirt.sh" other-host \
        >"$BED/other/said" 2>&1 &
    other=$!
    in_other=(nsenter --target "$other" --mount --net)
    other_uri="qemu+unix:///system?socket=$BED/other/sockets/libvirt-sock"
    until timeout 60 virsh --connect "$other_uri" uri >/dev/null 2>&1; do
        if ! kill -0 "$other" 2>/dev/null || [ $((SECONDS - started)) -gt "$patience" ]; then
            cat "$BED/other/said" >&2
            die "the other host's libvirtd is not there"
        fi
        sleep 0.1
    done
    ip link add host0 type veth peer name host1 netns "$other"
    ip address add "${addresses[0]}/24" dev host0
    ip link set host0 up
    "${in_other[@]}" ip address add "${addresses[1]}/24" dev host1
    "${in_other[@]}" ip link set host1 up
}

# That host, until it is killed.
be_other_host() {
    echo other-host >/proc/sys/kernel/hostname
    make_bed
    wait
}

# virsh, which has to answer: a libvirtd or a QEMU that hangs fails the test.
ask() {
    local code=0
    timeout --kill-after=5 "$patience" virsh --quiet "$@" || code=$?
    # What `timeout` returns when it had to end it.
    [ "$code" -lt 124 ] || say "no answer within $patience seconds: virsh $*" >&2
    return "$code"
}

# is_refused TEXT COMMAND...: libvirt must refuse it, and say TEXT.
is_refused() {
    local text=$1 said
    shift
    if said=$(ask "$@" 2>&1); then
        die "this should have failed: virsh $*"
    fi
    grep -q -- "$text" <<<"$said" || die "virsh $* said: $said"
}

# How many back-ends have been ready to serve.
readies() { grep -c ' ready: ' "$BED/backend.log" || true; }

# start_backend OPTION...: serves the disk.
start_backend() {
    local before
    before=$(readies)
    "${in_namespaces[@]}" "$target/release/vhost-user-ploop" --socket-path="$socket" \
        --blk-file="$disk" "$@" >>"$BED/backend.log" 2>&1 &
    backend=$!
    until [ "$(readies)" -gt "$before" ]; do
        kill -0 "$backend" 2>/dev/null || { cat "$BED/backend.log" >&2; die "the back-end has ended"; }
        sleep 0.1
    done
}

stop_backend() {
    local code=0
    kill "$backend"
    wait "$backend" || code=$?
    [ "$code" = 0 ] || { cat "$BED/backend.log" >&2; die "the back-end ended with status $code"; }
}

# The same on the other host.
start_other_backend() {
    local BED=$BED/other backend
    local -a in_namespaces=("${in_other[@]}")
    start_backend "$@"
    other_backend=$backend
}

stop_other_backend() {
    local BED=$BED/other backend=$other_backend
    stop_backend
}

# Kills it, and starts another one in its place. It leaves its socket, for the next one to
# replace.
replace_backend() {
    kill -KILL "$backend"
    # The shell says that it was killed.
    { wait "$backend" || true; } 2>/dev/null
    start_backend "$@"
}

# device [TAG]: the disk as a device of a domain, with TAG in its source.
device() {
    cat <<DEVICE
<disk type='vhostuser' device='disk'>
  <driver name='qemu' type='raw'/>
  <source type='unix' path='$socket'>${1:-}</source>
  <target dev='vda' bus='virtio'/>
</disk>
DEVICE
}

# define NAME [DEVICE]: a domain whose guest runs the script on standard input.
define() {
    local name=$1 folder=$BED/domains/$1
    mkdir "$folder"
    cat >"$folder/script"
    (cd "$folder" && echo script | cpio --quiet -o -H newc) |
        cat "$target/guest/initrd.cpio" - >"$folder/initrd"
    # libvirt gives the files of a domain to QEMU's user.
    cp "$target/guest/vmlinuz" "$folder/"
    # An emulated timer may seem dead while the machine is busy: no_timer_check.
    cat >"$folder/domain.xml" <<DOMAIN
<domain type='qemu'>
  <name>$name</name>
  <memory unit='MiB'>512</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>$folder/vmlinuz</kernel>
    <initrd>$folder/initrd</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 no_timer_check</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <devices>
    <emulator>$(command -v qemu-system-x86_64)</emulator>
    <controller type='pci' model='pcie-root'/>
    <controller type='pci' model='pcie-root-port'/>
    <controller type='pci' model='pcie-root-port'/>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='$folder/console' append='on'/></serial>
    ${2:-}
  </devices>
</domain>
DOMAIN
    ask define --validate "$folder/domain.xml"
}

# told NAME KEY: what the guest has last reported under KEY, or nothing.
told() {
    grep -ao "^guest: $2=[a-z0-9]*" "$BED/domains/$1/console" 2>/dev/null |
        tail -n 1 | cut -d = -f 2
}

# wait_for NAME CONDITION...: until it is true of the guest, which must not fail before.
wait_for() {
    local name=$1 console=$BED/domains/$1/console until=$((SECONDS + patience))
    shift
    until "$@"; do
        if grep -aq '^guest: script ended with status [^0]' "$console" || [ "$SECONDS" -gt "$until" ]; then
            tail -n 40 "$console" >&2
            die "the guest of $name waits in vain, or failed: $*"
        fi
        sleep 0.5
    done
}

has_told() { [ "$(told "$1" "$2")" = "$3" ]; }
has_counted() {
    local count
    count=$(told "$1" "$2")
    [ "${count:-0}" -ge "$3" ]
}
has_ended() { grep -aq '^guest: script ended with status 0' "$BED/domains/$1/console"; }
is_off() { [ "$(ask domstate "$1")" = "shut off" ]; }

# goes_on NAME KEY: the guest counts further. What it is at now may be all but done; what
# comes next has yet to begin.
goes_on() {
    local counted
    counted=$(told "$1" "$2")
    wait_for "$1" has_counted "$1" "$2" $((counted + 2))
}

# Nobody has the disk open, and it was closed as it should be.
is_sound() {
    local image
    "$target/release/ploop-img" check "$disk" || return 1
    for image in "$disk"/*.hds*; do
        qemu-img check -f parallels "$image" || return 1
    done
}

# Writes, and compares; each round $1 writes something else.
# shellcheck disable=SC2016 # It is expanded in the guest, like those that follow.
round='
    round() {
        fio --name=round --filename=/dev/vda --offset=1M --size=4M --rw=randrw --bs=16k \
            --ioengine=libaio --direct=1 --iodepth=8 --verify=crc32c --verify_fatal=1 \
            --randseed="$1" --minimal >/tmp/fio
    }'

# shellcheck disable=SC2016
owner_script="$round"'
    echo "by the owner" | dd of=/dev/vda conv=fsync 2>/dev/null
    n=0
    while true; do
        n=$((n + 1))
        round $n
        report rounds $n
    done'

# shellcheck disable=SC2016
second_script="$round"'
    n=0
    while [ ! -e /dev/vda ]; do
        n=$((n + 1))
        report beats $n
        sleep 1
    done
    [ "$(head -n 1 /dev/vda)" = "by the owner" ]
    round 0
    report disk used
    while [ -e /dev/vda ]; do sleep 1; done'

tests() {
    test_one_host
    test_moves
    ! grep -a 'I/O error' "$BED"/domains/*/console || die "a guest has seen an error"
}

test_one_host() {
    local tag way counted
    "$target/release/ploop-img" create "$disk" 1G
    define owner "$(device "$reconnect")" <<<"$owner_script"
    define second <<<"$second_script"
    define third "$(device)" <<<"true"
    device >"$BED/device.xml"
    device "$reconnect" >"$BED/reconnecting.xml"

    say "a socket that QEMU's user may not write to, or that is not there"
    is_refused "No such file or directory" start third
    start_backend --socket-mode=600
    is_refused "Permission denied" start third
    stop_backend

    say "one with QEMU's group"
    start_backend "${rights[@]}"
    ask start owner
    ask start second
    wait_for owner has_counted owner rounds 1
    wait_for second has_counted second beats 1
    [ "$(stat -c '%a %U %G' "$socket")" = "660 root $qemu_user" ] || die "libvirt has taken the socket"

    say "a busy disk"
    # Again and again: nothing may stay of one that fails. Where its chardev stayed, the
    # next one would fail before it comes to device_add.
    for _ in 1 2 3; do
        for tag in device reconnecting; do
            patience=20 is_refused "QEMU command 'device_add'" attach-device second "$BED/$tag.xml"
        done
    done
    [ -z "$(ask domblklist second)" ] || die "libvirt thinks that the second domain has a disk"
    is_refused "vhost-user-blk" start third
    is_off third || die "a domain whose start has failed is there"
    grep -q "is turned away: another front-end is being served" "$BED/backend.log" ||
        die "the back-end does not say that it turns somebody away"
    ! grep "sent nothing in time" "$BED/backend.log" || die "somebody had to wait to be turned away"
    goes_on owner rounds
    goes_on second beats

    say "a back-end that is killed and started again"
    for _ in 1 2 3; do
        replace_backend "${rights[@]}"
        goes_on owner rounds
    done

    say "a disk that nobody has any more"
    ask destroy owner
    ask attach-device second "$BED/device.xml"
    wait_for second has_told second disk used
    ask detach-device second "$BED/device.xml"
    wait_for second has_ended second
    wait_for second is_off second
    stop_backend
    is_sound

    say "a domain that is saved and restored"
    # libvirt does not start the back-end: it goes on, without the image.
    start_backend "${rights[@]}" --lock=running
    define saved "$(device "$reconnect")" <<<"$owner_script"
    ask start saved
    wait_for saved has_counted saved rounds 2
    for way in save managedsave; do
        counted=$(told saved rounds)
        case $way in
            save) ask save saved "$BED/domains/saved/memory" ;;
            managedsave) ask managedsave saved ;;
        esac
        is_off saved || die "a domain that was saved is there"
        # It is complete, and anybody's.
        is_sound
        "$target/release/ploop-img" snapshot create "$disk"
        case $way in
            save) ask restore "$BED/domains/saved/memory" ;;
            managedsave) ask start saved ;;
        esac
        wait_for saved has_counted saved rounds $((counted + 2))
        ! "$target/release/ploop-img" check "$disk" 2>/dev/null || die "a domain that was restored has no disk"
    done
    ask destroy saved
    stop_backend
    is_sound
}

# A guest goes from one host to the other, each with a libvirtd and a back-end, and back.
test_moves() {
    local way counted disk=$BED/moving
    say "a domain that moves to another libvirtd and back"
    "$target/release/ploop-img" create "$disk" 1G
    make_other_host
    start_backend "${rights[@]}" --lock=running
    start_other_backend "${rights[@]}" --lock=running
    define moving "$(device "$reconnect")" <<<"$owner_script"
    ask start moving
    wait_for moving has_counted moving rounds 1
    for way in there back there; do
        counted=$(told moving rounds)
        case $way in
            there) ask migrate --live moving "$other_uri" --migrateuri "tcp://${addresses[1]}" ;;
            back)
                ask --connect "$other_uri" migrate --live moving "$LIBVIRT_DEFAULT_URI" \
                    --migrateuri "tcp://${addresses[0]}" ;;
        esac
        # What it was at when it moved, and something that is all done on the host where it is.
        wait_for moving has_counted moving rounds $((counted + 2))
        ! "$target/release/ploop-img" check "$disk" 2>/dev/null || die "a domain that has moved has no disk"
    done
    is_off moving || die "a domain that has moved is still here"
    # A guest that was moved is nobody's here, and neither is its disk.
    stop_backend
    [ "$(ask --connect "$other_uri" domstate moving)" = running ] || die "the domain is gone"
    goes_on moving rounds
    ask --connect "$other_uri" destroy moving
    stop_other_backend
    is_sound
    "$target/release/ploop-img" convert -O raw "$disk" "$BED/raw"
    [ "$(head -c 13 "$BED/raw")" = "by the owner" ] || die "the disk has lost what was written to it"
}

case ${1:-} in
    '')
        prepare
        qemu/guest/build.sh "$target/guest"
        cargo build --release --locked --bins
        enter tests
        say "everything as it should be, after $SECONDS seconds"
        ;;
    other-host) be_other_host ;;
    inside)
        disk=$BED/disk
        make_bed
        "${@:2}"
        ;;
    *)
        prepare
        enter "$@"
        ;;
esac
