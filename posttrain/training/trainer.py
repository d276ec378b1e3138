"""One optimiser step for any objective: micro-batches of summed losses, divided by counts of the whole step.

Loss and gradient are therefore the same for every split of a batch into micro-batches, accumulation and processes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from posttrain.data.batches import micro_batches, share_of
from posttrain.data.tokens import Tokens
from posttrain.distributed import all_reduce_max, on_one_host, splits_layers
from posttrain.errors import CheckpointError, ConfigError, NotFiniteError, NumericalError
from posttrain.models.allocator import give_back_gaps
from posttrain.models.checkpointing import recomputed_layers
from posttrain.models.context import sharing, trainer_group
from posttrain.models.shards import by_kind, fresh_gradients, is_sharded, is_tensor_parallel
from posttrain.settings import OptimizerSettings
from posttrain.training.low_bit import keep_embeddings_wide
from posttrain.training.optimizer import (
    Groups,
    by_parameter,
    by_slot,
    load_portable,
    make_optimizer,
    per_group,
    per_kind,
    portable_state,
    stepping,
)
from posttrain.training.sharding import full, placed_state, shard, shards
from posttrain.training.sums import Sums, Terms
from posttrain.training.tensor_parallel import split_layers

Row = TypeVar("Row")
RowIn = TypeVar("RowIn", contravariant=True)


class Objective(Protocol[RowIn]):
    """A loss over rows. It is independent of micro-batches, processes and optimisers."""

    def sequences(self, row: RowIn) -> Sequence[Tokens]:
        """Return the sequences that the model reads for the row; `tokens/trained` counts their prompts and responses."""
        ...

    def counts(self, rows: Sequence[RowIn]) -> Mapping[str, float]:
        """Return the denominators of one optimiser step, over all its rows."""
        ...

    def terms(self, model: nn.Module, rows: Sequence[RowIn]) -> Terms:
        """Return sums over some of the step's rows; `rows` is never empty."""
        ...


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with their own learning rate and gradient norm; the first group's norm is the metric grad_norm."""

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float


