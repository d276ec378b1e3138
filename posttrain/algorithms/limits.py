"""For every option: when it has an effect.

Example:
    >>> from posttrain.algorithms.ppo import PPO
    >>> has_effect, condition = ON_POLICY_EFFECT["gamma"]
    >>> has_effect(PPO), condition
    (True, "advantage is 'gae'")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from posttrain.algorithms.specs import Algorithm, LoggedGroups, OnPolicy, Preference, Unpaired


def _updates_off_policy(spec: OnPolicy) -> bool:
    """Return True if a rollout is used for several updates; in the first one every importance ratio is 1, so no clip has an effect."""
    return spec.epochs * spec.minibatches > 1 or spec.anchor == "rollout"


def _clips(spec: OnPolicy) -> bool:
    return _updates_off_policy(spec) and spec.surrogate != "soft"


OFF_POLICY = "epochs x minibatches > 1, because the importance ratio is 1 in the first update after sampling"
CLIPPED = f"{OFF_POLICY}; and surrogate is not 'soft'"
PENALISED = "kl is 'reward' or 'loss' and kl_coefficient > 0"
# option -> (predicate that it has an effect, the same in words)
ON_POLICY_EFFECT: dict[str, tuple[Callable[[OnPolicy], bool], str]] = {
    "ratio": (lambda r: _updates_off_policy(r) or r.ratio == "token", OFF_POLICY),
    "surrogate": (lambda r: _updates_off_policy(r) or r.surrogate == "clip", OFF_POLICY),
    "clip_low": (_clips, CLIPPED),
    "clip_high": (_clips, CLIPPED),
    "dual_clip": (lambda r: r.surrogate == "clip" and _clips(r), f"surrogate is 'clip', and {OFF_POLICY}"),
    "tau_positive": (lambda r: r.surrogate == "soft", "surrogate is 'soft'"),
    "tau_negative": (lambda r: r.surrogate == "soft", "surrogate is 'soft'"),
    "kl_coefficient": (lambda r: r.kl != "none", "kl is 'reward' or 'loss'"),
    "kl_estimator": (lambda r: r.kl != "none" and r.kl_coefficient > 0, PENALISED),
    "kl_target": (lambda r: r.kl != "none" and r.kl_coefficient > 0, PENALISED),
    "kl_horizon": (lambda r: r.kl_target is not None, "kl_target is set"),
    "reward_combination": (
        lambda r: r.reward_combination == "sum" or not (r.has_critic or r.needs_teacher),
        "advantage is relative to a group or a batch, not 'gae' or 'teacher'",
    ),
    "refill_limit": (lambda r: r.filter == "refill", "filter is 'refill'"),
    "refill_partial": (lambda r: r.filter == "refill", "filter is 'refill'"),
    "mismatch": (
        lambda r: r.mismatch == "none" or r.anchor == "old",
        "anchor is 'old'; ratios to the sampler need no correction",
    ),
    "mismatch_cap": (lambda r: r.mismatch != "none", "mismatch is not 'none'"),
    "mu_valley": (lambda r: r.has_expert, "mu_peak > 0"),
    "mu_warmup_steps": (lambda r: r.has_expert, "mu_peak > 0"),
    "mu_decay_steps": (
        lambda r: r.has_expert and r.mu_valley != r.mu_peak,
        "mu_peak > 0 and mu_valley differs from it",
    ),
    "phi": (lambda r: r.has_expert or r.phi == "none", "mu_peak > 0"),
    "router_replay": (
        lambda r: r.router_replay and r.epochs * r.minibatches > 1,
        "it is true and epochs x minibatches > 1, because the first update routes by itself",
    ),
    "gamma": (lambda r: r.has_critic, "advantage is 'gae'"),
    "lam": (lambda r: r.has_critic, "advantage is 'gae'"),
    "whiten": (lambda r: r.has_critic, "advantage is 'gae'"),
    "value_clip": (lambda r: r.has_critic, "advantage is 'gae'"),
    "value_coefficient": (lambda r: r.has_critic, "advantage is 'gae'"),
    "critic": (lambda r: r.has_critic, "advantage is 'gae'"),
    "critic_start": (
        lambda r: r.has_critic and r.critic == "separate",
        "advantage is 'gae' and critic is 'separate'",
    ),
}
PREFERENCE_EFFECT: dict[str, tuple[Callable[[Preference], bool], str]] = {
    "label_smoothing": (
        lambda r: r.link != "square" and r.score_weighting != "soft",
        "link is 'logistic' or 'hinge' and score_weighting is not 'soft'",
    ),
    "robust": (lambda r: not r.robust or r.label_smoothing > 0, "label_smoothing > 0"),
    "score_scale": (lambda r: r.score_weighting in ("soft", "offset"), "score_weighting is 'soft' or 'offset'"),
    "target_margin": (lambda r: r.link != "square", "link is 'logistic' or 'hinge'"),
    "pair_coefficient": (lambda r: r.nll_coefficient > 0, "nll_coefficient > 0"),
}
LOGGED_EFFECT: dict[str, tuple[Callable[[LoggedGroups], bool], str]] = {
    "kl_estimator": (lambda r: r.kl_coefficient > 0, "kl_coefficient > 0"),
}
UNPAIRED_EFFECT: dict[str, tuple[Callable[[Unpaired], bool], str]] = {}


def effects(spec: Algorithm) -> Mapping[str, tuple[Callable[[Any], bool], str]]:
    """Return the table of effects for the options of this kind of algorithm."""
    kinds: tuple[tuple[type, Mapping[str, tuple[Callable[[Any], bool], str]]], ...] = (
        (OnPolicy, ON_POLICY_EFFECT),
        (Preference, PREFERENCE_EFFECT),
        (LoggedGroups, LOGGED_EFFECT),
        (Unpaired, UNPAIRED_EFFECT),
    )
    return next(table for kind, table in kinds if isinstance(spec, kind))


def effective_options(spec: Algorithm) -> dict[str, Any]:
    """Return the options that have an effect at this point of the design space, with the preset's values.

    Example:
        >>> from posttrain.algorithms.dr_grpo import DR_GRPO
        >>> options = effective_options(DR_GRPO)
        >>> options["aggregate"], "kl_coefficient" in options
        ('constant', False)
    """
    table = effects(spec)
    values = {field.name: getattr(spec, field.name) for field in fields(spec)}
    return {
        name: value
        for name, value in values.items()
        if name not in ("name", "paper") and value is not None and (name not in table or table[name][0](spec))
    }
