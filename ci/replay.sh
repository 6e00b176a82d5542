#!/usr/bin/env bash
# Real power cuts: the released daemon in a guest, whose kernel logs all that is written
# below the image's file system; then what a cut could have left at many points of that
# log, compared with what the guest knows to be flushed (docs/durability.md).
#
# usage: ci/replay.sh [RUNS] [POINTS]      (default: 10 runs, 100 points in each)
#
# Half of the runs are on single images, half on chains. Before them, that a daemon
# whose syncs do nothing is noticed. PLOOP_REPLAY_SECONDS=N is the length of each of the
# two loads of a run, PLOOP_REPLAY_SEED=N what the loads and points are drawn from; which
# request comes when is up to the guest all the same; PLOOP_REPLAY_FIRST=N leaves out the
# runs before that one, the first being 0. What a run with a violation has
# left is kept in cargo's folder for the files of tests.
#
# Runs as root: it mounts file systems, in namespaces of their own.
set -Eeuo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
# shellcheck source=qemu/tools.sh
. qemu/tools.sh

[ "$(id -u)" = 0 ] || { echo "ci/replay.sh: only root can mount what a cut has left" >&2; exit 1; }

export PLOOP_REPLAY_RUNS=${1:-10}
export PLOOP_REPLAY_POINTS=${2:-100}
# A test that cannot run fails.
export PLOOP_REQUIRE_PEERS=1

qemu/guest/build.sh
cargo build --release --locked --bin vhost-user-ploop
PLOOP_REPLAY_DAEMON=$(mkdir -p "${CARGO_TARGET_DIR:-target}" && cd "${CARGO_TARGET_DIR:-target}" && pwd)
export PLOOP_REPLAY_DAEMON+=/release/vhost-user-ploop

test=(cargo test --locked --test replay -- --ignored --nocapture --test-threads 2)
"${test[@]}" syncs_that_do_nothing_are_noticed
"${test[@]}" a_power_cut
