"""Attention in half precision: PyTorch's own numbers forward, and a gradient that is no further from the truth than its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from posttrain.models.kernels import Scores, attention

MASK = (torch.arange(9) <= torch.arange(5)[:, None] + 4).expand(3, 1, 5, 9).clone()
MASK[0, 0, :, :2] = False  # the padding of a shorter prompt
WINDOW = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril().triu(-2)


def states(queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Four heads of queries over two of keys and values, and a gradient from above."""
    generator = torch.Generator().manual_seed(queries)
    shapes = ((3, 4, queries, 8), (3, 2, keys, 8), (3, 2, keys, 8), (3, 4, queries, 8))
    made = [torch.randn(shape, generator=generator).bfloat16().to(dtype) for shape in shapes]
    return [part.requires_grad_(i < 3) for i, part in enumerate(made)]


def by_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scores.scaling, enable_gqa=True
    )


@pytest.mark.parametrize(("queries", "keys", "mask"), [(7, 7, None), (5, 9, MASK), (7, 7, WINDOW)])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_bfloat16_forward_is_pytorchs_and_backward_is_near_the_truth(
    queries: int, keys: int, mask: Tensor | None, scaling: float | None
) -> None:
    found = {}
    for name, function, dtype in (
        ("truth", by_torch, torch.float64),
        ("torch", by_torch, torch.bfloat16),
        ("ours", attention, torch.bfloat16),
    ):
        *given, outer = states(queries, keys, dtype)
        outputs = function(*given, mask, Scores(scaling))  # type: ignore[operator]
        outputs.backward(outer)
        found[name] = (outputs.detach(), [part.grad for part in given])
    assert torch.equal(found["ours"][0], found["torch"][0])
    for truth, theirs, ours in zip(*(found[name][1] for name in ("truth", "torch", "ours")), strict=True):
        error, allowed = (float((part.double() - truth).norm() / truth.norm()) for part in (ours, theirs))
        assert error <= max(1.1 * allowed, 0.004)


def test_values_may_have_another_size() -> None:
    query, key, value, outer = states(7, 7, torch.float32)
    narrow = value.detach()[..., :5].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = attention(query, key, narrow, None)
    outputs.backward(outer[..., :5].bfloat16())
    expected = by_torch(query, key, narrow, None, Scores())
    assert torch.allclose(outputs.float(), expected, atol=0.03)
    assert narrow.grad is not None


def test_autocast_is_followed() -> None:
    *given, outer = states(7, 7, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = attention(*given, None)
    assert outputs.dtype == torch.bfloat16
    outputs.backward(outer.bfloat16())
    assert given[0].grad is not None
    assert given[0].grad.dtype == torch.float32


def test_float32_is_pytorchs_to_the_last_bit() -> None:
    *given, _ = states(5, 9, torch.float32)
    assert torch.equal(attention(*given, MASK, Scores(0.7)), by_torch(*given, MASK, Scores(0.7)))
