#!/usr/bin/env bash
# Brings .venv to the state that pyproject.toml and constraints.txt describe. Safe to call again: a second call takes
# under a second. PYTHON names the interpreter to build it from; VENV a different folder for it. With an NVIDIA driver, PyTorch's wheels are
# those for the newest CUDA that the driver runs; `infra/setup.sh torch` only says which.
set -euo pipefail
unset CDPATH  # with it, cd may go elsewhere
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${VENV:-.venv}"
STAMP="$VENV/.posttrain-setup"

# The package index holds wheels for CUDA 13.0, which needs driver 580; PyTorch's own index has those for CUDA 12.6, which runs from 525.
torch_wheels() {
    local driver major limit=""
    if ! command -v nvidia-smi >/dev/null; then
        echo "default no NVIDIA driver: PyTorch as the package index has it"
        return
    fi
    ! command -v timeout >/dev/null || limit="timeout 30"  # it hangs with a broken driver
    read -r driver < <($limit nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1) || true
    driver="${driver%"${driver##*[![:space:]]}"}"
    major="${driver%%.*}"
    if [[ ! "$major" =~ ^[0-9]+$ ]]; then
        echo "default nvidia-smi names no driver (${driver:-it printed nothing}): PyTorch as the package index has it; no GPU can be used until the driver answers"
    elif [ "$major" -ge 580 ]; then
        echo "default NVIDIA driver $driver: PyTorch for CUDA 13.0"
    elif [ "$major" -ge 525 ]; then
        echo "cu126 NVIDIA driver $driver, older than 580: PyTorch for CUDA 12.6, from download.pytorch.org"
    else
        echo "cpu NVIDIA driver $driver, older than 525, runs no CUDA that PyTorch supports: PyTorch for the CPU; update the driver"
    fi
}

read -r TORCH TORCH_REASON < <(torch_wheels)
if [ "${1:-}" = torch ]; then
    echo "setup: $TORCH_REASON"
    exit 0
fi
WANTED="$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)"
[ "$TORCH" = default ] || WANTED+=" $TORCH"

fresh() { [ -x "$VENV/bin/python" ] && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ]; }

suitable() { command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

interpreter() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: posttrain needs Python 3.11 or newer, and found none under: ${PYTHON:-python3.11 python3.12 python3.13 python3 python}." >&2
    echo "Install one (for example: uv python install 3.11), or name it: PYTHON=/path/to/python3.11 make setup" >&2
    return 1
}

# uv installs in a tenth of pip's time but does not read pip's configuration.
with_uv() {
    local uv="$1" setting value
    local -a options=()
    for setting in find-links extra-index-url index-url; do
        value="$(pip_setting "$setting")"
        # One option per value: pip separates them by white space.
        for value in $value; do options+=("--$setting" "$value"); done
    done
    [ "$TORCH" = default ] || options+=(--torch-backend "$TORCH")
    "$uv" pip install --quiet --python "$VENV/bin/python" --index-strategy unsafe-best-match \
        ${options[@]+"${options[@]}"} --constraint constraints.txt --editable '.[dev,servers]'
}

pip_setting() {
    local variable
    variable="PIP_$(tr 'a-z-' 'A-Z_' <<<"$1")"
    { echo "${!variable:-}"; "$VENV/bin/python" -m pip config get "global.$1" 2>/dev/null || true; } | tr '\n' ' '
}

# Files that no process of the project imports, or only a few tests: almost half of the bytes.
SKIPPED='site-packages/((.*/)?tests?/|torch/testing/_internal/'
SKIPPED+='|(apprise|asyncssh|databricks|dateparser|gunicorn|hypothesis|pip|prompt_toolkit|pyasn1_modules|rich_rst|sklearn)/'
SKIPPED+='|fontTools/(?!misc/).*/|scipy/signal/|sympy/(polys/benchmarks|stats|physics/(?!units/)[a-z]+)/'
SKIPPED+='|moto/(?!(cloudwatch|core|events|iam|moto_api|moto_server|s3|s3bucket_path|sts|utilities)/).*/'
SKIPPED+='|huggingface_hub/(cli|inference)/|playwright/async_api/|wcwidth/table_grapheme_overrides/'
SKIPPED+='|transformers/models/(?!(auto|bloom|encoder_decoder|gemma2|llama|mamba|mistral|qwen2|qwen3|qwen3_moe)/).*/'
SKIPPED+='|transformers/(cli|exporters|pipelines)/)'

# Every stage is a separate process, and each would compile torch, MLflow and Prefect again if PYTHONDONTWRITEBYTECODE is set.
# pip compiles by itself. Some packages carry templates that are no Python: a file that cannot be compiled is no fault.
compile_packages() {
    local packages
    packages="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    "$VENV/bin/python" -m compileall -qq -j 0 -x "$SKIPPED" "$packages" flows infra pipelines posttrain tasks || true
}

with_pip() {
    local -a options=()
    [ "$TORCH" = default ] || options+=(--extra-index-url "https://download.pytorch.org/whl/$TORCH")
    "$VENV/bin/python" -m pip install --quiet ${options[@]+"${options[@]}"} --constraint constraints.txt --editable '.[dev,servers]'
}

# An index of one's own may have only wheels for the CPU.
check_torch() {
    local found
    [[ "$TORCH_REASON" == *"for CUDA"* ]] || return 0
    found="$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')"
    [[ "$found" != *+cpu ]] || echo "setup: torch $found has no CUDA, so the GPU would not be used; install it from an index with wheels for CUDA" >&2
}

find_uv() {
    command -v uv && return
    [ -x "$VENV/bin/uv" ] || "$VENV/bin/python" -m pip install --quiet uv >/dev/null 2>&1 || return 1
    echo "$VENV/bin/uv"
}

if fresh; then exit 0; fi
echo "setup: installing into $VENV (3 GB, more with CUDA; once per change of pyproject.toml or constraints.txt)"
echo "setup: $TORCH_REASON"
if [ ! -x "$VENV/bin/python" ]; then
    BASE="$(interpreter)"
    "$BASE" -m venv "$VENV"
fi
if UV="$(find_uv)" && with_uv "$UV"; then
    compile_packages
else
    echo "setup: uv is not to be had or could not install; using pip, which takes minutes"
    with_pip
fi
check_torch
echo "$WANTED" >"$STAMP"
echo "setup: done"
