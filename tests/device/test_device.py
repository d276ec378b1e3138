"""Training on a pretend accelerator: the CPU's numbers, no mixed devices, and few waits and copies."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.workspace import CLIENT, Warm

KINDS = ("sft", "reward", "dpo", "kto", "grpo_pairs", "grpo", "ppo", "dpo-bf16", "grpo-by-offsets", "sft-deterministic",
         "grpo-deterministic", "sft-offloaded")  # fmt: skip
SYNCS = 2
"""Most waits of one update: for all metrics at once, and for the norm of the gradient."""
SAMPLING = {"syncs": 6, "copies": 27}
"""Most waits and copies of one step's sampling and scoring: six tokens each, then two to four forward passes."""


@pytest.fixture(scope="module")
def measured(root: Path, warm: Warm) -> Any:
    command = [sys.executable, "-c", CLIENT, "tests.device.measure", *KINDS]
    environment = os.environ | {"POSTTRAIN_WARM": str(warm.socket), "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_gives_the_numbers_of_the_cpu(measured: Any, kind: str) -> None:
    steps = measured["kinds"][kind]["metrics"]
    assert len(steps) == 2
    # forward and backward, at least one call in each of two layers
    assert (measured["kinds"][kind]["kernel_calls"] >= 2 * 2 * 2) == kind.endswith(("-by-offsets", "-bf16"))
    relative, absolute = (2e-2, 5e-3) if kind.endswith("-bf16") else (1e-3, 1e-6)
    for ours, theirs in steps:
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert math.isfinite(value), name
            assert ours[name] == pytest.approx(value, rel=relative, abs=absolute), name


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_waits_and_copies_no_more_than_it_did(measured: Any, kind: str) -> None:
    found = measured["kinds"][kind]
    assert found["update"]["syncs"] <= SYNCS, found["places"]
    if kind.endswith("-offloaded"):
        assert found["update"]["copies"] > 20, found["places"]  # each gradient there, and each weight back
        return
    # the data of each micro-batch, and once the metrics
    assert found["update"]["copies"] <= found["update"]["micro-batches"] + 1, found["places"]
    if kind.endswith("-deterministic"):
        return  # the sampler's running sum is many small kernels there
    assert found["sampling"]["syncs"] <= SAMPLING["syncs"], found["places"]
    assert found["sampling"]["copies"] <= SAMPLING["copies"], found["places"]


def test_a_mixture_of_experts_waits_once_more_for_its_load(measured: Any) -> None:
    assert measured["experts"]["syncs"] <= SYNCS + 1
    assert measured["experts"]["difference"] < 1e-3


def test_continuations_of_tasks_wait_as_often_for_three_rows_as_for_two(measured: Any) -> None:
    """Each pass waits once, for its results."""
    assert measured["asked"]["syncs"] == {"2": 1, "3": 1}
    assert measured["asked"]["difference"] < 1e-4


def test_the_head_computes_large_tiles(measured: Any) -> None:
    """Count the kernels of one tile; a CPU computes five tiles."""
    assert measured["head"]["launches"] <= 80
    assert measured["head"]["difference"] < 1e-4


def test_the_sampler_stores_what_free_memory_holds(measured: Any) -> None:
    """70 % of 1 MiB for 2 layers x keys and values x 8 numbers of 4 bytes: 5734 tokens, of which the three leading bits stay."""
    assert measured["stored"] == 0b101 << 10


def test_a_recorded_step_starts_no_kernel_by_itself(measured: Any) -> None:
    """Each further token: every eighth one waits and copies, to read which answers have ended; else one mask is copied per token."""
    assert measured["token"]["recorded"] == {"syncs": 1 / 8, "copies": 1 / 8, "launches": 0}
    assert measured["token"]["run"]["copies"] == 1 + 1 / 8
    assert measured["token"]["run"]["launches"] > 100


def test_deterministic_mode_refuses_kernels_without_a_fixed_order_and_the_sampler_needs_none(measured: Any) -> None:
    assert measured["refusals"] == {
        "running sum": "refused: not deterministic",
        "running count": "accepted",
        "histogram": "refused: not deterministic",
        "weighted count": "refused: not deterministic",
        "the sampler's running sum": "accepted",
    }


def test_planted_faults_are_caught(measured: Any) -> None:
    assert measured["planted"] == {
        "index on the host": "refused",
        "mask on the host": "refused",
        "joined with the host": "refused",
        "targets on the host": "refused",
        "loss read in the loop": "syncs 4",
        "branch on a value": "syncs 1",
        "boolean selection": "syncs 1",
        "boolean assignment": "syncs 1",
        "positions of a mask": "syncs 1",
        "repeated by lengths": "syncs 2",
        "values to the host": "syncs 1",
        "one copy per row": "syncs 4",
        "copied with a wait": "syncs 1",
        "copied from memory that is not pinned": "syncs 1",
        "written with a wait": "syncs 1",
        "numbers as a tensor": "syncs 1",
        "index as a list": "syncs 1",
        "counts without a size": "syncs 1",
        "rows without repetition": "syncs 1",
        "neighbours without repetition": "syncs 1",
        "a check that all are near": "syncs 1",
        "drawn by torch": "syncs 1",
        "a matrix that may not be invertible": "syncs 1",
        "read before it arrived": "refused: no wait",
        "generator of the host": "refused: generator",
        "product of whole numbers": "refused: no kernel",
        "kernel of the CPU": "refused: no kernel",
        "histogram": "refused: no kernel",
    }
