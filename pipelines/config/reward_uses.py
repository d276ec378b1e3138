"""Find the places in params.yaml that use the reward model: rewards of algorithms and of the evaluation, and the start of a critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.config.schema import AlgorithmParams, RewardFunctionParams
from posttrain.algorithms import Algorithm, OnPolicy

Rewards = Mapping[str, RewardFunctionParams]


def algorithm_uses(name: str, section: AlgorithmParams, spec: Algorithm, rewards: Rewards) -> list[str]:
    """Return the places where an algorithm uses the reward model; a reward with the weight 0 is measured, so it counts."""
    models = _reward_models(rewards)
    found = [f"algorithms.{name}.rewards ({reward})" for reward in section.rewards or {} if reward in models]
    if isinstance(spec, OnPolicy) and spec.has_critic and spec.critic == "separate" and spec.critic_start == "reward":
        found.append(f"algorithms.{name}.options.critic_start (reward)")
    return found


def evaluation_uses(measured: Sequence[str], rewards: Rewards) -> list[str]:
    """Return the parameters by which the evaluation uses the reward model."""
    models = _reward_models(rewards)
    return [f"evaluation.rewards ({name})" for name in measured if name in models]


def _reward_models(rewards: Rewards) -> set[str]:
    """Return the names of the rewards that are the reward model."""
    return {name for name, section in rewards.items() if section.function == "reward_model"}
