"""Check `align.best_checkpoint` against the other sections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.errors import ConfigError
from posttrain.text import nearest

if TYPE_CHECKING:
    from pipelines.config.params import Params


def check_best_checkpoint(params: Params) -> None:
    """Refuse a rule without effect. Raises ConfigError."""
    rule = params.align.best_checkpoint
    if rule is None:
        return
    if rule.reward not in params.rewards:
        raise ConfigError(
            f"align.best_checkpoint.reward: no reward {rule.reward!r}{nearest(rule.reward, params.rewards)}"
        )
    if params.rewards[rule.reward].function == "reward_model":
        raise ConfigError(
            f"align.best_checkpoint.reward = {rule.reward!r}: a reward model would choose the step that exploits its errors most;"
            " name a reward that checks the answer"
        )
    for name in params.project.algorithms:
        steps = getattr(params.budget(name), "steps", None)
        if steps is not None and steps <= rule.every_steps:
            raise ConfigError(
                f"align.best_checkpoint.every_steps = {rule.every_steps}: {name} has {steps} steps, so only its last step would be"
                " measured and nothing would be chosen; lower it, or remove align.best_checkpoint"
            )
