"""One optimiser step for any objective: micro-batches of summed losses over denominators that are counted once for the whole step.

So loss and gradient are the same for every split of a batch into micro-batches, accumulation and processes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from posttrain.data.batches import micro_batches, share_of
from posttrain.data.tokens import Tokens
from posttrain.errors import CheckpointError, NotFiniteError, NumericalError

Row = TypeVar("Row")
RowIn = TypeVar("RowIn", contravariant=True)


@dataclass
class Terms:
    """What an objective says of one micro-batch. Sums only: each names the count that the trainer divides it by.

    losses: name -> (sum, count name, weight). metrics: name -> (sum, count name). extremes: name ending in /min or /max -> value.
    histograms: metric name -> counts [groups, bins]; the metric is the greatest share that a bin has of its group, over an even share.
    limits: metric name -> (the most that its step may have, what it means to have more).
    """

    losses: dict[str, tuple[Tensor, str, float]] = field(default_factory=dict)
    metrics: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
    extremes: dict[str, Tensor] = field(default_factory=dict)
    histograms: dict[str, Tensor] = field(default_factory=dict)
    limits: dict[str, tuple[float, str]] = field(default_factory=dict)


class Objective(Protocol[RowIn]):
    """A loss over rows. Knows nothing of micro-batches, processes or optimisers."""

    def sequences(self, row: RowIn) -> Sequence[Tokens]:
        """What the row has the model read; `tokens/trained` counts its prompts and responses."""
        ...

    def counts(self, rows: Sequence[RowIn]) -> Mapping[str, float]:
        """The denominators of one optimiser step, over all its rows."""
        ...

    def terms(self, model: nn.Module, rows: Sequence[RowIn]) -> Terms:
        """Sums over some of the step's rows; `rows` is never empty."""
        ...


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a schedule that counts optimiser steps."""

    learning_rate: float
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate and a gradient norm of their own; the first group's norm is the metric grad_norm."""

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float


class Trainer(Generic[Row]):
    """Holds model, optimiser and schedule, and takes optimiser steps."""

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        *,
        total_steps: int,
        micro_batch_tokens: int,
        groups: Sequence[ParameterGroup] | None = None,
        bf16: bool = False,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator(mixed_precision="bf16" if bf16 else "no")
        self.settings, self.total_steps, self.micro_batch_tokens = settings, total_steps, micro_batch_tokens
        self.groups = list(groups or [ParameterGroup("policy", trainable(model), settings.learning_rate)])
        optimizer = torch.optim.AdamW(
            [{"params": g.parameters, "lr": g.learning_rate} for g in self.groups],
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(_inner(self.optimizer), _multiplier(settings, total_steps))
        self.updates = 0
        self.tokens_trained = 0

    @property
    def unwrapped(self) -> nn.Module:
        module: nn.Module = self.accelerator.unwrap_model(self.model)
        return module

    def update(self, rows: Sequence[Row], objective: Objective[Row]) -> dict[str, float]:
        """One optimiser step on `rows` (the same list on every process). Returns the step's metrics, averaged over all rows.

        Raises, with the weights as they were, NotFiniteError when loss or gradient are not finite, and NumericalError when a metric is
        beyond its limit.
        """
        # gradients flow in evaluation mode as well, and no kind of dropout or router noise touches a log-probability there
        self.model.eval()
        counts = objective.counts(rows)
        every = [objective.sequences(row) for row in rows]
        share = share_of(every, self.accelerator.process_index, self.accelerator.num_processes)
        own = [rows[i] for i in share]
        groups = micro_batches([every[i] for i in share], self.micro_batch_tokens)
        sums = _Sums(counts)
        for number, group in enumerate(groups):
            last = number == len(groups) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                # a process without rows still takes part in the gradient's synchronisation, with nothing to add
                part = [own[i] for i in group] or [rows[0]]
                with self.accelerator.autocast():
                    terms = objective.terms(self.model, part)
                weight = 1.0 if group else 0.0
                loss = sums.add(terms, weight)
                # the mean over processes that data-parallel training takes is undone here: these are sums
                self.accelerator.backward(loss * weight * self.accelerator.num_processes)
        metrics = sums.reduced(self.accelerator)
        if not math.isfinite(metrics["loss"]):
            self.optimizer.zero_grad()
            raise NotFiniteError(f"the loss of update {self.updates + 1} is {metrics['loss']}; weights are unchanged")
        for name, (limit, meaning) in sums.limits.items():
            if metrics[name] > limit:
                self.optimizer.zero_grad()
                raise NumericalError(
                    f"{name} of update {self.updates + 1} is {metrics[name]:.3g}, above {limit:g}: {meaning}; weights are unchanged"
                )
        metrics |= self._step()
        self.tokens_trained += sum(len(tokens) for sequences in every for tokens in sequences)
        metrics["tokens/trained"] = float(self.tokens_trained)
        return metrics

    def _step(self) -> dict[str, float]:
        metrics = {"learning_rate": float(self.schedule.get_last_lr()[0])}
        for group in self.groups:
            norm = float(torch.nn.utils.clip_grad_norm_(group.parameters, self.settings.max_grad_norm))
            if not math.isfinite(norm):
                self.optimizer.zero_grad()
                raise NotFiniteError(f"the gradient norm of update {self.updates + 1} is {norm}; weights are unchanged")
            metrics["grad_norm" if group is self.groups[0] else f"{group.name}/grad_norm"] = norm
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """All that an update changes; frozen weights are those of the model that training started from."""
        frozen = _frozen(self.unwrapped)
        weights = {name: value for name, value in self.unwrapped.state_dict().items() if name not in frozen}
        return {
            "model": weights,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "updates": self.updates,
            "tokens_trained": self.tokens_trained,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        missing, unexpected = self.unwrapped.load_state_dict(state["model"], strict=False)
        if unexpected or set(missing) != _frozen(self.unwrapped):
            raise CheckpointError(
                "the checkpoint holds other weights than those that are trained now; was `lora` changed?"
                " Remove the run's checkpoints to start over"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.updates, self.tokens_trained = state["updates"], state["tokens_trained"]


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """What an optimiser may change: everything, or an adapter and the heads beside it."""
    return [p for p in module.parameters() if p.requires_grad]


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


class _Sums:
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


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _multiplier(settings: OptimizerSettings, total_steps: int) -> Callable[[int], float]:
    def multiplier(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / settings.warmup_steps
        if settings.schedule == "constant":
            return 1.0
        progress = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
        progress = min(1.0, progress)
        return 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return multiplier
