#!/usr/bin/env bash
# Every check that a change has to pass, in one command.
#
# usage: ci/test.sh [STAGE...]      (default: all of them, in order)
#
# Installs what is missing (qemu/install-tools.sh). A test that needs a program
# which is not there fails here, where a plain `cargo test` leaves it out.
set -Eeuo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
# shellcheck source=qemu/tools.sh
. qemu/tools.sh

export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never}
export PLOOP_REQUIRE_PEERS=1

# One function a stage. To add one, write it and put its name in the list.
stages=(tools format lint scripts guest tests models power_cuts release replay demo chroots bench)

stage_tools() {
    qemu/install-tools.sh ci
    cargo fmt --version
    cargo clippy --version
}

stage_format() {
    cargo fmt --all --check
    cargo fmt --manifest-path fuzz/Cargo.toml --check
}

stage_lint() {
    cargo clippy --locked --workspace --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items
}

stage_scripts() {
    git ls-files '*.sh' .ci/run | xargs shellcheck --external-sources
    shellcheck --shell=sh qemu/guest/init
}

# The kernel and the initramfs that the guest tests boot.
stage_guest() {
    qemu/guest/build.sh
}

stage_tests() {
    cargo test --locked --workspace --no-run
    if [ -z "$power_cuts" ] && is_asked_for power_cuts; then
        # Half of the time the tests wait, for guests and for clocks.
        begin_power_cuts
    fi
    cargo test --locked --workspace
}

# Storage, images and kills on a network file system that lacks what ext4 has, and on one
# that keeps files in shards. Not among the stages that run by default: the one with shards
# took five minutes on two busy cores, and they need root, FUSE and a network for the
# packages. What was found there is also tried by `tests`, on a file system of our own
# (tests/blkio/shards.rs and strict.rs).
stage_gluster() {
    ci/gluster.sh default
    ci/gluster.sh strict
}

stage_shards() {
    ci/gluster.sh shards
}

# Two domains of libvirt and one disk. Not among the stages that run by default: it needs
# root and installs libvirt. tests/guest/plugging.rs has the same of QEMU alone.
stage_libvirt() {
    ci/libvirt.sh
}

# Simulated power cuts, always the same, so that it is the change that a failure tells of; ci/sim.sh
# alone makes the long run, and other ones each time.
stage_power_cuts() {
    [ -n "$power_cuts" ] || begin_power_cuts
    local result=0
    wait "$power_cuts" || result=$?
    power_cuts=
    cat target/power_cuts.log
    return "$result"
}

begin_power_cuts() {
    mkdir -p target
    # In a session of their own, to be ended with all that belongs to them. Where sessions share
    # the processors evenly (sched(7), "The autogroup feature"), that has a priority of its own.
    setsid bash -c '
        { echo 19 > /proc/self/autogroup; } 2> /dev/null || true
        exec nice -n 19 ci/sim.sh 60000 1
    ' > target/power_cuts.log 2>&1 &
    power_cuts=$!
}

end_power_cuts() {
    [ -z "$power_cuts" ] || kill -- "-$power_cuts" 2> /dev/null || true
}

# Each fuzz target for a short time; ci/fuzz.sh alone runs them longer. Where there is no
# nightly toolchain they are left out, and the last lines say so. Not among the stages that
# run by default: building them takes longer than running them, and the inputs are drawn
# anew each time (docs/fuzzing.md).
stage_fuzz() {
    if ! rustup toolchain list 2> /dev/null | grep -q '^nightly'; then
        left_out+=$'fuzz: there is no nightly toolchain, nothing was fuzzed\n'
        printf '%s' "$left_out"
        return
    fi
    ci/fuzz.sh all 20
}

# What threads do to each other, in every order that the memory model allows.
stage_models() {
    RUSTFLAGS="--cfg ploop_loom -D warnings" \
        cargo test --locked --target-dir target/models --lib loom_models
}

# Mutants of the lines that are new: since this branch has left main, or on main those of
# the last commits. Not among the stages that run by default, as docs/durability.md says.
stage_mutants() {
    local head base
    head=$(git rev-parse HEAD)
    base=$(git merge-base HEAD origin/main 2> /dev/null || echo "$head")
    if [ "$base" = "$head" ]; then
        base=$(git rev-list --first-parent --max-count=6 HEAD | tail -n 1)
    fi
    if [ "$base" = "$head" ]; then
        echo "ci/test.sh: no commit to compare with: fetch some more history" >&2
        return 1
    fi
    git log --oneline "$base..HEAD"
    ci/mutants.sh --diff "$base"
}

stage_release() {
    cargo build --release --locked --bins
}

# The power cut below the daemon in a guest; ci/replay.sh alone makes the long run.
stage_replay() {
    ci/replay.sh 2 12
}

stage_demo() {
    qemu/demo.sh
}

# The installation step on machines that are not this one.
stage_chroots() {
    ci/chroots.sh
}

# That the benchmark runs: its figures are not judged here.
stage_bench() {
    ci/bench.sh --short
}

# Whether this stage is one of those that run.
is_asked_for() {
    [[ " ${stages[*]} " == *" $1 "* ]]
}

failed() {
    printf '\nci/test.sh: FAILED in stage %s\n' "$current" >&2
}

[ $# -eq 0 ] || stages=("$@")
for stage in "${stages[@]}"; do
    declare -F "stage_$stage" >/dev/null || { echo "ci/test.sh: no stage '$stage'" >&2; exit 2; }
done

trap failed ERR
trap end_power_cuts EXIT
timings=
left_out=
# The process that makes them, while it does.
power_cuts=
for current in "${stages[@]}"; do
    printf '\n=== %s\n' "$current"
    started=$SECONDS
    "stage_$current"
    timings+=$(printf '%-10s %5d s' "$current" $((SECONDS - started)))$'\n'
done
printf '\n=== done\n%s%-10s %5d s\n' "$timings" total "$SECONDS"
[ -z "$left_out" ] || printf '=== left out\n%s' "$left_out"
