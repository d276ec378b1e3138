"""A small tree of finished runs, written through real journals, whose true accuracies are known."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config.params import Params, load_params
from pipelines.runtime.context import RunContext
from pipelines.runtime.publish import publish
from pipelines.runtime.run import Run

ROOT = Path(__file__).parents[2]
ATTACK = "<script>alert('sampled')</script> & \"quoted\""
PRESETS = {"dpo": "dpo", "grpo": "grpo", "ppo": "ppo"}
ON_POLICY = ("grpo", "ppo")
LEARNING_RATES = {"dpo": 1e-5, "grpo": 2e-4, "ppo": 1e-3}
RATES = {"base": 0.0, "sft": 0.45, "dpo": 0.5, "grpo": 0.75, "ppo": 0.3}
SCORES = {"base": -2.0, "sft": 0.1, "dpo": 0.5, "grpo": 1.0, "ppo": 3.0}


def content(model: str) -> str:
    """Return the digest under which a training run records its model, and its evaluation reads it."""
    return hashlib.sha256(model.encode()).hexdigest()


def finished(
    folder: Path, directory: Path, name: str, values: Mapping[str, Any], params: Params, /, inputs: Mapping[str, str] | None = None,
    **arguments: Any,
) -> Run:  # fmt: skip
    """An open run; `close` publishes it."""
    context = RunContext(
        stage=directory.parts[1], name=name, params=params, args=argparse.Namespace(), directory=folder / directory,
        state=folder / "state" / name, key="k" * 64, code="c" * 64,
    )  # fmt: skip
    run = Run.create(context)
    start = {"kind": "start", "stage": context.stage, "name": name, "run": f"{name}-{'k' * 16}", "arguments": arguments}
    run.recorder.open(
        start | {"directory": directory.as_posix(), "inputs": dict(inputs or {})},
        {"kind": "params", "values": dict(values)},
        {"kind": "start"},
    )
    return run


def close(run: Run, summary: Mapping[str, float]) -> None:
    run.recorder.summary(summary)
    publish(run.context.state, run.context.directory, {"kind": "end", "status": "FINISHED"})


def training(
    folder: Path, name: str, algorithm: str, seed: int, steps: int, params: Params, selected: int | None = None
) -> None:
    """A finished training; with `selected`, `align.best_checkpoint` has chosen that step."""
    options = {"kl_coefficient": 0.2, "epochs": 2} if algorithm == "ppo" else {}
    values = {f"algorithms.{algorithm}.preset": PRESETS[algorithm]}
    values |= {f"algorithms.{algorithm}.options.{key}": value for key, value in options.items()}
    kind = "on_policy" if algorithm in ON_POLICY else "preference"
    values[f"align.{kind}.optimizer.learning_rate"] = LEARNING_RATES[algorithm]
    if selected is not None:
        rule = {"every_steps": 10, "problems": 100, "reward": "answer"}
        values |= {f"align.best_checkpoint.{key}": value for key, value in rule.items()}
    run = finished(folder, Path("runs/align", name), f"align-{name}", values, params, algorithm=algorithm, seed=seed)
    noise = np.random.Generator(np.random.PCG64([len(algorithm), ord(algorithm[0]), seed]))
    for step in range(1, steps + 1):
        run.recorder.metrics(step, _training_metrics(algorithm, step, step / steps, noise))
    if algorithm == "grpo":
        rollouts(run, steps)
    model = f"models/align/{name}"
    digests = {"sha256": content(model), "content": content(model), "files": {}}
    run.recorder.journal.append({"kind": "model", "path": model} | digests)
    chosen = {} if selected is None else {"selection/step": selected, "selection/score": 0.875, "selection/measured": 4}
    close(run, {"steps": steps} | chosen)


def _training_metrics(algorithm: str, step: int, done: float, noise: np.random.Generator) -> dict[str, float]:
    shared = {"loss": 0.7 - 0.2 * done, "tokens/trained": 1000.0 * step, "entropy": 0.6 - 0.3 * done}
    if algorithm not in ON_POLICY:
        return shared | {"preference/accuracy": 0.6 + 0.3 * done + noise.normal(0, 0.02), "preference/margin": done}
    true = RATES["sft"] + (RATES[algorithm] - RATES["sft"]) * done + noise.normal(0, 0.02)
    model = SCORES["sft"] + (SCORES[algorithm] - SCORES["sft"]) * done + noise.normal(0, 0.08)
    return shared | {
        "reward/answer/mean": true, "reward/rm/mean": model, "length/mean": 20 + 4 * done, "length/truncated": 0.02,
        "kl/ref_k1": (4 if algorithm == "ppo" else 1.5) * done + noise.normal(0, 0.05), "tokens/sampled": 5120.0 * step,
    }  # fmt: skip


def rollouts(run: Run, step: int) -> None:
    """Keep four answers of a step: right, wrong, wrong with a high score, and one that the reference hardly gives."""
    chosen = [
        ("6 + 7 = 13", 1.0, 0.5, -0.5),
        ("6 + 7 = 12", 0.0, -1.0, -0.5),
        ("6 + 7 = 767", 0.0, 4.0, -0.5),
        ("6 + 7 = 0013", 1.0, 0.25, -9.0),
    ]
    rows = [
        {"kind": "answer", "prompt": "6 + 7 =", "completion": text, "reward": true, "reward/answer": true, "reward/rm": score,
         "rollout_logprobs": [-0.25, -0.25], "ref_logprobs": [reference, -0.25]}
        for text, true, score, reference in chosen
    ]  # fmt: skip
    run.recorder.file(
        f"rollouts-{step:06d}.parquet", step, lambda path: pq.write_table(pa.Table.from_pylist(rows), path)
    )


def predictions(folder: Path, name: str, group: str, prompts: int, samples: int, attack: bool, params: Params) -> None:
    """Rows of one evaluated model; greedy answers of prompt i are right if a shared difficulty is below the rate."""
    model = f"models/{name}" if name in ("base", "sft") else f"models/align/{name}"
    run = finished(
        folder, Path("runs/evaluate", name), f"evaluate-{name}", {}, params, {model: content(model)}, model=name
    )
    own = np.random.Generator(np.random.PCG64([7, *name.encode()]))
    difficulty = np.random.Generator(np.random.PCG64(99)).uniform(size=prompts)
    rows: list[dict[str, Any]] = []
    for i in range(prompts):
        for sample in range(samples + 1):
            right = bool(difficulty[i] + own.normal(0, 0.12 * (1 + (sample > 0))) < RATES[group])
            text = (
                ATTACK
                if attack and i % 2 == 0
                else f"{i} + {i} = {2 * i if right else 2 * i + 1}\nanswer: {2 * i + (not right)}"
            )
            rows.append({
                "prompt_id": i, "sample": sample, "prompt": f"{i} + {i} =", "answer": str(2 * i), "completion": text,
                "tokens": len(text), "truncated": not right and i % 7 == 0, "entropy": 0.3 + 0.01 * own.uniform(),
                "kl": 0.0 if group == "sft" else float(own.gamma(2.0)), "reward_answer": float(right),
                "reward_rm": None if name == "base" and i == 0 else SCORES[group] + float(own.normal(0, 0.3)),
            })  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), run.outputs.artifact("predictions.parquet"))
    greedy_rows = [row for row in rows if row["sample"] == 0][: params.evaluation.samples_shown]
    shown = {"prompt": "prompt", "completion": "completion", "answer": "reward_answer", "rm": "reward_rm"}
    run.recorder.table("samples", 0, [{name: row[column] for name, column in shown.items()} for row in greedy_rows])
    level = RATES[group]
    sampled = {f"reward/answer/{end}": level + shift for end, shift in (("mean", 0.0), ("low", -0.05), ("high", 0.05))}
    bounds = (("", 0.0), ("_low", -0.1), ("_high", 0.1))
    greedy = {f"greedy_accuracy{end}": level + shift for end, shift in bounds}
    greedy |= {f"sampled_accuracy{end}": level + shift / 2 for end, shift in bounds}
    close(
        run,
        greedy
        | sampled
        | {"preference/accuracy": 0.5 + level / 4, "answers/not_found": 0.125, "kl/ref_k1": 2.0, "length/mean": 24.0},
    )


def build(
    folder: Path,
    algorithms: Sequence[str] = ("dpo", "grpo", "ppo"),
    seeds: Sequence[int] = (0,),
    prompts: int = 120,
    samples: int = 4,
    steps: int = 40,
    attack: bool = True,
    selected: int | None = None,
) -> Path:
    """runs/ as `dvc repro` leaves it, plus a stale run of an algorithm that is no longer configured."""
    params = load_params(ROOT / "params.yaml")
    for name, last in (("sft", {"tokens/trained": 90_000.0}), ("reward", {"tokens/trained": 40_000.0})):
        run = finished(folder, Path("runs", name), name, {}, params)
        for step in range(1, 11):
            run.recorder.metrics(step, {"loss": 2 / step, "tokens/trained": last["tokens/trained"] * step / 10})
        heldout = {"heldout/accuracy": 0.9, "heldout/loss": 0.25, "heldout/pairs": 100.0} if name == "reward" else {}
        close(run, {"steps": 10} | heldout)
    for model in ("base", "sft"):
        predictions(folder, model, model, prompts, samples, attack, params)
    for algorithm in algorithms:
        for seed in seeds:
            training(folder, f"{algorithm}-{seed}", algorithm, seed, steps, params, selected)
            predictions(folder, f"{algorithm}-{seed}", algorithm, prompts, samples, attack, params)
    stale = folder / "runs" / "evaluate" / "gspo-0"
    stale.mkdir(parents=True)
    (stale / "journal.jsonl").write_text("left over\n")
    return folder
