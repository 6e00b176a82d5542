#!/usr/bin/env bash
# Runs tests on CephFS: a monitor, three OSDs and an MDS, and their file system mounted
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
#   bed_kill_osd N          0 to 2, with SIGKILL
#   bed_start_osds          those that were killed
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
target=$(mkdir -p "${CARGO_TARGET_DIR:-target}" && cd "${CARGO_TARGET_DIR:-target}" && pwd)
programs=$target/ceph
packages=(ceph-mon ceph-mds ceph-osd ceph-fuse ceph-common)

say() { echo "ci/ceph.sh: $*"; }
die() { say "$*" >&2; exit 1; }

# The test of locks, each part on a file system of its own: a host that was fenced stays so.
fenced_tests=(
    a_host_that_comes_back_writes_nothing
    a_host_that_comes_back_with_plain_calls
    a_host_that_comes_back_with_the_page_cache
)

# Cargo's place for the files of tests is the first mount.
take_place() {
    mkdir -p "$target/tmp"
    mount --bind "$BED/m1" "$target/tmp"
    export PLOOP_REQUIRE_PEERS=1 PLOOP_OTHER_MOUNT=$BED/m2
}

# One of those; to be run beside the file system.
run_fenced() {
    take_place
    cargo test --locked --offline --test blkio -- --ignored --nocapture "gluster::$1"
}

# The other tests that it has to pass; likewise.
run_tests() {
    take_place
    PLOOP_TEST_FOLDERS=$BED/m1 cargo test --locked --offline --lib storage::host
    # Those left out start the program hundreds of times each.
    cargo test --locked --offline --test ploop_img -- --skip cuts:: --skip kill::
    cargo test --locked --offline --test blkio -- --test-threads 2 \
        true_to_the_model kill:: write_through::
    cargo test --locked --offline --test ploop_img -- --ignored two_mounts::
}

