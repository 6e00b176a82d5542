#!/usr/bin/env bash
# Runs the installation step (qemu/install-tools.sh) on machines of several kinds,
# each a chroot of its own, and checks what came of it: every program is there,
# QEMU starts, no package was removed or changed, and apt's sources are as before.
#
# usage: ci/chroots.sh [--demo] [--suite SUITE] [KIND...]
#
#   --demo         then run qemu/demo.sh in the chroot, with the programs of
#                  target/release; takes another minute each
#   --suite SUITE  the release of Debian or Ubuntu (default: bookworm)
#
# A KIND is a machine and how the step is run there, "bare-root" for example.
# Default: bare-root backports-sudo. Machines:
#
#   bare       nothing of QEMU is installed
#   backports  qemu-utils from backports is; apt's sources list the release only
#   gone       as backports, but its version is in no archive
#   busybox    busybox is installed, which busybox-static would replace
#   compiler   gcc is installed, nothing else, and apt knows its packages
#   complete   the step has been run before; nothing may happen
#
# and "root", "sudo" (a user that may use sudo) or "user" (one that may not). bare-user
# is one that has to fail, and say why: nobody can do without a compiler.
#
# The Debian mirror is the one of the host's apt, or DEBIAN_MIRROR. Ubuntu's is its main
# one, or UBUNTU_MIRROR. Needs root. What is downloaded is kept in target/chroots.
set -Eeuo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=qemu/tools.sh
. "$repo/qemu/tools.sh"

chroots=$(dirname "$tools")/chroots
suite=bookworm
with_demo=

say() { echo "chroots.sh: $*"; }
die() { say "$*" >&2; exit 1; }

# The releases of Ubuntu that are tried: those that its mirror still has.
is_ubuntu() {
    case $suite in jammy | noble | plucky | questing | resolute) ;; *) return 1 ;; esac
}

mirror() {
    if is_ubuntu; then
        echo "${UBUNTU_MIRROR:-http://archive.ubuntu.com/ubuntu}"
        return
    fi
    # The names in the format are apt's.
    # shellcheck disable=SC2016
    local found=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(ORIGIN)|$(REPO_URI)|$(SUITE)' "Created-By: Packages" 2>/dev/null |
        awk -F '|' '$1 == "Debian" && $3 !~ /-/ { print $2; exit }')}
    [ -n "$found" ] || die "apt of this machine knows no mirror of Debian: set DEBIAN_MIRROR"
    echo "$found"
}

# In the chroot $1, with the system's own folders and the checkout at /src.
inside() {
    local root=$1
    shift
    # Expanded in there.
    # shellcheck disable=SC2016
    unshare --mount --pid --fork --kill-child bash -euc '
        root=$1 repo=$2 archives=$3
        shift 3
        mount --make-rprivate /
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount --bind "$repo" "$root/src"
        mount --bind "$archives" "$root/var/cache/apt/archives"
        exec chroot "$root" env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/root \
            CARGO_TARGET_DIR=/target DEBIAN_FRONTEND=noninteractive "$@"
    ' inside "$root" "$repo" "$chroots/archives" "$@"
}

# The chroot that all others are copies of, made anew each week.
make_base() {
    local base=$chroots/$suite.tar root=$chroots/base url components=main
    local -a like=()
    mkdir -p "$chroots/archives/partial"
    [ -z "$(find "$base" -mtime -7 2>/dev/null)" ] || return 0
    url=$(mirror)
    say "making a $suite from $url"
    rm -rf --one-file-system "$root"
    if is_ubuntu; then
        components=main,universe
        # A debootstrap that does not know the release yet makes it as the ones before.
        like=(/usr/share/debootstrap/scripts/gutsy)
    fi
    # Where the distribution's key is not installed, debootstrap only warns; apt in the
    # chroot checks with its own.
    debootstrap --variant=minbase --include=sudo,ca-certificates --components="$components" \
        --cache-dir="$chroots/archives" "$suite" "$root" "$url" "${like[@]}" \
        >"$chroots/debootstrap.log" ||
        { tail "$chroots/debootstrap.log" >&2; die "debootstrap failed"; }
    echo "deb $url $suite ${components//,/ }" >"$root/etc/apt/sources.list"
    rm -f "$root"/etc/apt/sources.list.d/*
    mkdir -p "$root/src" "$root/target"
    # Rust is only asked for, and the demonstration brings its programs.
    printf '#!/bin/sh\n' >"$root/usr/local/bin/cargo"
    chmod +x "$root/usr/local/bin/cargo"
    chroot "$root" useradd --create-home user
    tar -C "$root" -cf "$base" .
    rm -rf --one-file-system "$root"
}

# Installs qemu-utils from backports, and makes apt forget where it came from.
add_backports_utils() {
    local root=$1
    echo "deb $(mirror) $suite-backports main" >"$root/etc/apt/sources.list.d/backports.list"
    inside "$root" apt-get -q update
    inside "$root" apt-get -q -y install --no-install-recommends "qemu-utils/$suite-backports"
    rm -r "$root/etc/apt/sources.list.d/backports.list" "$root"/var/lib/apt/lists/*
}

# Makes of chroot $1 a machine of kind $2.
furnish() {
    local root=$1
    case $2 in
        bare) ;;
        complete) inside "$root" /src/qemu/install-tools.sh ;;
        compiler)
            inside "$root" apt-get -q update
            inside "$root" apt-get -q -y install --no-install-recommends gcc libc6-dev ;;
        busybox)
            inside "$root" apt-get -q update
            inside "$root" apt-get -q -y install busybox ;;
        backports) add_backports_utils "$root" ;;
        gone)
            add_backports_utils "$root"
            sed -i '/^Package: qemu-utils$/,/^$/s/^Version: .*/&+local/' "$root/var/lib/dpkg/status" ;;
        *) die "no kind of machine '$2'" ;;
    esac
}

