#!/usr/bin/env bash
# Installs what is missing for the demonstration, the benchmark and the tests, with apt.
#
# usage: install-tools.sh [demo|bench|ci|libvirt]      (default: demo)
#
# A machine that has everything is left alone, no package is ever removed or
# brought to another version, and apt's sources stay as they are. A missing package
# is taken from the first of these that adds packages and changes none:
#
#   1. what apt is set up for
#   2. the distribution's backports, if what is there came from them
#   3. what apt is set up for, unpacked in target/tools instead of installed
#
# A package that would start a service is always unpacked.
#
# Rust is not installed, only asked for.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=qemu/tools.sh
. "$repo/qemu/tools.sh"

# What is read of apt's output is in English.
export LC_ALL=C

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
modprobe kmod
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
debootstrap debootstrap
ip iproute2
git git
python3 python3
"
# What apt installs as a service, and starts, though only its programs are wanted.
services="
promtool prometheus
prometheus prometheus
"
# The last is no program that somebody calls here: it comes with the driver for QEMU.
libvirt_tools="
libvirtd libvirt-daemon
virsh libvirt-clients
virt-qemu-run libvirt-daemon-driver-qemu
"

say() { echo "install-tools.sh: $*"; }
die() { say "$*" >&2; exit 1; }

# Whether program $1 is there and of use.
is_here() {
    local file
    file=$(program_file "$1") || return 1
    # The guest has no libraries when busybox starts.
    [ "$1" != busybox ] || ! linked_libraries "$file" >/dev/null
}

missing_packages() {
    local program package
    while read -r program package; do
        [ -z "$program" ] || is_here "$program" || echo "$package"
    done <<<"$programs" | sort -u
}

may_install() {
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null
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

# What apt would do with these arguments, one line each: "add" or "change",
# package, version. Fails where apt finds no way.
plan() {
    local said
    said=$(apt-get -s -q install --no-install-recommends "$@" 2>&1) || return 1
    sed -n -E \
        -e 's/^Inst ([^ ]+) \(([^ ]+) .*/add \1 \2/p' \
        -e 's/^Inst ([^ ]+) \[[^]]*\] \(([^ ]+) .*/change \1 \2/p' \
        -e 's/^Remv ([^ ]+) .*/change \1 -/p' <<<"$said"
}

only_adds() {
    local steps
    steps=$(plan "$@") && ! grep -q '^change' <<<"$steps"
}

# The version of QEMU of which parts are installed; empty if none is. QEMU's
# packages want each other in one and the same version.
qemu_version() {
    dpkg-query -W -f '${db:Status-Status} ${Version}\n' \
        qemu-system-common qemu-utils qemu-system-data qemu-block-extra 2>/dev/null |
        awk '$1 == "installed" { print $2; exit }'
}

# The suite in which apt, with these options, has QEMU's version $1.
suite_of() {
    local version=$1
    shift
    apt-cache "$@" madison qemu-system-x86 |
        awk -F ' *[|] *' -v version="$version" \
            '$2 == version && !suite { split($3, source, " "); suite = source[2] } END { sub("/.*", "", suite); print suite }'
}

# Installs these packages if apt, with the options in `apt`, can do so without
# changing what is there. QEMU's are asked for in the version of its parts that are
# there, if apt has that.
install() {
    local package version suite=
    local -a request=("${apt[@]}")
    version=$(qemu_version)
    [ -z "$version" ] || suite=$(suite_of "$version" "${apt[@]}")
    # What they depend on may have to come from there too.
    case $suite in *-backports) request+=(--target-release "$suite") ;; esac
    for package in "$@"; do
        case $package in
            qemu-system-x86)
                request+=("$package${suite:+=$version}")
                [ -z "$suite" ] ||
                    request+=("qemu-system-common=$version" "qemu-system-data=$version") ;;
            qemu-*) request+=("$package${suite:+=$version}") ;;
            *) request+=("$package") ;;
        esac
    done
    only_adds "${request[@]}" || return 1
    say "installing $*${suite:+ ($version)}"
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -q -y --no-install-recommends --no-remove "${request[@]}" ||
        die "apt-get could not install $*"
}

# Sets `apt` to options that make it look at the distribution's backports too. Its
# sources and lists stay as they are: these have lists of their own.
look_at_backports() {
    local own=$tools/apt distribution codename uri components key
    # shellcheck source=/dev/null
    read -r distribution codename < <(. /etc/os-release && echo "$ID ${VERSION_CODENAME:-}")
    # From where the release itself comes. The names in the format are apt's.
    # shellcheck disable=SC2016
    IFS='|' read -r uri components < <(
        apt-get indextargets --format '$(RELEASE)|$(REPO_URI)|$(COMPONENT)' "Created-By: Packages" |
            awk -F '|' -v OFS='|' -v release="$codename" '
                $1 == release && (!uri || $2 == uri) { uri = $2; components = components " " $3 }
                END { if (uri) print uri, components }'
    ) || return 1
    key=/usr/share/keyrings/$distribution-archive-keyring.gpg
    [ -e "$key" ] && key="[signed-by=$key] " || key=
    rm -rf "$own"
    mkdir -p "$own/lists/partial"
    printf 'deb %s%s %s%s\n' "$key" "$uri" "$codename" "$components" \
        "$key" "$uri" "$codename-backports" "$components" >"$own/sources.list"
    apt=(
        -o "Dir::Etc::SourceList=$own/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$own/lists" -o Dir::Cache::PkgCache= -o Dir::Cache::SrcPkgCache=
    )
    apt-get -q "${apt[@]}" update >"$own/log" 2>&1
}

