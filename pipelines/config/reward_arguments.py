"""Arguments of the built-in reward functions, checked before anything runs: a misspelt one would be ignored.

Example:
    >>> check_arguments("answer", {"extract": "strict"})
    >>> check_arguments("answer", {"extrakt": "strict"})
    Traceback (most recent call last):
    posttrain.errors.ConfigError: extrakt: the reward function 'answer' has no such argument; did you mean 'extract'? Valid: extract, kind
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from posttrain.errors import ConfigError
from posttrain.text import nearest

if TYPE_CHECKING:
    from posttrain.rewards.judge import JudgeSettings

_POSITIVE = "a number above 0"
_TEXT = "a regular expression"
KNOWN: dict[str, dict[str, tuple[str, ...] | str]] = {
    "answer": {"extract": ("strict", "flexible"), "kind": ("number", "choice", "text")},
    "math": {"row_seconds": _POSITIVE},
    "mentions": {},
    "length": {"target": _POSITIVE, "tolerance": _POSITIVE},
    "regex": {"pattern": _TEXT},
    "format": {"pattern": _TEXT},
}
"""Each function's arguments with their values; those of `length`, `regex` and `format` are required."""
_REQUIRED = ("length", "regex", "format")


def check_arguments(function: str, arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError if a built-in function has no such argument or value; other functions check their own."""
    if function == "judge":
        judge_settings(arguments)
    if function not in KNOWN:
        return
    known = KNOWN[function]
    for name, value in arguments.items():
        if name not in known:
            has = nearest(name, known) if known else "; it has none"
            raise ConfigError(f"{name}: the reward function {function!r} has no such argument{has}")
        valid = known[name]
        if isinstance(valid, tuple) and value not in valid:
            raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(valid)}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if valid == _POSITIVE and not (number and value > 0):
            raise ConfigError(f"{name} = {value!r}: must be {valid}")
    missing = sorted(set(known) - set(arguments)) if function in _REQUIRED else []
    if missing:
        raise ConfigError(f"{missing[0]}: missing; the reward function {function!r} needs it ({known[missing[0]]})")


def judge_settings(arguments: Mapping[str, Any]) -> JudgeSettings:
    """Return the settings of a judge. Raises ConfigError if there is no such argument, or its value has a wrong type or size."""
    from posttrain.rewards.judge import JudgeSettings  # not above: every stage reads params.yaml, and few ask a judge

    known = get_type_hints(JudgeSettings)
    for name, value in arguments.items():
        if name not in known:
            raise ConfigError(f"{name}: the reward function 'judge' has no such argument{nearest(name, known)}")
        if not _fits(value, known[name]):
            raise ConfigError(f"{name} = {value!r}: must be {_JUDGE_KINDS.get(known[name], 'text')}")
    if "model" not in arguments:
        raise ConfigError("model: missing; the reward function 'judge' needs the name of a model of its server")
    return JudgeSettings(**arguments)


_JUDGE_KINDS = {int: "a whole number", bool: "true or false", Mapping[str, float]: "sentences with weights"}


def _fits(value: Any, kind: Any) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool)
    if kind == Mapping[str, float]:
        return isinstance(value, Mapping) and all(
            isinstance(name, str) and isinstance(weight, int | float) and not isinstance(weight, bool)
            for name, weight in value.items()
        )
    return isinstance(value, str)