packages_of() {
    # shellcheck disable=SC2016  # the format is dpkg's
    chroot "$1" dpkg-query -W -f '${Package}:${Architecture} ${Version} ${db:Status-Status}\n' | sort
}

apt_of() {
    (cd "$1/etc/apt" && find . -type f -exec sha256sum {} + | sort)
}

# Runs $3... in chroot $1 as $2 says.
as_user() {
    local root=$1 who=$2
    shift 2
    case $who in
        root) inside "$root" "$@" ;;
        # su leaves the variables of the environment as they are.
        *) inside "$root" su user -s /bin/sh -c 'exec "$@"' -- sh "$@" ;;
    esac
}

try() {
    local kind=$1 who=${1#*-} root=$chroots/$1 log=$chroots/$1.log started=$SECONDS changed
    rm -rf --one-file-system "$root"
    mkdir -p "$root"
    tar -C "$root" -xf "$chroots/$suite.tar"
    case $who in
        root | user) ;;
        sudo) echo 'user ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/user" ;;
        *) die "'$kind' is not MACHINE-root, -sudo or -user" ;;
    esac
    furnish "$root" "${kind%-*}" >"$log" 2>&1 || { tail "$log" >&2; die "could not make $kind"; }
    [ "$who" != user ] || rm "$root/usr/bin/sudo"
    [ "$who" = root ] || chroot "$root" chown -R user /target
    packages_of "$root" >"$root/packages.before"
    apt_of "$root" >"$root/apt.before"

    if [ "$kind" = bare-user ]; then
        ! as_user "$root" "$who" /src/qemu/install-tools.sh demo >"$log" 2>&1 ||
            die "$kind: install-tools.sh found a compiler where there is none"
        grep -q "gcc is missing, and only root may install it" "$log" ||
            { tail -n 20 "$log" >&2; die "$kind: install-tools.sh does not say what is missing"; }
        say "$kind: refused: $(tail -n 1 "$log")"
        rm -rf --one-file-system "$root"
        return
    fi
    as_user "$root" "$who" /src/qemu/install-tools.sh demo >"$log" 2>&1 ||
        { tail -n 20 "$log" >&2; die "$kind: install-tools.sh failed; see $log"; }

    packages_of "$root" >"$root/packages.after"
    changed=$(comm -23 "$root/packages.before" "$root/packages.after")
    [ -z "$changed" ] || die "$kind: these packages were changed or removed: $changed"
    # A package may bring settings of its own.
    changed=$(apt_of "$root" | comm -13 - "$root/apt.before")
    [ -z "$changed" ] || die "$kind: apt's settings were changed: $changed"
    [ "${kind%-*}" != complete ] || cmp "$root/packages.before" "$root/packages.after" ||
        die "$kind: packages were added where nothing was missing"
    version=$(as_user "$root" "$who" bash -c 'repo=/src; . /src/qemu/tools.sh; qemu-system-x86_64 --version | head -n 1; command -v qemu-system-x86_64' | paste -s -d ' ')
    case $version in "QEMU emulator version "*) ;; *) die "$kind: qemu-system-x86_64 does not start: $version" ;; esac
    if [ -n "$with_demo" ]; then
        mkdir "$root/target/release"
        cp "$repo"/target/release/{vhost-user-ploop,ploop-img} "$root/target/release/"
        as_user "$root" "$who" /src/qemu/demo.sh >>"$log" 2>&1 ||
            { tail -n 20 "$log" >&2; die "$kind: demo.sh failed; see $log"; }
    fi
    say "$kind: $version, $(comm -13 "$root/packages.before" "$root/packages.after" | wc -l) packages added, none changed, ${with_demo:+demo.sh ran, }$((SECONDS - started)) s"
    rm -rf --one-file-system "$root"
}

kinds=()
while [ $# -gt 0 ]; do
    case $1 in
        --demo) with_demo=1 ;;
        --suite) suite=$2; shift ;;
        -*) die "unknown option $1" ;;
        *) kinds+=("$1") ;;
    esac
    shift
done
[ ${#kinds[@]} -gt 0 ] || kinds=(bare-root backports-sudo)

[ "$(id -u)" = 0 ] || die "chroots are made by root only"
command -v debootstrap >/dev/null || die "debootstrap is missing: run qemu/install-tools.sh ci"
make_base
for kind in "${kinds[@]}"; do
    try "$kind"
done
