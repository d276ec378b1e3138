"""Train twice with deterministic kernels, and once with a SIGKILL on the way: the losses must be the same numbers.

    python benchmarks/gpu_curve.py FOLDER KIND [--kill-at STEP] [--free] [--tiny]

benchmarks/gpu.py runs it in new processes, since a setting of cuBLAS is read only at the start. Prints a line of JSON for each
step: its number, loss, gradient norm and seconds. A run goes on from the checkpoint in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare GPU box has no installed package

from benchmarks.silent import Silent

STEPS, KILLED_AT = 6, 4
LAYERS, VOCABULARY = 8, 32_768
"""Of the model with the widths of 0.6 B. A run writes three checkpoints, which at full size would take most of its time."""
KINDS = ("sft", "grpo")


class Printed(Silent):
    """A recorder that prints every step, and may end the process."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.since = kill_at, time.perf_counter()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        print(json.dumps([step, values["loss"], values["grad_norm"], seconds]), flush=True)
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, kind: str, kill_at: int | None, tiny: bool) -> None:
    """Train a random model for STEPS steps, with a checkpoint after every second one."""
    import torch
    from accelerate import Accelerator
    from transformers import Qwen3ForCausalLM

    from benchmarks.gpu_cases import NO_EOS, SHAPES, Case, bytes_of, groups_of
    from posttrain.algorithms import GRPO
    from posttrain.data.batches import EpochOrder
    from posttrain.data.tokens import TextEncoder, Tokens
    from posttrain.models.policy import Policy
    from posttrain.models.tiny import byte_tokenizer
    from posttrain.rewards.sources import FunctionReward
    from posttrain.rollouts.engine import SamplingSettings
    from posttrain.rollouts.groups import GroupSampler, GroupSettings, Problem
    from posttrain.rollouts.native import NativeEngine
    from posttrain.settings import OptimizerSettings
    from posttrain.training.checkpoint import Checkpoints
    from posttrain.training.experience import ExperienceSource
    from posttrain.training.loop import LoopSettings, fit
    from posttrain.training.onpolicy import OnPolicyObjective
    from posttrain.training.supervised import EpochSource, Example, SupervisedObjective
    from posttrain.training.trainer import Trainer

    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    shape = SHAPES["tiny"] if tiny else replace(SHAPES["0.6B"], layers=LAYERS, vocabulary=VOCABULARY)
    with accelerator.device:
        model = Qwen3ForCausalLM(shape.config()).eval()
    policy = Policy(model)
    size, budget = (16, 256) if tiny else (256, 16_384)
    source: Any
    objective: Any
    if kind == "sft":
        groups = groups_of(Case("sft", 4 * STEPS, size, size, uneven=True), shape.vocabulary)
        rows = [Example(Tokens(prompt, answer)) for prompt, (answer,) in groups]
        source, objective = EpochSource(rows, EpochOrder(len(rows), 4, 1, seed=0)), SupervisedObjective()
    else:
        problems = [Problem(str(i), p, {}) for i, (p, _) in enumerate(groups_of(Case("grpo", 8, size, 2), 250))]
        sampler = GroupSampler(
            problems, NativeEngine(policy.lm, NO_EOS, bf16=True), TextEncoder(byte_tokenizer(4096), 4096),
            [FunctionReward("bytes", bytes_of)], {"bytes": 1.0}, GRPO, GroupSettings(2, 8, SamplingSettings(size, 1.0)), 0, accelerator,
        )  # fmt: skip
        objective = OnPolicyObjective(GRPO, size, 1.0)
        source = ExperienceSource(
            GRPO, policy, policy, sampler, objective, micro_batch_tokens=budget, bf16=True, measure_kl_every=0
        )
    trainer: Trainer[Any] = Trainer(
        policy, OptimizerSettings(1e-5), total_steps=STEPS, micro_batch_tokens=budget, accelerator=accelerator
    )
    settings = LoopSettings(kind, STEPS, checkpoint_steps=2)
    fit(trainer, source, objective, settings, Printed(kill_at), Checkpoints(folder, keep=1))


def curve(folder: Path, kind: str, *options: str) -> list[list[float]]:
    """Run a training in a new process. Return the steps that it printed."""
    # -P: the scripts next to this one are no modules for the packages that it imports
    command = [sys.executable, "-P", str(Path(__file__).resolve()), str(folder), kind, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not ("--kill-at" in options and done.returncode == -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def determinism(kind: str, tiny: bool) -> dict[str, Any]:
    """Return whether two runs, and one with a kill on the way, have the same losses and norms; and the mode's cost."""
    small = ("--tiny",) if tiny else ()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second = (curve(folder / part, kind, *small) for part in ("first", "second"))
        killed = curve(folder / "killed", kind, "--kill-at", str(KILLED_AT), *small)
        resumed = curve(folder / "killed", kind, *small)
        free = curve(folder / "free", kind, "--free", *small)
    return {
        "steps": len(first),
        "same_again": _numbers(first) == _numbers(second),
        "resumed_at": int(resumed[0][0]),
        "same_after_kill": {**_numbers(killed), **_numbers(resumed)} == _numbers(first),
        "times_as_slow": _median_seconds(first) / _median_seconds(free),
    }


def _numbers(steps: list[list[float]]) -> dict[float, list[float]]:
    return {step: values[:2] for step, *values in steps}


def _median_seconds(steps: list[list[float]]) -> float:
    """Return the median without the first step, which prepares kernels."""
    seconds = sorted(step[3] for step in steps[1:])
    return seconds[len(seconds) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--kill-at", type=int, help="end the process by SIGKILL after this step")
    parser.add_argument("--free", action="store_true", help="allow kernels that add in any order")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU trains in a second")
    args = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if args.tiny:
        torch.set_num_threads(1)
    from posttrain.models.kernels import set_kernels

    set_kernels(deterministic=not args.free)  # as in a stage
    train(args.folder, args.kind, args.kill_at, args.tiny)


if __name__ == "__main__":
    main()
