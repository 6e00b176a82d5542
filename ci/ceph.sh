#!/usr/bin/env bash
# Runs tests on CephFS: a monitor, a manager, three OSDs and an MDS, and their file system mounted
# twice with ceph-fuse, as if by two hosts. All of it lives in private mount, network and
# process namespaces and is gone when this ends. For the night: it takes minutes.
#
# usage: ci/ceph.sh               the tests
#        ci/ceph.sh COMMAND...    a command of yours beside the file system
#
# COMMAND finds the two mounts in $BED/m1, whose client sits behind a network link of
# its own, and $BED/m2, and these on its PATH:
#
#   bed_cut, bed_mend       take the link of m1 away, give it back
#   bed_kill_server N       an OSD, 1 to 3, with SIGKILL
#   bed_start_servers       those that were killed
#   bed_heal                wait until they have all that they have missed
#   bed_kill_client N       of m1 or m2, with SIGKILL
#   bed_mount N             m1 or m2 again
#   ceph ...                Ceph's own command, of this cluster
#
# BED_OSD_SIZE=600M makes the OSDs so large (default: 4G, of which a file takes what is
# written).
#
# Runs as root. Ceph comes from the distribution's packages and is unpacked under target/:
# nothing is installed.
set -Eeuo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
storage=ceph
# shellcheck source=ci/bed.sh
. ci/bed.sh

packages=(ceph-mon ceph-mgr ceph-mds ceph-osd ceph-fuse ceph-common)

# The test of locks, each part on a file system of its own: a host that was fenced stays so.
fenced_tests=(
    a_host_that_comes_back_writes_nothing
    a_host_that_comes_back_with_plain_calls
    a_host_that_comes_back_with_the_page_cache
)

# One of those; to be run beside the file system.
run_fenced() {
    take_place
    on_two_mounts blkio "volume::$1"
}

# The other tests that it has to pass; likewise. Those of `storage::host` are not among them: they
# look at files by descriptions of their own, through the page cache, which ceph-fuse does not
# renew after a direct write, and they count blocks, of which ceph-fuse says what the length is.
run_tests() {
    take_place
    on_two_mounts blkio volume::another_host volume::a_guest_that_has_waited volume::a_server
    run_ordinary_tests
}

# The tests that take a mount away, by its own path; likewise.
run_mount_tests() { on_two_mounts blkio volume::a_mount; }

# That of a file system without space.
run_full_test() { on_two_mounts blkio volume::a_full_volume; }

# Ceph's packages and what they need that is not installed.
provide_programs() {
    [ -x "$programs/root/usr/bin/ceph-osd" ] || {
        command -v apt-get >/dev/null || die "there is no apt-get to get Ceph's packages with"
        apt-cache show ceph-osd >/dev/null 2>&1 || apt-get update -q
        rm -rf "$programs.new"
        mkdir -p "$programs.new/debs/partial"
        apt-get install -q -y --no-install-recommends --download-only -o APT::Sandbox::User=root \
            -o Dir::Cache::archives="$programs.new/debs" "${packages[@]}"
        unpack_packages
    }
}

# Makes a cluster, a file system and its mounts in the folder $BED.
make_bed() {
    local id fsid uuid
    overlay_programs
    mkdir run mon mgr modules mds etc
    mkdir -p /etc/ceph 2>/dev/null || true
    mount --bind etc /etc/ceph
    make_link 10.78.0.1/30 10.78.0.2/30
    mkdir -p /run/ceph
    # The servers' own address, so that they meet each other when the link is cut.
    ip addr add 10.78.1.1/32 dev lo
    ip netns exec one ip route add 10.78.1.1/32 via 10.78.0.1
    write_helpers

    fsid=$(cat /proc/sys/kernel/random/uuid)
    write_settings "$fsid"
    monmaptool --create --addv a '[v2:10.78.1.1:3300,v1:10.78.1.1:6789]' --fsid "$fsid" monmap
    make_keys
    ceph-mon --mkfs -i a --monmap monmap
    ceph-mon -i a
    # Without it the file system says that it has no blocks at all.
    ceph-mgr -i a
    for id in 0 1 2; do
        mkdir osd$id
        uuid=$(cat /proc/sys/kernel/random/uuid)
        [ "$(ceph osd new "$uuid")" = $id ]
        ceph-osd --mkfs -i $id --osd-uuid "$uuid"
        ceph-osd -i $id
    done
    # They notice some seconds late that they are full. What they are sent until then must leave them
    # space: at 97 % they refuse their own file system's journal as well, and nothing goes on any more.
    ceph osd set-nearfull-ratio 0.7
    ceph osd set-backfillfull-ratio 0.75
    ceph osd set-full-ratio 0.8
    ceph osd pool create metadata 8
    ceph osd pool create data 16
    ceph fs new bed metadata data
    # How soon a client that is gone is given up: the least that can be set.
    ceph fs set bed session_timeout 30
    ceph fs set bed session_autoclose 30
    ceph-mds -i a
    for _ in $(seq 300); do
        ! ceph mds stat | grep -q up:active || break
        sleep 0.1
    done
    bin/bed_mount 1
    bin/bed_mount 2
    for _ in $(seq 300); do
        [ "$(stat -f -c %b m1)" = 0 ] || return 0
        sleep 0.1
    done
    die "the file system says that it has no blocks"
}

