"""Where a training loop gets its batches from.

Example:
    >>> StepData([[1, 2], [3]]).batches  # two optimiser updates
    [[1, 2], [3]]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, runtime_checkable

from posttrain.training.trainer import Row


@dataclass
class StepData(Generic[Row]):
    """Data of one step: one batch per optimiser update, and the metrics and timings (seconds) of preparing them."""

    batches: list[Sequence[Row]]
    metrics: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Pending(Protocol):
    """A part of a source's state that may still be computed when the state is taken."""

    def state(self) -> dict[str, Any]:
        """Wait for it, and return it as a checkpoint holds it."""
        ...


def settled(tree: Any) -> Any:
    """Return a state with every pending part replaced by its result. It waits, so a state is settled only when it is written."""
    if isinstance(tree, Pending):
        return tree.state()
    if isinstance(tree, dict):
        return {name: settled(value) for name, value in tree.items()}
    return [settled(value) for value in tree] if isinstance(tree, list) else tree


class BatchSource(Protocol[Row]):
    """Provides the batches of a step. Its state is part of the checkpoint, after `settled`."""

    def next(self, step: int) -> StepData[Row]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
