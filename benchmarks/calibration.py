"""A/A calibration: train copies of one algorithm with other seeds and count how often the comparison calls them different.

    python benchmarks/calibration.py --write        # writes benchmarks/calibration.md

One supervised model, three algorithms, 20 training seeds each (order of the prompts and sampling). All models answer the same
held-out problems. The settings leave accuracy well below 1, where seeds differ most. Both methods judge the same pairs: the one
of the report, over seeds and prompts, and the older one over prompts only.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script

from pipelines.report.calibration import power_lines, rates, simulated
from posttrain.algorithms import PRESETS, OnPolicy
from posttrain.data.batches import EpochOrder
from posttrain.data.tokens import TextEncoder, table_tokens
from posttrain.environments.arithmetic import rows as arithmetic
from posttrain.evaluation.crossed import Spread, crossed_difference
from posttrain.evaluation.statistics import Floats, Resampling, paired
from posttrain.models.policy import Policy
from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.rewards.functions import answer
from posttrain.rewards.sources import FunctionReward
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.groups import GroupSampler, GroupSettings, Problem
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import OptimizerSettings
from posttrain.training.experience import ExperienceSource
from posttrain.training.onpolicy import OnPolicyObjective
from posttrain.training.supervised import EpochSource, Example, SupervisedObjective
from posttrain.training.trainer import Trainer

ALGORITHMS = ("grpo", "cispo", "gspo")
TASK: dict[str, Any] = {"terms": 2, "max_term": 99, "careless": 0.65}
SHAPE = TinyShape(hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2, max_length=96)
NEW_TOKENS, BUDGET = 32, 16_384


@dataclass(frozen=True)
class Size:
    """The amount of work: training runs an algorithm, on-policy steps, held-out problems."""

    seeds: int = 20
    steps: int = 20
    prompts: int = 8
    samples: int = 8
    sft_rows: int = 1200
    sft_epochs: int = 14
    heldout: int = 200
    learning_rate: float = 2e-4


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=Size.seeds)
    parser.add_argument("--steps", type=int, default=Size.steps)
    parser.add_argument("--write", action="store_true", help="write benchmarks/calibration.md")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = Size(seeds=args.seeds, steps=args.steps)
    started = time.perf_counter()
    tables = train(size)
    text = page(size, tables, time.perf_counter() - started)
    print(text)
    if args.write:
        Path(__file__).with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return 0


def train(size: Size) -> dict[str, Floats]:
    """Return each algorithm's right and wrong answers to the held-out problems, [problems, seeds]."""
    lm, encoder = fine_tuned(size)
    tables = {}
    for name in ALGORITHMS:
        columns = []
        for seed in range(size.seeds):
            columns.append(aligned(PRESETS[name], lm, encoder, size, seed))
            print(f"{name}-{seed}: {np.mean(columns[-1]):.3f}", file=sys.stderr, flush=True)
        tables[name] = np.stack(columns, axis=1)
    return tables


def fine_tuned(size: Size) -> tuple[Any, TextEncoder]:
    lm, tokenizer = tiny_model(SHAPE, 0)
    encoder = TextEncoder(tokenizer, SHAPE.max_length)
    rows = [Example(t) for t in table_tokens(encoder, arithmetic("sft", size.sft_rows, 0, **TASK), "completion")]
    order = EpochOrder(len(rows), 32, size.sft_epochs, 0)
    trainer: Trainer[Example] = Trainer(
        Policy(lm), OptimizerSettings(3e-3, "cosine", 10), total_steps=order.steps, micro_batch_tokens=BUDGET
    )
    source = EpochSource(rows, order)
    for step in range(order.steps):
        for batch in source.next(step).batches:
            trainer.update(batch, SupervisedObjective())
    return lm, encoder


