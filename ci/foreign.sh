#!/usr/bin/env bash
# Guests of other machines, under emulation: arm64 whose pages have 16 KiB, and s390x,
# whose bytes go the other way round. Each writes, flushes, discards and reads back a
# disk of the back-end's; a second boot on a new back-end finds it again, and ploop-img
# and, by way of a raw copy, this script compare what is in the image. And pseries, whose
# firmware (SLOF) has to load GRUB from the disk.
#
# usage: ci/foreign.sh [arm64|s390x|pseries]...      (default: all; some minutes each)
#
# Downloads 60 to 250 MB on the first run. Kernels, busybox and GRUB are Debian's for those
# machines, fetched by an apt that has nothing to do with the system's and unpacked
# under target/foreign. QEMU is used as installed, or else comes from there too, with
# all the libraries it needs. Nothing is installed.
# DEBIAN_MIRROR names another mirror.
set -Eeuo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=$(mkdir -p "${CARGO_TARGET_DIR:-target}" && cd "${CARGO_TARGET_DIR:-target}" && pwd)
foreign=$target/foreign
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# How long a guest may take, in seconds. Emulation is slow, and so may the host be.
patience=600

say() { echo "ci/foreign.sh: $*"; }
die() { say "$*" >&2; exit 1; }

# The kernel of each machine, in the first of the suites that has it.
kernel_of() {
    case $1 in
        arm64) echo linux-image-arm64-16k ;;
        s390x) echo linux-image-s390x ;;
        *) die "no such machine: '$1'; arm64, s390x or pseries" ;;
    esac
}
suites=(trixie bookworm)

# apt for another machine or suite, with lists and caches of its own.
private_apt() {
    local arch=$1 suite=$2 world=$foreign/apt/$1-$2
    shift 2
    mkdir -p "$world/lists/partial" "$world/cache/archives/partial" "$world/etc/parts"
    : >"$world/status"
    echo "deb [signed-by=$keyring] $mirror $suite main" >"$world/etc/sources.list"
    apt-get -q -o APT::Architecture="$arch" -o APT::Architectures="$arch" \
        -o Dir::State="$world" -o Dir::State::status="$world/status" \
        -o Dir::State::lists="$world/lists" -o Dir::Cache="$world/cache" \
        -o Dir::Etc="$world/etc" -o Dir::Etc::sourcelist="$world/etc/sources.list" \
        -o Dir::Etc::sourceparts="$world/etc/parts" \
        -o Dir::Etc::preferencesparts="$world/etc/parts" \
        -o APT::Install-Recommends=false -o APT::Sandbox::User="$(id -un)" \
        -o Debug::NoLocking=1 "$@"
}

