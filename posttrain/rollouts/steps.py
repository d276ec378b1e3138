"""Run the same decoding step many times. A GPU records it once and replays it: the program starts one graph in place of a thousand kernels.

A replay repeats the recorded kernels on the same memory, with the numbers that the program passed to them while they were recorded. So a
step that may be recorded takes its positions from tensors of the device that it changes in place, and asks the device for no value.

Example:
    Without a recorder, as on a CPU, every run is the step itself:

    >>> count = torch.zeros(1)
    >>> runner = StepRunner(RECORDERS.get("cpu"))
    >>> for _ in range(3):
    ...     runner.run(lambda: count.add_(1), lambda: [count], arrangement=0)
    >>> float(count)
    3.0
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from posttrain.text import reason_of

Step = Callable[[], object]
Recorder = Callable[[Step], Callable[[], object]]
"""Takes a step and returns a function that repeats its kernels. While a step is recorded none of its kernels runs."""
TOLERANCE = 1e-3
"""Largest difference of a log-probability between a replay and the step itself. Both run the same kernels."""


def _cuda_graph(step: Step) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    # other threads may copy batches meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


RECORDERS: dict[str, Recorder] = {"cuda": _cuda_graph}
"""How a step is recorded on each kind of device; on the others it is not."""


class StepRunner:
    """Runs steps, and replays them as long as the arrangement of their tensors stays the same.

    Attributes:
        record: None if steps are not recorded.
        refusal: the reason why steps are no longer recorded; empty otherwise.
    """

    def __init__(self, record: Recorder | None) -> None:
        self.record, self.refusal = record, ""
        self._confirmed = False
        self._arrangement: int | None = None
        self._replay: Callable[[], object] | None = None

    def run(self, step: Step, state: Callable[[], Sequence[Tensor]], arrangement: int) -> None:
        """Run the step once.

        Args:
            state: returns the tensors that a step changes and that a later one, or the caller, reads.
            arrangement: a different number whenever a tensor or a number that the step reads on the host has been replaced.
        """
        if self.record is None or arrangement != self._arrangement:
            # the first step of an arrangement also lets libraries allocate what they keep
            self._arrangement, self._replay = arrangement, None
            step()
        elif self._replay is not None:
            self._replay()
        else:
            self._record(self.record, step, state())

    def forget(self) -> None:
        """Free the recording and its memory."""
        self._arrangement = self._replay = None

    def _record(self, record: Recorder, step: Step, state: Sequence[Tensor]) -> None:
        """Record the step and replay it once; the first time its results are compared with those of the step itself."""
        expected = None if self._confirmed else _results(step, state)
        try:
            self._replay = record(step)
        # a kernel that waits for the host cannot be recorded; torch has no separate exception for it
        except RuntimeError as error:
            self._refuse(f"this model's step cannot be recorded ({reason_of(error)})")
            step()
            return
        self._replay()
        if expected is not None and not all(_equal(*pair) for pair in zip(state, expected, strict=True)):
            self._refuse("a replayed step gave other tokens than the step itself")
            for tensor, value in zip(state, expected, strict=True):
                tensor.copy_(value)
        self._confirmed = True

    def _refuse(self, reason: str) -> None:
        self.record, self.refusal = None, reason
        self.forget()


def _results(step: Step, state: Sequence[Tensor]) -> list[Tensor]:
    """Return the state after the step, and leave it as it was."""
    before = [tensor.clone() for tensor in state]
    step()
    found = [tensor.clone() for tensor in state]
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    return found


def _equal(found: Tensor, expected: Tensor) -> bool:
    if found.is_floating_point():
        return torch.allclose(found, expected, atol=TOLERANCE, rtol=0, equal_nan=True)
    return torch.equal(found, expected)
