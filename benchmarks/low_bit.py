"""Measure what low-bit training costs on the small task: 8-bit moments, bfloat16 autocast, and a 4-bit base under an adapter.

    python benchmarks/low_bit.py --write        # needs the extras low-bit and qlora; writes benchmarks/low_bit.md

Supervised training from scratch, and GRPO with an adapter from one supervised model, each with several seeds (weights or adapter, order,
sampling). All models answer the same held-out problems greedily. Sides share seeds, and differ in nothing but the setting.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from scipy.stats import t as student

from benchmarks.calibration import BUDGET, NEW_TOKENS, SHAPE, TASK, problems
from posttrain.algorithms import PRESETS, OnPolicy
from posttrain.data.batches import EpochOrder
from posttrain.data.tokens import TextEncoder, table_tokens
from posttrain.environments.arithmetic import rows as arithmetic
from posttrain.evaluation.statistics import Floats
from posttrain.models.lora import Adapter, BasePolicy
from posttrain.models.policy import Policy
from posttrain.models.tiny import tiny_model
from posttrain.rewards.functions import answer
from posttrain.rewards.sources import FunctionReward
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.groups import GroupSampler, GroupSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import LoraSettings, OptimizerSettings
from posttrain.training.experience import ExperienceSource
from posttrain.training.onpolicy import OnPolicyObjective
from posttrain.training.supervised import EpochSource, Example, SupervisedObjective
from posttrain.training.trainer import Trainer

SUPERVISED = OptimizerSettings(3e-3, "cosine", 10)
ADAPTED = OptimizerSettings(2e-3)
LORA = LoraSettings(rank=8, alpha=16)
HELD_OUT, EPOCHS, STEPS = 400, 8, 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/low_bit.md")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.process_time()
    # the model that GRPO improves has learnt to forget carries
    lm, encoder, _ = supervised(SUPERVISED, False, 0, TASK["careless"])
    sides: dict[str, Callable[[int], tuple[Any, TextEncoder, float]]] = {
        "SFT: float32": lambda seed: supervised(SUPERVISED, False, seed),
        "SFT: moments in 8 bits": lambda seed: supervised(replace(SUPERVISED, moment_bits=8), False, seed),
        "SFT: bf16 autocast, float32 master weights": lambda seed: supervised(SUPERVISED, True, seed),
        "GRPO, adapter: float32 base": lambda seed: adapted(lm, encoder, LORA, seed),
        "GRPO, adapter: base in 4 bits": lambda seed: adapted(lm, encoder, replace(LORA, base_bits=4), seed),
    }
    tables: dict[str, Floats] = {}
    measures: dict[str, float] = {}
    for name, train in sides.items():
        columns, last = [], []
        for seed in range(args.seeds):
            model, _, measured = train(seed)
            columns.append(greedy(model, encoder))
            last.append(measured)
            print(f"{name}, seed {seed}: {np.mean(columns[-1]):.3f}, {last[-1]:.4f}", file=sys.stderr, flush=True)
        tables[name], measures[name] = np.stack(columns, axis=1), float(np.mean(last))
    text = page(tables, measures, float(np.mean(greedy(lm, encoder))), args.seeds, time.process_time() - started)
    print(text)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return 0


def supervised(
    settings: OptimizerSettings, bf16: bool, seed: int, careless: float = 0.0
) -> tuple[Any, TextEncoder, float]:
    """Train a tiny model from scratch on demonstrations. Return it, its encoder and the mean loss of the last epoch."""
    lm, tokenizer = tiny_model(SHAPE, seed)
    encoder = TextEncoder(tokenizer, SHAPE.max_length)
    rows = [
        Example(t)
        for t in table_tokens(encoder, arithmetic("sft", 1200, 0, **TASK | {"careless": careless}), "completion")
    ]
    order = EpochOrder(len(rows), 32, EPOCHS, seed)
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process otherwise
    trainer: Trainer[Example] = Trainer(
        Policy(lm), settings, total_steps=order.steps, micro_batch_tokens=BUDGET, bf16=bf16
    )
    source, losses = EpochSource(rows, order), list[float]()
    for step in range(order.steps):
        for batch in source.next(step).batches:
            losses.append(trainer.update(batch, SupervisedObjective())["loss"])
    return lm, encoder, float(np.mean(losses[-order.steps_per_epoch :]))


def adapted(start: Any, encoder: TextEncoder, lora: LoraSettings, seed: int) -> tuple[Any, TextEncoder, float]:
    """Train an adapter on a copy of `start` by GRPO. Return the merged model, its encoder and the last five steps' mean reward."""
    spec = PRESETS["grpo"]
    assert isinstance(spec, OnPolicy)
    torch.manual_seed(seed)
    AcceleratorState._reset_state(reset_partial_state=True)
    policy = Policy(copy.deepcopy(start))
    adapter = Adapter(policy.lm, lora)
    sampler = GroupSampler(
        problems(encoder, "problems", 1000), NativeEngine(policy.lm, encoder.eos_id), encoder,
        [FunctionReward("answer", answer)], {"answer": 1.0}, spec,
        GroupSettings(8, 8, SamplingSettings(NEW_TOKENS, 1.0)), seed, Accelerator(),
    )  # fmt: skip
    objective = OnPolicyObjective(spec, NEW_TOKENS, 1.0)
    reference = BasePolicy(policy.lm, adapter)
    source = ExperienceSource(
        spec, policy, reference, sampler, objective, micro_batch_tokens=BUDGET, measure_kl_every=0
    )
    updates = STEPS * spec.minibatches * spec.epochs
    trainer: Trainer[Any] = Trainer(policy, ADAPTED, total_steps=updates, micro_batch_tokens=BUDGET)
    rewards = []
    for step in range(STEPS):
        made = source.next(step)
        for batch in made.batches:
            trainer.update(batch, objective)
        rewards.append(made.metrics["reward/total/mean"])
    adapter.merge()
    return policy.lm, encoder, float(np.mean(rewards[-5:]))


