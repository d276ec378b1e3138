#!/usr/bin/env bash
# Make the environment of a peer that benchmarks measure us against: .venv-trl from requirements-trl.txt.
#
#     benchmarks/peers/setup.sh trl
set -euo pipefail
unset CDPATH  # with it, cd may go elsewhere
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit

peer="${1:-}"
requirements="benchmarks/peers/requirements-$peer.txt"
if [ -z "$peer" ] || [ ! -f "$requirements" ]; then
    echo "usage: benchmarks/peers/setup.sh PEER, with one of: trl" >&2
    exit 2
fi
python3 -m venv ".venv-$peer"
# the same versions as ours of all that both need, so that the difference is the peer's own
".venv-$peer/bin/python" -m pip install --quiet --requirement "$requirements" --constraint constraints.txt
echo "made .venv-$peer"