# Unpacks Ceph's packages and what they need that is not installed.
unpack_programs() {
    local name
    command -v apt-get >/dev/null || die "there is no apt-get to get Ceph's packages with"
    apt-cache show ceph-osd >/dev/null 2>&1 || apt-get update -q
    rm -rf "$programs.new"
    mkdir -p "$programs.new/debs/partial" "$programs.new/root"
    apt-get install -q -y --no-install-recommends --download-only -o APT::Sandbox::User=root \
        -o Dir::Cache::archives="$programs.new/debs" "${packages[@]}"
    for name in "$programs.new"/debs/*.deb; do
        dpkg -x "$name" "$programs.new/root"
    done
    rm -rf "$programs"
    mv "$programs.new" "$programs"
}

# Enters the namespaces, again in this script.
enter() {
    local bed code=0
    [ "$(id -u)" = 0 ] || die "only root can mount CephFS: run this as root"
    command -v ip >/dev/null || die "there is no ip: install iproute2"
    [ -x "$programs/root/usr/bin/ceph-osd" ] || unpack_programs
    bed=$(mktemp -d /var/tmp/ploop-ceph.XXXXXX)
    BED=$bed unshare --mount --net --pid --fork --kill-child --mount-proc \
        "$PWD/ci/ceph.sh" inside "$@" || code=$?
    rm -rf "$bed"
    return $code
}

# Makes the unpacked programs appear where they belong, for this namespace alone.
overlay_programs() {
    local folder
    mkdir layer
    mount -t tmpfs layer layer
    mkdir layer/upper layer/work layer/merged
    # Where /lib is a link into /usr, its files belong there too.
    [ -L /lib ] || die "cannot use the packages: /lib is no link into /usr"
    for folder in lib sbin bin; do
        [ ! -d "$programs/root/$folder" ] ||
            cp -a "$programs/root/$folder/." "$programs/root/usr/$folder/"
    done
    mount -t overlay -o "lowerdir=$programs/root/usr:/usr,upperdir=$BED/layer/upper,workdir=$BED/layer/work" \
        overlay /usr
    mkdir etc
    mkdir -p /etc/ceph 2>/dev/null || true
    mount --bind etc /etc/ceph
    ldconfig -C "$BED/ld.so.cache"
    mount --bind ld.so.cache /etc/ld.so.cache
}

# Makes a cluster, a file system and its mounts in the folder $BED.
make_bed() {
    local id fsid uuid
    mkdir log run mon mds m1 m2 bin
    mount -t tmpfs run /run
    mkdir -p /run/netns /run/ceph
    ip link set lo up
    ip netns add one
    ip link add bed0 type veth peer name bed1
    ip link set bed1 netns one
    # The servers' own address, so that they meet each other when the link is cut.
    ip addr add 10.78.1.1/32 dev lo
    ip addr add 10.78.0.1/30 dev bed0
    ip link set bed0 up
    ip netns exec one ip addr add 10.78.0.2/30 dev bed1
    ip netns exec one ip link set bed1 up
    ip netns exec one ip link set lo up
    ip netns exec one ip route add 10.78.1.1/32 via 10.78.0.1
    write_helpers
    export PATH=$BED/bin:$PATH

    fsid=$(cat /proc/sys/kernel/random/uuid)
    write_settings "$fsid"
    monmaptool --create --addv a '[v2:10.78.1.1:3300,v1:10.78.1.1:6789]' --fsid "$fsid" monmap
    make_keys
    ceph-mon --mkfs -i a --monmap monmap
    ceph-mon -i a
    for id in 0 1 2; do
        mkdir osd$id
        uuid=$(cat /proc/sys/kernel/random/uuid)
        [ "$(ceph osd new "$uuid")" = $id ]
        ceph-osd --mkfs -i $id --osd-uuid "$uuid"
        ceph-osd -i $id
    done
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
    bed_mount 1
    bed_mount 2
}

# One file with the keys of all, who may do anything.
make_keys() {
    local name
    ceph-authtool --create-keyring keyring --gen-key -n mon. --cap mon 'allow *'
    for name in osd.0 osd.1 osd.2 mds.a client.admin client.host1 client.host2; do
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
[osd]
osd data = $BED/osd\$id
osd objectstore = bluestore
osd op threads = 1
bluestore block size = $(numfmt --from=iec "${BED_OSD_SIZE:-4G}")
bluestore fsck on mount = false
osd memory target = 939524096
# The servers see each other's death at once or not at all.
osd heartbeat grace = 6
[mds]
mds data = $BED/mds
[client]
# As the other host sees it.
fuse disable pagecache = false
EOT
}

helper() {
    printf '#!/usr/bin/env bash\nset -euo pipefail\n%s\n' "$2" >"bin/$1"
    chmod +x "bin/$1"
}

# shellcheck disable=SC2016 # They are expanded when they run.
write_helpers() {
    helper bed_cut 'ip link set bed0 down'
    helper bed_mend 'ip link set bed0 up'
    # The namespace has no other processes of that command line.
    helper bed_kill_osd 'kill -9 "$(pgrep -f "^ceph-osd -i $1\$")"'
    helper bed_start_osds 'for id in 0 1 2; do
    pgrep -f "^ceph-osd -i $id\$" >/dev/null || ceph-osd -i $id
done'
    helper bed_kill_client 'kill -9 "$(pgrep -f "ceph-fuse .*$BED/m$1\$")"'
    helper bed_mount 'umount -l "$BED/m$1" 2>/dev/null || true
host=(); [ "$1" != 1 ] || host=(nsenter --net=/run/netns/one)
"${host[@]}" ceph-fuse --id "host$1" "$BED/m$1"
for _ in $(seq 300); do
    ! { mountpoint -q "$BED/m$1" && stat "$BED/m$1/." >/dev/null 2>&1; } || exit 0
    sleep 0.1
done
exit 1'
}

inside() {
    local code=0
    cd "$BED"
    overlay_programs
    make_bed >commands.log 2>&1 || { tail -n 20 commands.log >&2; die "cannot make the file system"; }
    (cd "$OLDPWD" && "$@") || code=$?
    umount -l m1 m2 || true
    return $code
}

case ${1:-} in
    '')
        cargo test --locked --no-run --lib --test ploop_img --test blkio
        for name in "${fenced_tests[@]}"; do enter "$PWD/ci/ceph.sh" run-fenced "$name"; done
        enter "$PWD/ci/ceph.sh" run-tests
        ;;
    inside) inside "${@:2}" ;;
    run-fenced) run_fenced "$2" ;;
    run-tests) run_tests ;;
    *) enter "$@" ;;
esac
