"""Draw the trials of each algorithm: sections of `algorithms` with some values replaced.

Trial 0 is the section as it is given. A random trial draws every parameter of the space on its own; a grid is the product of evenly
spaced points or of the listed values, and must have as many points as there are trials after the first. With `tpe` the trials after
the first are suggested while the search runs (`suggest`).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.config.params import Params, merged
from pipelines.config.tune_schema import KINDS, SearchRange
from posttrain.algorithms import OnPolicy
from posttrain.errors import ConfigError
from posttrain.text import nearest


@dataclass(frozen=True)
class Trial:
    """One setting of an algorithm."""

    algorithm: str
    number: int
    values: Mapping[str, Any]
    """Replaced parameters by their path within the algorithm's section; empty for trial 0."""
    section: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the name of the trial's section in `algorithms`."""
        return f"{self.algorithm}_t{self.number}"


def trials(params: Params) -> list[Trial]:
    """Return the trials of all algorithms of the project, in their order; with `tpe` only the first of each.

    Raises ConfigError if an algorithm has no space, the space names no algorithm, or a grid has a different number of points.
    """
    known = [*KINDS, *params.project.algorithms]
    for name in params.tune.space:
        if name not in known:
            raise ConfigError(f"tune.space.{name}: not an algorithm of project.algorithms{nearest(name, known)}")
    if params.tune.training_seed in params.project.seeds:
        raise ConfigError(
            f"tune.training_seed = {params.tune.training_seed} is one of project.seeds: the chosen values would be reported on the run"
            " that chose them. Set a different one."
        )
    return [one for name in params.project.algorithms for one in _of(params, name)]


def space_of(params: Params, name: str) -> dict[str, SearchRange]:
    """Return the space of an algorithm: the one of its kind, with its own entries on top."""
    kind = KINDS[0] if isinstance(params.algorithm(name), OnPolicy) else KINDS[1]
    space = params.tune.space.get(kind, {}) | params.tune.space.get(name, {})
    if not space and params.tune.trials > 1:
        raise ConfigError(
            f"tune.space: no parameter of {name} to tune; give tune.space.{name} or tune.space.{kind}, e.g."
            " {budget.optimizer.learning_rate: {low: 5e-5, high: 5e-4, log: true}}"
        )
    return space


def _of(params: Params, name: str) -> list[Trial]:
    space, count = space_of(params, name), params.tune.trials - 1
    if params.tune.method == "tpe":
        points: list[dict[str, Any]] = []
    elif params.tune.method == "grid" and count:
        points = _grid(space, count, name)
    else:
        rng = random.Random(f"tune/{params.tune.seed}/{name}")
        points = [{path: _drawn(found, rng) for path, found in sorted(space.items())} for _ in range(count)]
    return [trial(params, name, number, values) for number, values in enumerate([{}, *points])]


def trial(params: Params, name: str, number: int, values: Mapping[str, Any]) -> Trial:
    """Return the trial of an algorithm with these values in its section."""
    given = params.algorithms[name].model_dump(exclude_unset=True)
    return Trial(name, number, values, merged(given, _nested(values)))


def _drawn(found: SearchRange, rng: random.Random) -> Any:
    if found.values is not None:
        return rng.choice(found.values)
    return _between(found, rng.random())


def _between(found: SearchRange, share: float) -> float:
    """Return the value at this share of the way from low to high, with four significant digits."""
    assert found.low is not None
    assert found.high is not None
    if found.log:
        value = math.exp(math.log(found.low) + share * (math.log(found.high) - math.log(found.low)))
    else:
        value = found.low + share * (found.high - found.low)
    return float(f"{value:.4g}")


def _grid(space: Mapping[str, SearchRange], count: int, name: str) -> list[dict[str, Any]]:
    """Return the points of a grid: intervals share the number of points that the lists leave."""
    listed = math.prod(len(found.values) for found in space.values() if found.values is not None)
    intervals = sum(found.values is None for found in space.values())
    each = round((count / listed) ** (1 / intervals)) if intervals else 1
    if listed * each**intervals != count:
        raise ConfigError(
            f"tune: a grid over {', '.join(sorted(space))} of {name} cannot have {count} points (trials - 1): lists give {listed}, and"
            f" each of {intervals} intervals the same number. Set tune.trials: {listed * max(each, 1) ** intervals + 1}, or method: random."
        )
    axes = {path: found.values or _spaced(found, each) for path, found in sorted(space.items())}
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def _spaced(found: SearchRange, count: int) -> list[float]:
    return [_between(found, (i + 0.5) / count if count == 1 else i / (count - 1)) for i in range(count)]


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"options.clip_high": 0.3} as {"options": {"clip_high": 0.3}}."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        node = tree
        *parents, last = path.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree
