"""Find out by trying up to which length of row a faster way of computing agrees with the model's own: windows end it.

Example:
    >>> probe_ids(4, vocabulary=300)
    (3, 7, 13, 21)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from posttrain.settings import context_limit

TRIED = 512
"""Longer windows are tried only with a short one in their place: a forward pass over so many tokens would take long."""
PAST = 8
"""Tokens that a trial goes beyond a window."""
SMALL_WINDOW = 8
"""Tokens of a window that replaces one that is too long for a trial."""
PLAIN_LENGTH = 48
"""Tokens of the trial that every model gets, whatever its configuration says."""
LIMITS = re.compile(r"window|chunk|local|block|topk|top_k|sparse|sliding|stride|compress")


def find_reach(
    config: PreTrainedConfig, agrees: Callable[[int], bool], agrees_in: Callable[[int], bool] | None = None
) -> int | None:
    """Return the longest row for which `agrees` can be relied on, None without a limit, 0 if it never agrees.

    Every number of the configuration that could limit attention is tried a few tokens beyond it, whatever its exact name.

    Args:
        agrees_in: returns True if rows beyond a long window agree, by a trial with a short one in its place.
    """
    text = config.get_text_config()
    context = context_limit(text.to_dict()) or 2**31
    for window in _candidates(text):
        if window > context:
            continue
        if window > TRIED:
            if agrees_in is not None and agrees_in(window):
                continue
            return window
        if not agrees(min(window + PAST, context)):
            near = [n for n in _candidates(text) if window <= n < min(window + PAST, context)]
            return next((n for n in reversed(near) if agrees(n)), 0)
    return None if agrees(min(PLAIN_LENGTH, context)) else 0


@contextmanager
def shrunk(model: PreTrainedModel, window: int, short: int) -> Iterator[None]:
    """Replace numbers `window` of the configuration and the layers by `short`, if their names may be those of limits."""
    owners = [vars(owner) for owner in (model.config.get_text_config(), *model.modules())]
    found = [
        (own, name) for own in owners for name, value in own.items() if _may_limit(name, value) and value == window
    ]
    for own, name in found:
        own[name] = short
    try:
        yield
    finally:
        for own, name in found:
            own[name] = window


def trial_length(config: PreTrainedConfig, longest: int = 0) -> int:
    """Return the length of a row that is past every window that may be tried, and past those that rows of `longest` tokens exceed."""
    tried = (window for window in _candidates(config) if window <= TRIED or window < longest)
    return max([PLAIN_LENGTH, *(window + PAST for window in tried)])


def probe_ids(length: int, vocabulary: int) -> tuple[int, ...]:
    """Return `length` token ids without a period, so that no two parts of the row look alike."""
    most = max(2, min(vocabulary, 251) - 3)
    return tuple(min(3, vocabulary - 1) + (i * i + 3 * i) % most for i in range(length))


def _candidates(config: PreTrainedConfig) -> list[int]:
    """Return the configuration's numbers above 1 with a name that a limit may have, ascending."""
    numbers = {n for name, value in config.to_dict().items() if LIMITS.search(name) for n in _integers(value)}
    kinds = getattr(config, "layer_types", None)
    if kinds and set(kinds) == {"full_attention"}:
        numbers.discard(getattr(config, "sliding_window", None) or 0)
    return sorted(n for n in numbers if n > 1)


def _may_limit(name: str, value: Any) -> bool:
    return LIMITS.search(name) is not None and isinstance(value, int)


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _integers(part)