# Unpacks kernel and busybox of a machine into $foreign/ARCH.
fetch_guest() {
    local arch=$1 suite package image
    [ ! -e "$foreign/$arch/complete" ] || return 0
    package=$(kernel_of "$arch")
    rm -rf "${foreign:?}/$arch"
    mkdir -p "$foreign/$arch/debs" "$foreign/$arch/root"
    for suite in "${suites[@]}"; do
        private_apt "$arch" "$suite" update >"$foreign/$arch/apt.log" 2>&1 || continue
        # The package of that name only depends on the one that has the kernel.
        image=$(private_apt "$arch" "$suite" install -s -y "$package" 2>>"$foreign/$arch/apt.log" |
            awk '$1 == "Inst" && $2 ~ /^linux-image-[0-9]/ { print $2 }') || continue
        [ -n "$image" ] || continue
        say "$arch: $image of $suite"
        (cd "$foreign/$arch/debs" && private_apt "$arch" "$suite" download "$image" busybox-static) \
            >>"$foreign/$arch/apt.log" 2>&1 || continue
        for package in "$foreign/$arch"/debs/*.deb; do
            dpkg -x "$package" "$foreign/$arch/root"
        done
        rm -r "$foreign/$arch/debs"
        touch "$foreign/$arch/complete"
        return 0
    done
    tail -n 20 "$foreign/$arch/apt.log" >&2
    die "cannot get a kernel for $arch from $mirror"
}

# Unpacks QEMU, and what makes images of GRUB, with all their libraries into $foreign/qemu.
fetch_qemu() {
    local suite=${suites[0]} package
    [ ! -e "$foreign/qemu/complete" ] || return 0
    rm -rf "$foreign/qemu"
    mkdir -p "$foreign/qemu"
    say "QEMU of $suite"
    { private_apt amd64 "$suite" update &&
        private_apt amd64 "$suite" install -y --download-only qemu-system-arm qemu-system-s390x \
            qemu-system-ppc grub-common; } \
        >"$foreign/qemu.log" 2>&1 || { tail -n 20 "$foreign/qemu.log" >&2; die "cannot get QEMU"; }
    for package in "$foreign/apt/amd64-$suite"/cache/archives/*.deb; do
        dpkg -x "$package" "$foreign/qemu"
    done
    rm "$foreign/apt/amd64-$suite"/cache/archives/*.deb
    touch "$foreign/qemu/complete"
}

# Runs an unpacked program with its own C library.
unpacked() {
    local program=$1 libraries=$foreign/qemu/usr/lib/x86_64-linux-gnu
    shift
    QEMU_MODULE_DIR=$libraries/qemu exec "$foreign/qemu/usr/lib64/ld-linux-x86-64.so.2" \
        --library-path "$libraries" "$foreign/qemu/usr/bin/$program" "$@"
}

# Runs QEMU's program $1: the system's, or the unpacked one.
qemu() {
    if command -v "$1" >/dev/null; then
        exec "$@"
    fi
    unpacked "$@" -L "$foreign/qemu/usr/share/qemu" -L "$foreign/qemu/usr/share/seabios" \
        -L "$foreign/qemu/usr/share/slof"
}

# Makes sure of QEMU for machine $1.
need_qemu() {
    local program
    case $1 in
        arm64) program=qemu-system-aarch64 ;;
        s390x) program=qemu-system-s390x ;;
        # GRUB is needed as well.
        pseries) program=none ;;
    esac
    command -v "$program" >/dev/null || fetch_qemu
}

# What the guest does; its words come out of the console.
guest_init() {
    cat <<'INIT'
#!/bin/busybox sh
/bin/busybox mkdir -p /applets /proc /sys /dev /tmp
/bin/busybox --install -s /applets
PATH=/applets
export PATH
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
# In whatever order they need each other.
for _ in 1 2 3 4; do
    for module in /modules/*.ko; do insmod "$module" 2>/dev/null; done
done
for _ in $(seq 100); do [ -b /dev/vda ] || sleep 0.1; done

report() { echo "guest: $1=$2"; }
sum() { dd if=/dev/vda bs=1M skip="$1" count="$2" 2>/dev/null | sha256sum | cut -d ' ' -f 1; }

report machine "$(uname -m)"
report page "$(sed -n 's/^KernelPageSize: *//p' /proc/self/smaps | head -n 1)"
report sectors "$(cat /sys/block/vda/size)"
report serial "$(cat /sys/block/vda/serial)"
case " $(cat /proc/cmdline) " in
    *" phase=write "*)
        set -e
        # At the start, over several clusters in the middle, and to the very end.
        for place in 0:3 17:9 60:4; do
            dd if=/dev/urandom of=/dev/vda bs=1M seek="${place%:*}" count="${place#*:}" conv=notrunc,fsync 2>/dev/null
        done
        # A piece that is no whole cluster is given back.
        blkdiscard -o $((19 * 1048576)) -l $((2 * 1048576 + 65536)) /dev/vda
        dd if=/dev/zero of=/dev/vda bs=64k seek=336 count=1 conv=notrunc,fsync 2>/dev/null
        sync
        set +e
        ;;
esac
echo 3 >/proc/sys/vm/drop_caches
report start "$(sum 0 3)"
report middle "$(sum 17 9)"
report end "$(sum 60 4)"
report untouched "$(sum 30 20)"
echo "guest: done"
poweroff -f
INIT
}

