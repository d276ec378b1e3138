"""Where a training loop gets its batches from.

Example:
    >>> StepData([[1, 2], [3]]).batches  # two optimiser updates
    [[1, 2], [3]]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol

from posttrain.training.trainer import Row


@dataclass
class StepData(Generic[Row]):
    """Data of one step: one batch per optimiser update, and the metrics and timings (seconds) of preparing them."""

    batches: list[Sequence[Row]]
    metrics: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)


class BatchSource(Protocol[Row]):
    """Provides the batches of a step. Its state is part of the checkpoint."""

    def next(self, step: int) -> StepData[Row]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
