"""Hold the identity, parameters and paths of one run. This module writes nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.config.params import Params

MEASUREMENTS, CHECKPOINTS, FAULTS, LOCK = "measurements.jsonl", "checkpoints", "faults", "lock"
"""Names inside the folder of a run's live state."""


def _never() -> bool:
    """Return False: nothing asks a run without signal handling to stop."""
    return False


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """One run of one step.

    `state` holds its live files and survives a kill; `directory` is the finished run's folder, which DVC tracks.
    """

    stage: str
    name: str
    params: Params
    args: argparse.Namespace
    directory: Path
    state: Path
    key: str
    code: str
    """Digest of the code and libraries. A checkpoint that different code wrote is never continued."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each input at the start of the run, by its path."""
    stop_requested: Callable[[], bool] = _never
    """Return True if a signal asked to stop: write a checkpoint, then raise Interrupted."""
    records: bool = True
    """True for the one process that records, if several processes run a step together."""

    @property
    def identity(self) -> str:
        """Return `name-key`: the folder of the run's state, and its tag in MLflow."""
        return self.state.name

    @property
    def command(self) -> str:
        """Return the command that runs only this step."""
        given = {name: value for name, value in sorted(vars(self.args).items()) if name not in ("params", "replay")}
        options = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
        return " ".join([f"python -m pipelines.{self.stage}", *options])

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints that this code wrote. It is removed when the step has succeeded."""
        return self.state / CHECKPOINTS / self.code[:16]