# Unpacks a package and what it needs below target/tools. Packages of the machine
# that apt would remove or change for it stay, and go on being used by the rest.
unpack() {
    local package=$1 steps work name version why link
    # A compiler is of no use where it is unpacked.
    if [ "$package" = gcc ] && ! may_install; then
        die "gcc is missing, and only root may install it (there is no sudo): run 'apt-get install gcc' as root"
    fi
    steps=$(plan "$package") ||
        die "apt has no way to install $package; run 'apt-get update' as root, or install it yourself"
    if [ "$package" = gcc ] || grep -qE '^change libc6(:[a-z0-9]+)? [^-]' <<<"$steps"; then
        die "installing $package would change other packages (apt-get -s install $package shows which); install it yourself"
    fi
    why="to install it, apt would have to remove or change other packages"
    may_install || why="only root may install it, and there is no sudo"
    [ "$package" != prometheus ] || why="installed, it would start as a service"
    say "unpacking $package in $tools: $why"
    work=$tools/download
    rm -rf "$work"
    mkdir -p "$work" "$tools_root"
    while read -r _ name version; do
        [ "$version" = - ] || echo "$name=$version"
    done <<<"$steps" >"$work/packages"
    # apt drops its privileges to read what it downloads, and says so at length
    # where it can't; the download works all the same.
    (cd "$work" && xargs apt-get download -q <packages >log 2>&1) ||
        { cat "$work/log" >&2; die "could not download $package"; }
    for package in "$work"/*.deb; do
        dpkg-deb -x "$package" "$tools_root"
    done
    # What links to a place from / on, as depmod does to /bin/kmod, means one in here.
    find "$tools_root" -type l -lname '/*' | while read -r link; do
        [ ! -e "$tools_root$(readlink "$link")" ] || ln -sf "$tools_root$(readlink "$link")" "$link"
    done
    rm -rf "$work"
}

# Makes program $1 of the unpacked ones one that can be called.
expose() {
    local program=$1 folder file=
    local -a options=()
    for folder in usr/bin usr/sbin bin sbin; do
        [ ! -x "$tools_root/$folder/$program" ] || file=$tools_root/$folder/$program
    done
    [ -n "$file" ] || return 0
    mkdir -p "$tools_bin"
    rm -f "$tools_bin/$program"
    if ! linked_libraries "$file" >/dev/null; then
        ln -s "$file" "$tools_bin/$program"
        return
    fi
    if linked_libraries "$file" | grep 'not found' >&2; then
        die "$file does not find these libraries"
    fi
    case $program in qemu-system-*)
        for folder in usr/share/qemu usr/share/seabios usr/lib/ipxe/qemu; do
            options+=(-L "$tools_root/$folder")
        done ;;
    esac
    {
        printf '#!/bin/sh\n# Written by install-tools.sh.\n'
        printf 'LD_LIBRARY_PATH=%q exec' "$(tools_libraries)"
        printf ' %q' "$file" "${options[@]}"
        printf ' "$@"\n'
    } >"$tools_bin/$program"
    chmod +x "$tools_bin/$program"
}

# Gets these packages onto the machine, or into target/tools.
provide() {
    local package
    local -a apt=()
    [ $# -gt 0 ] || return 0
    if may_install; then
        install "$@" && return
        case $* in *qemu-*)
            if [ -n "$(qemu_version)" ] && look_at_backports && install "$@"; then
                return
            fi ;;
        esac
        if [ $# -gt 1 ]; then
            for package in "$@"; do
                provide "$package"
            done
            return
        fi
    fi
    for package in "$@"; do
        unpack "$package"
    done
}

# Programs that are unpacked but that the machine has meanwhile must not hide its own.
forget_superseded() {
    local file
    for file in "$tools_bin"/*; do
        if [ -e "$file" ] && PATH=$machine_path is_here "$(basename "$file")"; then
            rm "$file"
        fi
    done
}

provide_missing() {
    local program _
    local -a packages qemu=() other=() unpacked=()
    mapfile -t packages < <(missing_packages)
    [ ${#packages[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null ||
        die "this is not Debian or Ubuntu; install what these packages hold yourself: ${packages[*]}"
    for package in "${packages[@]}"; do
        case $package in
            qemu-*) qemu+=("$package") ;;
            prometheus) unpacked+=("$package") ;;
            *) other+=("$package") ;;
        esac
    done
    if may_install; then
        as_root apt-get update -q
    fi
    provide "${other[@]}"
    provide "${qemu[@]}"
    for package in "${unpacked[@]}"; do
        unpack "$package"
    done
    while read -r program _; do
        [ -z "$program" ] || is_here "$program" || expose "$program"
    done <<<"$programs"
    rm -rf "$tools/apt"
}

case ${1:-demo} in
    demo) programs=$demo_tools ;;
    bench) programs=$demo_tools$bench_tools ;;
    ci) programs=$demo_tools$ci_tools$services ;;
    libvirt) programs=$demo_tools$libvirt_tools ;;
    *) die "unknown set '$1': demo, bench, ci or libvirt" ;;
esac
forget_superseded
provide_missing

missing=$(missing_packages | paste -s -d ' ')
[ -z "$missing" ] || die "still missing after the installation: $missing"
command -v cargo >/dev/null || die "Rust is missing: https://rustup.rs or your distribution's rustc and cargo, 1.88 or newer"

# Compiling or booting needs no package lists, fetching the guest's kernel does.
if ! apt-cache show linux-image-amd64 linux-image-generic >/dev/null 2>&1; then
    as_root apt-get update -q
fi
