#!/usr/bin/env bash
# Guests that work while their back-end is killed and started again (docs/durability.md):
# with two queues and with four, while clusters of a chain are copied, on a full host,
# while the machine is paused, while it starts, and twice in quick succession. The test
# suite does a few of each.
#
# usage: ci/deaths.sh [KILLS [TEST...]]      (default: 200 kills in each test, all of them)
set -Eeuo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
# shellcheck source=qemu/tools.sh
. qemu/tools.sh

export PLOOP_KILLS=${1:-200}
shift $(($# > 0 ? 1 : 0))
[ $# -gt 0 ] || set -- deaths::
# A test that cannot run fails.
export PLOOP_REQUIRE_PEERS=1

qemu/guest/build.sh
cargo test --locked --test guest -- --nocapture --test-threads 1 "$@"
