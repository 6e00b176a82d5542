# shellcheck shell=bash
# What ci/gluster.sh and ci/ceph.sh share, which read this file: a storage of three servers that
# is mounted twice, in $BED/m1 and $BED/m2, as if by two hosts. All of it lives in private mount,
# network and process namespaces and is gone when the script ends.
#
# Whoever reads it has set `storage`, its name in both of the script's and the folder's, and
# changed into the project's folder.

target=$(mkdir -p "${CARGO_TARGET_DIR:-target}" && cd "${CARGO_TARGET_DIR:-target}" && pwd)
# Where the storage's programs are unpacked.
programs=$target/${storage:?}

say() { echo "ci/$storage.sh: $*"; }
die() { say "$*" >&2; exit 1; }

# Puts the packages that are in $programs.new/debs into the place of the programs.
unpack_packages() {
    local name folder root=$programs.new/root
    mkdir -p "$root"
    for name in "$programs.new"/debs/*.deb; do
        dpkg -x "$name" "$root"
    done
    # Where /lib is a link into /usr, its files belong there too. This is done once: another run
    # may have these files open, and what is copied over a library changes it where it is in use.
    for folder in lib sbin bin; do
        [ -d "$root/$folder" ] || continue
        [ -L /lib ] || die "cannot use the packages: /lib is no link into /usr"
        mkdir -p "$root/usr/$folder"
        cp -a "$root/$folder/." "$root/usr/$folder/"
    done
    rm -rf "$programs"
    mv "$programs.new" "$programs"
}

# Enters the namespaces, again in the same script.
enter() {
    local bed code=0
    [ "$(id -u)" = 0 ] || die "only root can mount the storage: run this as root"
    command -v ip >/dev/null || die "there is no ip: install iproute2"
    provide_programs
    bed=$(mktemp -d "/var/tmp/ploop-$storage.XXXXXX")
    BED=$bed unshare --mount --net --pid --fork --kill-child --mount-proc \
        "$PWD/ci/$storage.sh" inside "$@" || code=$?
    rm -rf "$bed"
    return $code
}

# In them: makes the storage and its mounts in $BED, and runs a command beside them.
inside() {
    local code=0
    cd "$BED" || exit
    mkdir log m1 m2 bin
    make_bed >log/commands 2>&1 || { tail -n 20 log/commands >&2; die "cannot make the storage"; }
    export PATH=$BED/bin:$PATH
    (cd "$OLDPWD" && "$@") || code=$?
    say_if_dead
    umount -l m1 m2 || true
    return $code
}

# A client that has crashed has every test fail that comes then, for no reason of its own. One that
# was fenced, as it was to be, looks the same.
say_if_dead() {
    local mount
    [ -z "${BED_IS_FENCED:-}" ] || return 0
    for mount in m1 m2; do
        timeout 60 stat "$mount/." >/dev/null 2>&1 ||
            say "the mount $mount is dead at the end: has its client crashed?" >&2
    done
}

# Makes the unpacked programs appear where they belong, for this namespace alone.
overlay_programs() {
    mkdir layer
    mount -t tmpfs layer layer
    mkdir layer/upper layer/work
    mount -t overlay -o "lowerdir=$programs/root/usr:/usr,upperdir=$BED/layer/upper,workdir=$BED/layer/work" \
        overlay /usr
    ldconfig -C "$BED/ld.so.cache"
    mount --bind ld.so.cache /etc/ld.so.cache
}

# A network of two hosts: the servers and the second mount here, the first mount in the namespace
# "one". A link between these two addresses can be cut.
make_link() {
    mount -t tmpfs run /run
    mkdir -p /run/netns
    ip link set lo up
    ip netns add one
    ip link add bed0 type veth peer name bed1
    ip link set bed1 netns one
    ip addr add "$1" dev bed0
    ip link set bed0 up
    ip netns exec one ip addr add "$2" dev bed1
    ip netns exec one ip link set bed1 up
    ip netns exec one ip link set lo up
    helper bed_cut 'ip link set bed0 down'
    helper bed_mend 'ip link set bed0 up'
}

# A command for who runs beside the storage.
helper() {
    printf '#!/usr/bin/env bash\nset -euo pipefail\n%s\n' "$2" >"bin/$1"
    chmod +x "bin/$1"
}

# The one that mounts: $1 is the client's command, which is given a folder; in it, $1 is the
# number of the mount.
# shellcheck disable=SC2016 # It is expanded when it runs.
mount_helper() {
    helper bed_mount 'umount -l "$BED/m$1" 2>/dev/null || true
host=(); [ "$1" != 1 ] || host=(nsenter --net=/run/netns/one)
"${host[@]}" '"$1"' "$BED/m$1"
for _ in $(seq 300); do
    ! { mountpoint -q "$BED/m$1" && stat "$BED/m$1/." >/dev/null 2>&1; } || exit 0
    sleep 0.1
done
exit 1'
}

build_tests() { cargo test --locked --no-run --lib --test ploop_img --test blkio; }

# Cargo's place for the files of tests is the first mount.
take_place() {
    mkdir -p "$target/tmp"
    mount --bind "$BED/m1" "$target/tmp"
}

# Runs tests of this name that need two mounts, one after the other.
on_two_mounts() {
    PLOOP_REQUIRE_PEERS=1 PLOOP_OTHER_MOUNT=$BED/m2 \
        cargo test --locked --offline --test "$1" -- --ignored --nocapture --test-threads 1 "${@:2}"
}

# The tests that any file system has to pass. Those left out start the program hundreds of times
# each, or change the files of a disk while it is served, which is refused where a server may take
# locks away.
run_ordinary_tests() {
    export PLOOP_REQUIRE_PEERS=1
    cargo test --locked --offline --test ploop_img -- --skip cuts:: --skip kill::
    cargo test --locked --offline --test blkio -- --test-threads 2 \
        --skip operations:: true_to_the_model kill:: write_through::
    on_two_mounts ploop_img two_mounts::
}
