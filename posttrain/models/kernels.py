"""Scaled dot-product attention, with the backward pass that is quick on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Outputs [batch, heads, queries, size], causal without a mask. Keys and values may have fewer heads than queries, and values
    another size (DeepSeek's latent attention).

    mask: [batch, 1, queries, keys] bool.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (states.to(torch.get_autocast_dtype(kind)) for states in (query, key, value))
    if kind == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad and query.shape[-1] == value.shape[-1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
        outputs: Tensor = _HalfPrecision.apply(query, key, value, mask, scaling)
        return outputs
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


class _HalfPrecision(torch.autograd.Function):
    """PyTorch's kernel in bfloat16, and its backward pass in float32, which takes down to a sixth of the time of the one in bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        bias = None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        outputs, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None, attn_mask=bias, scale=scaling
        )
        ctx.save_for_backward(query, key, value, outputs, normaliser, bias)
        ctx.scaling = scaling
        return outputs  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, outputs, normaliser, bias = ctx.saved_tensors
        wide = [states.float() for states in (outer, query, key, value, outputs)]
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *wide, normaliser, 0.0, bias is None, attn_mask=None if bias is None else bias.float(), scale=ctx.scaling
        )
        return *(of.to(query.dtype) for of in gradients), None, None
