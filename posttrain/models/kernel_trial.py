"""Try the attention kernel of a device before its first use. A device, driver or package without it then costs speed, and not the run.

The trial has a prompt that two responses share, and a separate row. Outputs and gradients must be those of attention with masks in
float32 on the CPU, up to the rounding of the kernel's dtype. A wrong mask or offset changes them by as much as they are.

A lack of memory, a lost device and a failed assertion of this package are no refusals: they end the run.

Example:
    >>> reason = refusal_of(torch.device("cuda", 0), torch.bfloat16, (4, 2, 64))
    >>> torch.cuda.is_available() or bool(reason)
    True
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from posttrain.data.offsets import Segment, by_offsets
from posttrain.data.transfer import together
from posttrain.models.flash import leave_newest
from posttrain.models.kernels import PLAIN, Scores, attention
from posttrain.models.refusals import counts, refused
from posttrain.models.varlen import KERNELS, Kernel, varlen_attention

SEGMENTS = (
    Segment(range(0), range(5)),
    Segment(range(5), range(5, 8)),
    Segment(range(5), range(8, 12)),
    Segment(range(0), range(12, 18)),
)
TOKENS, WINDOW, ROUNDINGS = 18, 3, 8
"""Tokens of the trial, its window, and the largest difference in roundings of the largest number."""
FAULTS = (RuntimeError, AssertionError, TypeError, AttributeError, ImportError, NotImplementedError)
"""Errors of a kernel that is absent, refuses the device or the heads, or has a different signature; see `counts` for the exceptions."""


def refusal(query: Tensor, key: Tensor, scores: Scores) -> str:
    """Return the reason why the kernel of the states' device is not used for them, [tokens, heads, size]; empty if it is used."""
    heads = query.shape[1], key.shape[1], query.shape[2]
    return refusal_of(query.device, query.dtype, heads, scores)


def refusal_of(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], scores: Scores = PLAIN) -> str:
    """Return the same for (heads, key heads, size of a head). Each kind is tried once in a process."""
    find = KERNELS[device.type]
    return _refusal(find, device, dtype, heads, scores.window is not None, scores.sinks is not None)


@cache
def _refusal(
    find: Callable[[], Kernel],
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    windowed: bool,
    sinks: bool,
) -> str:
    reason = _tried(device, dtype, heads, windowed, sinks)
    if reason and leave_newest():
        reason = _tried(device, dtype, heads, windowed, sinks)
    return reason


def _tried(device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], windowed: bool, sinks: bool) -> str:
    count, keys, size = heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, count, size), (TOKENS, keys, size), (TOKENS, keys, size), *([(count,)] if sinks else [])]
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    outer = torch.randn(shapes[0], generator=generator).to(dtype)
    window = WINDOW if windowed else None
    layout = by_offsets(SEGMENTS)
    try:
        *moved, moved_outer = together([*given, outer], device)
        there = layout.with_tensors(together(layout.tensors(), device))
        found = _results(
            lambda q, k, v, s: varlen_attention(q, k, v, there, Scores(window=window, sinks=s)), moved, moved_outer
        )
    except FAULTS as error:
        if not counts(error):
            raise
        return refused(error)
    wide = [each.float() for each in given]
    expected = _results(lambda q, k, v, s: _by_masks(q, k, v, window, s), wide, outer.float())
    # a maximum of PyTorch is NaN if one number is
    worst = torch.stack(
        [(a.cpu().float() - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    ).max()
    near = bool(worst <= ROUNDINGS * torch.finfo(dtype).eps)
    return "" if near else f"it differs from attention with masks by {float(worst):.2g}"


def _results(
    compute: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor], given: list[Tensor], outer: Tensor
) -> list[Tensor]:
    """Return the outputs and the gradients of all inputs."""
    leaves = [each.detach().requires_grad_() for each in given]
    query, key, value, *sinks = leaves
    # a layer that is recomputed in the backward pass has hooks, which would start that pass here
    with (
        torch.enable_grad(),
        torch.autocast(outer.device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved),
    ):
        outputs = compute(query, key, value, sinks[0] if sinks else None)
        return [outputs.detach(), *torch.autograd.grad(outputs, leaves, outer)]


def _by_masks(query: Tensor, key: Tensor, value: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """Return the outputs [tokens, heads, size] of all segments, row by row."""
    outputs = []
    for segment in SEGMENTS:
        row = torch.tensor([*segment.seen, *segment.own])
        away = torch.arange(len(segment.seen), len(row))[:, None] - torch.arange(len(row))
        mask = (away >= 0) & (away < (window or len(row)))
        own = query[list(segment.queries)].transpose(0, 1)[None]
        keys, values = (states.index_select(0, row).transpose(0, 1)[None] for states in (key, value))
        outputs.append(attention(own, keys, values, mask[None, None], Scores(sinks=sinks))[0].transpose(0, 1))
    return torch.cat(outputs)
