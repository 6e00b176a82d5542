#!/usr/bin/env bash
# Fuzz targets, with libFuzzer and the address sanitizer: docs/fuzzing.md says what they
# try. Seeds are in fuzz/seeds/TARGET; what is found meanwhile is kept in
# fuzz/corpus/TARGET, and inputs that fail go to fuzz/artifacts/TARGET.
#
# usage: ci/fuzz.sh [TARGET|all [SECONDS]]      (default: all of them, 120 s each)
#
# Needs a nightly toolchain (rustup toolchain install nightly --profile minimal): the
# sanitizer is not in a stable one. Installs cargo-fuzz where it is missing.
set -Eeuo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"

cargo_fuzz_version=0.13.1
targets=(header bat extension descriptor request inflight messages connection qmp metrics)

target=${1:-all}
seconds=${2:-120}
[ "$target" = all ] || targets=("$target")

if ! rustup toolchain list 2> /dev/null | grep -q '^nightly'; then
    echo "ci/fuzz.sh: there is no nightly toolchain, which the sanitizer needs:" >&2
    echo "    rustup toolchain install nightly --profile minimal" >&2
    exit 2
fi
if ! cargo fuzz --version 2> /dev/null | grep -q "$cargo_fuzz_version"; then
    cargo install --locked "cargo-fuzz@$cargo_fuzz_version"
fi

for target in "${targets[@]}"; do
    mkdir -p "fuzz/corpus/$target"
    options=("-max_total_time=$seconds" -timeout=120 -print_final_stats=1 -verbosity=1)
    case $target in
        # Long inputs from the start: their structure is not found byte by byte.
        bat | request | inflight | messages | connection | qmp | metrics)
            options+=(-len_control=0 -max_len=2000) ;;
    esac
    case $target in
        # Threads allocate and others free, which looks like a leak, and each look costs.
        messages | connection) options+=(-detect_leaks=0) ;;
    esac
    dictionary=fuzz/$target.dict
    [ ! -e "$dictionary" ] || options+=("-dict=$dictionary")
    folders=("fuzz/corpus/$target")
    [ ! -d "fuzz/seeds/$target" ] || folders+=("fuzz/seeds/$target")
    printf '\n--- %s, %s s\n' "$target" "$seconds"
    cargo +nightly fuzz run "$target" "${folders[@]}" -- "${options[@]}"
done
