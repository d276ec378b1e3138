"""Refusals: unknown options, wrong types, impossible combinations, and options that would change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from posttrain.algorithms.records import LoggedGroups, OnPolicy, Preference
from posttrain.errors import ConfigError
from posttrain.text import nearest

Record = TypeVar("Record", OnPolicy, Preference, LoggedGroups)

# option -> (when it has an effect, how to say so)
_ON_POLICY_EFFECT: dict[str, tuple[Callable[[OnPolicy], bool], str]] = {
    "kl_estimator": (lambda r: r.kl != "none", "kl is 'reward' or 'loss'"),
    "kl_coefficient": (lambda r: r.kl != "none", "kl is 'reward' or 'loss'"),
    "kl_target": (lambda r: r.kl != "none", "kl is 'reward' or 'loss'"),
    "kl_horizon": (lambda r: r.kl_target is not None, "kl_target is set"),
    "refill_limit": (lambda r: r.filter == "refill", "filter is 'refill'"),
    "refill_partial": (lambda r: r.filter == "refill", "filter is 'refill'"),
    "mismatch_cap": (lambda r: r.mismatch != "none", "mismatch is 'truncate' or 'mask'"),
    "mu_valley": (lambda r: r.has_expert, "mu_peak > 0"),
    "mu_warmup_steps": (lambda r: r.has_expert, "mu_peak > 0"),
    "mu_decay_steps": (lambda r: r.has_expert, "mu_peak > 0"),
    "phi": (lambda r: r.has_expert or r.phi == "none", "mu_peak > 0"),
    "gamma": (lambda r: r.has_critic, "advantage is 'gae'"),
    "lam": (lambda r: r.has_critic, "advantage is 'gae'"),
    "whiten": (lambda r: r.has_critic, "advantage is 'gae'"),
    "value_clip": (lambda r: r.has_critic, "advantage is 'gae'"),
    "value_coefficient": (lambda r: r.has_critic, "advantage is 'gae'"),
    "critic": (lambda r: r.has_critic, "advantage is 'gae'"),
}
_PREFERENCE_EFFECT: dict[str, tuple[Callable[[Preference], bool], str]] = {
    "label_smoothing": (
        lambda r: r.link != "square" and r.score_weighting != "soft",
        "link is 'logistic' or 'hinge' and score_weighting is not 'soft'",
    ),
    "robust": (lambda r: not r.robust or r.label_smoothing > 0, "label_smoothing > 0"),
    "score_scale": (lambda r: r.score_weighting in ("soft", "offset"), "score_weighting is 'soft' or 'offset'"),
}


def checked_options(record: Record, options: Mapping[str, Any]) -> Record:
    """`record` with `options`, after a check of names, types and ranges."""
    hints = get_type_hints(type(record))
    valid = {f.name for f in fields(record)} - {"name", "paper"}
    for option, value in options.items():
        where = f"{record.name}.options.{option}"
        if option not in valid:
            raise ConfigError(f"{where}: no such option{nearest(option, valid)}")
        if not _fits(value, hints[option]):
            raise ConfigError(f"{where} = {value!r}: must be {_describe(hints[option])}")
    return replace(record, **{k: float(v) if hints[k] in (float, float | None) and v is not None else v for k, v in options.items()})


def check_record(record: OnPolicy | Preference | LoggedGroups, given: set[str]) -> None:
    """Refuse impossible points, and options in `given` that have no effect at this point."""
    for name in ("clip_low", "clip_high", "kl_coefficient", "beta", "value_clip", "score_scale", "missing_eos_penalty"):
        if getattr(record, name, 0.0) < 0:
            raise ConfigError(f"{record.name}.options.{name} = {getattr(record, name)}: must not be negative")
    for name in ("epochs", "minibatches", "refill_limit", "kl_horizon"):
        if getattr(record, name, 1) < 1:
            raise ConfigError(f"{record.name}.options.{name} = {getattr(record, name)}: must be at least 1")
    if isinstance(record, OnPolicy):
        _check_on_policy(record, given)
    elif isinstance(record, Preference):
        _refuse_without_effect(record, given, _PREFERENCE_EFFECT)
        if not 0 <= record.label_smoothing < 0.5:
            raise ConfigError(f"{record.name}.options.label_smoothing = {record.label_smoothing}: must be in [0, 0.5)")


def _check_on_policy(record: OnPolicy, given: set[str]) -> None:
    _refuse_without_effect(record, given, _ON_POLICY_EFFECT)
    if record.ratio == "sequence" and max(record.clip_low, record.clip_high) > 0.05 and not {"clip_low", "clip_high"} <= given:
        raise ConfigError(
            f"{record.name}: a sequence ratio with clip {record.clip_low}/{record.clip_high} never clips, since the ratio is a"
            " geometric mean over tokens; set clip_low and clip_high yourself (GSPO uses 3e-4 and 4e-4)"
        )
    if record.ratio == "sequence" and record.has_critic:
        raise ConfigError(f"{record.name}: ratio 'sequence' needs one advantage per response, 'gae' gives one per token")
    if record.kl != "none" and record.kl_coefficient == 0 and "kl" in given:
        raise ConfigError(f"{record.name}.options.kl = {record.kl!r}: has no effect while kl_coefficient is 0")
    if not 0 <= record.mu_valley <= max(record.mu_peak, record.mu_valley) <= 1:
        raise ConfigError(f"{record.name}: mu_valley and mu_peak must lie in [0, 1]")
    if record.mu_valley > record.mu_peak:
        raise ConfigError(f"{record.name}: mu_valley = {record.mu_valley} is above mu_peak = {record.mu_peak}")
    if record.kl == "reward" and record.kl_estimator != "k1":
        raise ConfigError(f"{record.name}: KL in the reward is the log-ratio k1; {record.kl_estimator} belongs in the loss")


def _refuse_without_effect(record: Any, given: set[str], table: Mapping[str, tuple[Callable[[Any], bool], str]]) -> None:
    for option in sorted(given & table.keys()):
        has_effect, condition = table[option]
        if not has_effect(record):
            raise ConfigError(
                f"{record.name}.options.{option} = {getattr(record, option)!r}: has no effect here;"
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
    return value is None or _fits(value, float)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(hint, "a number or null")
