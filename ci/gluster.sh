#!/usr/bin/env bash
# Runs tests on GlusterFS: three bricks, and a volume on them that is mounted twice, as
# if by two hosts. All of it lives in private mount, network and process namespaces
# and is gone when this ends.
#
# usage: ci/gluster.sh [default|shards|strict]             the tests, on a volume of this
#                                                          kind or on one of each
#        ci/gluster.sh default|shards|strict COMMAND...    a command of yours beside a volume
#
# strict is default with client.strict-locks, and has the test of locks alone and that of a
# guest that goes from one mount to the other: five times, or PLOOP_MIGRATIONS=N.
#
# COMMAND finds the two mounts in $BED/m1, whose client sits behind a network link of
# its own, and $BED/m2, and these on its PATH:
#
#   bed_cut, bed_mend       take the link of m1 away, give it back
#   bed_kill_brick N        1 to 3, with SIGKILL
#   bed_start_bricks        those that were killed
#   bed_heal                wait until they have all that they have missed
#   bed_kill_client N       of m1 or m2, with SIGKILL
#   bed_mount N             m1 or m2 again
#
# BED_OPTIONS="key=value ..." sets options of the volume, BED_BRICK_SIZE=150M makes
# the bricks so large, in memory.
#
# Runs as root. GlusterFS is used as installed, or else taken from the distribution's
# packages and unpacked under target/: nothing is installed, so it meets no version of
# its libraries that QEMU may have brought.
set -Eeuo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=$(mkdir -p "${CARGO_TARGET_DIR:-target}" && cd "${CARGO_TARGET_DIR:-target}" && pwd)
programs=$target/gluster

say() { echo "ci/gluster.sh: $*"; }
die() { say "$*" >&2; exit 1; }

# Runs the tests on volumes of these kinds.
test_on() {
    local kind
    cargo test --locked --no-run --lib --test ploop_img --test blkio --test guest
    [[ " $* " != *" strict "* ]] || qemu/guest/build.sh "$target/guest"
    for kind in "$@"; do
        say "the tests on a volume of this kind: $kind"
        enter "$kind" "$PWD/ci/gluster.sh" run-tests
    done
}

# The tests that the volumes have to pass; to be run beside one of them.
run_tests() {
    # Cargo's place for the files of tests.
    mkdir -p "$target/tmp"
    mount --bind "$BED/m1" "$target/tmp"
    export PLOOP_REQUIRE_PEERS=1
    PLOOP_OTHER_MOUNT=$BED/m2 cargo test --locked --offline --test blkio -- \
        --ignored --test-threads 1 gluster::a_host_that_comes_back gluster::another_host
    if [ "$BED_KIND" = strict ]; then
        PLOOP_OTHER_MOUNT=$BED/m2 cargo test --locked --offline --test guest -- \
            --ignored --nocapture migration::mounts
        return 0
    fi
    PLOOP_TEST_FOLDERS=$BED/m1 cargo test --locked --offline --lib storage::host
    # Those left out start the program hundreds of times each.
    cargo test --locked --offline --test ploop_img -- --skip cuts:: --skip kill::
    cargo test --locked --offline --test blkio -- --test-threads 2 \
        true_to_the_model kill:: write_through::
    PLOOP_OTHER_MOUNT=$BED/m2 cargo test --locked --offline --test ploop_img -- \
        --ignored two_mounts::
    PLOOP_OTHER_MOUNT=$BED/m2 cargo test --locked --offline --test blkio -- \
        --ignored --test-threads 1 gluster::servers_that gluster::a_guest_that_has_waited
    # With shards, direct writes are not written behind.
    [ "$BED_KIND" != default ] ||
        PLOOP_OTHER_MOUNT=$BED/m2 cargo test --locked --offline --test blkio -- \
            --ignored gluster::a_flush_tells
}

