"""Check the settings by which answers are sampled ahead of training."""

from __future__ import annotations

from pipelines.config.schema import OnPolicyBudget
from posttrain.algorithms import OnPolicy
from posttrain.algorithms.on_policy_checks import needs_correction, too_stale
from posttrain.errors import ConfigError


def check_ahead(name: str, spec: OnPolicy, budget: OnPolicyBudget) -> None:
    """Raise ConfigError if an algorithm would be biased by older weights, or if a setting had no effect."""
    if budget.rollouts.staleness and (reason := needs_correction(spec)):
        raise ConfigError(
            f"algorithms.{name}: rollouts.staleness = {budget.rollouts.staleness}: {reason} in its options"
        )
    if reason := too_stale(budget.rollouts.staleness, budget.steps):
        raise ConfigError(f"algorithms.{name}: rollouts.staleness = {budget.rollouts.staleness}: {reason}")
    cut = budget.rollouts.interrupt
    if cut and (budget.rollouts.staleness < 2 or cut >= budget.max_new_tokens):
        raise ConfigError(
            f"algorithms.{name}: rollouts.interrupt = {cut} with staleness = {budget.rollouts.staleness} and max_new_tokens ="
            f" {budget.max_new_tokens}: no answer would be interrupted, since only answers that are longer, and begun two steps ahead,"
            " meet newer weights. Set interrupt below max_new_tokens and staleness to 2 or more, or interrupt: 0"
        )
    if budget.rollouts.staleness and budget.turns is not None:
        raise ConfigError(
            f"algorithms.{name}: rollouts.staleness = {budget.rollouts.staleness} and turns: an environment's step has a time limit,"
            " which holds only if the trainer waits for its answers; set staleness: 0"
        )
