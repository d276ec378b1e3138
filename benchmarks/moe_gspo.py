"""Compare GSPO with GRPO on a mixture of experts: spread of the importance ratio, clipping, changes of routing, learning.

    python benchmarks/moe_gspo.py [--seeds 5] [--steps 30]

For each seed, a tiny Qwen3-MoE is fine-tuned on additions, then both algorithms align it at a low and at a high learning rate. They
differ only in the ratio and its clip. Advantage (group_z), no KL term, prompts, sampling seeds and four minibatches per step are GSPO's,
so three of four updates are off-policy for both. Writes the tables and the plot into benchmarks/moe_gspo.md and a file next to it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import t as student

from posttrain.algorithms.gspo import GSPO
from posttrain.algorithms.specs import OnPolicy
from posttrain.data.batches import EpochOrder
from posttrain.data.tokens import TextEncoder, table_tokens
from posttrain.environments.arithmetic import rows as arithmetic
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.models.tiny import TinyShape, tiny_model
from posttrain.rewards.functions import answer
from posttrain.rewards.sources import FunctionReward
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.groups import GroupSampler, GroupSettings, Problem
from posttrain.rollouts.native import NativeEngine
from posttrain.settings import OptimizerSettings
from posttrain.training.experience import ExperienceSource
from posttrain.training.onpolicy import Experience, OnPolicyObjective
from posttrain.training.supervised import EpochSource, Example, SupervisedObjective
from posttrain.training.trainer import Trainer

ALGORITHMS: dict[str, OnPolicy] = {
    "GRPO": replace(GSPO, name="grpo", paper="2402.03300", ratio="token", clip_low=0.2, clip_high=0.2),
    "GSPO": GSPO,
}
SHAPE = TinyShape(
    hidden_size=64, intermediate_size=64, layers=2, heads=4, kv_heads=2, max_length=64, experts=8, experts_per_token=2
)
TASK = {"terms": 2, "max_term": 999, "careless": 0.5}
NEW_TOKENS, BUDGET = 44, 8192
SMALLEST = 1e-12
MARKS = ("<!-- tables -->", "<!-- end of tables -->")
RATES = {"calm": 1e-4, "hasty": 2e-4}
CURVES = {
    "token": "log10 variance of the token ratio",
    "sequence": "log10 variance of the sequence ratio",
    "clipped": "share of tokens clipped",
    "changed": "share of tokens x layers with other experts",
    "reward": "share of sampled answers that are right",
}


@dataclass(frozen=True)
class Size:
    """Size of the comparison."""

    seeds: int = 5
    steps: int = 30
    prompts: int = 16
    samples: int = 8
    sft_rows: int = 4000
    sft_epochs: int = 8
    heldout: int = 200


@dataclass(frozen=True)
class Outcome:
    """Results of one algorithm, learning rate and seed. curves: one value per step, by name. accuracy: greedy, on held-out problems.

    moved_changed, moved_others: mean |log ratio| of the tokens whose experts changed in some layer, and of the other tokens.
    """

    curves: dict[str, list[float]]
    accuracy_before: float
    accuracy: float
    moved_changed: float
    moved_others: float


Results = dict[str, list[Outcome]]
"""One outcome per seed, by algorithm."""


def fine_tuned(size: Size, seed: int) -> tuple[Any, TextEncoder]:
    """Return a tiny mixture of experts that adds, with errors."""
    lm, tokenizer = tiny_model(SHAPE, seed)
    encoder = TextEncoder(tokenizer, SHAPE.max_length)
    demonstrations = arithmetic("sft", size.sft_rows, seed, **TASK)
    rows = [Example(tokens) for tokens in table_tokens(encoder, demonstrations, "completion")]
    order = EpochOrder(len(rows), 64, size.sft_epochs, seed)
    trainer: Trainer[Example] = Trainer(
        Policy(lm),
        OptimizerSettings(3e-3, "cosine", min(10, order.steps)),
        total_steps=order.steps,
        micro_batch_tokens=BUDGET,
    )
    source = EpochSource(rows, order)
    for step in range(order.steps):
        for batch in source.next(step).batches:
            trainer.update(batch, SupervisedObjective())
    return lm, encoder


def problems(encoder: TextEncoder, kind: Any, count: int, seed: int) -> list[Problem]:
    rows = arithmetic(kind, count, seed, **TASK)
    return [Problem(row["prompt"], tuple(encoder.prompt(row["prompt"])), {"answer": row["answer"]}) for row in rows]


def aligned(spec: OnPolicy, lm: Any, encoder: TextEncoder, size: Size, seed: int, learning_rate: float) -> Outcome:
    """Train a copy of `lm` and record its curves."""
    policy, reference = (Policy(copy.deepcopy(lm)) for _ in range(2))
    reference.requires_grad_(False)
    engine = NativeEngine(policy.lm, encoder.ends)
    sampler = GroupSampler(
        problems(encoder, "problems", 1000, seed),
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
    source = ExperienceSource(spec, policy, reference, sampler, objective, micro_batch_tokens=BUDGET)
    trainer: Trainer[Any] = Trainer(
        policy,
        OptimizerSettings(learning_rate),
        total_steps=size.steps * spec.minibatches,
        micro_batch_tokens=BUDGET,
    )
    heldout = problems(encoder, "evaluation", size.heldout, seed)
    before = accuracy(engine, encoder, heldout)
    steps = [one_step(source, trainer, objective, step) for step in range(size.steps)]
    moved = [float(np.nanmean([step[name] for step in steps])) for name in ("moved, changed", "moved, others")]
    curves = {name: [step[name] for step in steps] for name in CURVES}
    return Outcome(curves, before, accuracy(engine, encoder, heldout), *moved)


def one_step(
    source: ExperienceSource, trainer: Trainer[Any], objective: OnPolicyObjective, step: int
) -> dict[str, float]:
    """Sample, update on every minibatch, and measure the last minibatch just before its update."""
    data = source.next(step)
    *others, last = data.batches
    updates = [trainer.update(batch, objective) for batch in others]
    seen = ratios(source.policy, last)
    updates.append(trainer.update(last, objective))
    return seen | {
        "clipped": float(np.mean([u["clip/low"] + u["clip/high"] for u in updates[1:]])),
        "changed": updates[-1]["router/changed"],
        "reward": data.metrics["reward/answer/mean"],
    }


def ratios(policy: Policy, batch: Sequence[Experience]) -> dict[str, float]:
    """Return both ratios of the current policy to the sampling policy, for either algorithm."""
    numbers = token_logprobs(policy, [row.tokens for row in batch], BUDGET)
    logs = [now.logprobs - row.old_logprobs for now, row in zip(numbers, batch, strict=True)]
    changed = [(now.experts != row.old_routing).any((-2, -1)) for now, row in zip(numbers, batch, strict=True)]
    every, other = np.concatenate(logs), np.concatenate(changed)
    return {
        "token": float(np.log10(np.exp(every).var() + SMALLEST)),
        "sequence": float(np.log10(np.exp([log.mean() for log in logs]).var() + SMALLEST)),
        "moved, changed": float(np.abs(every[other]).mean()) if other.any() else float("nan"),
        "moved, others": float(np.abs(every[~other]).mean()),
    }


def accuracy(engine: NativeEngine, encoder: TextEncoder, asked: Sequence[Problem]) -> float:
    answers = engine.sample([Request(p.ids, ((0,),)) for p in asked], SamplingSettings(NEW_TOKENS, 0.0))
    texts = [encoder.text(completion.tokens) for (completion,) in answers]
    return float(np.mean(answer([], texts, answer=[p.columns["answer"] for p in asked])))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over seeds and half the width of its 95 % interval (Student's t)."""
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(student.ppf(0.975, len(values) - 1)) * spread


