#!/usr/bin/env bash
# Mutation tests: does a test notice when a line of what keeps data safe is wrong?
#
# usage: ci/mutants.sh [--diff BASE] [--shard K/N] [FILE...]
#
#   FILE...       only mutants of these source files (default: all of .cargo/mutants.toml)
#   --diff BASE   only mutants of lines that differ from the commit BASE, by the quick
#                 tests alone, and only as many, from anywhere among them, as ten minutes
#                 are enough for; fails if they are not enough for one
#   --shard K/N   only every N-th mutant, from the K-th on
#
# cargo-mutants says which mutants there are. All that can be switched on and off are
# built into one program (ci/mutants), so that a mutant costs the tests that reach it
# and no build. The quick tests judge first, those of the library; what survives them
# meets the long ones: real daemons, ploop-img, and more simulated power cuts. The few
# that cannot be switched are left to cargo-mutants itself, which builds each of them;
# with --diff they are only named. What survives there though the long tests notice it
# is judged by ci/mutants.sh FILE.
#
# What was found is kept in target/mutants/judged.jsonl, and a run that was stopped
# goes on from there. Mutants that change nothing are in .cargo/mutants.toml, and
# docs/durability.md says why of each. Fails if a mutant survives; their names are
# printed, and are in target/mutants/survived.txt.
set -Eeuo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly version=27.1.0
readonly work=${MUTANTS_WORK:-target/mutants}
readonly tools=target/tools
readonly long_targets=(--lib --bins --test=ploop_img --test=chains --test=front_end --test=daemon --test=blkio)
# Not worth its time here: it judges engines that are wrong by themselves.
readonly not_this=(--skip=power_cuts_notice_every_broken_rule)

# The exit code that says so.
readonly some_survived=3

# When --diff begins no other mutant, in seconds from the start: one that survives may
# take as long as all tests that reach it.
readonly diff_ends=480

export PLOOP_REQUIRE_PEERS=1

main() {
    local base='' list=() shard=() limits=()
    while [ $# -gt 0 ]; do
        case $1 in
            --diff) base=${2:?--diff needs a commit}; shift ;;
            --shard) shard=(--shard "${2:?--shard needs K/N}"); shift ;;
            -*) echo "ci/mutants.sh: unknown option '$1'" >&2; exit 2 ;;
            *) list+=(--file "$1") ;;
        esac
        shift
    done
    mkdir -p "$work"
    if [ -n "$base" ]; then
        git diff "$base" -- src > "$work/diff"
        list+=(--in-diff "$work/diff")
    fi
    install_cargo_mutants
    "$tools/bin/cargo-mutants" mutants --list --json "${list[@]}" > "$work/list.json"
    # It says nothing at all where the diff is empty.
    if ! grep -q '"name"' "$work/list.json"; then
        echo "no mutants: no line of what .cargo/mutants.toml names is concerned"
        return
    fi
    cargo build --quiet --locked --package mutant-schemata
    if [ -n "$base" ]; then
        limits=(--seconds $((SECONDS < diff_ends ? diff_ends - SECONDS : 0)) --jobs "$(nproc)")
        # There may be a test by now, in another file.
        limits+=(--again)
    fi
    local status=0
    judge 100 --build=--lib "${shard[@]}" "${limits[@]}" || status=$?
    [ "$status" = 0 ] || [ "$status" = "$some_survived" ] || exit "$status"
    cp "$work/left.txt" "$work/one-by-one.txt"
    if [ -n "$base" ]; then
        sed 's/^/left to ci\/mutants.sh without --diff: /' "$work/one-by-one.txt"
        exit "$status"
    fi
    if [ "$status" = "$some_survived" ]; then
        echo "--- what has survived meets the long tests"
        cp "$work/survived.txt" "$work/survived-quick.txt"
        status=0
        judge 3000 --only "$work/survived-quick.txt" --again "${long_targets[@]/#/--build=}" ||
            status=$?
    fi
    judge_one_by_one
    return "$status"
}

install_cargo_mutants() {
    if ! "$tools/bin/cargo-mutants" mutants --version 2> /dev/null | grep -qF "$version"; then
        cargo install --quiet --locked --root "$tools" --version "$version" cargo-mutants
    fi
}

# judge CUTS OPTION...: so many simulated power cuts each time
judge() {
    local cuts=$1
    shift
    PLOOP_SIM_CUTS=$cuts target/debug/mutant-schemata "$work/list.json" --work "$work" \
        "${not_this[@]}" "$@"
}

# Those that cannot be switched.
judge_one_by_one() {
    local names=()
    mapfile -t names < "$work/one-by-one.txt"
    [ "${#names[@]}" -gt 0 ] || return 0
    local only=() name
    for name in "${names[@]}"; do
        # shellcheck disable=SC2001  # a set of characters, each kept
        only+=(--re "^$(sed 's/[][(){}.*+?^$|\\]/\\&/g' <<< "$name")\$")
    done
    PLOOP_SIM_CUTS=100 "$tools/bin/cargo-mutants" mutants --output "$work" "${only[@]}" \
        -- --lib -- --skip power_cuts_notice_every_broken_rule
}

main "$@"
