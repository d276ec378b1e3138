"""Run every kind of training on the pretend device and print its results and costs as JSON.

    python -m tests.device.measure sft dpo

It runs as a separate process: the pretend device is registered with PyTorch for good.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from torch.utils._pytree import tree_map_only

from posttrain.data.offsets import OFFSETS
from posttrain.evaluation.benchmarks import continuations
from posttrain.models.logprobs import selected_logprobs
from posttrain.models.policy import Policy
from posttrain.models.varlen import KERNELS, Kernel
from posttrain.rollouts.drawing import running_sums
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine, _Sampling
from posttrain.rollouts.steps import RECORDERS
from posttrain.training.sums import Sums
from posttrain.training.supervised import Example, SupervisedObjective
from posttrain.training.trainer import Trainer
from tests.device.planted import FAULTS, caught
from tests.device.pretend import DEVICE, Counts, OnDevice, pretending
from tests.models import small
from tests.models.varlen_reference import REFERENCE
from tests.rollouts.replayed import replayed
from tests.training import runs
from tests.training.runs import Memory, start

SAMPLING = ("posttrain/rollouts/", "posttrain/models/inference.py", "posttrain/models/allocator.py")
"""Files that sample or score; the rest of the counts belongs to updates."""
STEPS = 2
DETERMINISTIC = "-deterministic"
"""Ends the name of a training that may only use deterministic kernels (`compute.deterministic`)."""
OFFLOADED = "-offloaded"
"""Ends the name of a training whose moments are in main memory (`optimizer.offload`)."""
BY_OFFSETS = "-by-offsets"
"""Ends the name of a training whose attention takes offsets."""
BF16 = "-bf16"
"""Ends the name of a training in bfloat16 whose attention takes offsets, as on a GPU."""


class Stepwise(Memory):
    """Keep the counts of the last step: the first one also moves the weights and tries the model's cache."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts, self.before, self.last = counts, Counts(), Counts()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().metrics(step, values)
        self.last, self.before = self.counts.since(self.before), copy.deepcopy(self.counts)


@contextmanager
def counting(found: dict[str, int]) -> Iterator[None]:
    """Count the updates of the last step and their micro-batches."""
    update, add = Trainer.update, Sums.add

    def counted_update(self: Any, *args: Any) -> Any:
        found["updates"] = found.get("updates", 0) + 1
        return update(self, *args)

    def counted_add(self: Any, *args: Any) -> Any:
        found["micro_batches"] = found.get("micro_batches", 0) + 1
        return add(self, *args)

    Trainer.update, Sums.add = counted_update, counted_add  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.update, Sums.add = update, add  # type: ignore[method-assign]


def on_device(function: Callable[..., Any], found: dict[str, int]) -> Callable[..., Any]:
    """Return a kernel of the device: it computes on raw values, and its program neither waits nor copies. Its calls are counted."""

    def kernel(*given: Any) -> Any:
        found["kernel_calls"] = found.get("kernel_calls", 0) + 1
        return tree_map_only(torch.Tensor, OnDevice, function(*tree_map_only(OnDevice, lambda t: t.raw, given)))

    return kernel


def run(name: str, device: str, found: dict[str, int]) -> tuple[dict[int, dict[str, float]], Counts]:
    """Train `name` on a device. Return its metrics by step, and the counts of the last step."""
    AcceleratorState._reset_state(True)
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    bf16 = BF16 in name
    OFFSETS[DEVICE.type] = frozenset({torch.float32} if BY_OFFSETS in name else {torch.bfloat16} if bf16 else ())
    KERNELS[DEVICE.type] = lambda: Kernel(*(on_device(function, found) for function in REFERENCE))
    torch.use_deterministic_algorithms(DETERMINISTIC in name)
    with pretending() as counts, counting(found), patch.object(runs, "Trainer", partial(Trainer, bf16=bf16)):
        recorder = Stepwise(counts)
        runs.OPTIMIZER = replace(runs.OPTIMIZER, offload=OFFLOADED in name)
        model = start(plain_name(name), Path(tempfile.mkdtemp()), recorder)
    torch.use_deterministic_algorithms(False)
    assert next(model.parameters()).device == torch.device(device)
    return recorder.steps, recorder.last


def plain_name(name: str) -> str:
    """Return the kind of training."""
    return name.removesuffix(BF16).removesuffix(BY_OFFSETS).removesuffix(DETERMINISTIC).removesuffix(OFFLOADED)


def part(counts: Any, sampling: bool) -> int:
    """Return the counts of sampling and scoring, or of the rest."""
    return sum(n for place, n in counts.items() if place.startswith(SAMPLING) == sampling)


def measured(name: str) -> dict[str, Any]:
    """Return the metrics on both devices, and the counts of the last step: per update, per micro-batch, and of its sampling.

    A copy to the host is a wait as well, so `copies - syncs` are the copies to the device.
    """
    found: dict[str, int] = {}
    ours, counts = run(name, str(DEVICE), found)
    theirs, _ = run(name, "cpu", {})
    updates, micro_batches = found["updates"] / STEPS, found["micro_batches"] / STEPS
    return {
        "metrics": [[ours[step], theirs[step]] for step in sorted(theirs)],
        "update": {
            "syncs": part(counts.syncs, False) / updates,
            "copies": part(counts.copies, False) / updates,
            "micro-batches": micro_batches / updates,
        },
        "kernel_calls": found.get("kernel_calls", 0),
        "sampling": {"syncs": part(counts.syncs, True), "copies": part(counts.copies, True)},
        "places": str(counts),
    }