# One file with the keys of all, who may do anything.
make_keys() {
    local name
    ceph-authtool --create-keyring keyring --gen-key -n mon. --cap mon 'allow *'
    for name in mgr.a osd.0 osd.1 osd.2 mds.a client.admin client.host1 client.host2; do
        ceph-authtool keyring --gen-key -n $name --cap mon 'allow *' --cap osd 'allow *' \
            --cap mds 'allow *' --cap mgr 'allow *'
    done
}

write_settings() {
    cat >etc/ceph.conf <<EOT
[global]
fsid = $1
mon host = 10.78.1.1
# Without any, a client may ask before it knows which cluster it is, and is refused.
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = $BED/keyring
public network = 10.78.1.1/32
log file = $BED/log/\$name
run dir = /run/ceph
admin socket = /run/ceph/\$name.\$pid.asok
pid file =
osd pool default size = 3
# All OSDs are on one host.
osd crush chooseleaf type = 0
osd pool default min size = 2
osd pool default pg autoscale mode = off
[mon]
mon data = $BED/mon
mon allow pool delete = true
[mgr]
mgr data = $BED/mgr
# Statistics are its own; what it could do besides is in modules, and none is needed.
mgr module path = $BED/modules
mgr initial modules =
[osd]
osd data = $BED/osd\$id
osd objectstore = bluestore
osd op threads = 1
bluestore block size = $(numfmt --from=iec "${BED_OSD_SIZE:-4G}")
bluestore fsck on mount = false
osd memory target = 939524096
# The servers see each other's death at once or not at all. As often as they ask each other they
# look how full they are.
osd heartbeat interval = 1
osd heartbeat grace = 6
[mds]
mds data = $BED/mds
[client]
# As the other host sees it.
fuse disable pagecache = false
EOT
}

# shellcheck disable=SC2016 # They are expanded when they run.
write_helpers() {
    # The namespace has no other processes of that command line.
    helper bed_kill_server 'kill -9 "$(pgrep -f "^ceph-osd -i $(($1 - 1))\$")"'
    helper bed_start_servers 'for id in 0 1 2; do
    pgrep -f "^ceph-osd -i $id\$" >/dev/null || ceph-osd -i $id
done'
    helper bed_heal 'for _ in $(seq 120); do
    ! ceph osd stat | grep -q "3 up" || exit 0
    sleep 0.5
done
exit 1'
    helper bed_kill_client 'kill -9 "$(pgrep -f "ceph-fuse .*$BED/m$1\$")"'
    mount_helper 'ceph-fuse --id "host$1"'
}

case ${1:-} in
    '')
        build_tests
        for name in "${fenced_tests[@]}"; do
            BED_IS_FENCED=1 enter "$PWD/ci/ceph.sh" run-fenced "$name"
        done
        BED_OSD_SIZE=600M enter "$PWD/ci/ceph.sh" run-full-test
        enter "$PWD/ci/ceph.sh" run-mount-tests
        enter "$PWD/ci/ceph.sh" run-tests
        ;;
    inside) inside "${@:2}" ;;
    run-fenced) run_fenced "$2" ;;
    run-mount-tests) run_mount_tests ;;
    run-full-test) run_full_test ;;
    run-tests) run_tests ;;
    *) enter "$@" ;;
esac
