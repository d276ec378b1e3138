"""Settings of stages on other machines: infra/workers.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipelines.config.yaml_files import read_yaml
from posttrain.errors import ConfigError
from posttrain.text import nearest

VARIABLE = "POSTTRAIN_POOL"
"""Environment variable of a flow: the work pool whose workers run its stages."""
FILE = Path("infra/workers.yaml")
CPU, GPU = "cpu", "gpu"
"""Work queues of a pool, by the resource that a stage needs."""
FLOW = "stage"
"""Name of the flow that a worker runs; its deployment has the name of the pool."""


@dataclass(frozen=True)
class WorkerSettings:
    """The values of infra/workers.yaml, which documents them."""

    resources: Mapping[str, str]
    lease_seconds: float
    beat_seconds: float
    checkpoint_seconds: float
    remote_seconds: float
    attempts: int
    in_flight: int

    def queue(self, stage: str) -> str:
        """Return the work queue of a stage; the instances of a matrix share one."""
        return self.resources.get(stage.partition("@")[0], CPU)


def read_settings(root: Path, stages: Mapping[str, object]) -> WorkerSettings:
    """Return the settings of a project. Raises ConfigError that names the field, the value and the rule."""
    path = root / FILE
    tree = read_yaml(path)
    names = [field.name for field in fields(WorkerSettings)]
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold the fields {', '.join(names)}.")
    for name in tree:
        if name not in names:
            raise ConfigError(f"{path}: unknown field {name!r}{nearest(str(name), names)}")
    for name in names:
        if name not in tree:
            raise ConfigError(f"{path}: {name} is missing; `git checkout {FILE}` restores the file.")
        if name != "resources":
            _require_positive(path, name, tree[name])
    if tree["lease_seconds"] < 3 * tree["beat_seconds"]:
        raise ConfigError(
            f"{path}: lease_seconds = {tree['lease_seconds']} must be at least three times beat_seconds = {tree['beat_seconds']}:"
            " one lost report would take a stage from a worker that is at work."
        )
    _check_resources(path, tree["resources"], {name.partition("@")[0] for name in stages})
    return WorkerSettings(**tree)


def _require_positive(path: Path, name: str, value: Any) -> None:
    """Raise ConfigError if the value is not a positive number, or no whole number for a count."""
    kinds = (int,) if name in ("attempts", "in_flight") else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
        raise ConfigError(f"{path}: {name} = {value!r} must be a positive {'whole ' if len(kinds) == 1 else ''}number.")


def _check_resources(path: Path, tree: Any, stages: set[str]) -> None:
    """Raise ConfigError if a stage or a queue is unknown."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: resources = {tree!r} must be a mapping of stages to {CPU} or {GPU}.")
    for stage, queue in tree.items():
        if stage not in stages:
            raise ConfigError(f"{path}: resources: dvc.yaml has no stage {stage!r}{nearest(str(stage), stages)}")
        if queue not in (CPU, GPU):
            raise ConfigError(f"{path}: resources: {stage}: {queue!r} must be {CPU} or {GPU}.")
