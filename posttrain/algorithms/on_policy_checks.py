"""Reject impossible points of the on-policy design space.

Example:
    >>> from dataclasses import replace
    >>> from posttrain.algorithms.dppo import DPPO_TV
    >>> check_on_policy(replace(DPPO_TV, mismatch="mask"), set())
    Traceback (most recent call last):
    ...
    posttrain.errors.ConfigError: dppo_tv: anchor 'rollout' already takes ratios to the sampler; set mismatch: none, or anchor: old
"""

from __future__ import annotations

import warnings

from posttrain.algorithms.axes import KlEstimator
from posttrain.algorithms.specs import OnPolicy
from posttrain.errors import ConfigError


def refuse_k1_in_loss(name: str, estimator: KlEstimator) -> None:
    """Raise ConfigError if a loss would use k1."""
    if estimator == "k1":
        raise ConfigError(
            f"{name}.options.kl_estimator = 'k1': in a loss its gradient does not depend on the reference; use k2 or k3, or"
            " kl: reward if answers are sampled"
        )


def needs_several_answers(spec: OnPolicy, samples: int) -> str:
    """Return why the algorithm learns nothing from `samples` answers to a prompt; empty if they suffice."""
    if samples > 1:
        return ""
    if spec.advantage in ("group_mean", "group_z", "leave_one_out", "group_rate"):
        return f"advantage {spec.advantage!r} compares several answers to one prompt"
    return (
        f"filter {spec.filter!r} keeps prompts whose answers are rewarded differently" if spec.filter != "none" else ""
    )


def uneven_minibatches(spec: OnPolicy, prompts: int) -> str:
    """Return why `prompts` per step cannot be split into the algorithm's updates; empty if they can.

    Some prompts of a step would count more than others, and with fewer prompts than updates each would be trained on several times.
    """
    if prompts % spec.minibatches == 0:
        return ""
    return f"it must be a multiple of the {spec.minibatches} updates of a step, each with its own prompts (options.minibatches)"


def needs_correction(spec: OnPolicy) -> str:
    """Return why the algorithm cannot train on answers that older weights sampled; empty if it corrects for them."""
    if spec.anchor == "rollout" or spec.mismatch != "none":
        return ""
    return (
        "the answers are sampled by older weights, and nothing corrects for that, so the gradient would be biased. Set anchor to 'rollout'"
        " (ratios to the sampler's probabilities), or mismatch to 'truncate'"
    )


def too_stale(staleness: int, steps: int) -> str:
    """Return why answers of a run cannot be so many steps old; empty if they can."""
    if staleness < max(2, steps):
        return ""
    return f"all answers of the {steps} steps would come from the weights of the start, as with {steps - 1}; set a smaller one, such as 1"


def check_on_policy(spec: OnPolicy, given: set[str]) -> None:
    """Raise ConfigError for impossible points; `given` are the options that the user set."""
    if spec.ratio == "sequence" and spec.surrogate in ("geometric", "tv", "kl"):
        raise ConfigError(
            f"{spec.name}: surrogate {spec.surrogate!r} reads the ratio of each token, so ratio 'sequence' has no effect; set ratio: token"
        )
    if spec.anchor == "rollout" and spec.mismatch != "none":
        raise ConfigError(
            f"{spec.name}: anchor 'rollout' already takes ratios to the sampler; set mismatch: none, or anchor: old"
        )
    if spec.needs_teacher and (spec.ratio == "sequence" or spec.surrogate == "geometric"):
        raise ConfigError(
            f"{spec.name}: a teacher gives one advantage per token, which the ratio of a whole answer cannot carry"
        )
    if spec.needs_teacher and (
        spec.kl != "none" or spec.filter != "none" or spec.missing_eos_penalty or spec.overlong_share
    ):
        raise ConfigError(
            f"{spec.name}: advantage 'teacher' reads no reward and no reference, so kl, filter, missing_eos_penalty and overlong_share have"
            " no effect; remove them"
        )
    shaped = spec.kl == "reward" or spec.missing_eos_penalty > 0 or spec.overlong_share > 0
    if spec.advantage == "group_rate" and shaped:
        raise ConfigError(
            f"{spec.name}: advantage 'group_rate' divides by the group's mean reward, which must not be negative; set kl to none or loss,"
            " missing_eos_penalty: 0 and overlong_share: 0"
        )
    if (
        spec.ratio == "sequence"
        and max(spec.clip_low, spec.clip_high) > 0.05
        and not {"clip_low", "clip_high"} <= given
    ):
        raise ConfigError(
            f"{spec.name}: a sequence ratio with clip {spec.clip_low}/{spec.clip_high} never clips, since the ratio is a"
            " geometric mean over tokens; set clip_low and clip_high yourself (GSPO uses 3e-4 and 4e-4)"
        )
    if spec.ratio == "sequence" and max(spec.clip_low, spec.clip_high) > 0.05:
        warnings.warn(
            f"{spec.name}: a sequence ratio is a geometric mean over tokens and stays near 1; with clip"
            f" {spec.clip_low}/{spec.clip_high} it hardly ever clips (GSPO uses 3e-4 and 4e-4)",
            stacklevel=2,
        )
    if spec.reward_combination == "group_normalised" and spec.advantage == "group_z":
        raise ConfigError(
            f"{spec.name}: advantage 'group_z' divides by the spread within the group again, which undoes reward_combination"
            " 'group_normalised': a group that differs in one reward would count as much as one that differs in all. Set advantage:"
            " batch_z (as GDPO, 2601.05242) or group_mean"
        )
    if spec.surrogate == "geometric" and spec.has_critic:
        raise ConfigError(
            f"{spec.name}: surrogate 'geometric' has one factor for all tokens of a response, so it needs one advantage per response;"
            " 'gae' gives one per token. Set surrogate: clip, or an advantage of the group"
        )
    if spec.ratio == "sequence" and spec.has_critic:
        raise ConfigError(f"{spec.name}: ratio 'sequence' needs one advantage per response, 'gae' gives one per token")
    if spec.kl != "none" and spec.kl_coefficient == 0 and "kl" in given:
        raise ConfigError(f"{spec.name}.options.kl = {spec.kl!r}: has no effect while kl_coefficient is 0")
    if spec.has_expert and spec.mu_valley > spec.mu_peak:
        raise ConfigError(f"{spec.name}: mu_valley = {spec.mu_valley} is above mu_peak = {spec.mu_peak}")
    if spec.has_expert and spec.mu_decay_steps == 0 and spec.mu_valley != spec.mu_peak:
        raise ConfigError(
            f"{spec.name}: without mu_decay_steps the weight is mu_valley = {spec.mu_valley} at once, and mu_peak ="
            f" {spec.mu_peak} has no effect; set mu_decay_steps, or mu_valley to mu_peak for a constant weight"
        )
    if spec.kl == "loss" and spec.kl_coefficient > 0:
        refuse_k1_in_loss(spec.name, spec.kl_estimator)
    if spec.kl == "reward" and spec.kl_estimator != "k1":
        raise ConfigError(f"{spec.name}: KL in the reward is the log-ratio k1; {spec.kl_estimator} belongs in the loss")