# Unpacks GlusterFS's own packages, all of one version. Some names are those of one
# release, and some packages are not there in another.
unpack_programs() {
    local name offered version
    local -a packages
    command -v apt-get >/dev/null || die "there is no glusterd; install GlusterFS's server and client"
    apt-cache show glusterfs-server >/dev/null 2>&1 || apt-get update -q
    offered=$(apt-cache madison glusterfs-server glusterfs-client glusterfs-common glusterfs-cli \
        libglusterfs0 libgfrpc0 libgfxdr0 libgfapi0 libgfchangelog0 libglusterd0 \
        liburcu8 liburcu8t64 2>/dev/null | awk -F ' *[|] *' '{ print $1, $2 }' | tr -s ' ')
    version=$(awk '$1 == "glusterfs-server" { print $2; exit }' <<<"$offered")
    [ -n "$version" ] || die "apt knows no glusterfs-server"
    mapfile -t packages < <(awk -v version="$version" \
        '($2 == version || $1 ~ /^liburcu/) && !seen[$1]++ { print $1 "=" $2 }' <<<"$offered")
    rm -rf "$programs.new"
    mkdir -p "$programs.new/debs" "$programs.new/root"
    (cd "$programs.new/debs" && apt-get download -q -o APT::Sandbox::User=root "${packages[@]}")
    for name in "$programs.new"/debs/*.deb; do
        dpkg -x "$name" "$programs.new/root"
    done
    rm -rf "$programs"
    mv "$programs.new" "$programs"
}

# Enters the namespaces, again in this script.
enter() {
    local bed code=0
    [ "$(id -u)" = 0 ] || die "only root can mount GlusterFS: run this as root"
    command -v ip >/dev/null || die "there is no ip: install iproute2"
    command -v glusterd >/dev/null || [ -x "$programs/root/usr/sbin/glusterd" ] || unpack_programs
    bed=$(mktemp -d /var/tmp/ploop-gluster.XXXXXX)
    BED=$bed BED_KIND=$1 unshare --mount --net --pid --fork --kill-child --mount-proc \
        "$PWD/ci/gluster.sh" inside "${@:2}" || code=$?
    rm -rf "$bed"
    return $code
}

# Makes the unpacked programs appear where they belong, for this namespace alone.
overlay_programs() {
    command -v glusterd >/dev/null && return
    local folder
    mkdir layer
    mount -t tmpfs layer layer
    mkdir layer/upper layer/work
    mount -t overlay -o "lowerdir=$programs/root/usr:/usr,upperdir=$BED/layer/upper,workdir=$BED/layer/work" \
        overlay /usr
    # Where /lib is not a link into it, and the settings.
    for folder in "$programs"/root/lib/*/; do
        [ ! -d "$folder" ] || [ -L /lib ] || die "cannot use the packages: /lib is no link into /usr"
    done
    mkdir etc
    cp -a "$programs/root/etc/glusterfs" etc/
    mkdir -p /etc/glusterfs 2>/dev/null || true
    mount --bind etc/glusterfs /etc/glusterfs
    ldconfig -C "$BED/ld.so.cache"
    cp "$BED/ld.so.cache" etc/
    mount --bind etc/ld.so.cache /etc/ld.so.cache
}

