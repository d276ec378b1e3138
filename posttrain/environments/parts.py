"""Which table a generated prompt may enter. A prompt belongs to one table by a hash of itself, so tables cannot share one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

from posttrain.errors import ConfigError

Kind = Literal["sft", "preferences", "problems", "evaluation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Row = dict[str, Any]
_BOUNDS: dict[Kind, tuple[float, float]] = {
    "sft": (0.0, 0.3),
    "preferences": (0.3, 0.5),
    "problems": (0.5, 0.85),
    "evaluation": (0.85, 1.0),
}


def part(key: str) -> Kind:
    """The table that owns `key`, whatever seed or number of rows was asked for."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return next(kind for kind, (low, high) in _BOUNDS.items() if low <= place < high)


def share(kind: Kind) -> float:
    """The part of all prompts that `kind` owns, about."""
    low, high = _BOUNDS[kind]
    return high - low


def distinct(kind: Kind, count: int, draws: Iterable[Any], key: Callable[[Any], str], hint: str) -> list[Any]:
    """The first `count` different draws that `kind` owns. Raises ConfigError where `draws` end before that."""
    chosen: dict[Any, None] = {}
    for draw in draws:
        if len(chosen) == count:
            break
        if part(key(draw)) == kind:
            chosen.setdefault(draw)
    if len(chosen) < count:
        raise ConfigError(
            f"data.{kind}.rows = {count}: only {len(chosen)} different prompts were found for this table, which owns"
            f" {share(kind):.0%} of all. {hint}"
        )
    return list(chosen)
