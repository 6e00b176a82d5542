#!/usr/bin/env bash
# Installs what is missing for the demonstration, the benchmark and the tests, with apt.
#
# usage: install-tools.sh [demo|bench|ci]      (default: demo)
#
# A machine that has everything is left alone, and no package is ever removed
# or brought to another version. Rust is not installed, only asked for.
set -euo pipefail

# program, package
demo_tools="
qemu-system-x86_64 qemu-system-x86
qemu-img qemu-utils
qemu-storage-daemon qemu-utils
busybox busybox-static
mkfs.ext4 e2fsprogs
e2fsck e2fsprogs
fio fio
blkdiscard util-linux
fallocate util-linux
flock util-linux
cpio cpio
depmod kmod
xz xz-utils
zstd zstd
cc gcc
"
bench_tools="
qemu-storage-daemon qemu-utils
"
ci_tools="
shellcheck shellcheck
mkfs.xfs xfsprogs
"

say() { echo "install-tools.sh: $*"; }
die() { say "$*" >&2; exit 1; }

# The programs of the system administrator are not on everybody's PATH.
PATH=$PATH:/usr/sbin:/sbin

missing_packages() {
    local program package
    while read -r program package; do
        [ -n "$program" ] || continue
        if ! command -v "$program" >/dev/null; then
            echo "$package"
        elif [ "$program" = busybox ] && ldd "$(command -v busybox)" >/dev/null 2>&1; then
            # The guest has no libraries when busybox starts.
            echo "$package"
        fi
    done <<<"$1" | sort -u
}

# Empty if the package is not installed.
installed_version() {
    dpkg-query -W -f '${db:Status-Status} ${Version}\n' "$1" 2>/dev/null | awk '$1 == "installed" { print $2 }' || true
}

# QEMU's packages want each other in one and the same version. Where some are
# there already (from backports, say), the others have to match those, not the
# newest that apt would choose. Prints the packages as apt-get is to be told.
pin_qemu() {
    local package version='' suite=''
    for package in qemu-system-common qemu-utils qemu-system-data qemu-block-extra; do
        version=$(installed_version "$package")
        [ -z "$version" ] || break
    done
    # Where that version comes from; empty if it has gone from the archive.
    [ -z "$version" ] || suite=$(apt-cache madison qemu-system-x86 |
        awk -F ' *[|] *' -v version="$version" '$2 == version { split($3, source, " "); sub("/.*", "", source[2]); print source[2]; exit }')
    # Its other dependencies may have to come from there too.
    case $suite in *-backports) printf '%s\n' --target-release "$suite" ;; esac
    for package in "$@"; do
        case $package in
            qemu-system-x86 | qemu-utils) printf '%s\n' "$package${suite:+=$version}" ;;
            *) printf '%s\n' "$package" ;;
        esac
    done
    case " $* " in
        *" qemu-system-x86 "*) [ -z "$suite" ] ||
            printf '%s\n' "qemu-system-common=$version" "qemu-system-data=$version" ;;
    esac
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "not root and no sudo: run '$*' as root"
    fi
}

install_missing() {
    local -a packages
    mapfile -t packages < <(missing_packages "$1")
    [ ${#packages[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null ||
        die "this is not Debian or Ubuntu; install what these packages hold yourself: ${packages[*]}"
    say "installing ${packages[*]}"
    as_root apt-get update -q
    mapfile -t packages < <(pin_qemu "${packages[@]}")
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends --no-remove "${packages[@]}"
}

case ${1:-demo} in
    demo) tools=$demo_tools ;;
    bench) tools=$demo_tools$bench_tools ;;
    ci) tools=$demo_tools$ci_tools ;;
    *) die "unknown set '$1': demo, bench or ci" ;;
esac
install_missing "$tools"

missing=$(missing_packages "$tools" | tr '\n' ' ')
[ -z "$missing" ] || die "still missing after the installation: $missing"
command -v cargo >/dev/null || die "Rust is missing: https://rustup.rs or your distribution's rustc and cargo, 1.88 or newer"

# Compiling or booting needs no package lists, fetching the guest's kernel does.
if ! apt-cache show linux-image-amd64 linux-image-generic >/dev/null 2>&1; then
    as_root apt-get update -q
fi
