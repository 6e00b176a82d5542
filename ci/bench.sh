#!/usr/bin/env bash
# Measures vhost-user-ploop against qemu-storage-daemon and the plain file.
#
# usage: ci/bench.sh [--short | --targets | --all | --shared | --cost | --stalls | --siege | --fleet | --changes] [OPTION...]   (default: --targets)
#
#   --short    two minutes: shows that everything runs, judges nothing
#   --targets  twenty minutes: what has a target, with PASS or BELOW
#   --all      two hours: everything
#   --shared   four minutes: the rate on storage that hosts share, in --disk-dir DIR
#   --cost     five minutes: instructions and system calls per I/O
#   --stalls   five minutes: how long a guest waits when another process serves
#   --siege    five minutes: the rate beside control clients that misbehave
#   --changes  ten minutes: what a guest notices of snapshots, growth and jobs
#   --fleet    three minutes: what 500 disks cost one host (--disks N)
#
# Installs what is missing (qemu/install-tools.sh) and builds in release mode.
# --help shows the other options: --document docs/performance.md renews the figures
# there, --only TEXT picks scenarios by name, --against PROGRAM measures another build
# of the back-end in the same rounds. How the figures are taken is said in
# docs/performance.md.
#
# Nothing else should run on the machine meanwhile.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
# shellcheck source=qemu/tools.sh
. qemu/tools.sh

case " $* " in
    *" --short "* | *" --targets "* | *" --all "* | *" --shared "* | *" --cost "* | *" --stalls "* | *" --siege "* | *" --fleet "* | *" --changes "* | *" --help "* | *" -h "*) ;;
    *) set -- --targets "$@" ;;
esac

target=${CARGO_TARGET_DIR:-target}
qemu/install-tools.sh bench
qemu/guest/build.sh "$target/guest"
# Each on its own: built together, the features of their dependencies would mix.
cargo build --release --locked --bins
cargo build --release --locked --package ploop-bench

exec "$target/release/ploop-bench" --server "$target/release/vhost-user-ploop" \
    --img "$target/release/ploop-img" --guest "$target/guest" "$@"