def greedy(lm: Any, encoder: TextEncoder) -> Floats:
    """Return 1 for each held-out problem that the model's greedy answer solves, else 0."""
    asked = problems(encoder, "evaluation", HELD_OUT)
    engine = NativeEngine(lm, encoder.eos_id)
    answers = engine.sample([Request(p.ids, ((0,),)) for p in asked], SamplingSettings(NEW_TOKENS, 0.0))
    texts = [encoder.text(completion.tokens) for (completion,) in answers]
    return np.asarray(answer([], texts, answer=[p.columns["answer"] for p in asked]), dtype=np.float64)


def page(tables: dict[str, Floats], measures: dict[str, float], start: float, seeds: int, seconds: float) -> str:
    """Write the accuracies as Markdown, each next to that of float32 with the same training."""
    lines = [
        "# Low-bit training on the small task",
        "",
        f"    python benchmarks/low_bit.py --seeds {seeds} --write    # {seconds:.0f} s of one processor",
        "",
        f"Two-digit additions, {HELD_OUT} held-out problems, {seeds} seeds a side. SFT: {EPOCHS} epochs from random weights, and"
        " the last epoch's mean loss. GRPO:"
        f" {STEPS} steps of 8 x 8 answers with an adapter of rank {LORA.rank}, from a model of accuracy {start:.3f} that"
        " forgets carries, and the mean reward of the last five steps."
        " Intervals of 95 % over pairs of runs with one seed, on these problems.",
        "",
        "| training | accuracy | difference to float32 | interval | last loss or reward |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, table in tables.items():
        base = next(key for key in tables if key.split(":")[0] == name.split(":")[0])
        row = f"| {name} | {table.mean():.3f} |"
        if base != name:
            gaps = (table - tables[base]).mean(0)
            half = float(student.ppf(0.975, seeds - 1) * gaps.std(ddof=1) / seeds**0.5)
            row += f" {gaps.mean():+.3f} | {gaps.mean() - half:+.3f} to {gaps.mean() + half:+.3f} |"
        lines.append(f"{row} {'' if base != name else '| | '}{measures[name]:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