class Trainer(Generic[Row]):
    """Holds model, optimiser and schedule, and takes optimiser steps.

    Example:
        >>> from posttrain.data.tokens import Tokens
        >>> from posttrain.models.policy import Policy
        >>> from posttrain.models.tiny import TinyShape, tiny_model
        >>> from posttrain.training.supervised import Example, SupervisedObjective
        >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
        >>> trainer = Trainer(Policy(model), OptimizerSettings(learning_rate=0.01), total_steps=5, micro_batch_tokens=64)
        >>> rows = [Example(Tokens((5, 6), (7, 8)))]
        >>> losses = [trainer.update(rows, SupervisedObjective())["loss"] for _ in range(5)]
        >>> losses[-1] < losses[0], trainer.updates, trainer.tokens_trained
        (True, 5, 20)
    """

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
        _check_warmup(settings, total_steps)
        self.accelerator = accelerator or Accelerator(mixed_precision="bf16" if bf16 else "no")
        self.bf16 = _in_bf16(self.accelerator)
        self.settings, self.total_steps, self.micro_batch_tokens = settings, total_steps, micro_batch_tokens
        self.together = self.accelerator.num_processes if splits_layers(self.accelerator) else 1
        """Number of processes that split each layer, and so train on the same rows."""
        self.sharded, self.context = self.together > 1 or shards(self.accelerator), trainer_group(self.accelerator)
        self.recomputed = recomputed_layers(model)
        self.groups = list(groups or [ParameterGroup("policy", trainable(model), settings.learning_rate)])
        if self.sharded and not (is_sharded(model) or is_tensor_parallel(model)):
            self.groups = _shard(model, self.groups, self.accelerator)
        if settings.offload and not self.sharded:
            model.to(self.accelerator.device)  # only a device's weights have copies in main memory
        keep_embeddings_wide(model)
        optimizer = make_optimizer(
            [{"params": kind, "lr": g.learning_rate} for g in self.groups for kind in by_kind(g.parameters)], settings
        )
        kinds = by_kind(trainable(model))
        self.replicated = kinds[1] if len(kinds) > 1 else []
        """Parameters that every process holds whole next to those that tensor parallelism splits."""
        self.model: nn.Module = model
        self.optimizer: Any = optimizer
        if not self.sharded:
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(_inner(self.optimizer), _multiplier(settings, total_steps))
        self.updates = 0
        self.tokens_trained = 0

    @property
    def unwrapped(self) -> nn.Module:
        """Return the module without the wrapper of data-parallel training."""
        module: nn.Module = self.accelerator.unwrap_model(self.model)
        return module

    def update(self, rows: Sequence[Row], objective: Objective[Row]) -> dict[str, float]:
        """Take one optimiser step on `rows` (the same list on every process). Return the step's metrics, averaged over all rows.

        Raises:
            NotFiniteError: loss or gradient are not finite; the weights are unchanged.
            NumericalError: a metric exceeded its limit; the weights are unchanged.
        """
        # gradients also flow in evaluation mode, where neither dropout nor router noise changes a log-probability
        if any(module.training for module in self.model.modules()):
            self.model.eval()
        for layer in self.recomputed:
            layer.training = True
        counts = objective.counts(rows)
        every = [objective.sequences(row) for row in rows]
        # processes that share layers, or the tokens of rows, have the same rows
        together = self.together if self.context is None else self.context.size
        process, processes = self.accelerator.process_index // together, self.accelerator.num_processes // together
        share = share_of(every, process, processes)
        own = [rows[i] for i in share]
        groups = micro_batches([every[i] for i in share], self.micro_batch_tokens)
        if self.sharded:
            # every forward pass gathers weights from all processes, so all must run the same number of them
            groups += [[]] * (all_reduce_max(self.accelerator, len(groups)) - len(groups))
        sums = Sums(counts)
        for number, group in enumerate(groups):
            at_once = self.sharded or number == len(groups) - 1
            with contextlib.nullcontext() if at_once else self.accelerator.no_sync(self.model):
                # a process without rows still takes part in collective operations, with weight 0
                part = [own[i] for i in group] or [rows[0]]
                # without autocast's cache: under FSDP2 it would keep a copy of all gathered weights until the end of the forward pass
                kind, cached = self.accelerator.device.type, not self.sharded
                with sharing(self.context), torch.autocast(kind, torch.bfloat16, self.bf16, cached):
                    terms = objective.terms(self.model, part)
                weight = 1.0 / together if group else 0.0
                loss = sums.add(terms, weight)
                # data-parallel training averages gradients over processes; the factor undoes that, because these are sums
                with fresh_gradients(self.replicated):
                    self.accelerator.backward(loss * weight * self.accelerator.num_processes)
            give_back_gaps()
        metrics = sums.reduced(self.accelerator)
        if not math.isfinite(metrics["loss"]):
            self.optimizer.zero_grad()
            raise NotFiniteError(f"the loss of update {self.updates + 1} is {metrics['loss']}; {self._advice()}")
        for name, (limit, meaning) in sums.limits.items():
            if math.isnan(metrics[name]):
                self.optimizer.zero_grad()
                raise NotFiniteError(f"{name} of update {self.updates + 1} is {metrics[name]}; {self._advice()}")
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
                raise NotFiniteError(f"the gradient norm of update {self.updates + 1} is {norm}; {self._advice()}")
            metrics["grad_norm" if group is self.groups[0] else f"{group.name}/grad_norm"] = norm
        with stepping(_inner(self.optimizer), self.accelerator.device):
            # accelerate's own step would look for a package on the disk each time
            _inner(self.optimizer).step()
        self.schedule.step()
        _inner(self.optimizer).zero_grad()
        self.updates += 1
        return metrics

    def _advice(self) -> str:
        """Return what a value that is not finite means for the weights, and which setting to lower."""
        if not self.updates:
            return "weights are unchanged"
        return (
            "weights are unchanged by it. If the updates before it were too large for the weights, lower"
            f" learning_rate = {self.settings.learning_rate:g}"
        )

    def weights(self) -> dict[str, Tensor]:
        """Return all trained weights, gathered on the main process only; the others are unchanged since the start of training.

        All processes must call it; without sharding each one has all weights.
        """
        if not self.sharded:
            return self._held()
        gathered = full(self._held(), self.accelerator.is_main_process)
        return gathered if self.accelerator.is_main_process else {}

    def _held(self) -> dict[str, Tensor]:
        """Return the trained weights as this process holds them, which may be its part."""
        frozen = _frozen(self.unwrapped)
        return {name: value for name, value in self.unwrapped.state_dict().items() if name not in frozen}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an update changes. Any number of processes can resume from it.

        Split tensors are this process's part, or gathered by the main process if the others may have no disk in common with it.
        """
        moments = by_parameter(portable_state(self.optimizer), [group.parameters for group in self.groups])
        tensors = {"model": self._held(), "optimizer": moments}
        if self.sharded and not on_one_host(self.accelerator):
            tensors = full(tensors, self.accelerator.is_main_process)
        return {
            **tensors,
            "schedule": self._schedule_state(self.schedule.state_dict(), per_group),
            "updates": self.updates,
            "tokens_trained": self.tokens_trained,
        }

    def _schedule_state(
        self, state: Mapping[str, Any], change: Callable[[Sequence[Any], Groups], list[Any]]
    ) -> dict[str, Any]:
        """Return the schedule's state with lists of other groups: the trainer's in a checkpoint, the optimiser's in the schedule."""
        members = [group.parameters for group in self.groups]
        return {name: change(v, members) if isinstance(v, list) else v for name, v in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`.

        Raises:
            CheckpointError: the checkpoint has other trained weights than the model, or moments of a different precision.
        """
        held = self.unwrapped.state_dict()
        frozen = _frozen(self.unwrapped)
        if state["model"].keys() != held.keys() - frozen:
            raise CheckpointError(
                "the checkpoint has other trained weights than this model; was `lora` changed?"
                " Remove the run's checkpoints to start again"
            )
        members = [group.parameters for group in self.groups]
        weights, moments = placed_state(state["model"], state["optimizer"], held, [*chain(*members)])
        self.unwrapped.load_state_dict(weights, strict=False)
        load_portable(self.optimizer, by_slot(moments, members))
        self.schedule.load_state_dict(self._schedule_state(state["schedule"], per_kind))
        self.updates, self.tokens_trained = state["updates"], state["tokens_trained"]


def _shard(model: nn.Module, groups: Sequence[ParameterGroup], accelerator: Accelerator) -> list[ParameterGroup]:
    """Split the model; return the groups with the parameters that replaced the old ones."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    named = [(group, [names[parameter] for parameter in group.parameters]) for group in groups]
    split_layers(model, accelerator) if splits_layers(accelerator) else shard(model, accelerator)
    placed = dict(model.named_parameters())
    return [replace(group, parameters=[placed[name] for name in members]) for group, members in named]


def _clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Clip the gradient. Return its norm over all processes before clipping."""
    kinds = by_kind(parameters)
    norms = [full(torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    norm = norms[0] if len(norms) == 1 else torch.stack([each.cpu() for each in norms]).norm()
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return float(norm)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that an optimiser may change: all, or an adapter and the heads next to it."""
    return [p for p in module.parameters() if p.requires_grad]


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _in_bf16(accelerator: Accelerator) -> bool:
    """Return True for bfloat16, False for float32. Raises ConfigError for a precision whose gradients have to be scaled."""
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            f"the Accelerator has mixed_precision = {accelerator.mixed_precision!r}, whose gradients have to be scaled, which the"
            " trainer does not do; use 'bf16' or 'no'"
        )
    return accelerator.mixed_precision == "bf16"


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _check_warmup(settings: OptimizerSettings, total_steps: int) -> None:
    """Raise ConfigError if the run ends before the learning rate is reached."""
    if settings.warmup_steps > total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps = {settings.warmup_steps} is longer than this run of {total_steps} optimiser steps, so the"
            f" learning rate {settings.learning_rate:g} would never be reached; set it to {total_steps // 10}, a tenth of the run,"
            " or train for longer"
        )


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
