"""One optimiser step for any objective: micro-batches of summed losses over denominators that are counted once for the whole step.

So loss and gradient are the same for every split of a batch into micro-batches, accumulation and processes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from posttrain.data.batches import micro_batches, share_of
from posttrain.data.tokens import Tokens
from posttrain.distributed import all_reduce_max
from posttrain.errors import CheckpointError, NotFiniteError, NumericalError
from posttrain.models.checkpointing import recomputed_layers
from posttrain.training.sharding import full, shard, shards, split_moments, split_weights
from posttrain.training.sums import Sums

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
        self.sharded = shards(self.accelerator)
        self.recomputed = recomputed_layers(model)
        self.groups = list(groups or [ParameterGroup("policy", trainable(model), settings.learning_rate)])
        if self.sharded:
            self.groups = _shard(model, self.groups, self.accelerator)
        optimizer = torch.optim.AdamW(
            [{"params": g.parameters, "lr": g.learning_rate} for g in self.groups],
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            # one kernel for all parameters: a sixth of the time of a loop over them at 25 million, on a CPU
            fused=True,
        )
        self.model: nn.Module = model
        self.optimizer: Any = optimizer
        if not self.sharded:
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
        for layer in self.recomputed:
            layer.training = True
        counts = objective.counts(rows)
        every = [objective.sequences(row) for row in rows]
        share = share_of(every, self.accelerator.process_index, self.accelerator.num_processes)
        own = [rows[i] for i in share]
        groups = micro_batches([every[i] for i in share], self.micro_batch_tokens)
        if self.sharded:
            # every forward gathers weights from all processes, so all must take as many
            groups += [[]] * (all_reduce_max(self.accelerator, len(groups)) - len(groups))
        sums = Sums(counts)
        for number, group in enumerate(groups):
            at_once = self.sharded or number == len(groups) - 1
            with contextlib.nullcontext() if at_once else self.accelerator.no_sync(self.model):
                # a process without rows still takes part in what all do, with nothing to add
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
            if math.isnan(metrics[name]):
                self.optimizer.zero_grad()
                raise NotFiniteError(f"{name} of update {self.updates + 1} is {metrics[name]}; weights are unchanged")
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
            norm = _clip(group.parameters, self.settings.max_grad_norm)
            if not math.isfinite(norm):
                self.optimizer.zero_grad()
                raise NotFiniteError(f"the gradient norm of update {self.updates + 1} is {norm}; weights are unchanged")
            metrics["grad_norm" if group is self.groups[0] else f"{group.name}/grad_norm"] = norm
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return metrics

    def weights(self) -> dict[str, Tensor]:
        """All that is trained, put together on every process; the rest is as it was in the model that training started from."""
        frozen = _frozen(self.unwrapped)
        weights = {name: value for name, value in self.unwrapped.state_dict().items() if name not in frozen}
        return full(weights) if self.sharded else weights

    def state_dict(self) -> dict[str, Any]:
        """All that an update changes. Any number of processes can go on from it."""
        moments = self.optimizer.state_dict()
        return {
            "model": self.weights(),
            "optimizer": full(moments) if self.sharded else moments,
            "schedule": self.schedule.state_dict(),
            "updates": self.updates,
            "tokens_trained": self.tokens_trained,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        weights, moments = state["model"], state["optimizer"]
        if self.sharded:
            weights = split_weights(weights, self.unwrapped)
            moments = split_moments(moments, [p for group in self.groups for p in group.parameters])
        missing, unexpected = self.unwrapped.load_state_dict(weights, strict=False)
        if unexpected or set(missing) != _frozen(self.unwrapped):
            raise CheckpointError(
                "the checkpoint holds other weights than those that are trained now; was `lora` changed?"
                " Remove the run's checkpoints to start over"
            )
        self.optimizer.load_state_dict(moments)
        self.schedule.load_state_dict(state["schedule"])
        self.updates, self.tokens_trained = state["updates"], state["tokens_trained"]


def _shard(model: nn.Module, groups: Sequence[ParameterGroup], accelerator: Accelerator) -> list[ParameterGroup]:
    """Split the model; the groups over the parameters that have taken the place of the old ones."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    named = [(group, [names[parameter] for parameter in group.parameters]) for group in groups]
    shard(model, accelerator)
    placed = dict(model.named_parameters())
    return [replace(group, parameters=[placed[name] for name in members]) for group, members in named]


def _clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """The norm of the gradient over all processes, before it is clipped."""
    norm = full(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """What an optimiser may change: everything, or an adapter and the heads beside it."""
    return [p for p in module.parameters() if p.requires_grad]


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


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
