"""Limits of numbers anywhere in params.yaml."""

from __future__ import annotations

from typing import Any

from posttrain.errors import ConfigError

LARGEST = 2**53
"""Floats hold every whole number up to here."""


def refuse_huge(tree: Any, place: str = "") -> None:
    """Raise ConfigError for a whole number that no counter or float of a run holds exactly."""
    if isinstance(tree, int) and abs(tree) > LARGEST:
        raise ConfigError(f"{place}: a whole number beyond 2^53 = {LARGEST:,}; type a smaller one")
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in pairs:
        refuse_huge(value, f"{place}.{name}" if place else str(name))


def repeated_prompts(name: str, prompts: int, problems: int) -> str:
    """Return a warning: a step of algorithm `name` draws more prompts than there are problems."""
    return (
        f"algorithms.{name}: each step draws {prompts} prompts and there are {problems} problems, so a step holds some of them more than"
        f" once. Lower prompts_per_step to {problems} at most, or give more problems."
    )