# Makes the initramfs of a machine.
build_initrd() {
    local arch=$1 root=$foreign/$1/initrd module name
    rm -rf "$root"
    mkdir -p "$root/bin" "$root/modules"
    cp "$foreign/$arch"/root/bin/busybox "$root/bin/" 2>/dev/null ||
        cp "$foreign/$arch"/root/usr/bin/busybox "$root/bin/"
    # Those that the kernel has built in have no file.
    for name in virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
        module=$(find "$foreign/$arch/root" -name "$name.ko*" | head -n 1)
        case $module in
            *.ko) cp "$module" "$root/modules/" ;;
            *.ko.xz) xz -dc "$module" >"$root/modules/$name.ko" ;;
            *.ko.zst) zstd -qdc "$module" >"$root/modules/$name.ko" ;;
        esac
    done
    guest_init >"$root/init"
    chmod +x "$root/init"
    (cd "$root" && find . | cpio --quiet -o -H newc) >"$foreign/$arch/initrd.cpio"
}

# One boot; what the guest says is in $work/console.
boot() {
    local arch=$1 phase=$2 program
    local -a machine
    local -a system=(-append "quiet panic=-1 phase=$phase")
    case $arch in
        arm64)
            program=qemu-system-aarch64
            machine=(-machine "virt,memory-backend=mem" -cpu "max,pauth-impdef=on")
            ;;
        s390x)
            program=qemu-system-s390x
            machine=(-machine "s390-ccw-virtio,memory-backend=mem")
            ;;
        pseries)
            program=qemu-system-ppc64
            machine=(-machine "pseries,memory-backend=mem")
            ;;
    esac
    if [ "$arch" = pseries ]; then
        system=()
    else
        system+=(-kernel "$(echo "$foreign/$arch"/root/boot/vmlinuz-*)" -initrd "$foreign/$arch/initrd.cpio")
    fi
    "$target/debug/vhost-user-ploop" --socket-path="$work/socket" --blk-file="$work/disk" \
        --serial=foreign >>"$work/log" 2>&1 &
    daemon=$!
    for _ in $(seq 100); do [ ! -S "$work/socket" ] || break; sleep 0.1; done
    (qemu "$program" -accel tcg -smp 2 -m 512M "${machine[@]}" \
        -object memory-backend-memfd,id=mem,size=512M,share=on \
        -chardev socket,id=disk,path="$work/socket" -device vhost-user-blk-pci,chardev=disk,bootindex=0 \
        "${system[@]}" -nographic -nodefaults -serial stdio -no-reboot) \
        </dev/null >"$work/console" 2>&1 &
    guest=$!
    (sleep "$patience"; kill "$guest") 2>/dev/null &
    timer=$!
    wait "$guest" || true
    kill "$timer" 2>/dev/null || true
    kill "$daemon"
    wait "$daemon" || { cat "$work/log" >&2; die "$arch: the back-end failed"; }
    tr -d '\r' <"$work/console" | grep -q '^guest: done' ||
        { tail -n 40 "$work/console" "$work/log" >&2; die "$arch: the guest did not finish"; }
}

told() { tr -d '\r' <"$work/console" | sed -n "s/^guest: $1=//p"; }

expect() {
    [ "$2" = "$3" ] || die "$arch: $1: '$2', expected '$3'"
}

# The digest of a part of the raw copy, in MiB.
raw_sum() { dd if="$work/raw" bs=1M skip="$1" count="$2" status=none | sha256sum | cut -d ' ' -f 1; }

