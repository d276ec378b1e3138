"""A recorder in memory: the metrics of every step of a run, passed on to a second recorder if there is one.

Example:
    >>> history = History()
    >>> history.metrics(1, {"loss": 2.0})
    >>> history.metrics(2, {"loss": 1.0})
    >>> history.truncate_after(1)
    >>> history.steps
    {1: {'loss': 2.0}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.training.loop import Recorder


class History:
    """Keeps the metrics of every step.

    Attributes:
        steps: step (counted from 1) -> its metrics.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self.recorder = recorder
        self.steps: dict[int, dict[str, float]] = {}

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.steps[step] = dict(values)
        if self.recorder is not None:
            self.recorder.metrics(step, values)

    def timings(self, step: int, values: Mapping[str, float]) -> None:
        if self.recorder is not None:
            self.recorder.timings(step, values)

    def faults(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        if self.recorder is not None:
            self.recorder.faults(step, records)

    def truncate_after(self, step: int) -> None:
        self.steps = {kept: values for kept, values in self.steps.items() if kept <= step}
        if self.recorder is not None:
            self.recorder.truncate_after(step)

    def stop_requested(self) -> bool:
        return self.recorder is not None and self.recorder.stop_requested()
