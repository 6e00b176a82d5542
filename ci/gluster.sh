#!/usr/bin/env bash
# Runs tests on GlusterFS: three bricks, and a volume on them that is mounted twice, as
# if by two hosts. All of it lives in private mount, network and process namespaces
# and is gone when this ends.
#
# usage: ci/gluster.sh [default|shards|strict]             the tests, on a volume of this
#                                                          kind or on one of each
#        ci/gluster.sh default|shards|strict COMMAND...    a command of yours beside a volume
#        ci/gluster.sh turns [KIND]                        how long images take to be opened and
#                                                          closed there (default: strict)
#
# strict is default with client.strict-locks, and has the tests of two hosts alone, and that of a
# guest that goes from one mount to the other: five times, or PLOOP_MIGRATIONS=N.
#
# COMMAND finds the two mounts in $BED/m1, whose client sits behind a network link of
# its own, and $BED/m2, and these on its PATH:
#
#   bed_cut, bed_mend       take the link of m1 away, give it back
#   bed_kill_server N       a brick, 1 to 3, with SIGKILL
#   bed_start_servers       those that were killed
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
storage=gluster
# shellcheck source=ci/bed.sh
. ci/bed.sh

# Runs the tests on volumes of these kinds.
test_on() {
    local kind
    build_tests
    if [[ " $* " = *" strict "* ]]; then
        cargo test --locked --no-run --test guest
        qemu/guest/build.sh "$target/guest"
    fi
    for kind in "$@"; do
        say "the tests on a volume of this kind: $kind"
        BED_KIND=$kind enter "$PWD/ci/gluster.sh" run-tests
        BED_KIND=$kind enter "$PWD/ci/gluster.sh" run-mount-tests
        BED_KIND=$kind BED_BRICK_SIZE=150M enter "$PWD/ci/gluster.sh" run-full-test
    done
}

# The tests that the volumes have to pass; to be run beside one of them.
run_tests() {
    take_place
    on_two_mounts blkio volume::a_host_that_comes_back volume::another_host \
        volume::a_server gluster::a_host_that_comes_back
    if [ "$BED_KIND" = strict ]; then
        on_two_mounts guest migration::mounts
        on_two_mounts blkio gluster::a_guest_whose_servers
        return
    fi
    on_two_mounts blkio volume::a_guest_that_has_waited
    PLOOP_REQUIRE_PEERS=1 PLOOP_TEST_FOLDERS=$BED/m1 \
        cargo test --locked --offline --lib storage::host
    run_ordinary_tests
    on_two_mounts blkio gluster::servers_that
    # With shards, direct writes are not written behind.
    [ "$BED_KIND" != default ] || on_two_mounts blkio gluster::a_flush_tells
}

# Measures, with a release build; likewise.
run_turns() {
    take_place
    cargo test --locked --offline --release --test daemon -- --ignored --nocapture turns::
}

# The tests that take a mount away, by its own path; likewise.
run_mount_tests() { on_two_mounts blkio volume::a_mount; }

# That of a volume without space.
run_full_test() { on_two_mounts blkio volume::a_full_volume; }

# GlusterFS's own packages, all of one version. Some names are those of one release, and some
# packages are not there in another.
provide_programs() {
    local offered version
    local -a packages
    command -v glusterd >/dev/null || [ -x "$programs/root/usr/sbin/glusterd" ] || {
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
        mkdir -p "$programs.new/debs"
        (cd "$programs.new/debs" && apt-get download -q -o APT::Sandbox::User=root "${packages[@]}")
        unpack_packages
    }
}

# Makes bricks, a volume and its mounts in the folder $BED.
make_bed() {
    local brick option
    if ! command -v glusterd >/dev/null; then
        overlay_programs
        mkdir etc
        cp -a "$programs/root/etc/glusterfs" etc/
        mkdir -p /etc/glusterfs 2>/dev/null || true
        mount --bind etc/glusterfs /etc/glusterfs
    fi
    mkdir lib brick1 brick2 brick3
    for option in groups hooks; do
        [ ! -d "/var/lib/glusterd/$option" ] || cp -a "/var/lib/glusterd/$option" lib/
        [ ! -d "$programs/root/var/lib/glusterd/$option" ] ||
            cp -a "$programs/root/var/lib/glusterd/$option" lib/
    done
    mkdir -p /var/lib/glusterd /var/log/glusterfs
    mount --bind lib /var/lib/glusterd
    mount --bind log /var/log/glusterfs
    make_link 10.77.0.1/24 10.77.0.2/24
    mkdir -p /run/gluster
    if [ -n "${BED_BRICK_SIZE:-}" ]; then
        for brick in brick1 brick2 brick3; do mount -t tmpfs -o "size=$BED_BRICK_SIZE" brick $brick; done
    fi
    write_helpers
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
    bin/bed_mount 1
    bin/bed_mount 2
}

manage() { gluster --mode=script "$@"; }

# shellcheck disable=SC2016 # They are expanded when they run.
write_helpers() {
    # Of a brick, the status breaks a long line in front of the end of its path.
    helper bed_kill_server 'kill -9 "$(gluster volume status bed | awk -v brick="brick$1 .* Y " '\''$0 ~ brick { print $NF }'\'')"'
    helper bed_start_servers 'for _ in $(seq 10); do
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
    mount_helper 'glusterfs --volfile-server=10.77.0.1 --volfile-id=bed'
}

case ${1:-} in
    '') test_on default shards strict ;;
    default | shards | strict)
        if [ $# -gt 1 ]; then BED_KIND=$1 enter "${@:2}"; else test_on "$1"; fi
        ;;
    turns)
        cargo test --locked --no-run --release --test daemon
        BED_KIND=${2:-strict} enter "$PWD/ci/gluster.sh" run-turns
        ;;
    inside) inside "${@:2}" ;;
    run-turns) run_turns ;;
    run-tests) run_tests ;;
    run-mount-tests) run_mount_tests ;;
    run-full-test) run_full_test ;;
    *) die "unknown argument '$1'" ;;
esac
