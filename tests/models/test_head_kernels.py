"""The Triton kernels of the fused head, run by Triton's interpreter on a CPU, and compiled for GPUs that are not here.

pip install triton
TRITON_INTERPRET=1 python -m pytest tests/models/test_head_kernels.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.models import head_trial, logprobs
from posttrain.models.head_tiles import SINGLE_OPERATORS, RowGradients, Sums, TileWork

pytest.importorskip("triton", reason="PyTorch for CPUs comes without Triton: pip install triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run with TRITON_INTERPRET=1, which must be set before Triton is imported", allow_module_level=True)

from posttrain.models import head_kernels

ADDED = head_kernels.WORK._replace(add_product=SINGLE_OPERATORS.add_product)
"""The kernels with a product that a CPU has: PyTorch's product of half precision in float32 is one of CUDA."""


@settings(max_examples=100, deadline=None)
@given(
    words=st.integers(1, 40),
    rows=st.integers(1, 5),
    block=st.sampled_from([1, 4, 16, 64]),
    size=st.sampled_from([0.0, 1.0, 30.0, 3e4]),
    uniform=st.sampled_from([None, 1.0, 0.3]),
    dtype=st.sampled_from(sorted(head_kernels.DTYPES, key=str)),
    odd=st.sampled_from([None, torch.inf, -torch.inf, torch.nan]),
    seed=st.integers(0, 9),
)
def test_a_tile_is_that_of_single_operators(
    words: int,
    rows: int,
    block: int,
    size: float,
    uniform: float | None,
    dtype: torch.dtype,
    odd: float | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    product = (size * torch.randn(rows, words, generator=generator)).to(dtype)
    if odd is not None:
        product[0, words // 2] = odd
    columns = torch.randint(-words, 2 * words, (rows,), generator=generator)
    temperature = 0.5 + torch.rand(rows, generator=generator) if uniform is None else uniform
    scale, bonus = torch.randn(2, rows, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_kernels, "BLOCK", block)
        found, expected = (
            results(work, product, columns, temperature, scale, bonus) for work in (ADDED, SINGLE_OPERATORS)
        )
    # the interpreter cuts off to bfloat16, and a GPU rounds; a logit of 3e4 has an error of 1e-3 in float32
    near = {"rtol": 2**-7 if dtype == torch.bfloat16 else 2e-3 if dtype == torch.float16 else 1e-4}
    near["atol"] = 1e-6 * (1 + float(product.float().abs().nan_to_num(0, 0, 0).max()) / 0.3)
    for name, value in expected.items():
        one, other = found[name].float(), value.to(found[name].dtype).float()
        assert torch.allclose(one, other, **near, equal_nan=True), (name, one, other)


def results(
    work: TileWork, product: Tensor, columns: Tensor, temperature: float | Tensor, scale: Tensor, bonus: Tensor
) -> dict[str, Tensor]:
    """Return the sums over the tile and a second one, and the gradients of the first with and without entropy."""
    sums = Sums.start(len(product), scale)
    work.scan(product.clone(), columns, temperature, sums)
    normaliser, entropy = sums.normaliser(), sums.entropy()
    work.scan(product[:, :1].flip(0).contiguous(), columns, temperature, sums)
    found = {"normaliser": normaliser, "entropy": entropy, "selected": sums.selected, "two tiles": sums.normaliser()}
    for name, more in (("gradient", None), ("gradient with entropy", bonus)):
        rows = RowGradients(normaliser, entropy, scale, more)
        found[name] = work.differentiate(product.clone(), columns, temperature, rows)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("uniform", [None, 0.7])
def test_the_head_with_kernels_is_the_head(
    dtype: torch.dtype, bias: bool, uniform: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "TILE_WORDS", 7)
    monkeypatch.setattr(logprobs, "TILE_ELEMENTS", 28)
    found, again, expected = (head(work, dtype, bias, uniform) for work in (ADDED, ADDED, SINGLE_OPERATORS))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-2)


def head(work: TileWork, dtype: torch.dtype, bias: bool, uniform: float | None) -> list[Tensor]:
    """Return log-probabilities, entropies and all gradients of 11 tokens in tiles of 4 tokens and 7 of 30 words."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((11, 8), (30, 8), (30,))]
    targets = torch.randint(30, (11,), generator=generator)
    temperature = torch.rand(11, generator=generator) + 0.5 if uniform is None else uniform
    offset = leaves[2] if bias else None
    values, entropy = logprobs._SelectedLogprobs.apply(*leaves[:2], offset, targets, temperature, dtype, work)
    loss = ((values - 0.3 * entropy) * torch.arange(11)).sum()
    return [values, entropy, *torch.autograd.grad(loss, leaves[: 3 if bias else 2])]


@pytest.mark.parametrize("dtype", sorted(head_kernels.DTYPES, key=str))
def test_they_pass_the_trial_before_their_first_use(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_trial, "TOKENS", 32)
    assert head_trial._Tile(torch.device("cpu"), dtype, 5000).fault_of(head_kernels.WORK) == ""


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from posttrain.models import head_kernels as h
for name, sums, known in (("_scan", "selected greatest total weighted", {}),
                          ("_differentiate", "normaliser entropy scale bonus", {"HAS_BONUS": True})):
    kernel = getattr(h, name)
    types = {"product": "*bf16", "columns": "*i64", "temperatures": "*fp32", "temperature": "fp32", "words": "i32"}
    types |= dict.fromkeys(sums.split(), "*fp32")
    signature = {each: types.get(each, "constexpr") for each in kernel.arg_names}
    aligned = {(kernel.arg_names.index(each),): [["tt.divisibility", 16]] for each in ("product", "words")}
    source = ASTSource(kernel, signature, known | {"PER_ROW": True, "BLOCK": h.BLOCK}, aligned)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": h.WARPS}).asm["ptx"]
    print(name, "atom" in ptx, "ld.global.v4" in ptx or ".v8" in ptx, "local" in ptx)
"""


def test_they_compile_for_hopper_without_atomics_and_with_wide_loads() -> None:
    surroundings: dict[str, Any] = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(head_kernels.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COMPILE], env=surroundings, cwd=root, capture_output=True, text=True)
    assert re.findall(r"^\w+ .*$", done.stdout, re.M) == [
        "_scan False True False",
        "_differentiate False True False",
    ], done.stderr
