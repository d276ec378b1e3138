"""Stop a run that begins to optimise its reward model against the true reward, if `align.on_policy.on_divergence` is `stop`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.runtime.journal import read
from posttrain.errors import NumericalError
from posttrain.evaluation.divergence import divergence
from posttrain.rollouts.groups import ScoredAnswer

if TYPE_CHECKING:
    from accelerate import Accelerator


class DivergenceMonitor:
    """Watch a true reward and a reward model's score after each step.

    The curves up to a resumed step come from the journal, so that a resumed run stops where an uninterrupted one does.

    Args:
        journal: of the run.
        truth, model: names of the true reward and of the reward model.
        accelerator: of a run with several processes, of which only rank 0 has the journal.
    """

    def __init__(self, journal: Path, truth: str, model: str, accelerator: Accelerator | None = None) -> None:
        self.journal, self.truth, self.model, self.accelerator = journal, truth, model, accelerator
        self._curves: dict[int, tuple[float, float]] | None = None

    def check(self, step: int, answers: Sequence[ScoredAnswer]) -> None:
        """Add a step's answers. Raises NumericalError if the run diverged at this step."""
        if self._curves is None:
            self._curves = self._recorded(step)
        self._curves[step] = (_mean(answers, self.truth), _mean(answers, self.model))
        steps = sorted(self._curves)
        truth, score = zip(*(self._curves[s] for s in steps), strict=True)
        found = divergence(truth, score, since=len(steps) - 1)
        if found is None:
            return
        raise NumericalError(
            f"stopped after step {step}: since step {steps[found.began]} the true reward {self.truth} fell from {found.level:.3f} to"
            f" {found.truth:.3f} while the score of {self.model} rose by {found.score_gain:.3f}. The policy exploits errors of the reward"
            " model. Raise kl_coefficient, lower the learning rate or the number of steps, train the reward model on more pairs; or set"
            " align.on_policy.on_divergence: report to train to the end."
        )

    def _recorded(self, step: int) -> dict[int, tuple[float, float]]:
        """Return the curves of the steps before, from the journal."""
        names = (f"reward/{self.truth}/mean", f"reward/{self.model}/mean")
        found: dict[int, tuple[float, float]] = {}
        for record in read(self.journal):
            values: Mapping[str, float] = record.get("values", {}) if record["kind"] == "metrics" else {}
            if record.get("step", step) < step and all(isinstance(values.get(name), float) for name in names):
                found[record["step"]] = (values[names[0]], values[names[1]])
        if self.accelerator is None:
            return found
        from posttrain.distributed import broadcast_state

        return broadcast_state(self.accelerator, found)


def _mean(answers: Sequence[ScoredAnswer], source: str) -> float:
    """Return the mean of a reward over the answers that have it; NaN if none has."""
    known = [value for answer in answers if (value := answer.sources.get(source)) is not None]
    return float(np.mean(known)) if known else float("nan")
