"""A reward with ties, differences and gaps for any text of an untrained policy, so that groups carry a signal or not by chance."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any


def varied(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
    return [None if len(c) % 7 == 3 else float(sum(map(ord, c)) % 3) for c in completions]


def overflowing(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
    """Infinity for long answers, until somebody mends it."""
    limit = 99 if os.environ.get("MENDED") else 10
    return [float("inf") if len(c) > limit else float(len(c)) for c in completions]
