#!/usr/bin/env bash
# Clients of QEMU's at a control socket: the Python package qemu.qmp and its qmp-shell run every
# command that there is, on a disk with snapshots that is being served.
#
# usage: ci/qmp.sh [VERSION]      (of qemu.qmp; default: 0.0.6)
#
# Needs python3 with venv, and PyPI: not among the stages that run by default.
set -Eeuo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=$(mkdir -p "${CARGO_TARGET_DIR:-target}" && cd "${CARGO_TARGET_DIR:-target}" && pwd)
version=${1:-0.0.6}
venv=$target/qmp-$version

cargo build --locked --bins
[ -x "$venv/bin/qmp-shell" ] || {
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet "qemu.qmp==$version"
}
exec "$venv/bin/python" ci/qmp_clients.py "$target/debug"
