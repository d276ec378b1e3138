"""Context parallelism: several processes share the tokens of one flat batch, and exchange tokens for heads around attention (2309.14509).

Each process computes a slice of the tokens. Before attention it sends its tokens of the other processes' heads and receives all tokens
of the heads that it computes, so attention, its parts and kernels are those of one process. Activations are divided by the number of
processes.

After the last layer the hidden states are gathered. Every process then computes the loss of all rows, which the trainer weighs by
1 / processes. The gradient of a gathered slice is the sum over the processes, so each parameter's gradients add up to that of one process.

Example:
    >>> context_group(1, 0, 4) is None, padded_length(10, 4)
    (True, 12)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from posttrain.combinations import Setup, require
from posttrain.errors import ModelError
from posttrain.settings import CONTEXT_PARALLEL, row_processes


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share the tokens of a batch: neighbours in the order of ranks."""

    group: Any
    rank: int
    size: int


@dataclass(frozen=True)
class Split:
    """The parts of a batch whose tokens a group shares.

    Attributes:
        parts: the layout of all tokens, for attention.
        tokens: number of tokens, without those that make the slices equal.
    """

    parts: Any
    tokens: int
    group: ContextGroup


_active: ContextGroup | None = None


def context_size(processes: int) -> int:
    """Return how many processes share each row.

    Raises:
        ConfigError: the environment names no divisor of `processes`.
    """
    size = row_processes()
    require(Setup(processes, context=size))
    return size


def trainer_group(accelerator: Accelerator) -> ContextGroup | None:
    """Return this process's group, or None if each process has its own rows. All processes must call it."""
    processes = accelerator.num_processes
    return context_group(context_size(processes), accelerator.process_index, processes)


@cache
def context_group(size: int, process: int, processes: int) -> ContextGroup | None:
    """Return the group of `process`. Every process makes all groups, once."""
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, processes, size)]
    return ContextGroup(groups[process // size], process % size, size)


@contextmanager
def sharing(group: ContextGroup | None) -> Iterator[None]:
    """Let the processes of `group` share the tokens of every batch that is computed inside the block."""
    global _active
    before, _active = _active, group
    try:
        yield
    finally:
        _active = before


def active() -> ContextGroup | None:
    """Return the group of the innermost `sharing` block."""
    return _active


def padded_length(tokens: int, size: int) -> int:
    """Return the next multiple of `size`."""
    return -(-tokens // size) * size


def own_slice(states: Tensor, group: ContextGroup) -> Tensor:
    """Return this process's share of the first dimension, padded with zeros to equal slices."""
    whole = padded_length(len(states), group.size)
    padded = functional.pad(states, (*(0, 0) * (states.dim() - 1), 0, whole - len(states)))
    return padded.chunk(group.size)[group.rank]


def own_indices(indices: Tensor, group: ContextGroup) -> Tensor:
    """Return this process's share of the indices; the first one fills up the last shares."""
    missing = padded_length(len(indices), group.size) - len(indices)
    return torch.cat([indices, indices[:1].expand(missing)]).chunk(group.size)[group.rank]


def joined_slices(states: Tensor, group: ContextGroup, length: int) -> Tensor:
    """Return the first `length` entries of all processes' slices."""
    whole: Tensor = _Gathered.apply(states, group)
    return whole[:length]


def heads_for_tokens(states: Tensor, group: ContextGroup) -> Tensor:
    """Exchange [tokens / n, heads, size] of all heads for [tokens, heads / n, size] of this process's heads.

    Raises:
        ModelError: the heads cannot be divided by the number of processes.
    """
    if states.shape[1] % group.size:
        raise ModelError(
            f"{CONTEXT_PARALLEL} = {group.size}: the model's {states.shape[1]} attention heads cannot be divided by it, so processes cannot"
            " share a row; choose a divisor of the number of heads"
        )
    # [n, tokens / n, heads / n, size]: what each process receives
    parts = states.unflatten(1, (group.size, -1)).transpose(0, 1)
    received: Tensor = _Exchanged.apply(parts, group)
    return received.flatten(0, 1)


def enough_heads(states: Tensor, group: ContextGroup) -> Tensor:
    """Return keys or values with at least one head for each process: fewer heads than processes are repeated."""
    heads = states.shape[1]
    return (
        states.repeat_interleave(group.size // heads, 1) if group.size % heads == 0 and heads < group.size else states
    )


def tokens_for_heads(states: Tensor, group: ContextGroup) -> Tensor:
    """Exchange [tokens, heads / n, size] of this process's heads for [tokens / n, heads, size] of all heads."""
    received: Tensor = _Exchanged.apply(states.unflatten(0, (group.size, -1)), group)
    return received.transpose(0, 1).flatten(1, 2)


def own_heads(numbers: Tensor, group: ContextGroup) -> Tensor:
    """Return this process's share of a number per head."""
    return numbers.chunk(group.size)[group.rank]


class _Exchanged(torch.autograd.Function):
    """Send the i-th entry of the first dimension to process i, and receive one from each."""

    @staticmethod
    # pyrefly: ignore[bad-override]
    def forward(ctx: Any, states: Tensor, group: ContextGroup) -> Tensor:
        ctx.group = group
        return _exchange(states, group)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.group), None


def _exchange(states: Tensor, group: ContextGroup) -> Tensor:
    states = states.contiguous()
    received = torch.empty_like(states)
    dist.all_to_all_single(received, states, group=group.group)
    return received


class _Gathered(torch.autograd.Function):
    """Join the slices of all processes; the gradient of a slice is the sum of all processes' gradients."""

    @staticmethod
    # pyrefly: ignore[bad-override]
    def forward(ctx: Any, states: Tensor, group: ContextGroup) -> Tensor:
        ctx.group = group
        states = states.contiguous()
        whole = states.new_empty(group.size * len(states), *states.shape[1:])
        dist.all_gather(list(whole.chunk(group.size)), states, group=group.group)
        return whole

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        group: ContextGroup = ctx.group
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=group.group)
        return total.chunk(group.size)[group.rank], None
