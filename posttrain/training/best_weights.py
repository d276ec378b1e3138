"""Keep the weights of the step whose model scores best on problems that the run does not train on.

Example:
    >>> import torch
    >>> class Nothing:
    ...     def next(self, step): return StepData([])
    ...     def state_dict(self): return {}
    ...     def load_state_dict(self, state): pass
    >>> scores, weight = iter([0.5, 0.75, 0.75]), torch.zeros(1)
    >>> best = BestWeights(Nothing(), lambda: next(scores), lambda: {"w": weight}, every=2, last=5, name="answer")
    >>> for step in range(1, 6):
    ...     _ = weight.add_(1.0), best(step)
    >>> best.step, best.score, best.weights
    (4, 0.75, {'w': tensor([4.])})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic

from torch import Tensor

from posttrain.training.source import BatchSource, StepData
from posttrain.training.trainer import Row


class BestWeights(Generic[Row]):
    """A source of batches that is also a hook: it scores the model every few steps and keeps the best weights.

    It wraps the run's source. The best weights are thus part of every checkpoint, and a resumed run chooses the same step. Of equal
    scores the earliest step is kept.

    Args:
        source: source of the run.
        scored: returns the score of the present weights, the same on every process.
        weights: returns the present weights.
        every: steps between two measurements; the last step is always measured.
        last: number of steps of the run.
        name: of the score in the run's metrics, `selection/NAME`.

    Attributes:
        step, score, weights: of the best measurement so far; 0, NaN and nothing before the first one.
        measured: number of measurements.
    """

    def __init__(
        self,
        source: BatchSource[Row],
        scored: Callable[[], float],
        weights: Callable[[], Mapping[str, Tensor]],
        *,
        every: int,
        last: int,
        name: str,
    ) -> None:
        self.source, self.scored, self.present = source, scored, weights
        self.every, self.last, self.name = every, last, name
        self.step, self.measured, self.score = 0, 0, float("nan")
        self.weights: dict[str, Tensor] = {}

    def next(self, step: int) -> StepData[Row]:
        return self.source.next(step)

    def __call__(self, step: int) -> Mapping[str, float]:
        """Measure the model after a step, if it is due."""
        if step % self.every and step != self.last:
            return {}
        score = self.scored()
        self.measured += 1
        if self.measured == 1 or score > self.score:
            self.step, self.score = step, score
            self.weights = {name: value.detach().cpu().clone() for name, value in self.present().items()}
        return {f"selection/{self.name}": score}

    def state_dict(self) -> dict[str, Any]:
        best = {"step": self.step, "score": self.score, "measured": self.measured, "weights": self.weights}
        return {"source": self.source.state_dict(), "best": best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        best = state["best"]
        self.step, self.score, self.measured, self.weights = (
            best["step"], best["score"], best["measured"], dict(best["weights"]),
        )  # fmt: skip
