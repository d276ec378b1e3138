"""Shared by the tests with real vLLM servers: the path of vLLM, and its processes."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

PYTHON = Path(os.environ.get("POSTTRAIN_VLLM_PYTHON") or Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python")
QUICK = ("--enforce-eager", "--max-num-seqs", "32")
REAL = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not PYTHON.exists(), reason=f"no vLLM at {PYTHON}: run infra/vllm/setup.sh or set POSTTRAIN_VLLM_PYTHON"
    ),
]


def family(pid: int) -> list[psutil.Process]:
    """Return the process and all that runs under it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def gone(processes: list[psutil.Process]) -> bool:
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
