#!/usr/bin/env bash
# Builds the test guest, a kernel and an initramfs, out of the host's packages.
#
# usage: build.sh [DIR]       (default: guest in cargo's target folder)
#
# Makes DIR/vmlinuz and DIR/initrd.cpio, and does nothing if both are newer than
# this folder. The kernel comes from the distribution's package, which is
# downloaded and unpacked, never installed. The initramfs holds busybox and the
# host's fio and file system tools with the libraries they need; a caller
# appends a second archive with /script in it (see init).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
# shellcheck source=qemu/tools.sh
. "$repo/qemu/tools.sh"

out=${1:-${CARGO_TARGET_DIR:-$repo/target}/guest}
mkdir -p "$out"
out=$(cd "$out" && pwd)

# Programs of the host that the guest gets. Everything else is busybox.
programs=(fio mkfs.ext4 e2fsck resize2fs blkdiscard fallocate)

die() { echo "guest/build.sh: $*" >&2; exit 1; }

# The kernel packages to unpack, one a line. The kernels meant for virtual
# machines are smaller and start faster; Ubuntu keeps some modules apart.
kernel_packages() {
    local meta image
    for meta in linux-image-cloud-amd64 linux-image-amd64 linux-image-virtual linux-image-generic; do
        # Not every distribution has each of them, and apt-cache fails then.
        image=$(apt-cache depends "$meta" 2>/dev/null |
            awk '$1 == "Depends:" && $2 ~ /^linux-image-(unsigned-)?[0-9]/ && !image { image = $2 } END { print image }') ||
            continue
        [ -n "$image" ] || continue
        echo "$image"
        apt-cache depends "$image" | awk '$1 == "Depends:" && $2 ~ /^linux-modules-[0-9]/ { print $2; exit }'
        return
    done
    die "no kernel package found; run 'apt-get update' first"
}

unpack_kernel() {
    local into=$1 package
    local -a packages
    mapfile -t packages < <(kernel_packages)
    [ ${#packages[@]} -gt 0 ] || exit 1
    echo "guest/build.sh: kernel from ${packages[*]}"
    # apt drops its privileges to read what it downloads, and says so at length
    # where it can't; the download works all the same.
    (cd "$into" && apt-get download -q "${packages[@]}" >download.log 2>&1) ||
        { cat "$into/download.log" >&2; die "could not download ${packages[*]}"; }
    for package in "$into"/*.deb; do
        dpkg-deb -x "$package" "$into/kernel"
    done
    # Merged-/usr packages have their modules below /usr/lib.
    if [ -d "$into/kernel/usr/lib/modules" ] && [ ! -d "$into/kernel/lib/modules" ]; then
        mkdir -p "$into/kernel/lib"
        mv "$into/kernel/usr/lib/modules" "$into/kernel/lib/modules"
    fi
}

# Copies these drivers into folder $2, numbered in the order of loading.
# What the kernel has built in needs no file.
add_modules() {
    local kernel=$1 into=$2 version number=10 kind path name
    shift 2
    version=$(basename "$(echo "$kernel"/lib/modules/*)")
    mkdir -p "$into"
    while read -r kind path _; do
        [ "$kind" = insmod ] || continue
        name=$(basename "$path")
        case $name in
            *.ko) cp "$path" "$into/$number-$name" ;;
            *.ko.xz) xz -dc "$path" >"$into/$number-${name%.xz}" ;;
            *.ko.zst) zstd -qdc "$path" >"$into/$number-${name%.zst}" ;;
            *) die "do not know how to unpack $path" ;;
        esac
        number=$((number + 1))
    done < <(for module in "$@"; do
        modprobe -d "$kernel" -S "$version" --show-depends "$module" || kill $$
    done | awk '!seen[$2]++')
}

# Copies a program and the libraries that the dynamic linker would load.
add_program() {
    local root=$1 program=$2 path file to
    path=$(program_file "$program") || die "$program is not installed"
    install -D "$path" "$root/usr/sbin/$program"
    for file in $(linked_libraries "$path" | grep -o '/[^ ]*'); do
        # The libraries of an unpacked program are where installed ones would be.
        to=$root${file#"$tools_root"}
        [ -e "$to" ] || install -D "$file" "$to"
    done
}

pack_initramfs() {
    local root=$1 to=$2 program
    install -D "$here/init" "$root/init"
    install -D "$(program_file busybox)" "$root/bin/busybox"
    mkdir -p "$root/etc"
    # mkfs.ext4 wants to know its defaults.
    [ ! -e /etc/mke2fs.conf ] || cp /etc/mke2fs.conf "$root/etc/"
    for program in "${programs[@]}"; do
        add_program "$root" "$program"
    done
    # Not compressed: an emulated processor would take longer to unpack it.
    (cd "$root" && find . | LC_ALL=C sort | cpio --quiet -o -H newc --owner=0:0) >"$to"
}

main() {
    [ "$(uname -m)" = x86_64 ] || die "the test guest is built for x86_64 hosts only"
    local work
    exec 9>"$out/lock"
    flock 9
    if [ -s "$out/initrd.cpio" ] && [ -s "$out/vmlinuz" ] &&
        [ -z "$(find "$here" -newer "$out/initrd.cpio" -type f)" ]; then
        return
    fi
    work=$(mktemp -d)
    # shellcheck disable=SC2064  # the name is wanted as it is now
    trap "rm -rf '$work'" EXIT
    unpack_kernel "$work"
    depmod -b "$work/kernel" "$(basename "$(echo "$work"/kernel/lib/modules/*)")"
    add_modules "$work/kernel" "$work/root/modules" virtio_pci virtio_blk ext4
    # For scripts that ask for them, see init.
    add_modules "$work/kernel" "$work/root/modules/replay" dm_log_writes xfs
    pack_initramfs "$work/root" "$out/initrd.cpio.new"
    cp "$work"/kernel/boot/vmlinuz-* "$out/vmlinuz"
    mv "$out/initrd.cpio.new" "$out/initrd.cpio"
    echo "guest/build.sh: $out/vmlinuz and $out/initrd.cpio ($(du -h "$out/initrd.cpio" | cut -f1)) are ready"
}

main
