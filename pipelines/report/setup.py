"""Collect what the compared runs were set to, and the data that they read, from their journals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.config.effective import effective_parameters
from pipelines.report.load import Results, Training


@dataclass(frozen=True)
class Setup:
    """Hyper-parameters by algorithm, and the sha256 of each input by path."""

    shared: dict[str, Any]
    """Hyper-parameters that all algorithms use with one value."""
    differing: dict[str, dict[str, Any]]
    """Hyper-parameter to its value for each algorithm that uses it."""
    inputs: dict[str, str]
    """Tables and models of the runs, and the held-out problems."""


def setup_of(results: Results) -> Setup:
    """Return the setup of the first seed of each algorithm; the seeds of one algorithm differ in nothing else."""
    runs = {name: run for name in results.algorithms if (run := results.of(name)[0].training) is not None}
    values = {name: _parameters(name, run) for name, run in runs.items()}
    every = sorted({key for found in values.values() for key in found})
    shared = {
        key: next(iter(values.values()))[key]
        for key in every
        if all(key in found for found in values.values()) and len({str(found[key]) for found in values.values()}) == 1
    }
    differing = {
        key: {name: found[key] for name, found in values.items() if key in found} for key in every if key not in shared
    }
    read = {**_evaluated(results), **{path: digest for run in runs.values() for path, digest in run.inputs.items()}}
    inputs = {path: read[path] for path in sorted(read) if path.startswith(("data/", "models/"))}
    return Setup(shared, differing, inputs)


def _evaluated(results: Results) -> dict[str, str]:
    """Return the tables that the first evaluation read; all evaluations ask the same prompts."""
    return {path: digest for path, digest in results.models[0].evaluated.items() if path.startswith("data/")}


def _parameters(algorithm: str, run: Training) -> dict[str, Any]:
    return effective_parameters("align", {"algorithm": algorithm}, run.params)
