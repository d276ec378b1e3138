"""The arguments of one call of `train`, with its trainer and its loop.

Example:
    >>> from posttrain.api import tiny
    >>> model = tiny(seed=0, hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1)
    >>> run = Run(model, 2, 0.01, 1, 0, 64, History(None), None, {})
    >>> [len(run.epochs(["a", "b"]).next(step).batches[0]) for step in (0, 1)]
    [1, 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.api import Model
from posttrain.data.batches import EpochOrder
from posttrain.data.conversations import TrainOn
from posttrain.models.policy import Policy
from posttrain.settings import OptimizerSettings
from posttrain.training.history import History
from posttrain.training.loop import LoopSettings, fit
from posttrain.training.own_checkpoints import OwnCheckpoints
from posttrain.training.supervised import EpochSource
from posttrain.training.trainer import Trainer

if TYPE_CHECKING:
    from posttrain.training.checkpoint import Checkpoints


@dataclass(frozen=True)
class Run:
    """The arguments of `train` that do not depend on the algorithm; `identity` is that of its checkpoints."""

    model: Model
    steps: int
    learning_rate: float
    batch_size: int
    seed: int
    micro_batch_tokens: int
    history: History
    checkpoints: Checkpoints | None
    identity: dict[str, Any]
    train_on: TrainOn = "completion"

    def trainer(self, policy: Policy, updates: int) -> Trainer[Any]:
        settings = OptimizerSettings(self.learning_rate)
        return Trainer(policy, settings, total_steps=updates, micro_batch_tokens=self.micro_batch_tokens)

    def fit(self, trainer: Trainer[Any], source: Any, objective: Any, shown: str) -> None:
        settings = LoopSettings("training", self.steps, (shown,))
        kept = None if self.checkpoints is None else OwnCheckpoints(self.checkpoints, self.identity)
        fit(trainer, source, objective, settings, self.history, kept)

    def epochs(self, rows: Sequence[Any]) -> EpochSource[Any]:
        return EpochSource(rows, EpochOrder(len(rows), self.batch_size, 1, self.seed))
