"""NF4 in plain PyTorch, with the signatures of bitsandbytes' operators: the tests' own reference of the quantised layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CODES = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
    0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip
"""Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0 (arXiv 2305.14314, appendix E)."""


def quantize_4bit(weight: Tensor, block: int, kind: str, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return two codes a byte, the first one in the high bits, and the largest absolute number of each block."""
    blocks = weight.reshape(-1, block)
    scales = blocks.abs().amax(1)
    codes = ((blocks / scales[:, None])[..., None] - CODES).abs().argmin(-1).flatten().to(storage)
    return (codes[::2] << 4 | codes[1::2])[:, None], scales


def dequantize_4bit(
    codes: Tensor, scales: Tensor, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    each = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()
    return (CODES[each.long()].view(-1, block) * scales[:, None]).view(*shape).to(dtype)
