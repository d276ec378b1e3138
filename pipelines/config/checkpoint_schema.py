"""Parameters of the rule that chooses the evaluated checkpoint of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.config.types import Count, Section, Seed
from posttrain.errors import ConfigError
from posttrain.text import nearest

if TYPE_CHECKING:
    from pipelines.config.params import Params


class BestCheckpointParams(Section):
    """Evaluate the best of several steps of a run, chosen on problems that no run trains on. Without this section it is the last step."""

    every_steps: Count
    """Steps between two measurements. The last step is always measured."""
    problems: Count
    """Prompts of data.problems that are kept out of training. The model answers them greedily at each measurement."""
    reward: str = "answer"
    """The reward whose mean chooses. It must be a true one: a reward model would choose the step that exploits it most."""
    seed: Seed = 0
    """Decides which prompts are kept out."""


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
