"""Metrics of an optimiser step out of the sums of its micro-batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import Tensor

if TYPE_CHECKING:
    from posttrain.training.trainer import Terms


class Sums:
    """Metric numerators of a step, kept in float64, divided by the step's counts at the end."""

    def __init__(self, counts: Mapping[str, float]) -> None:
        self.counts = counts
        self.totals: dict[str, float] = {"loss": 0.0}
        self.extremes: dict[str, float] = {}
        self.histograms: dict[str, Tensor] = {}
        self.limits: dict[str, tuple[float, str]] = {}

    def add(self, terms: Terms, weight: float) -> Tensor:
        loss: Tensor | None = None
        for value, count, factor in terms.losses.values():
            part = value * (factor / max(self.counts[count], 1e-12))
            loss = part if loss is None else loss + part
        assert loss is not None, "an objective must give at least one loss"
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
        if accelerator.num_processes == 1:
            return self.totals | self.extremes | {name: _peak(counts) for name, counts in self.histograms.items()}
        from accelerate.utils import gather_object

        every = gather_object([(self.totals, self.extremes)])
        merged: dict[str, Tensor] = {}
        for name, counts in (item for histograms in gather_object([self.histograms]) for item in histograms.items()):
            merged[name] = merged.get(name, 0) + counts
        for limits in gather_object([self.limits]):
            self.limits |= limits
        # a process whose rows are all of one kind has no metrics of the other kind
        names = dict.fromkeys(name for totals, _ in every for name in totals)
        totals = {name: sum(t.get(name, 0.0) for t, _ in every) for name in names}
        for name in sorted({name for _, extremes in every for name in extremes}):
            values = [extremes[name] for _, extremes in every if name in extremes]
            totals[name] = min(values) if name.endswith("/min") else max(values)
        return totals | {name: _peak(merged[name]) for name in sorted(merged)}


def _peak(counts: Tensor) -> float:
    """The greatest share that a bin has of its group, over the share that every bin would have if all were even."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return float(shares.max()) * counts.shape[-1]
