"""Run every kind of training on the pretend device and print its results and costs as JSON.

    python -m tests.device.measure sft dpo

It runs as a separate process: the pretend device is registered with PyTorch for good.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from tests.device.planted import FAULTS, caught
from tests.device.pretend import DEVICE, Counts, pretending
from tests.training import runs
from tests.training.runs import Memory, options_of, start

SAMPLING = ("posttrain/rollouts/", "posttrain/models/inference.py", "posttrain/models/allocator.py")
"""Files that sample or score; the rest of the counts belongs to updates."""
STEPS = 2
OFFLINE = ("sft", "reward", "dpo", "grpo_pairs")


def run(name: str, device: str) -> tuple[dict[int, dict[str, float]], Counts]:
    """Train `name` on a device. Return its metrics by step, and the counts."""
    AcceleratorState._reset_state(True)
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    recorder = Memory()
    with pretending() as counts:
        model = start(name, Path(tempfile.mkdtemp()), recorder)
    assert next(model.parameters()).device == torch.device(device)
    return recorder.steps, counts


def part(counts: Any, sampling: bool) -> int:
    """Return the counts of sampling and scoring, or of the rest."""
    return sum(n for place, n in counts.items() if place.startswith(SAMPLING) == sampling)


def measured(name: str) -> dict[str, Any]:
    """Return the metrics on both devices, and the counts per update and per step."""
    ours, counts = run(name, str(DEVICE))
    theirs, _ = run(name, "cpu")
    spec = None if name in OFFLINE else options_of(name)
    updates = STEPS * (spec.epochs * spec.minibatches if spec else 1)
    moving = sum(n for place, n in counts.copies.items() if "trainer.py" in place)  # the weights, once
    return {
        "metrics": [[ours[step], theirs[step]] for step in sorted(theirs)],
        "update": {
            "syncs": part(counts.syncs, False) / updates,
            "copies": (part(counts.copies, False) - moving) / updates,
        },
        "sampling": {"syncs": part(counts.syncs, True) / STEPS, "copies": part(counts.copies, True) / STEPS},
        "places": str(counts),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs.STEPS = STEPS
    found = {name: measured(name) for name in sys.argv[1:]}
    json.dump({"kinds": found, "planted": {name: caught(fault) for name, fault in FAULTS.items()}}, sys.stdout)
