"""Load finished runs for the report: predictions by prompt, curves by metric, results by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.config.effective import spec_of
from pipelines.runtime.journal import number, read
from pipelines.runtime.publish import ARTIFACTS, JOURNAL, METRICS
from posttrain.algorithms import OnPolicy
from posttrain.errors import DataError
from posttrain.evaluation.statistics import Floats
from posttrain.files import read_json

RUNS = Path("runs")
PREDICTIONS = "predictions.parquet"
BENCHMARKS = "benchmarks.parquet"
GROUP = "group"
TEXTS = ("prompt", "answer", "completion")
NUMBERS = ("tokens", "truncated", "entropy", "kl")
BASE, SFT = "base", "sft"


@dataclass(frozen=True)
class Predictions:
    """Answers of one model. Rows are prompts sorted by prompt_id; column 0 is greedy, the other columns are sampled."""

    prompt_ids: tuple[int, ...]
    prompts: list[str]
    answers: list[str]
    completions: list[list[str]]
    numbers: dict[str, Floats]
    """Values by name, [prompts, samples]; NaN if there is no value."""
    groups: tuple[str, ...] | None = None
    """The value of `evaluation.groups` of each prompt; None if prompts are independent."""


@dataclass(frozen=True)
class Training:
    """One training run from its journal. `curves` maps a metric to (steps, values)."""

    name: str
    curves: dict[str, tuple[Floats, Floats]]
    summary: dict[str, float]
    params: dict[str, Any]
    inputs: dict[str, str]
    """sha256 of each table and model that the run read, by path."""
    folder: Path = Path()
    """The run directory."""
    identity: str = ""
    """The run's identity; empty if its journal has none."""

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric, or None."""
        if metric not in self.curves:
            return None
        return float(self.curves[metric][1][-1])


@dataclass(frozen=True)
class Model:
    """One evaluated model: base, sft, or one algorithm trained with one seed."""

    name: str
    group: str
    seed: int | None
    predictions: Predictions
    metrics: dict[str, float]
    training: Training | None
    benchmarks: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """By task and metric: value, low, high, and documents, one number each."""
    evaluated: dict[str, str] = field(default_factory=dict)
    """sha256 of each table and model that the evaluation read, by path."""


@dataclass(frozen=True)
class Results:
    """All data of the report. The order of models is base, sft, then algorithms as in params.yaml."""

    models: list[Model]
    sft: Training
    reward: Training
    algorithms: list[str]
    seeds: list[int]

    @property
    def groups(self) -> list[str]:
        """Return the names of all rows of the report."""
        return [BASE, SFT, *self.algorithms]

    def of(self, group: str) -> list[Model]:
        """Return the models of one group."""
        return [model for model in self.models if model.group == group]

    @property
    def prompts(self) -> Predictions:
        """Return prompts and gold answers, which are the same for every model."""
        return self.models[0].predictions


def wanted(algorithms: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Return the run directories that a report over these algorithms and seeds reads."""
    aligned = [f"{algorithm}-{seed}" for algorithm in algorithms for seed in seeds]
    evaluated = [RUNS / "evaluate" / name for name in (BASE, SFT, *aligned)]
    return [RUNS / "sft", RUNS / "reward", *(RUNS / "align" / name for name in aligned), *evaluated]


def load(algorithms: Sequence[str], seeds: Sequence[int], root: Path = Path()) -> Results:
    """Read exactly the runs of these algorithms and seeds; unrelated runs are ignored."""
    missing = [path.as_posix() for path in wanted(algorithms, seeds) if not (root / path / JOURNAL).is_file()]
    if missing:
        raise DataError(
            f"the report needs runs that do not exist: {', '.join(missing)}. Run `dvc repro`; or remove the algorithm or"
            " seed from project in params.yaml."
        )
    models = [_model(root, BASE, BASE, None), _model(root, SFT, SFT, None)]
    models += [_model(root, f"{name}-{seed}", name, seed) for name in algorithms for seed in seeds]
    _check_same_prompts(models)
    runs = root / RUNS
    return Results(
        models, training(runs / "sft", "sft"), training(runs / "reward", "reward"), list(algorithms), list(seeds)
    )


def _model(root: Path, name: str, group: str, seed: int | None) -> Model:
    """Load one evaluated model."""
    folder = root / RUNS / "evaluate" / name
    trained = None if seed is None else training(root / RUNS / "align" / name, name)
    answered, metrics = predictions(folder / ARTIFACTS / PREDICTIONS), _metrics(folder / METRICS)
    benchmarks, inputs = benchmark_scores(folder / ARTIFACTS / BENCHMARKS), training(folder, name).inputs
    return Model(name, group, seed, answered, metrics, trained, benchmarks, inputs)


