"""Reject unknown options, wrong types, impossible combinations, and options without effect.

Example:
    >>> from posttrain.algorithms.grpo import GRPO
    >>> check_spec(checked_options(GRPO, {"clip_high": 0.3}), given={"clip_high"})
    Traceback (most recent call last):
    ...
    posttrain.errors.ConfigError: grpo.options.clip_high = 0.3: has no effect here; it counts only when epochs x minibatches > 1, ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from posttrain.algorithms.limits import effects
from posttrain.algorithms.on_policy_checks import check_on_policy, refuse_k1_in_loss
from posttrain.algorithms.ranges import RANGES, range_in_words
from posttrain.algorithms.specs import Algorithm, LoggedGroups, OnPolicy, Preference
from posttrain.errors import ConfigError
from posttrain.text import nearest

Spec = TypeVar("Spec", bound=Algorithm)

_hints = cache(get_type_hints)  # reading the annotations of a class takes 2 ms


def checked_options(spec: Spec, options: Mapping[str, Any]) -> Spec:
    """Return `spec` with `options`, after a check of names, types and ranges."""
    hints = _hints(type(spec))
    valid = {f.name for f in fields(spec)} - {"name", "paper"}
    for option, value in options.items():
        where = f"{spec.name}.options.{option}"
        if option not in valid:
            raise ConfigError(f"{where}: no such option{nearest(str(option), valid)}")
        if not _fits(value, hints[option]):
            raise ConfigError(f"{where} = {value!r}: must be {_describe(hints[option])}")
    changes: dict[str, Any] = {
        k: float(v) if hints[k] in (float, float | None) and v is not None else v for k, v in options.items()
    }
    return replace(spec, **changes)


def check_spec(spec: Algorithm, given: set[str]) -> None:
    """Raise ConfigError for impossible points, and for options in `given` that have no effect at this point."""
    hints = _hints(type(spec))
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name not in ("name", "paper") and not _fits(value, hints[field.name]):
            raise ConfigError(f"{spec.name}.options.{field.name} = {value!r}: must be {_describe(hints[field.name])}")
    for name, (least, greatest) in RANGES.items():
        value = getattr(spec, name, None)
        if value is not None and not least <= value <= greatest:
            raise ConfigError(f"{spec.name}.options.{name} = {value}: must be {range_in_words(least, greatest)}")
    _refuse_without_effect(spec, given, effects(spec))
    if isinstance(spec, OnPolicy):
        check_on_policy(spec, given)
    elif isinstance(spec, Preference):
        _check_preference(spec)
    elif isinstance(spec, LoggedGroups) and spec.kl_coefficient > 0:
        refuse_k1_in_loss(spec.name, spec.kl_estimator)


def _check_preference(spec: Preference) -> None:
    if spec.logit == "odds" and (spec.reference or spec.link == "square"):
        raise ConfigError(
            f"{spec.name}: logit 'odds' compares probabilities of answers, not ratios to a reference, and has no target to regress"
            " onto; set reference: false and link: logistic or hinge (as the preset orpo)"
        )
    if not 0 <= spec.label_smoothing < 0.5:
        raise ConfigError(f"{spec.name}.options.label_smoothing = {spec.label_smoothing}: must be in [0, 0.5)")
    weighting = spec.score_weighting
    if spec.link == "square" and (weighting in ("soft", "offset") or spec.label_smoothing or spec.target_margin):
        raise ConfigError(
            f"{spec.name}: link 'square' regresses onto 1/(2 beta), so it has no soft target, offset, label_smoothing or"
            " target_margin; use link 'logistic', or remove them"
        )
    if weighting == "soft" and (spec.link == "hinge" or spec.robust or spec.label_smoothing):
        raise ConfigError(
            f"{spec.name}: score_weighting 'soft' sets the target from the scores, under link 'logistic' and without robust or"
            " label_smoothing; remove one of them"
        )


def _refuse_without_effect(spec: Any, given: set[str], table: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    for option in sorted(given & table.keys()):
        has_effect, condition = table[option]
        if not has_effect(spec):
            raise ConfigError(
                f"{spec.name}.options.{option} = {getattr(spec, option)!r}: has no effect here;"
                f" it counts only when {condition}. Remove it."
            )


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    return value is None or _fits(value, next(part for part in get_args(hint) if part is not type(None)))


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    kinds = {bool: "true or false", int: "a whole number", float: "a number", int | None: "a whole number or null"}
    return kinds.get(hint, "a number or null")
