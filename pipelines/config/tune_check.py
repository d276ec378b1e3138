"""Check that every parameter of `tune.space` is one of its algorithms, and that the ends of its range are valid values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pipelines.config.explain import validated
from pipelines.config.schema import AlgorithmParams
from pipelines.config.tune_schema import KINDS, SearchRange
from posttrain.algorithms import OnPolicy
from posttrain.errors import ConfigError


class Tunable(Protocol):
    """The parameters that this check reads: those of `Params`, which imports this module."""

    @property
    def project(self) -> Any: ...

    @property
    def algorithms(self) -> Any: ...

    @property
    def tune(self) -> Any: ...

    def algorithm(self, name: str) -> Any: ...

    def budget(self, name: str) -> Any: ...

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Any: ...


def check_space(params: Tunable) -> None:
    """Raise ConfigError for a parameter or value that a trial of `posttrain tune` could not take."""
    for name in params.project.algorithms:
        kind = KINDS[0] if isinstance(params.algorithm(name), OnPolicy) else KINDS[1]
        for owner in (kind, name):
            for path, found in params.tune.space.get(owner, {}).items():
                for value in _values(found):
                    _check(params, name, f"tune.space.{owner}.{path}", path, value)


def _values(found: SearchRange) -> list[Any]:
    return [found.low, found.high] if found.values is None else found.values


def _check(params: Tunable, name: str, place: str, path: str, value: Any) -> None:
    section = params.algorithms[name].model_dump(exclude_unset=True)
    try:
        changed = validated(AlgorithmParams, _replaced(section, path.split("."), value), ("algorithms", name))
        tried = params.model_copy(update={"algorithms": {**params.algorithms, name: changed}})
        tried.algorithm(name)
        tried.budget(name)
    except ConfigError as error:
        raise ConfigError(f"{place}: the value {value!r} cannot be tried: {error}") from None


def _replaced(tree: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Return the tree with the value at the path."""
    first, *rest = path
    below = tree.get(first)
    return {**tree, first: _replaced(below if isinstance(below, Mapping) else {}, rest, value) if rest else value}
