"""Triton kernels for a tile of logits: each reads the tile once, and the gradient is written over it in the product's dtype.

A program of `_scan` owns a row and reads its words block by block (online softmax, 1805.02867); one of `_differentiate` owns a block of a
row. No two programs write the same number and nothing is added atomically, so results have the same bits in every run. Sums are float32.

Triton comes with PyTorch for CUDA. `TRITON_INTERPRET=1` runs the same programs on a CPU with NumPy, which is how they are tested there.
"""

from __future__ import annotations

import subprocess

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from posttrain.models.head_tiles import RowGradients, Sums, TileWork

BLOCK, WARPS = 4096, 8
"""Words that a program holds at once, and its warps of 32 threads: 16 words a thread."""
ONE_A_ROW = (
    "columns", "temperatures", "selected", "greatest", "total", "weighted", "normaliser", "entropy", "scale", "bonus",
)  # fmt: skip
"""Arguments of which a program reads one number, so that no program is compiled anew for addresses that are multiples of 16 bytes."""
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
FAULTS = (TritonError, subprocess.CalledProcessError, OSError)
"""Errors of a compiler that is absent or fails, next to PyTorch's."""


@triton.jit(do_not_specialize_on_alignment=ONE_A_ROW)
def _scan(
    product: tl.tensor, columns: tl.tensor, temperatures: tl.tensor, temperature: tl.tensor,
    selected: tl.tensor, greatest: tl.tensor, total: tl.tensor, weighted: tl.tensor,
    words: tl.tensor, PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    # int64, because a tile may have more than 2^31 numbers
    row = tl.program_id(0).to(tl.int64)
    logits = product + row * words
    if PER_ROW:
        temperature = tl.load(temperatures + row)
    m, s, w = tl.load(greatest + row), tl.load(total + row), tl.load(weighted + row)
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < words
        z = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32) / temperature
        above = tl.maximum(m, tl.max(z, 0))
        base = tl.where(above == -float("inf"), 0.0, above)
        rescale, exponentials = tl.exp(m - base), tl.exp(z - base)
        s = s * rescale + tl.sum(exponentials, 0)
        w = w * rescale + tl.sum(exponentials * tl.where(inside, z, 0.0), 0)
        m = above
    tl.store(greatest + row, m)
    tl.store(total + row, s)
    tl.store(weighted + row, w)
    column = tl.load(columns + row)
    here = (column >= 0) & (column < words)
    z = tl.load(logits + column, mask=here, other=0.0).to(tl.float32) / temperature
    tl.store(selected + row, z, mask=here)


@triton.jit(do_not_specialize_on_alignment=ONE_A_ROW)
def _differentiate(
    product: tl.tensor, columns: tl.tensor, temperatures: tl.tensor, temperature: tl.tensor,
    normaliser: tl.tensor, entropy: tl.tensor, scale: tl.tensor, bonus: tl.tensor,
    words: tl.tensor, PER_ROW: tl.constexpr, HAS_BONUS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < words
    if PER_ROW:
        temperature = tl.load(temperatures + row)
    place = product + row * words + at
    z = tl.load(place, mask=inside, other=0.0).to(tl.float32) / temperature
    of_logprob = tl.load(scale + row)
    logprobs = z - tl.load(normaliser + row)
    factor = of_logprob
    if HAS_BONUS:
        factor = of_logprob + tl.load(bonus + row) * (logprobs + tl.load(entropy + row))
    gradient = -factor * tl.exp(logprobs)
    gradient += tl.where(at == tl.load(columns + row), of_logprob, 0.0)
    tl.store(place, gradient.to(product.dtype.element_ty), mask=inside)


def scan(product: Tensor, columns: Tensor, temperature: float | Tensor, sums: Sums) -> None:
    """Add the words of a tile to the sums."""
    rows, words = product.shape
    every, one = _temperatures(temperature, product)
    with torch.cuda.device_of(product):
        _scan[(rows,)](
            product, columns, every, one, *sums, words,
            PER_ROW=isinstance(temperature, Tensor), BLOCK=_block(words), num_warps=WARPS,
        )  # fmt: skip


def differentiate(product: Tensor, columns: Tensor, temperature: float | Tensor, rows: RowGradients) -> Tensor:
    """Write the gradient of the logits over the product, and return it."""
    words = product.shape[1]
    every, one = _temperatures(temperature, product)
    block = _block(words)
    bonus = rows.scale if rows.bonus is None else rows.bonus
    with torch.cuda.device_of(product):
        _differentiate[(len(product), triton.cdiv(words, block))](
            product, columns, every, one, rows.normaliser, rows.entropy, rows.scale, bonus, words,
            PER_ROW=isinstance(temperature, Tensor), HAS_BONUS=rows.bonus is not None, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return product


def add_wide(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` in the total's dtype, within the product: nothing is rounded, and no product of half precision is stored."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _temperatures(temperature: float | Tensor, product: Tensor) -> tuple[Tensor, float]:
    """Return the rows' temperatures and a number for all; the product takes the place of a tensor that is not read."""
    if isinstance(temperature, Tensor):
        return temperature.to(torch.float32).contiguous(), 1.0
    return product, float(temperature)


def _block(words: int) -> int:
    return min(BLOCK, triton.next_power_of_2(words))


WORK = TileWork(scan, differentiate, add_wide)
