"""A layer of the plain family (Llama, Mistral, Qwen 2 and 3 and models with the same code) as one function with its own gradient, on CPUs.

In small models norms, rotations, residuals and the steps of autograd take as long as half of the products. Here residuals are added by
products, gradients are changed in place, and each head of a token is one row, which attention gathers. Fewer tensors are kept for the
backward pass: normalised states, not states and weighted states.

A layer is taken by the code of its classes, as in `posttrain.models.fused`, if nothing has changed it: no hook, no split weights,
float32, and no adapter but peft's low-rank ones (2106.09685). Its last layer computes only the tokens that are read.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=2, heads=2, kv_heads=1), seed=0)
    >>> join_layers(model)
    2
"""

from __future__ import annotations

from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import SiLUActivation

from posttrain.data.layout import Parts
from posttrain.models.fused import rotate, scale_of_norm, with_forward
from posttrain.models.head_rows import attend, head_layout
from posttrain.models.last_layer import is_narrow
from posttrain.models.plain_backward import Gradient, LayerInputs, LayerShape, angles_of, tiles
from posttrain.models.plain_family import is_plain_layer, window_of
from posttrain.models.plain_weights import (
    DOWN,
    GATE,
    KEY,
    NORM,
    OUT,
    QUERY,
    QUERY_BIAS,
    QUERY_NORM,
    SECOND_NORM,
    UP,
    VALUE,
    WEIGHTS,
    Weights,
    adapted,
    weights_of,
)  # fmt: skip


def join_layers(model: nn.Module) -> int:
    """Give the plain layers of `model` the function here. Return how many modules have got it."""
    changed = 0
    for module in model.modules():
        if is_plain_layer(module, adapted=True) and not hasattr(type(module), "joined"):
            module.__class__ = _joined(type(module))
            changed += 1
    return changed


@cache
def _joined(kind: type[nn.Module]) -> type[nn.Module]:
    @wraps(kind.forward)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts, angles = kwargs.get("parts"), kwargs.get("position_embeddings")
        usual = not args and isinstance(parts, tuple) and angles is not None and kwargs.get("past_key_values") is None
        if usual and not torch.compiler.is_compiling():
            joined = joined_inputs(self, hidden_states, parts, angles, _reads_of(self, kwargs))
            if joined is not None:
                return computed(hidden_states, *joined)
        own: Tensor = kind.forward(self, hidden_states, *args, **kwargs)
        return own

    made = with_forward(kind, forward)
    made.joined = True  # type: ignore[attr-defined]
    return made


def _reads_of(layer: Any, given: dict[str, Any]) -> Tensor | None:
    """Return the tokens that a narrow layer computes; None for all."""
    return given["reads"].tokens if given.get("reads") is not None and is_narrow(layer) else None


def computed(states: Tensor, inputs: LayerInputs, weights: Weights) -> Tensor:
    """Return the states [1, tokens, hidden] after a layer; only the read ones if the inputs ask for that."""
    if not torch.is_grad_enabled():
        return _forward(states[0], inputs, weights, None)[None]
    found: Tensor = _Layer.apply(states, inputs, *weights)
    return found


def _weights_if_taken(layer: Any, states: Tensor) -> tuple[Weights, tuple[float, ...]] | None:
    """Return the parameters of a joined layer and the scalings of its adapters; None if its own code has to compute the states."""
    if type(states) is not Tensor or len(states) != 1 or torch.is_autocast_enabled("cpu"):
        return None
    if not (hasattr(type(layer), "joined") and is_plain_layer(layer, adapted=True)):
        return None
    if type(layer.mlp.act_fn) not in (nn.SiLU, SiLUActivation):
        return None
    found = weights_of(layer)
    return found if found is not None and all(map(_is_wide, (states, *found[0]))) else None


