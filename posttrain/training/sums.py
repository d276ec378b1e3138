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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from accelerate import Accelerator
from torch import Tensor


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
    """Metric numerators of a step in float64; `reduced` divides them by the step's counts."""

    def __init__(self, counts: Mapping[str, float]) -> None:
        self.counts = counts
        self.totals: dict[str, float] = {"loss": 0.0}
        self.extremes: dict[str, float] = {}
        self.histograms: dict[str, Tensor] = {}
        self.limits: dict[str, tuple[float, str]] = {}

    def add(self, terms: Terms, weight: float) -> Tensor:
        """Add one micro-batch and return its loss; `weight` 0 keeps it out of all metrics."""
        loss: Tensor | None = None
        for value, count, factor in terms.losses.values():
            part = value * (factor / max(self.counts[count], 1e-12))
            loss = part if loss is None else loss + part
        assert loss is not None, "an objective must return at least one loss"
        self.totals["loss"] += weight * float(loss.detach())
        for name, (value, count) in terms.metrics.items():
            share = weight * float(value.detach()) / max(self.counts[count], 1e-12)
            self.totals[name] = self.totals.get(name, 0.0) + share
        self.limits |= terms.limits
        for name, value in terms.extremes.items() if weight else ():
            choose: Callable[[float, float], float] = min if name.endswith("/min") else max
            self.extremes[name] = choose(self.extremes.get(name, float(value)), float(value))
        for name, counts in terms.histograms.items() if weight else ():
            self.histograms[name] = self.histograms.get(name, 0) + counts.cpu()
        return loss

    def reduced(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the step's metrics over all processes."""
        if accelerator.num_processes == 1:
            return self.totals | self.extremes | {name: _peak(counts) for name, counts in self.histograms.items()}
        from accelerate.utils import gather_object

        every = gather_object([(self.totals, self.extremes)])
        merged: dict[str, Tensor] = {}
        for name, counts in (item for histograms in gather_object([self.histograms]) for item in histograms.items()):
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


def _peak(counts: Tensor) -> float:
    """Return the largest share of a bin in its group, divided by the share that each bin would have if all were even."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return float(shares.max()) * counts.shape[-1]
