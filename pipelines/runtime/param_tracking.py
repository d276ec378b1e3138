"""Track which parameters a step reads, and reject undeclared ones.

A watched section behaves like the section itself (isinstance, methods, properties), so that callers keep their types.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, cast

from pydantic import BaseModel

from pipelines.config.params import Params, flatten
from pipelines.config.types import Section
from posttrain.errors import ConfigError
from posttrain.text import nearest

UNTRACKED = "limits"
"""The section that every stage may read and none declares: time limits depend on the machine, not on the result."""
Seen = Callable[[str], None]
"""A callback that receives the dotted name of every parameter that is read."""


class Reads:
    """Collect the dotted names that one stage has read. Raises ConfigError on a read outside the declared prefixes."""

    def __init__(self, stage: str, declared: tuple[str, ...]) -> None:
        self.stage = stage
        self.declared = declared
        self.leaves: set[str] = set()

    def __call__(self, leaf: str) -> None:
        if within(leaf, UNTRACKED):
            return
        if not any(within(leaf, prefix) for prefix in self.declared):
            parts = leaf.split(".")
            prefix = ".".join(parts[:2]) if parts[0] in ("algorithms", "rewards") else parts[0]
            raise ConfigError(
                f"stage {self.stage} reads the parameter {leaf} but declares only {', '.join(self.declared) or 'none'}."
                f" Add {prefix!r} to `params` in the step's main(...) and to the stage's params in dvc.yaml."
            )
        self.leaves.add(leaf)


def within(leaf: str, prefix: str) -> bool:
    """Return True if `leaf` is the prefix or lies below it."""
    return leaf == prefix or leaf.startswith(f"{prefix}.")


def watched(params: Params, seen: Seen) -> Params:
    """Return `params` in a wrapper that reports every parameter that is read to `seen`."""
    return cast(Params, _Section(params, "", seen))


def declared_values(params: Params, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Return the flat values under the declared prefixes, sorted by name. Raises ConfigError if a prefix names no parameter."""
    values: dict[str, Any] = {}
    for prefix in prefixes:
        node: Any = params
        for part in prefix.split("."):
            known = type(node).model_fields if isinstance(node, BaseModel) else node if isinstance(node, dict) else {}
            if part not in known:
                raise ConfigError(f"there is no parameter {prefix}: {part!r} is unknown{nearest(part, known)}")
            node = getattr(node, part) if isinstance(node, BaseModel) else node[part]
        values |= flatten(node, prefix)
    return dict(sorted(values.items()))


def _wrap(value: Any, path: str, seen: Seen) -> Any:
    """Return a value in the wrapper for its type; a plain value is reported as read."""
    if isinstance(value, Section):
        return _Section(value, path, seen)
    if isinstance(value, dict) and value and all(isinstance(item, Section) for item in value.values()):
        return _Table(value, path, seen)
    _saw(value, path, seen)
    return value


def _saw(value: Any, path: str, seen: Seen) -> None:
    """Report every leaf of a value as read."""
    for leaf in flatten(value, path) or {path: None}:
        seen(leaf)


class _Section:
    """Proxy for a Section; `__class__` makes isinstance give the result that the section itself would give."""

    __slots__ = ("_path", "_section", "_seen")

    def __init__(self, section: Section, path: str, seen: Seen) -> None:
        self._section, self._path, self._seen = section, path, seen

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._section)

    def __getattr__(self, name: str) -> Any:
        section, kind = self._section, type(self._section)
        if name in kind.model_fields:
            return _wrap(getattr(section, name), f"{self._path}.{name}" if self._path else name, self._seen)
        static = inspect.getattr_static(kind, name, None)
        if name.startswith("__") and name != "__dict__":
            return getattr(section, name)
        ours = not hasattr(BaseModel, name)
        if ours and isinstance(static, FunctionType):
            return MethodType(static, self)
        if ours and isinstance(static, property) and static.fget is not None:
            return static.fget(self)
        if ours:
            return getattr(section, name)
        return getattr(self._everything(), name)

    def _everything(self) -> Section:
        """Report the whole section as read and return it."""
        _saw(self._section, self._path, self._seen)
        return self._section

    def __eq__(self, other: object) -> bool:
        mine = self._everything()
        return mine == (other._everything() if type(other) is _Section else other)

    def __hash__(self) -> int:
        return id(self._section)

    def __repr__(self) -> str:
        return repr(self._everything())

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._everything())

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._everything(),)


class _Table(Mapping[str, Any]):
    """Proxy for a dictionary of sections. Iterating over its names counts as reading all of it."""

    def __init__(self, table: dict[str, Any], path: str, seen: Seen) -> None:
        self._table, self._path, self._seen = table, path, seen

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return dict

    def __getitem__(self, name: str) -> Any:
        return _wrap(self._table[name], f"{self._path}.{name}", self._seen)

    def __contains__(self, name: object) -> bool:
        self._seen(f"{self._path}.{name}")
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        self._seen(self._path)
        return iter(self._table)

    def __len__(self) -> int:
        self._seen(self._path)
        return len(self._table)


def _itself(section: Section) -> Section:
    """Return the section; pickling a proxy restores the plain section."""
    return section