def compare(size: Size) -> dict[str, Results]:
    """Return the results by learning rate."""
    found: dict[str, Results] = {rate: {name: [] for name in ALGORITHMS} for rate in RATES}
    for seed in range(size.seeds):
        lm, encoder = fine_tuned(size, seed)
        for rate, results in found.items():
            for name, spec in ALGORITHMS.items():
                started = time.perf_counter()
                done = aligned(spec, lm, encoder, size, seed, RATES[rate])
                results[name].append(done)
                print(
                    f"seed {seed}, {rate}, {name}: accuracy {done.accuracy_before:.3f} -> {done.accuracy:.3f},"
                    f" {time.perf_counter() - started:.0f} s",
                    file=sys.stderr,
                )
    return found


def table(results: Results) -> str:
    """Return means over seeds with 95 % intervals, and the paired difference; * marks an interval that excludes 0."""

    def row(title: str, *of: Callable[[Outcome], float]) -> str:
        values = [
            [read(o) for o in outcomes] for read, outcomes in zip(of * (3 - len(of)), results.values(), strict=True)
        ]
        pairs = [interval(v) for v in (*values, [b - a for a, b in zip(*values, strict=True)])]
        sure = "*" if abs(pairs[-1][0]) > pairs[-1][1] else ""
        return f"| {title} | {' | '.join(f'{mean:.3g} ± {half:.2g}' for mean, half in pairs)}{sure} |"

    def mean_of(name: str) -> Callable[[Outcome], float]:
        return lambda outcome: float(np.mean(outcome.curves[name]))

    lines = [f"| mean over steps, then over seeds | {' | '.join(results)} | difference |", "|---|---|---|---|"]
    lines.append(row("log10 variance of the ratio that it uses", mean_of("token"), mean_of("sequence")))
    lines += [row(title, mean_of(name)) for name, title in CURVES.items()]
    lines += [
        row("mean \\|log ratio\\|, tokens with other experts", lambda o: o.moved_changed),
        row("mean \\|log ratio\\|, tokens with the same experts", lambda o: o.moved_others),
        row("greedy accuracy before", lambda o: o.accuracy_before),
        row("greedy accuracy after", lambda o: o.accuracy),
    ]
    return "\n".join(lines)