def refusals() -> dict[str, str]:
    """Return how the device reacts to operations without a deterministic kernel, and to the sampler's replacement for one of them."""
    faults: dict[str, Callable[[torch.Tensor], Any]] = {
        "running sum": lambda x: x.cumsum(-1),
        "running count": lambda x: (x > 0).long().cumsum(-1),
        "histogram": lambda x: x.histc(3),
        "weighted count": lambda x: x[0].abs().long().bincount(x[0]),
        "the sampler's running sum": running_sums,
    }
    torch.use_deterministic_algorithms(True)
    try:
        return {name: caught(fault) or "accepted" for name, fault in faults.items()}
    finally:
        torch.use_deterministic_algorithms(False)


def experts() -> dict[str, float]:
    """Return the waits of an update of a mixture of experts, and its largest relative difference from the CPU's metrics."""
    rows, found = [Example(tokens) for tokens in small.rows(6)], []
    OFFSETS[DEVICE.type] = frozenset()
    for device in (str(DEVICE), "cpu"):
        AcceleratorState._reset_state(True)
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
        with pretending() as counts:
            policy = Policy(small.language_model(shape=small.MOE))
            trainer = Trainer(policy, runs.OPTIMIZER, total_steps=STEPS, micro_batch_tokens=40)
            before = copy.deepcopy(counts)
            metrics = trainer.update(rows, SupervisedObjective())
            found.append((metrics, counts.since(before).syncs.total()))
    (ours, waits), (theirs, _) = found
    return {
        "syncs": waits,
        "difference": max(abs(ours[name] - value) / (1e-6 + abs(value)) for name, value in theirs.items()),
    }


def asked() -> dict[str, Any]:
    """Return the waits for continuations of lm-eval's tasks by the number of rows of one pass, and the difference from the CPU."""
    pairs, waits = [([5, 6, 7], [8, 9]), ([5], [6]), ([9] * 6, [4, 4, 4])], {}
    policy = Policy(small.language_model())
    theirs = [value for value, _ in continuations(policy, pairs, 64, 80)]
    with pretending() as counts:
        policy = policy.to(DEVICE)
        for rows in (2, 3):
            before = copy.deepcopy(counts)
            ours = [value for value, _ in continuations(policy, pairs[:rows], 64, 80)]
            waits[str(rows)] = counts.since(before).syncs.total()
    return {"syncs": waits, "difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True))}


def head() -> dict[str, Any]:
    """Return the kernels that the fused head starts for 64 tokens of 20,000 words, and its largest difference from the CPU's results."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (64, 20_000))
    targets = torch.randint(20_000, (64,), generator=generator)

    def run(device: torch.device | str) -> list[torch.Tensor]:
        leaves = [tensor.to(device).requires_grad_() for tensor in (hidden, weight)]
        logprobs, entropy = selected_logprobs(*leaves, None, targets.to(device), 1.0)
        return [logprobs, entropy, *torch.autograd.grad((logprobs - 0.1 * entropy).sum(), leaves)]

    with pretending() as counts:
        ours = [tensor.detach().cpu() for tensor in run(DEVICE)]
    worst = max(float((a - b.detach()).abs().max()) for a, b in zip(ours, run("cpu"), strict=True))
    return {"launches": counts.launches.total(), "difference": worst}


def stored() -> int:
    """Return how many tokens the sampler stores on the device."""
    limits = []

    class Watched(_Sampling):
        def __init__(self, *given: Any) -> None:
            limits.append(given[4])
            super().__init__(*given)

    with pretending(), patch("posttrain.rollouts.native._Sampling", Watched):
        lm = small.language_model().to(DEVICE)
        NativeEngine(lm, ()).sample([Request((5, 6), ((0,),))], SamplingSettings(1, 1.0))
    (limit,) = limits
    return int(limit)


def per_token(recorded: bool) -> dict[str, float]:
    """Return how often the program waits, copies and starts kernels for each further token of four answers."""
    totals = []
    for tokens in (24, 56):
        replays = Counts()

        def record(step: Callable[[], object], counts: Counts, replays: Counts = replays) -> Callable[[], None]:
            replay = replayed(step)

            def apart() -> None:
                """Count the operators of a replay separately: the program starts it with one call."""
                before = copy.deepcopy(counts)
                replay()
                for total, part in zip(of_kinds(replays), of_kinds(counts.since(before)), strict=True):
                    total += part

            return apart

        with pretending() as counts:
            RECORDERS.pop(DEVICE.type, None)
            if recorded:
                RECORDERS[DEVICE.type] = partial(record, counts=counts)
            engine = NativeEngine(small.language_model().to(DEVICE), ())
            requests = [Request((5, 6, 7), ((0,), (1,))), Request((9, 8, 7, 6, 5), ((2,), (3,)))]
            answers = [answer for group in engine.sample(requests, SamplingSettings(tokens, 1.0)) for answer in group]
            assert [len(answer.tokens) for answer in answers] == [tokens] * 4
        RECORDERS.pop(DEVICE.type, None)
        totals.append([kind.total() for kind in of_kinds(counts.since(replays))])
    return {name: (b - a) / 32 for name, a, b in zip(("syncs", "copies", "launches"), *totals, strict=True)}


def of_kinds(counts: Counts) -> list[Counter[str]]:
    return [counts.syncs, counts.copies, counts.launches]


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs.STEPS = STEPS
    found = {name: measured(name) for name in sys.argv[1:]}
    planted = {name: caught(fault) for name, fault in FAULTS.items()}
    json.dump(
        {
            "kinds": found,
            "planted": planted,
            "head": head(),
            "experts": experts(),
            "asked": asked(),
            "stored": stored(),
            "refusals": refusals(),
            "token": {name: per_token(name == "recorded") for name in ("run", "recorded")},
        },
        sys.stdout,
    )
