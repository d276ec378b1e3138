"""Linear layers whose frozen weights are kept in 4 bits (NF4, arXiv 2305.14314) by bitsandbytes, and dequantised for each product.

A block of 64 numbers has one float32 scale, so a weight takes 4.5 bits. Only codes and scales are kept for the backward pass, which
dequantises again. Quantising and dequantising round nothing at random, so two processes hold the same weights.

Example:
    The seven matrices of a layer; embeddings and head stay as they are:

    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=32, layers=1, heads=2, kv_heads=1), seed=0)
    >>> quantised_parameters(model), quantised_parameters(model) * BYTES
    (2304, 1296.0)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from posttrain.errors import ModelError
from posttrain.extras import require_extra
from posttrain.models.deferred import fill
from posttrain.models.routing import routers_of

BLOCK, KIND = 64, "nf4"
BYTES = 0.5 + 4 / BLOCK
"""Bytes of a weight: four bits, and its share of a scale."""
SCORE = "score"
"""The scalar head of a reward model or critic, which is trained in full."""


class QuantisedLinear(nn.Linear):
    """A linear layer that holds codes and scales as buffers, which no state dict contains: they follow from the frozen weights."""

    codes: Tensor
    scales: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().to(torch.float32).flatten()
        blocks = functional.pad(weight, (0, -len(weight) % BLOCK)).view(-1, BLOCK)
        codes, scales = _operators().quantize_4bit(blocks, BLOCK, KIND, torch.uint8)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the dequantised weight [outputs, inputs], a new tensor at each call."""
        shape = (self.out_features, self.in_features)
        return dequantised(self.codes, self.scales, shape).to(self.scales.dtype)

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input, self.codes, self.scales, (self.out_features, self.in_features))
        return product if self.bias is None else product + self.bias

    def plain(self) -> nn.Linear:
        """Return an ordinary layer with the dequantised weight."""
        weight = self.weight
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = self.bias
        return layer


class _Product(torch.autograd.Function):
    """Multiply by a dequantised weight, which is not kept for the backward pass."""

    @staticmethod
    # pyrefly: ignore[bad-override]
    def forward(ctx: Any, states: Tensor, codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape, ctx.dtype = shape, states.dtype
        return functional.linear(states, dequantised(codes, scales, shape).to(states.dtype))

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        weight = dequantised(codes, scales, ctx.shape).to(gradient.dtype)
        return (gradient @ weight).to(ctx.dtype), None, None, None


def dequantised(codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the float32 weight of codes and scales.

    The operator gets one block a row: bitsandbytes 0.50 on a CPU takes wrong scales if rows are no multiple of a block.
    """
    blocks = _operators().dequantize_4bit(codes, scales.float(), BLOCK, KIND, (len(scales), BLOCK), torch.float32)
    weight: Tensor = blocks.flatten()[: shape[0] * shape[1]].view(shape)
    return weight


def _operators() -> Any:
    """Return bitsandbytes' operators, which its import registers."""
    import bitsandbytes  # noqa: F401

    return torch.ops.bitsandbytes


def quantise_base(model: PreTrainedModel) -> None:
    """Replace the linear layers of `model` except heads and routers. The weights of a deferred model are read layer by layer.

    Raises:
        ConfigError: bitsandbytes is not installed.
        ModelError: the model has no such layer.
    """
    require_extra("bitsandbytes", "lora.base_bits = 4", "qlora")
    found = list(_linear_layers(model))
    if not found:
        raise ModelError(
            f"lora.base_bits = 4: {type(model).__name__} has no linear layer besides its head, so nothing would be quantised; set"
            " lora.base_bits: 32"
        )
    for parent, name, layer in found:
        fill(layer)
        setattr(parent, name, QuantisedLinear(layer))


def quantised_parameters(model: PreTrainedModel) -> int:
    """Return the number of weights that `quantise_base` would replace."""
    return sum(layer.weight.numel() for _, _, layer in _linear_layers(model))


def dequantise(model: nn.Module) -> bool:
    """Put ordinary layers in place of quantised ones, in main memory. Return True if there were any."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, QuantisedLinear)
    ]
    if places:
        model.to("cpu")  # the whole model in float32 may exceed the device
    for parent, name, child in places:
        setattr(parent, name, child.plain())
    return bool(places)


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    head = model.get_output_embeddings()
    routed = {id(module) for router in routers_of(model) for module in router.modules()}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head and name != SCORE and id(child) not in routed:
                yield parent, name, child
