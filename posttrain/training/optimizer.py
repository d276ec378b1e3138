"""AdamW with moments in float32, or in 8 bits by torchao (block-wise quantisation, arXiv 2110.02861).

Each block of 256 numbers has a float32 scale, so two moments take 2 x (1 + 4/256) bytes a weight instead of 8. Parameters of fewer than
4,096 numbers, or whose number is no multiple of 256, embeddings and heads keep float32 moments. A checkpoint holds codes and scales as
plain tensors.

Example:
    >>> from torch import nn
    >>> optimizer = make_optimizer([{"params": [nn.Parameter(torch.zeros(2))], "lr": 0.1}], OptimizerSettings(0.1))
    >>> type(optimizer).__name__, optimizer.param_groups[0]["weight_decay"]
    ('AdamW', 0.0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from posttrain.combinations import Setup, require
from posttrain.errors import CheckpointError, ConfigError
from posttrain.extras import require_extra
from posttrain.models.shards import by_kind
from posttrain.settings import OptimizerSettings
from posttrain.training.host_optimizer import HostAdamW
from posttrain.training.low_bit import eight_bit_adamw, moment, plain, splits_columns


def make_optimizer(groups: Sequence[Mapping[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return AdamW for the parameter groups.

    Raises:
        ConfigError: 8-bit moments are asked for without torchao or under tensor parallelism, or moments in main memory for parameters
            that are split over processes.
    """
    given = [dict(group) for group in groups]
    arguments: dict[str, Any] = {
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    parts = [parameter for group in given for parameter in group["params"] if isinstance(parameter, DTensor)]
    if parts:
        processes, layered = parts[0].device_mesh.size(), any(splits_columns(part) for part in parts)
        layers, fsdp = (processes, 0) if layered else (1, 2)
        require(Setup(processes, layers=layers, fsdp=fsdp, offload=settings.offload, moment_bits=settings.moment_bits))
    if settings.offload:
        if settings.moment_bits != 32:
            raise ConfigError(
                f"optimizer.offload: true keeps moments of 32 bits in main memory, so moment_bits {settings.moment_bits} has no effect;"
                " remove one"
            )
        if next(iter(given[0]["params"])).device.type != "cpu":
            return HostAdamW(given, **arguments)
    if settings.moment_bits == 32:
        # one kernel for all parameters; with 25 million parameters on a CPU it takes a sixth of the loop's time
        return torch.optim.AdamW(given, **arguments, fused=True)
    require_extra("torchao", "optimizer.moment_bits = 8", "low-bit")
    return eight_bit_adamw(given, **arguments)


def stepping(optimizer: torch.optim.Optimizer, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context for a step of the optimiser.

    torchao compiles its step. On a CPU that takes a minute or two and a C++ compiler, so the step runs uncompiled there.
    """
    compiles = not isinstance(optimizer, torch.optim.AdamW | HostAdamW) and device.type == "cpu"
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


def portable_state(optimizer: torch.optim.Optimizer | Any) -> dict[str, Any]:
    """Return the optimiser's state dict, with codes and scale in place of each 8-bit moment. Tensors are not copied."""
    state: dict[str, Any] = optimizer.state_dict()
    entries = {i: {name: plain(value) for name, value in entry.items()} for i, entry in state["state"].items()}
    return {**state, "state": entries}


Groups = Sequence[Sequence[nn.Parameter]]
"""The trainer's groups of parameters. The optimiser has two for each that tensor parallelism splits only in part."""


def by_parameter(state: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """Return an optimiser's state numbered by the order of the parameters, so that it does not depend on which of them are split."""
    numbers, first, merged = _numbers(groups), 0, []
    for members, kept in zip(groups, per_group(state["param_groups"], groups), strict=True):
        merged.append({**kept, "params": list(range(first, first + len(members)))})
        first += len(members)
    entries = {numbers[slot]: entry for slot, entry in state["state"].items()}
    return {**state, "state": dict(sorted(entries.items())), "param_groups": merged}


def by_slot(state: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """Return a state that `by_parameter` returned in the order of the optimiser's own groups."""
    slots, first, parted = {number: slot for slot, number in enumerate(_numbers(groups))}, 0, []
    kinds = [kind for members in groups for kind in by_kind(members)]
    for kind, stored in zip(kinds, per_kind(state["param_groups"], groups), strict=True):
        parted.append({**stored, "params": list(range(first, first + len(kind)))})
        first += len(kind)
    entries = {slots[number]: entry for number, entry in state["state"].items()}
    return {**state, "state": dict(sorted(entries.items())), "param_groups": parted}


def per_group(values: Sequence[Any], groups: Groups) -> list[Any]:
    """Return the first of each trainer's group among values for the optimiser's own groups."""
    counts = [len(by_kind(members)) for members in groups]
    return [values[sum(counts[:i])] for i in range(len(counts))]


def per_kind(values: Sequence[Any], groups: Groups) -> list[Any]:
    """Return the value of each group of the trainer for each of the optimiser's own groups."""
    return [value for value, members in zip(values, groups, strict=True) for _ in by_kind(members)]


def _numbers(groups: Groups) -> list[int]:
    """Return the place of each parameter of an optimiser in `groups`."""
    places = {id(parameter): i for i, parameter in enumerate(chain(*groups))}
    return [places[id(parameter)] for members in groups for kind in by_kind(members) for parameter in kind]


def load_portable(optimizer: torch.optim.Optimizer | Any, state: Mapping[str, Any]) -> None:
    """Load a state that `portable_state` returned.

    Raises:
        CheckpointError: it is that of an optimiser with other moments.
    """
    groups = zip(state["param_groups"], optimizer.state_dict()["param_groups"], strict=False)
    if any(("fused" in stored) != ("fused" in held) for stored, held in groups):
        raise CheckpointError(
            "the checkpoint holds moments of a different precision than this optimiser; was `optimizer.moment_bits` changed?"
            " Remove the run's checkpoints to start again"
        )
    entries = {i: {name: moment(name, value) for name, value in entry.items()} for i, entry in state["state"].items()}
    optimizer.load_state_dict({**state, "state": entries})