def _is_wide(tensor: Tensor | None) -> bool:
    """Return True for float32 of a CPU that no process splits."""
    if tensor is None:
        return True
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def joined_inputs(
    layer: Any, states: Tensor, parts: Parts, angles: tuple[Tensor, Tensor], reads: Tensor | None = None
) -> tuple[LayerInputs, Weights] | None:
    """Return the inputs of `computed` for a layer of a flat batch; None if the layer or its numbers are of a different kind.

    Args:
        states: [1, tokens, hidden].
        angles: cosines and sines, [1, tokens, size].
        reads: the tokens that the layer computes; None for all.
    """
    taken = _weights_if_taken(layer, states)
    if taken is None:
        return None
    weights, scalings = taken
    attention = layer.self_attn
    size = attention.head_dim
    cos, sin = angles
    if cos.shape[-1] != size or cos.dtype != torch.float32 or len(cos) != 1:
        return None
    heads, key_heads = (len(weights[place]) // size for place in (QUERY, KEY))
    layout = head_layout(parts, reads, states.shape[1], heads, key_heads, window_of(attention))
    if layout is None:
        return None
    norms = (layer.input_layernorm, getattr(attention, "q_norm", layer.input_layernorm), layer.post_attention_layernorm)
    shape = LayerShape(
        heads,
        key_heads,
        size,
        attention.scaling,
        tuple(norm.variance_epsilon for norm in norms),
        bool(getattr(attention, "use_rope", True)),
        scalings,
    )
    return LayerInputs(shape, layout, reads, cos[0][:, None], sin[0][:, None]), weights


def _forward(states: Tensor, inputs: LayerInputs, weights: Weights, kept: list[Tensor] | None) -> Tensor:
    """Return the states [tokens, hidden] after the layer; those of tokens that are not read are unchanged or left out.

    Args:
        kept: gets the tensors that the backward pass needs, unless None.
    """
    out, second, gate, up, down = (weights[place] for place in (OUT, SECOND_NORM, GATE, UP, DOWN))
    shape, layout, reads = inputs.shape, inputs.layout, inputs.reads
    epsilon, _, second_epsilon = shape.epsilons
    add = partial(adapted, weights=weights, scalings=shape.scalings)
    normal = _unit(states, epsilon, kept)
    given = torch.mul(normal, weights[NORM], out=normal if kept is None else None)
    query, key, value = _heads(given, inputs, weights, kept)
    del normal, given
    mixed = attend(query, key, value, layout, kept).view(-1, shape.heads * shape.size)
    del query, key, value
    own = states if reads is None else states.index_select(0, reads)
    outputs = torch.empty_like(own)
    for rows in tiles(len(own)):
        middle = add(torch.addmm(own[rows], mixed[rows], out.t(), out=outputs[rows]), mixed[rows], place=OUT)
        normal = _unit(middle, second_epsilon, kept)
        given = torch.mul(normal, second, out=normal if kept is None else None)
        opened, lifted = add(given @ gate.t(), given, place=GATE), add(given @ up.t(), given, place=UP)
        passed = functional.silu(opened, inplace=kept is None)
        if kept is not None:
            kept += [mixed[rows], opened, lifted, passed]
        gated = torch.mul(passed, lifted, out=passed if kept is None else None)
        add(middle.addmm_(gated, down.t()), gated, place=DOWN)
    if reads is None or inputs.returns_reads:
        return outputs
    return states.clone().index_copy_(0, reads, outputs)


def _unit(states: Tensor, epsilon: float, kept: list[Tensor] | None) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) over the last dimension, and keep it and the factor."""
    scale = scale_of_norm(states, epsilon)
    normal = states * scale
    if kept is not None:
        kept += [normal, scale]
    return normal


def _heads(
    given: Tensor, inputs: LayerInputs, weights: Weights, kept: list[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scaled queries with a row of zeros at the end, keys and values, each with one head of one token a row."""
    shape, reads = inputs.shape, inputs.reads
    made = []
    for number, place in enumerate((QUERY, KEY, VALUE)):
        own = given if reads is None or number else given.index_select(0, reads)
        product = functional.linear(own, weights[place], weights[QUERY_BIAS + number])
        product = adapted(product, own, weights, shape.scalings, place).view(len(own), -1, shape.size)
        if number == 2:
            made.append(product.view(-1, shape.size))
            continue
        weight = weights[QUERY_NORM + number]
        if weight is not None:
            product = _unit(product, shape.epsilons[1], kept)
        rows = product.new_empty(product.shape[0] * product.shape[1] + (number == 0), shape.size)
        rotated = rows[: product.shape[0] * product.shape[1]].view(product.shape)
        if number == 0:
            rows[-1] = 0
        if weight is not None:
            product = product * weight
        if shape.rotates:
            rotate(product, *angles_of(inputs, number == 0), out=rotated)
        else:
            rotated.copy_(product)
        if number == 0:
            rotated.mul_(shape.scaling)
        made.append(rows)
    query, key, value = made
    return query, key, value


class _Layer(torch.autograd.Function):
    """Autograd function of a whole layer."""

    @staticmethod
    # pyrefly: ignore[bad-override]
    def forward(ctx: Any, states: Tensor, inputs: LayerInputs, *weights: Tensor | None) -> Tensor:
        kept: list[Tensor] = []
        outputs = _forward(states[0], inputs, weights, kept)
        ctx.save_for_backward(*kept, *weights)
        ctx.inputs = inputs
        return outputs[None]

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: checkpointing computes the layer again for it
        kept, weights = saved[:-WEIGHTS], saved[-WEIGHTS:]
        of_states, of_weights = Gradient(ctx.inputs, weights, ctx.needs_input_grad)(gradient[0], list(kept))
        return (None if of_states is None else of_states[None], None, *of_weights)