# Makes bricks, a volume and its mounts in the folder $BED.
make_bed() {
    local brick option
    mkdir lib log brick1 brick2 brick3 m1 m2 bin
    for option in groups hooks; do
        [ ! -d "/var/lib/glusterd/$option" ] || cp -a "/var/lib/glusterd/$option" lib/
        [ ! -d "$programs/root/var/lib/glusterd/$option" ] ||
            cp -a "$programs/root/var/lib/glusterd/$option" lib/
    done
    mkdir -p /var/lib/glusterd /var/log/glusterfs
    mount --bind lib /var/lib/glusterd
    mount --bind log /var/log/glusterfs
    mount -t tmpfs run /run
    mkdir -p /run/netns /run/gluster
    ip link set lo up
    ip netns add one
    ip link add bed0 type veth peer name bed1
    ip link set bed1 netns one
    ip addr add 10.77.0.1/24 dev bed0
    ip link set bed0 up
    ip netns exec one ip addr add 10.77.0.2/24 dev bed1
    ip netns exec one ip link set bed1 up
    ip netns exec one ip link set lo up
    if [ -n "${BED_BRICK_SIZE:-}" ]; then
        for brick in brick1 brick2 brick3; do mount -t tmpfs -o "size=$BED_BRICK_SIZE" brick $brick; done
    fi
    write_helpers
    export PATH=$BED/bin:$PATH
    glusterd
    for _ in $(seq 100); do
        ! gluster pool list >/dev/null 2>&1 || break
        sleep 0.1
    done
    manage volume create bed replica 3 10.77.0.1:"$BED"/brick{1,2,3} force
    [ "$BED_KIND" != shards ] || manage volume set bed group virt
    [ "$BED_KIND" != strict ] || manage volume set bed client.strict-locks on
    # How soon a client that is gone is given up.
    for option in server.tcp-user-timeout=5 network.ping-timeout=5 server.keepalive-time=2 \
        server.keepalive-interval=1 server.keepalive-count=3 ${BED_OPTIONS:-}; do
        manage volume set bed "${option%%=*}" "${option#*=}"
    done
    manage volume start bed
    bed_mount 1
    bed_mount 2
}

manage() { gluster --mode=script "$@" >>log/commands 2>&1; }

helper() {
    printf '#!/usr/bin/env bash\nset -euo pipefail\n%s\n' "$2" >"bin/$1"
    chmod +x "bin/$1"
}

# shellcheck disable=SC2016 # They are expanded when they run.
write_helpers() {
    helper bed_cut 'ip link set bed0 down'
    helper bed_mend 'ip link set bed0 up'
    # Of a brick, the status breaks a long line in front of the end of its path.
    helper bed_kill_brick 'kill -9 "$(gluster volume status bed | awk -v brick="brick$1 .* Y " '\''$0 ~ brick { print $NF }'\'')"'
    helper bed_start_bricks 'for _ in $(seq 10); do
    gluster --mode=script volume start bed force >/dev/null
    sleep 1
    [ "$(gluster volume status bed | grep -c "brick[123] .* Y ")" != 3 ] || exit 0
done
exit 1'
    helper bed_heal 'for _ in $(seq 120); do
    gluster --mode=script volume heal bed >/dev/null 2>&1 || true
    # A file that is being written to is counted now and then, and complete all the same.
    [ "$(gluster volume heal bed info 2>/dev/null | grep -c "Number of entries: 0")" != 3 ] || exit 0
    sleep 0.5
done
exit 1'
    # The namespace has no other processes of that command line.
    helper bed_kill_client 'kill -9 "$(pgrep -f "volfile-id=bed $BED/m$1\$")"'
    helper bed_mount 'umount -l "$BED/m$1" 2>/dev/null || true
host=(); [ "$1" != 1 ] || host=(nsenter --net=/run/netns/one)
"${host[@]}" glusterfs --volfile-server=10.77.0.1 --volfile-id=bed "$BED/m$1"
for _ in $(seq 100); do
    ! { mountpoint -q "$BED/m$1" && stat "$BED/m$1/." >/dev/null 2>&1; } || exit 0
    sleep 0.1
done
exit 1'
}

inside() {
    local code=0
    cd "$BED"
    overlay_programs
    make_bed || { tail -n 20 log/commands >&2; die "cannot make the volume"; }
    (cd "$OLDPWD" && "$@") || code=$?
    umount -l m1 m2 || true
    return $code
}

case ${1:-} in
    '') test_on default shards strict ;;
    default | shards | strict)
        if [ $# -gt 1 ]; then enter "$@"; else test_on "$1"; fi
        ;;
    inside) inside "${@:2}" ;;
    run-tests) run_tests ;;
    *) die "unknown argument '$1'" ;;
esac
