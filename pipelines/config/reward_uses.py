"""Find the places in params.yaml that use the reward model: rewards of algorithms and of the evaluation, and the start of a critic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.algorithms import OnPolicy

if TYPE_CHECKING:
    from pipelines.config.params import Params


def algorithm_uses(params: Params, name: str) -> list[str]:
    """Return the places where an algorithm uses the reward model; a reward with the weight 0 is measured, so it counts."""
    models = _reward_models(params)
    rewards = params.algorithms[name].rewards or {}
    found = [f"algorithms.{name}.rewards ({reward})" for reward in rewards if reward in models]
    spec = params.algorithm(name)
    if isinstance(spec, OnPolicy) and spec.has_critic and spec.critic == "separate" and spec.critic_start == "reward":
        found.append(f"algorithms.{name}.options.critic_start (reward)")
    return found


def evaluation_uses(params: Params) -> list[str]:
    """Return the places where the evaluation uses the reward model."""
    models = _reward_models(params)
    return [f"evaluation.rewards ({name})" for name in params.evaluation.rewards if name in models]


def _reward_models(params: Params) -> set[str]:
    """Return the names of the rewards that are the reward model."""
    return {name for name, section in params.rewards.items() if section.function == "reward_model"}