def aligned(spec: Any, lm: Any, encoder: TextEncoder, size: Size, seed: int) -> Floats:
    """Train a copy of `lm` with one seed and return its greedy answers' rewards, [problems]."""
    assert isinstance(spec, OnPolicy)
    torch.manual_seed(seed)
    policy, reference = (Policy(copy.deepcopy(lm)) for _ in range(2))
    reference.requires_grad_(False)
    engine = NativeEngine(policy.lm, encoder.eos_id)
    sampler = GroupSampler(
        problems(encoder, "problems", 1000),
        engine,
        encoder,
        [FunctionReward("answer", answer)],
        {"answer": 1.0},
        spec,
        GroupSettings(size.prompts, size.samples, SamplingSettings(NEW_TOKENS, 1.0)),
        seed,
        Accelerator(),
    )
    objective = OnPolicyObjective(spec, NEW_TOKENS, 1.0)
    source = ExperienceSource(
        spec, policy, reference, sampler, objective, micro_batch_tokens=BUDGET, measure_kl_every=0
    )
    updates = size.steps * spec.minibatches * spec.epochs
    trainer: Trainer[Any] = Trainer(
        policy, OptimizerSettings(size.learning_rate), total_steps=updates, micro_batch_tokens=BUDGET
    )
    for step in range(size.steps):
        for batch in source.next(step).batches:
            trainer.update(batch, objective)
    asked = problems(encoder, "evaluation", size.heldout)
    answers = engine.sample([Request(p.ids, ((0,),)) for p in asked], SamplingSettings(NEW_TOKENS, 0.0))
    texts = [encoder.text(completion.tokens) for (completion,) in answers]
    return np.asarray(answer([], texts, answer=[p.columns["answer"] for p in asked]), dtype=np.float64)


def problems(encoder: TextEncoder, kind: Any, count: int) -> list[Problem]:
    rows = arithmetic(kind, count, 0, **TASK)
    return [Problem(row["prompt"], tuple(encoder.prompt(row["prompt"])), {"answer": row["answer"]}) for row in rows]


def page(size: Size, tables: dict[str, Floats], seconds: float) -> str:
    """Write the runs' table as Markdown."""
    lines = [
        "# Copies of one algorithm, compared with each other",
        "",
        f"    python benchmarks/calibration.py --seeds {size.seeds} --steps {size.steps} --write    # {seconds:.0f} s",
        "",
        f"{len(tables)} algorithms x {size.seeds} training seeds on two-digit additions ({size.heldout} held-out problems,"
        f" {size.steps} steps of {size.prompts} x {size.samples} answers). A method"
        " that holds its level calls at most 5 % of the pairs different.",
        "",
        "| method | seeds a side | called different | pairs | 95 % interval (pairs that share no run) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for rate in rates(list(tables.values()), [1, 3, 5, 10], Resampling(1000)):
        low, high = rate.interval
        lines.append(
            f"| {rate.method} | {rate.seeds} | {100 * rate.share:.1f} % | {rate.pairs} |"
            f" {100 * low:.1f} to {100 * high:.1f} % ({rate.independent}) |"
        )
    lines += [
        "",
        "Simulated with the variances of these runs (20,000 experiments each), equal copies are called different in:",
        "",
    ]
    lines += [
        "| algorithm | accuracy | between seeds, sd | 3 seeds | 5 seeds | 10 seeds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, table in tables.items():
        other = next(t for n, t in tables.items() if n != name)
        own = Spread.of(table, table)
        spread = Spread(own.run, Spread.of(table, other).prompt, own.rest)
        level = [f"{100 * simulated(spread, k, len(table), 0.95):.1f} %" for k in (3, 5, 10)]
        means = table.mean(0)
        lines.append(
            f"| {name} | {100 * table.mean():.1f} % | {100 * means.std(ddof=1):.1f} points | {' | '.join(level)} |"
        )
    first, second = list(tables)[:2]
    a, b = tables[first], tables[second]
    lines += ["", f"What an experiment like this can show ({first} against {second}):", ""]
    lines += [f"- {line}" for line in power_lines(Spread.of(a, b), 5, len(a))]
    lines += ["", _two_builds(tables["cispo"])]
    return "\n".join(lines)


def _two_builds(table: Floats) -> str:
    """Compare the three best with the three worst copies: the most that three seeds against three others can mislead."""
    order = np.argsort(table.mean(0))
    worst, best = table[:, order[:3]], table[:, order[-3:]]
    old, new = paired(best, worst, Resampling(1000)), crossed_difference(best, worst)
    return (
        f"The three luckiest CISPO runs against the three unluckiest ({100 * best.mean():.1f} % against {100 * worst.mean():.1f} %;"
        f" chosen after the fact, so no fair test): over prompts only p = {old.p:.3f}, over seeds and prompts p = {new.p:.3f}."
    )


if __name__ == "__main__":
    sys.exit(main())
