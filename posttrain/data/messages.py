"""Whole conversations: which turns are learnt, and how much each counts.

Example:
    >>> asked, answered, greets = parted([{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}])
    >>> asked, answered, greets
    ([{'role': 'user', 'content': '1+1='}], [{'role': 'assistant', 'content': '2'}], False)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.errors import DataError
from posttrain.text import shortened

WEIGHTS = ("weight", "train", "trainable", "training", "loss", "loss_weight", "loss_mask")
"""Keys of a message that say how much its tokens count in the loss: true, false, or a number that is not negative."""
_TRAINING = frozenset((
    "train", "trained", "trainable", "training", "untrained", "finetune", "loss", "losses", "mask", "masks", "masked", "masking",
    "weight", "weights", "weighted", "weighting", "supervise", "supervised", "supervision", "ignore", "ignored", "learn", "learned",
    "learnable", "skip", "skipped", "exclude", "excluded", "labels", "backprop", "grad",
))  # fmt: skip
"""Words in the names of keys that may say which tokens are trained."""
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def says_training(name: str) -> bool:
    """Return True if the name of a key or column may say which tokens are trained, such as `train_detail` or `lossMask`."""
    return any(word.lower() in _TRAINING for word in _WORD.findall(name))


def weighted(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the message with its weight under the key `weight`, whatever key of `WEIGHTS` it has; without one if it has none.

    Raises DataError for a value that is no weight, for keys that contradict each other, and for other keys that may say which tokens
    are trained.
    """
    others = {key: value for key, value in turn.items() if key not in WEIGHTS}
    given = {key: turn[key] for key in WEIGHTS if turn.get(key) is not None}
    for key, value in others.items():
        if value is not None and isinstance(key, str) and says_training(key):
            raise DataError(
                f"{where}: the key {key!r} ({shortened(value)}) may say which tokens are trained, and is not read. Write `weight: 0` into"
                " each message that must not be trained, or rename the key if it says something else."
            )
    for key, value in given.items():
        number = value.item() if getattr(value, "shape", None) == () else value
        if not isinstance(number, int | float) or not 0 <= number <= sys.float_info.max:
            raise DataError(
                f"{where}: {key} is {shortened(value)}; it must be true, false, or a finite number that is not negative"
            )
        given[key] = float(number)
    if len(set(given.values())) > 1:
        shown = ", ".join(f"{key}: {turn[key]}" for key in given)
        raise DataError(
            f"{where}: {shown} contradict each other, and only one of them would be used; leave only `weight`"
        )
    return others | ({"weight": next(iter(given.values()))} if given else {})


def parted(turns: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any], bool]:
    """Return the turns before the first answer, those from it on, and True if the conversation begins with the assistant.

    Its greeting answers nothing, so it belongs to the first part and is not trained.
    """
    asked = [i for i, turn in enumerate(turns) if turn["role"] != "system"]
    greets = bool(asked) and turns[asked[0]]["role"] == "assistant"
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"][1 if greets else 0 :]
    first = answers[0] if answers else len(turns)
    return list(turns[:first]), list(turns[first:]), greets
