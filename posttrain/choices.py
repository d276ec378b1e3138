"""Choices that a process makes by its clock or its free memory, kept with a run's checkpoints: a resumed run repeats them.

Different choices give numbers that differ in their last bits, so that a run which was killed would end with other bytes.

Example:
    >>> choose("example: rows at once", 5)
    >>> chosen("example: rows at once"), chosen("example: other")
    (5, None)
    >>> follow({"example: rows at once": 4})
    >>> made()["example: rows at once"]
    4
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_MADE: dict[str, int] = {}
_CHANGES = [0]


def name_of(device: torch.device) -> str:
    """Return the device's model, for the name of a choice: on a different model the choice is made anew."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def chosen(name: str) -> int | None:
    """Return the choice of this process, or of the run that it continues; None if there is none."""
    return _MADE.get(name)


def choose(name: str, value: int) -> None:
    """Note a choice."""
    _MADE[name] = int(value)


def made() -> dict[str, int]:
    """Return all choices, for a checkpoint."""
    return dict(sorted(_MADE.items()))


def follow(choices: Mapping[str, int]) -> None:
    """Take choices that were made before, by a process that was cut off or by rank 0, in place of those of the same name."""
    if any(_MADE.get(name, value) != value for name, value in choices.items()):
        _CHANGES[0] += 1
    _MADE.update(choices)


def changes() -> int:
    """Return how often choices were replaced. Values that were derived from them are derived again."""
    return _CHANGES[0]
