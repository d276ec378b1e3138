"""Check `align.best_checkpoint` against the rewards and the lengths of the runs."""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.config.checkpoint_schema import BestCheckpointParams
from pipelines.config.schema import OnPolicyBudget, PreferenceBudget, RewardFunctionParams
from posttrain.errors import ConfigError
from posttrain.text import nearest


def check_best_checkpoint(
    rule: BestCheckpointParams | None,
    rewards: Mapping[str, RewardFunctionParams],
    budgets: Mapping[str, OnPolicyBudget | PreferenceBudget],
) -> None:
    """Refuse a rule without effect. `budgets` are those of the comparison's algorithms. Raises ConfigError."""
    if rule is None:
        return
    if rule.reward not in rewards:
        raise ConfigError(f"align.best_checkpoint.reward: no reward {rule.reward!r}{nearest(rule.reward, rewards)}")
    if rewards[rule.reward].function == "reward_model":
        raise ConfigError(
            f"align.best_checkpoint.reward = {rule.reward!r}: a reward model would choose the step that exploits its errors most;"
            " name a reward that checks the answer"
        )
    for name, budget in budgets.items():
        if isinstance(budget, OnPolicyBudget) and budget.steps <= rule.every_steps:
            raise ConfigError(
                f"align.best_checkpoint.every_steps = {rule.every_steps}: {name} has {budget.steps} steps, so only its last step would be"
                " measured and nothing would be chosen; lower it, or remove align.best_checkpoint"
            )
