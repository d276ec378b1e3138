"""Parameters of the rule that chooses the evaluated checkpoint of a run."""

from __future__ import annotations

from pipelines.config.types import Count, Section, Seed


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
