#!/usr/bin/env bash
# Simulated power cuts: the engine on a disk that loses what it may.
#
# usage: ci/sim.sh [CUTS] [SEED]      (default: 1000000 cuts, another seed each time)
#
# Prints the seed, the cuts and how often each invariant was put to the test. Seven
# runs of so many cuts each, made or only imagined (docs/durability.md): single images,
# images and chains, disks that grow, disks of which snapshots are made, disks that are
# compacted, and disks whose levels go, with snapshots and without. A failure prints the seed of the life that failed and all that
# led to it; that seed with one cut shows it again.
set -Eeuo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PLOOP_SIM_CUTS=${1:-1000000}
export PLOOP_SIM_SEED=${2:-$(date +%s)}

echo "seed $PLOOP_SIM_SEED, $PLOOP_SIM_CUTS cuts"
exec cargo test --locked --profile sim --lib power_cuts -- --nocapture --test-threads 2