def benchmark_scores(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Load the scores of benchmarks; none if the evaluation ran none."""
    rows = pq.read_table(path).to_pylist() if path.is_file() else []
    return {(row["task"], row["metric"]): row for row in rows}


def predictions(path: Path) -> Predictions:
    """Load one Parquet file of predictions, with samples as columns. Raises DataError if it is not usable."""
    if not path.is_file():
        raise DataError(
            f"{path} does not exist although its run has finished; run its evaluate stage again with `dvc repro --force`"
        )
    table = pq.read_table(path)
    absent = [name for name in ("prompt_id", "sample", *TEXTS, *NUMBERS) if name not in table.column_names]
    if absent or not table.num_rows:
        raise DataError(
            f"{path}: "
            + (f"the columns {', '.join(absent)} are missing" if absent else "has no rows")
            + "; evaluate again: `dvc repro --force`"
        )
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    ids = sorted(set(columns["prompt_id"]))
    row_of = {prompt_id: row for row, prompt_id in enumerate(ids)}
    rows = [row_of[prompt_id] for prompt_id in columns["prompt_id"]]
    samples = max(columns["sample"]) + 1
    texts = {name: [[""] * samples for _ in ids] for name in TEXTS}
    for name in TEXTS:
        for row, sample, text in zip(rows, columns["sample"], columns[name], strict=True):
            texts[name][row][sample] = str(text)
    names = [*NUMBERS, *sorted(name for name in columns if name.startswith("reward_"))]
    numbers = {name: np.full((len(ids), samples), np.nan) for name in names}
    for name in names:
        numbers[name][rows, columns["sample"]] = np.asarray(columns[name], dtype=np.float64)
    prompts, answers = ([row[0] for row in texts[name]] for name in ("prompt", "answer"))
    groups = dict(zip(columns["prompt_id"], columns.get(GROUP, ()), strict=False))
    found = tuple(str(groups[prompt_id]) for prompt_id in ids) if groups else None
    return Predictions(tuple(ids), prompts, answers, texts["completion"], numbers, found)


def _check_same_prompts(models: Sequence[Model]) -> None:
    """Raise DataError if two models answered different prompts."""
    first = models[0]
    for model in models[1:]:
        ours, theirs = model.predictions, first.predictions
        if _asked(ours) != _asked(theirs):
            raise DataError(
                f"runs/evaluate/{model.name} and runs/evaluate/{first.name} answer different prompts, so they cannot be compared"
                " prompt by prompt. Run `dvc repro` so that all evaluations use the same data/valid/evaluation.parquet."
            )


def _asked(found: Predictions) -> tuple[object, ...]:
    return found.prompt_ids, found.prompts, found.answers, found.groups


def training(folder: Path, name: str) -> Training:
    """Load curves, summary and parameters from a journal."""
    points: dict[str, list[tuple[int, float]]] = {}
    summary: dict[str, float] = {}
    params: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    identity = ""
    for record in read(folder / JOURNAL):
        if record["kind"] == "metrics":
            for metric, value in record["values"].items():
                points.setdefault(metric, []).append((record["step"], number(value)))
        elif record["kind"] == "summary":
            summary |= {key: number(value) for key, value in record["values"].items()}
        elif record["kind"] == "params":
            params |= record["values"]
        elif record["kind"] == "start":
            inputs, identity = dict(record.get("inputs", {})), str(record.get("run", ""))
    curves = {}
    for metric, pairs in sorted(points.items()):
        steps, values = np.asarray(sorted(pairs), dtype=np.float64).T
        curves[metric] = (steps, values)
    return Training(name, curves, summary, params, inputs, folder, identity)


def optimiser_steps(run: Training, algorithm: str) -> int:
    """Return the number of weight updates; every on-policy step makes epochs x minibatches of them."""
    spec = spec_of(algorithm, run.params)
    each = spec.epochs * spec.minibatches if isinstance(spec, OnPolicy) else 1
    return round(run.summary["steps"]) * each


def _metrics(path: Path) -> dict[str, float]:
    """Load metrics.json as flat names and values."""
    return dict(_flat(read_json(path, f"Type `dvc checkout --force {path}`, or `dvc repro`."), ""))


def _flat(tree: Any, prefix: str) -> list[tuple[str, float]]:
    """Return the leaves of a nested mapping with their path as name."""
    if not isinstance(tree, dict):
        return [(prefix, number(tree))]
    return [leaf for key, value in tree.items() for leaf in _flat(value, f"{prefix}/{key}" if prefix else key)]
