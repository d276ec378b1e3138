"""Attention in half precision: PyTorch's own numbers forward, and a gradient that is no further from the truth than its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from posttrain.models import kernels
from posttrain.models.kernels import Scores, attention
from posttrain.models.packed import padded_attention

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


@pytest.mark.parametrize(
    ("dtype", "mask", "heads"),
    [
        (torch.float32, None, 4),
        (torch.float32, MASK, 4),
        (torch.bfloat16, MASK, 4),
        (torch.bfloat16, None, 2),
    ],
)
def test_a_gpu_gets_ungrouped_heads_unless_its_kernel_groups_them(
    dtype: torch.dtype, mask: Tensor | None, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise PyTorch's fallback would store all scores. Also for prompts, which are padded rows."""
    asked = []

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        asked.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(kernels, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # it knows no meta device
    given = [part.detach() for part in states(9 if mask is None else 5, 9, dtype)[:3]]
    there = [part.to("meta") for part in given]
    outputs = attention(*there, None if mask is None else mask.to("meta"))
    assert outputs.shape == (3, 4, given[0].shape[2], 8)
    attention(*given, mask)
    assert asked == [(heads, heads, heads == 2), (2, 2, True)]
    if heads == 4 and mask is None:
        layer = nn.Module()
        padded_attention(layer, *there, None, Scores())
        assert asked[2:] == [(4, 4, False)]
        layer.is_causal = False  # type: ignore[assignment]
        layer.num_key_value_groups = 2  # type: ignore[assignment]
        padded_attention(layer, *there, None, Scores())
        padded_attention(layer, *given, None, Scores())
        assert len(asked) == 3, "transformers' own"


def test_ungrouped_heads_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    *given, outer = states(5, 9, torch.float32)
    expected = attention(*given, MASK)
    wanted = torch.autograd.grad(expected, given, outer)
    monkeypatch.setattr(kernels, "stores_scores", lambda *_: True)
    found = attention(*given, MASK)
    assert torch.allclose(found, expected, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(found, given, outer), wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