def picture(found: dict[str, Results], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(found), len(CURVES), figsize=(15, 5.6), layout="constrained", squeeze=False)
    for (rate, results), axes in zip(found.items(), grid, strict=True):
        for axis, (name, title) in zip(axes, CURVES.items(), strict=True):
            for algorithm, colour in zip(results, ("#0072B2", "#D55E00"), strict=True):
                curves = np.array([outcome.curves[name] for outcome in results[algorithm]])
                mean, half = np.array([interval(list(column)) for column in curves.T]).T
                steps = np.arange(1, len(mean) + 1)
                axis.plot(steps, mean, color=colour, label=algorithm, linewidth=1.4)
                axis.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
            axis.set_title(f"{title}\n{rate}, learning rate {RATES[rate]:g}", fontsize=8)
            axis.tick_params(labelsize=7)
        axes[0].legend(fontsize=8, frameon=False)
    for axis in grid[-1]:
        axis.set_xlabel("step", fontsize=8)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)
    smaller(path)


def smaller(path: Path) -> None:
    """Reduce the number of colours in a plot's file."""
    from PIL import Image

    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(48, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)


def write(report: str, path: Path) -> None:
    """Put the tables between the marks in `path`; the text around them is kept."""
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0]) if path.exists() else ("", "", "")
    after = rest.partition(MARKS[1])[2]
    path.write_text(f"{before}{MARKS[0]}\n\n{report}\n\n{MARKS[1]}{after or chr(10)}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="the file of the tables")
    for name, default in vars(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    torch.set_num_threads(1)
    found = compare(Size(**given))
    sections = [f"### {rate}: learning rate {RATES[rate]:g}\n\n{table(results)}" for rate, results in found.items()]
    write("\n\n".join(sections), out)
    picture(found, out.with_suffix(".png"))
    print("\n\n".join(sections))


if __name__ == "__main__":
    main()
