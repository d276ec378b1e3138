"""Sum an objective's terms over the micro-batches and processes of one optimiser step.

Example:
    Two micro-batches of a step with 4 tokens: losses of 2 and 6 give (2 + 6) / 4:

    >>> import torch
    >>> sums = Sums({"tokens": 4.0})
    >>> for numerator in (2.0, 6.0):
    ...     _ = sums.add(Terms(losses={"nll": (torch.tensor(numerator), "tokens", 1.0)}), weight=1.0)
    >>> sums.reduced(Accelerator())["loss"]
    2.0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from posttrain.data.transfer import to_host


@dataclass
class Terms:
    """Sums of an objective over one micro-batch. Each names the count that the trainer divides it by.

    Attributes:
        losses: name -> (sum, count name, weight).
        metrics: name -> (sum, count name).
        extremes: name ending in /min or /max -> value.
        histograms: metric name -> counts [groups, bins]; the metric is the largest share of a bin in its group, divided by an even share.
        limits: metric name -> (largest allowed value of a step, meaning of a larger value).
    """

    losses: dict[str, tuple[Tensor, str, float]] = field(default_factory=dict)
    metrics: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    extremes: dict[str, Tensor] = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)
    limits: dict[str, tuple[float, str]] = field(default_factory=dict)


class Sums:
    """Metric numerators of a step; `reduced` reads them from the device at once, adds them in float64 and divides by the step's counts."""

    def __init__(self, counts: Mapping[str, float]) -> None:
        self.counts = counts
        self.parts: list[tuple[str, Tensor, float, float]] = []
        self.ends: list[tuple[str, Tensor]] = []
        self.histograms: dict[str, Tensor] = {}
        self.limits: dict[str, tuple[float, str]] = {}

    def add(self, terms: Terms, weight: float) -> Tensor:
        """Add one micro-batch and return its loss; `weight` 0 keeps it out of all metrics."""
        loss: Tensor | None = None
        for value, count, factor in terms.losses.values():
            part = value * (factor / max(self.counts[count], 1e-12))
            loss = part if loss is None else loss + part
        assert loss is not None, "an objective must return at least one loss"
        self.parts.append(("loss", loss.detach(), weight, 1.0))
        for name, (value, count) in terms.metrics.items():
            self.parts.append((name, value.detach(), weight, max(self.counts[count], 1e-12)))
        self.limits |= terms.limits
        for name, value in terms.extremes.items() if weight else ():
            self.ends.append((name, value.detach()))
        for name, counts in terms.histograms.items() if weight else ():
            self.histograms[name] = self.histograms.get(name, 0) + counts
        return loss

    def _read(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the totals and the extremes of this process."""
        numbers = read_together([value for _, value, _, _ in self.parts] + [value for _, value in self.ends])
        totals: dict[str, float] = {"loss": 0.0}
        extremes: dict[str, float] = {}
        for (name, _, weight, count), number in zip(self.parts, numbers[: len(self.parts)], strict=True):
            totals[name] = totals.get(name, 0.0) + weight * number / count
        for (name, _), number in zip(self.ends, numbers[len(self.parts) :], strict=True):
            choose: Callable[[float, float], float] = min if name.endswith("/min") else max
            extremes[name] = choose(extremes.get(name, number), number)
        return totals, extremes

    def reduced(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the step's metrics over all processes."""
        totals, extremes = self._read()
        histograms = {name: counts.cpu() for name, counts in self.histograms.items()}
        if accelerator.num_processes == 1:
            return totals | extremes | {name: _peak(counts) for name, counts in histograms.items()}
        from accelerate.utils import gather_object

        every = gather_object([(totals, extremes)])
        merged: dict[str, Tensor] = {}
        for name, counts in (item for histograms in gather_object([histograms]) for item in histograms.items()):
            merged[name] = merged.get(name, 0) + counts
        for limits in gather_object([self.limits]):
            self.limits |= limits
        # a process whose rows all have one type has no metrics of the other types
        names = dict.fromkeys(name for totals, _ in every for name in totals)
        totals = {name: sum(t.get(name, 0.0) for t, _ in every) for name in names}
        for name in sorted({name for _, extremes in every for name in extremes}):
            values = [extremes[name] for _, extremes in every if name in extremes]
            totals[name] = min(values) if name.endswith("/min") else max(values)
        return totals | {name: _peak(merged[name]) for name in sorted(merged)}


def read_together(values: Sequence[Tensor]) -> list[float]:
    """Return the numbers; a device is waited for once, not once per number."""
    kinds = [value.dtype for value in values]
    members = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
    stacked = to_host([torch.stack([values[i] for i in places]) for places in members.values()])
    numbers = [0.0] * len(values)
    for places, read in zip(members.values(), stacked, strict=True):
        for i, number in zip(places, read.tolist(), strict=True):
            numbers[i] = number
    return numbers


def _peak(counts: Tensor) -> float:
    """Return the largest share of a bin in its group, divided by the share that each bin would have if all were even."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return float(shares.max()) * counts.shape[-1]
