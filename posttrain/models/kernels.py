"""Scaled dot-product attention with a fast backward pass on CPUs, and attention with soft caps and sinks.

Example:
    Without a mask attention is causal, so the first position sees only its own value:

    >>> import torch
    >>> value = torch.arange(3.0).view(1, 1, 3, 1)
    >>> attention(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), value, mask=None).flatten().tolist()
    [0.0, 0.5, 1.0]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention


class Scores(NamedTuple):
    """How a layer makes probabilities of the products of queries and keys.

    Attributes:
        scaling: factor of the scores; None means 1 / sqrt(size).
        window: tokens that a query sees, itself included; None means all before it.
        softcap: c in c tanh(score / c), as in Gemma 2; None means no cap.
        sinks: [heads] a score that takes part in the softmax and has no value, as in gpt-oss; None means none.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def are_plain(self) -> bool:
        """Return True if scaled dot-product attention computes them, given a mask for the window."""
        return self.softcap is None and self.sinks is None


PLAIN = Scores()


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores = PLAIN) -> Tensor:
    """Return the outputs [batch, heads, queries, size]; without a mask attention is causal, and aligned at the last query and key.

    Keys and values may have fewer heads than queries (grouped queries), and values a different size (DeepSeek's latent attention).

    Args:
        mask: [batch, 1, queries, keys] bool, True where a query may see a key. It contains the window.
    """
    scaling, kind = scores.scaling, query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (states.to(torch.get_autocast_dtype(kind)) for states in (query, key, value))
    if not scores.are_plain:
        return _written_out(query, key, value, mask, scores)
    if kind == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad and query.shape[-1] == value.shape[-1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
        outputs: Tensor = _HalfPrecision.apply(query, key, value, mask, scaling)
        return outputs
    if stores_scores(query, key, mask):
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def set_kernels(deterministic: bool) -> None:
    """Choose PyTorch's kernels for this process.

    Args:
        deterministic: only those that give the same bits in every run; cuBLAS also reads CUBLAS_WORKSPACE_CONFIG when it starts.
    """
    torch.use_deterministic_algorithms(deterministic)
    # cuDNN's attention compiles a plan for each shape, up to a second, and nearly every batch has new ones
    torch.backends.cuda.enable_cudnn_sdp(False)


def stores_scores(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Return True if a GPU would compute grouped heads with all scores in memory, [batch, heads, queries, keys].

    Of PyTorch's kernels only FlashAttention groups heads, in half precision and without a mask. The memory-efficient one takes float32 and
    masks, but no groups.
    """
    grouped = query.shape[1] != key.shape[1] and query.device.type != "cpu"
    return grouped and (mask is not None or query.dtype not in (torch.bfloat16, torch.float16))


def _written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Compute attention with all scores in memory: PyTorch's kernels know neither caps nor sinks."""
    repeats, factor = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5
    key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
    # [batch, heads, queries, keys]
    found = query @ key.mT * (factor if scores.scaling is None else scores.scaling)
    if scores.softcap is not None:
        found = torch.tanh(found / scores.softcap) * scores.softcap
    if mask is None:
        queries, keys = found.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=found.device).tril(keys - queries)
    found = found.masked_fill(~mask, -torch.inf)
    if scores.sinks is not None:
        sinks = scores.sinks.to(found.dtype).view(1, -1, 1, 1).expand(*found.shape[:3], 1)
        found = torch.cat([found, sinks], -1)
    wide = torch.promote_types(found.dtype, torch.float32)
    weights = found.softmax(-1, dtype=wide)[..., : key.shape[-2]].to(value.dtype)
    return weights @ value


class _HalfPrecision(torch.autograd.Function):
    """Run PyTorch's kernel forward in bfloat16 and backward in float32; on a CPU that takes down to a sixth of bfloat16's backward time."""

    @staticmethod
    # pyrefly: ignore[bad-override]
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
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, outputs, normaliser, bias = ctx.saved_tensors
        wide = [states.float() for states in (grad_outputs, query, key, value, outputs)]
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *wide, normaliser, 0.0, bias is None, attn_mask=None if bias is None else bias.float(), scale=ctx.scaling
        )
        return *(gradient.to(query.dtype) for gradient in gradients), None, None