test_machine() {
    local arch=$1 part page zeros
    fetch_guest "$arch"
    need_qemu "$arch"
    build_initrd "$arch"
    work=$(mktemp -d "$foreign/run.XXXXXX")
    "$target/debug/ploop-img" create "$work/disk" 64M
    boot "$arch" write
    case $arch in
        arm64) page='16 kB'; expect machine "$(told machine)" aarch64 ;;
        s390x) page='4 kB'; expect machine "$(told machine)" s390x ;;
    esac
    expect page "$(told page)" "$page"
    expect sectors "$(told sectors)" 131072
    expect serial "$(told serial)" foreign
    "$target/debug/ploop-img" check "$work/disk"
    "$target/debug/ploop-img" convert -O raw "$work/disk" "$work/raw"
    zeros=$(head -c 20M /dev/zero | sha256sum | cut -d ' ' -f 1)
    for part in start:0:3 middle:17:9 end:60:4 untouched:30:20; do
        IFS=: read -r name first count <<<"$part"
        digest=$(told "$name")
        expect "$name" "$digest" "$(raw_sum "$first" "$count")"
        if [ "$name" = untouched ]; then expect "$name" "$digest" "$zeros"; else
            [ "$digest" != "$(head -c "${count}M" /dev/zero | sha256sum | cut -d ' ' -f 1)" ] ||
                die "$arch: $name was not written"
        fi
    done
    # What was discarded reads as zeros.
    [ -z "$(dd if="$work/raw" bs=64k skip=304 count=33 status=none | tr -d '\0' | head -c 1)" ] ||
        die "$arch: what was discarded is still there"
    cp "$work/console" "$work/first"
    boot "$arch" read
    for name in start middle end untouched; do
        expect "$name after a second boot" "$(told "$name")" "$(tr -d '\r' <"$work/first" | sed -n "s/^guest: $name=//p")"
    done
    rm -rf "$work"
    say "$arch: written, flushed, discarded, found again: good"
}

# Unpacks GRUB for Open Firmware into $foreign/pseries.
fetch_grub() {
    local suite log=$foreign/pseries/apt.log
    [ ! -e "$foreign/pseries/complete" ] || return 0
    rm -rf "$foreign/pseries"
    mkdir -p "$foreign/pseries/root"
    for suite in "${suites[@]}"; do
        { private_apt ppc64el "$suite" update &&
            (cd "$foreign/pseries" && private_apt ppc64el "$suite" download grub-ieee1275-bin); } \
            >>"$log" 2>&1 || continue
        say "pseries: GRUB of $suite"
        dpkg -x "$foreign"/pseries/*.deb "$foreign/pseries/root"
        touch "$foreign/pseries/complete"
        return 0
    done
    tail -n 20 "$log" >&2
    die "cannot get GRUB"
}

# SLOF marks its reads as barriers, which no other driver does.
test_pseries() {
    local arch=pseries
    fetch_grub
    need_qemu pseries
    work=$(mktemp -d "$foreign/run.XXXXXX")
    printf 'echo\necho "guest: done"\nhalt\n' >"$work/grub.cfg"
    (unpacked grub-mkimage -O powerpc-ieee1275 -d "$foreign/pseries/root/usr/lib/grub/powerpc-ieee1275" \
        -c "$work/grub.cfg" -p / -o "$work/grub" echo halt)
    truncate -s 64M "$work/raw"
    # A partition that firmware loads as it is ("PReP"): type 0x41, 16384 sectors from 2048 on.
    printf '\x80\0\0\0\x41\0\0\0\0\x08\0\0\0\x40\0\0' |
        dd of="$work/raw" bs=1 seek=446 conv=notrunc status=none
    printf '\x55\xaa' | dd of="$work/raw" bs=1 seek=510 conv=notrunc status=none
    dd if="$work/grub" of="$work/raw" bs=512 seek=2048 conv=notrunc status=none
    "$target/debug/ploop-img" convert "$work/raw" "$work/disk"
    boot pseries none
    rm -rf "$work"
    say "pseries: the firmware has loaded GRUB: good"
}

[ -f "$keyring" ] || die "$keyring is missing: install debian-archive-keyring"
[ $# -gt 0 ] || set -- arm64 s390x pseries
for arch in "$@"; do [ "$arch" = pseries ] || kernel_of "$arch" >/dev/null; done
cargo build --locked --bins
for arch in "$@"; do
    if [ "$arch" = pseries ]; then test_pseries; else test_machine "$arch"; fi
done
