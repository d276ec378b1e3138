"""Read the outcomes of a study's arms from its workspaces."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipelines.report.load import Predictions, predictions, training
from pipelines.runtime.publish import ARTIFACTS, METRICS
from pipelines.studies.measured import measured
from pipelines.studies.study import FIXED, Study
from pipelines.studies.workspace import Workspace
from posttrain.errors import DataError
from posttrain.evaluation.statistics import Floats, per_prompt
from posttrain.text import nearest

V = TypeVar("V")
OVER: dict[str, Callable[[Floats], float]] = {
    "first": lambda points: float(points[0]),
    "last": lambda points: float(points[-1]),
    "mean": lambda points: float(points.mean()),
    "max": lambda points: float(points.max()),
    "min": lambda points: float(points.min()),
}


@dataclass(frozen=True)
class Reader:
    """Finished runs of a study, by arm."""

    study: Study
    spaces: Sequence[Workspace]
    accuracy: str
    """The reward that `answers/accuracy` is the mean of."""

    def values(self, arm: str, outcome: str) -> Floats:
        """Return an outcome of an arm: [prompts, seeds] for `answers/…`, else [seeds].

        Raises DataError if a run has not finished or has no such number.
        """
        kind, _, name = outcome.partition("/")
        if kind == "measured":
            space = next(s for s in self.spaces if arm in s.arms)
            level = self.study.level
            found = [measured(space.folder, arm, seed, name, space.params, level) for seed in self.study.seeds]
            return np.asarray(found, dtype=np.float64)
        columns = [self._value(run, kind, name) for run in self._runs(arm)]
        return np.stack(columns, axis=-1)

    def _runs(self, arm: str) -> list[tuple[Path, str]]:
        """Return (workspace, name of the run) of every seed of an arm; one for a fixed model."""
        space = next((s for s in self.spaces if arm in s.arms), self.spaces[0])
        if arm in FIXED and arm not in space.arms:
            return [(space.folder, arm)]
        return [(space.folder, f"{arm}-{seed}") for seed in self.study.seeds]

    def _value(self, run: tuple[Path, str], kind: str, name: str) -> Floats:
        folder, model = run
        if kind == "answers":
            return self._answers(folder, model, name)
        if kind == "evaluation":
            path = folder / "runs" / "evaluate" / model / METRICS
            found = _flat(json.loads(_existing(path).read_text(encoding="utf-8")))
            return np.asarray(_named(found, name, path))
        metric, _, over = name.partition(":")
        place = folder / "runs" / "align" / model
        _existing(place / METRICS)
        curves = training(place, model).curves
        _, points = _named(curves, metric, place)
        return np.asarray(OVER[over or "last"](points), dtype=np.float64)

    def _answers(self, folder: Path, model: str, name: str) -> Floats:
        """Return the mean over the sampled answers of each prompt, [prompts]."""
        found = predictions(_existing(folder / "runs" / "evaluate" / model / ARTIFACTS / "predictions.parquet"))
        column = f"reward_{self.accuracy}" if name == "accuracy" else name
        return per_prompt(_named(found.numbers, column, folder)[:, 1:])


def same_prompts(reader: Reader) -> Predictions:
    """Return the supervised model's answers, with the prompts and their groups. Raises DataError if two workspaces asked different ones."""
    asked = []
    for space in reader.spaces:
        path = _existing(space.folder / "runs" / "evaluate" / "sft" / ARTIFACTS / "predictions.parquet")
        asked.append(predictions(path))
        if (asked[-1].prompts, asked[-1].answers, asked[-1].groups) != (
            asked[0].prompts,
            asked[0].answers,
            asked[0].groups,
        ):
            raise DataError(
                f"{path}: other evaluation prompts than {reader.spaces[0].folder}, so the arms cannot be compared; an arm of a"
                " study must not change data.evaluation"
            )
    return asked[0]


def _existing(path: Path) -> Path:
    """Return the path. Raises DataError if the run has not finished."""
    if not path.is_file():
        raise DataError(f"{path} does not exist: the study has not run yet. Run it with: make study NAME=…")
    return path


def _named(found: Mapping[str, V], name: str, path: Path) -> V:
    if name not in found:
        raise DataError(f"{path}: no outcome {name!r}{nearest(name, found)}")
    return found[name]


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested mapping by their path."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": float(str(value))}
    return flat
