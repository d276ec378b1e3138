"""Assign each generated prompt to one table by its hash, so that tables never share a prompt.

Example:
    >>> part("1+1=") in KINDS, round(sum(share(kind) for kind in KINDS), 6)
    (True, 1.0)
"""

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
    """Return the table that owns `key`, for every seed and number of rows."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return next(kind for kind, (low, high) in _BOUNDS.items() if low <= place < high)


def share(kind: Kind) -> float:
    """Return the approximate share of prompts that `kind` owns."""
    low, high = _BOUNDS[kind]
    return high - low


def distinct(kind: Kind, count: int, draws: Iterable[Any], key: Callable[[Any], str], hint: str) -> list[Any]:
    """Return the first `count` different draws that `kind` owns.

    Raises:
        ConfigError: `draws` end before that.
    """
    chosen: dict[Any, None] = {}
    for draw in draws:
        if len(chosen) == count:
            break
        if part(key(draw)) == kind:
            chosen.setdefault(draw)
    if len(chosen) < count:
        raise ConfigError(
            f"data.{kind}.rows = {count}: only {len(chosen)} different prompts exist for this table, which owns"
            f" {share(kind):.0%} of all. {hint}"
        )
    return list(chosen)
