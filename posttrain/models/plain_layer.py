"""A layer of the plain family (Llama, Mistral, Qwen 2 and 3 and models with the same code) as one function with its own gradient, on CPUs.

In small models norms, rotations, residuals and the steps of autograd take as long as half of the products. Here residuals are added by
products, gradients are changed in place, and each head of a token is one row, which attention gathers. Fewer tensors are kept for the
backward pass: normalised states, not states and weighted states.

A layer is taken by the code of its classes, as in `posttrain.models.fused`, if nothing has changed it: no adapter, no hook, no split
weights, float32. Its last layer computes only the tokens that are read.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=2, heads=2, kv_heads=1), seed=0)
    >>> join_layers(model)
    2
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import SiLUActivation

from posttrain.data.layout import Parts
from posttrain.models.fused import rotate, rotate_back, scale_of_norm, with_forward
from posttrain.models.head_rows import HeadLayout, attend, attend_backward, head_layout
from posttrain.models.last_layer import is_narrow
from posttrain.models.plain_family import is_plain_layer, window_of

TILE_TOKENS = 2048
"""About the tokens for which the second half of a layer is computed at a time, so that its tensors stay in the processor's cache."""
WEIGHTS = 14
"""Number of parameters of a layer, with those that it may lack."""
Weights = tuple[Any, ...]
Pair = tuple[Tensor, Tensor]


class LayerShape(NamedTuple):
    """Sizes and constants of a layer."""

    heads: int
    key_heads: int
    size: int
    scaling: float
    epsilons: tuple[float, float, float]
    """Of the norms before attention, of heads, and before the feed-forward network."""
    rotates: bool


class LayerInputs(NamedTuple):
    """What a layer computes: its shape, the layout of its attention, the tokens that are read, and cosines and sines [tokens, 1, size]."""

    shape: LayerShape
    layout: HeadLayout
    reads: Tensor | None
    cos: Tensor
    sin: Tensor
    returns_reads: bool = False
    """If True, the layer returns only the tokens that are read, [read, hidden]."""


def join_layers(model: nn.Module) -> int:
    """Give the plain layers of `model` the function here. Return how many modules have got it."""
    changed = 0
    for module in model.modules():
        if is_plain_layer(module) and not hasattr(type(module), "joined"):
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
            inputs = joined_inputs(self, hidden_states, parts, angles, _reads_of(self, kwargs))
            if inputs is not None:
                return computed(hidden_states, inputs, self)
        own: Tensor = kind.forward(self, hidden_states, *args, **kwargs)
        return own

    made = with_forward(kind, forward)
    made.joined = True  # type: ignore[attr-defined]
    return made


def _reads_of(layer: Any, given: dict[str, Any]) -> Tensor | None:
    """Return the tokens that a narrow layer computes; None for all."""
    return given["reads"].tokens if given.get("reads") is not None and is_narrow(layer) else None


def computed(states: Tensor, inputs: LayerInputs, layer: Any) -> Tensor:
    """Return the states [1, tokens, hidden] after a layer; only the read ones if the inputs ask for that."""
    weights = _weights(layer)
    if not torch.is_grad_enabled():
        return _forward(states[0], inputs, weights, None)[None]
    found: Tensor = _Layer.apply(states, inputs, *weights)
    return found


def _takes(layer: Any, states: Tensor) -> bool:
    if type(states) is not Tensor or len(states) != 1 or torch.is_autocast_enabled("cpu"):
        return False
    return is_plain_layer(layer) and _has_usual_parts(layer) and all(map(_is_wide, (states, *_weights(layer))))


def _has_usual_parts(layer: Any) -> bool:
    """Return True if only queries, keys and values have a bias, and the feed-forward network's gate is a SiLU."""
    attention, mlp = layer.self_attn, layer.mlp
    unbiased = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return type(mlp.act_fn) in (nn.SiLU, SiLUActivation) and all(linear.bias is None for linear in unbiased)


def _is_wide(tensor: Tensor | None) -> bool:
    """Return True for float32 of a CPU that no process splits."""
    if tensor is None:
        return True
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def joined_inputs(
    layer: Any, states: Tensor, parts: Parts, angles: Pair, reads: Tensor | None = None
) -> LayerInputs | None:
    """Return the inputs of a layer for a flat batch; None if the layer is not a joined one or its numbers are of a different kind.

    Args:
        states: [1, tokens, hidden].
        angles: cosines and sines, [1, tokens, size].
        reads: the tokens that the layer computes; None for all.
    """
    if not (hasattr(type(layer), "joined") and _takes(layer, states)):
        return None
    attention = layer.self_attn
    size = attention.head_dim
    cos, sin = angles
    if cos.shape[-1] != size or cos.dtype != torch.float32 or len(cos) != 1:
        return None
    heads, key_heads = (linear.out_features // size for linear in (attention.q_proj, attention.k_proj))
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
    )
    return LayerInputs(shape, layout, reads, cos[0][:, None], sin[0][:, None])


def _weights(layer: Any) -> Weights:
    """Return the parameters in the order of `_forward`; None for those that the layer lacks."""
    attention, mlp = layer.self_attn, layer.mlp
    taken = (attention.q_proj, attention.k_proj, attention.v_proj)
    norms = [getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm")]
    return (
        layer.input_layernorm.weight,
        *(linear.weight for linear in taken),
        *(linear.bias for linear in taken),
        *norms,
        attention.o_proj.weight,
        layer.post_attention_layernorm.weight,
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        mlp.down_proj.weight,
    )


def _forward(states: Tensor, inputs: LayerInputs, weights: Weights, kept: list[Tensor] | None) -> Tensor:
    """Return the states [tokens, hidden] after the layer; those of tokens that are not read are unchanged or left out.

    Args:
        kept: gets the tensors that the backward pass needs, unless None.
    """
    norm, projections = weights[0], weights[1:7]
    of_heads, (out, second, gate, up, down) = weights[7:9], weights[9:]
    shape, layout, reads = inputs.shape, inputs.layout, inputs.reads
    epsilon, head_epsilon, second_epsilon = shape.epsilons
    normal = _unit(states, epsilon, kept)
    given = torch.mul(normal, norm, out=normal if kept is None else None)
    query, key, value = _heads(given, inputs, projections, of_heads, head_epsilon, kept)
    del normal, given
    mixed = attend(query, key, value, layout, kept).view(-1, shape.heads * shape.size)
    del query, key, value
    own = states if reads is None else states.index_select(0, reads)
    outputs = torch.empty_like(own)
    for rows in _tiles(len(own)):
        middle = torch.addmm(own[rows], mixed[rows], out.t(), out=outputs[rows])
        normal = _unit(middle, second_epsilon, kept)
        given = torch.mul(normal, second, out=normal if kept is None else None)
        opened, lifted = given @ gate.t(), given @ up.t()
        passed = functional.silu(opened, inplace=kept is None)
        if kept is not None:
            kept += [mixed[rows], opened, lifted, passed]
        gated = torch.mul(passed, lifted, out=passed if kept is None else None)
        middle.addmm_(gated, down.t())
    if reads is None or inputs.returns_reads:
        return outputs
    return states.clone().index_copy_(0, reads, outputs)


def _tiles(tokens: int) -> list[slice]:
    """Return equal parts of the tokens, each of about `TILE_TOKENS`."""
    size = -(-tokens // max(1, round(tokens / TILE_TOKENS))) or 1
    return [slice(start, start + size) for start in range(0, max(tokens, 1), size)]


def _unit(states: Tensor, epsilon: float, kept: list[Tensor] | None) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) over the last dimension, and keep it and the factor."""
    scale = scale_of_norm(states, epsilon)
    normal = states * scale
    if kept is not None:
        kept += [normal, scale]
    return normal


def _heads(
    given: Tensor,
    inputs: LayerInputs,
    projections: Weights,
    norms: Weights,
    epsilon: float,
    kept: list[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scaled queries with a row of zeros at the end, keys and values, each with one head of one token a row."""
    shape, reads = inputs.shape, inputs.reads
    made = []
    for number, linear in enumerate(projections[:3]):
        own = given if reads is None or number else given.index_select(0, reads)
        product = functional.linear(own, linear, projections[3 + number]).view(len(own), -1, shape.size)
        if number == 2:
            made.append(product.view(-1, shape.size))
            continue
        weight = norms[number]
        if weight is not None:
            product = _unit(product, epsilon, kept)
        rows = product.new_empty(product.shape[0] * product.shape[1] + (number == 0), shape.size)
        rotated = rows[: product.shape[0] * product.shape[1]].view(product.shape)
        if number == 0:
            rows[-1] = 0
        if weight is not None:
            product = product * weight
        if shape.rotates:
            rotate(product, *_angles(inputs, number == 0), out=rotated)
        else:
            rotated.copy_(product)
        if number == 0:
            rotated.mul_(shape.scaling)
        made.append(rows)
    query, key, value = made
    return query, key, value


def _angles(inputs: LayerInputs, of_reads: bool) -> Pair:
    if inputs.reads is None or not of_reads:
        return inputs.cos, inputs.sin
    return inputs.cos.index_select(0, inputs.reads), inputs.sin.index_select(0, inputs.reads)


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
        of_states, of_weights = _Backward(ctx.inputs, weights, ctx.needs_input_grad)(gradient[0], list(kept))
        return (None if of_states is None else of_states[None], None, *of_weights)


class _Backward:
    """The gradient of one layer.

    Args:
        needs: which inputs of `_Layer` need a gradient: states, the inputs, and each weight.
    """

    def __init__(self, inputs: LayerInputs, weights: Any, needs: tuple[bool, ...]) -> None:
        self.inputs, self.weights = inputs, weights
        self.needs_states, self.needs = needs[0], needs[2:]
        self.found: list[Tensor | None] = [None] * WEIGHTS

    def __call__(self, gradient: Tensor, kept: list[Tensor]) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of the states [tokens, hidden] and of the weights."""
        reads, tokens = self.inputs.reads, len(kept[0])
        if reads is not None and not self.inputs.returns_reads:
            gradient = gradient.index_select(0, reads)
        of_middle, of_mixed = self._second_half(gradient, kept)
        of_states = self._attention(of_middle, of_mixed, tokens, kept)
        if not self.needs_states:
            return None, self.found
        if reads is not None:
            of_states = of_states.index_add_(0, reads, of_middle)
        return of_states, self.found

    def _second_half(self, gradient: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the gradients of the states behind attention, and of its outputs with a row of zeros at the end."""
        shape, tokens = self.inputs.shape, len(gradient)
        of_middle, of_mixed = torch.empty_like(gradient), gradient.new_empty(tokens * shape.heads + 1, shape.size)
        of_mixed[-1] = 0
        flat = of_mixed[:-1].view(tokens, -1)
        for rows in reversed(_tiles(tokens)):
            passed, lifted, opened, mixed, scale, normal = (kept.pop() for _ in range(6))
            own = self._feed_forward(gradient[rows], normal, scale, (opened, lifted, passed), of_middle[rows])
            self._product(9, own, mixed)
            torch.mm(own, self.weights[9], out=flat[rows])
        return of_middle, of_mixed

    def _feed_forward(
        self, gradient: Tensor, normal: Tensor, scale: Tensor, inner: tuple[Tensor, Tensor, Tensor], out: Tensor
    ) -> Tensor:
        """Return in `out` the gradient of the states between attention and the feed-forward network."""
        (opened, lifted, passed), (gate, up, down) = inner, self.weights[11:]
        self._product(13, gradient, passed * lifted)
        of_gated = gradient @ down
        of_lifted = of_gated * passed
        of_opened = torch.ops.aten.silu_backward.grad_input(of_gated.mul_(lifted), opened, grad_input=of_gated)
        given = normal * self.weights[10]
        self._product(11, of_opened, given)
        self._product(12, of_lifted, given)
        of_given = (of_opened @ gate).addmm_(of_lifted, up)
        return torch.addcmul(gradient, self._unit(10, of_given, normal), scale, out=out)

    def _attention(self, gradient: Tensor, of_mixed: Tensor, tokens: int, kept: list[Tensor]) -> Tensor:
        """Return the gradient of the layer's states. For a layer that computes only some tokens, it lacks that of the residual."""
        (normal, scale), shape, reads = kept[:2], self.inputs.shape, self.inputs.reads
        norms = [kept[2 * n : 2 * n + 2] if self.weights[6 + n] is not None else [] for n in (1, 2)]
        query, key, value = attend_backward(of_mixed, tokens, self.inputs.layout, kept[2 + sum(map(len, norms)) :])
        query = self._rotated(query.view(len(gradient), -1, shape.size), 0, norms[0])
        key = self._rotated(key.view(tokens, -1, shape.size), 1, norms[1])
        given = normal * self.weights[0]
        of_projections = query, key, value.view(tokens, -1)
        for number, found in enumerate(of_projections):
            self._product(1 + number, found, given if reads is None or number else given.index_select(0, reads))
            if self.needs[4 + number]:
                self.found[4 + number] = found.sum(0)
        of_given = (of_projections[1] @ self.weights[2]).addmm_(of_projections[2], self.weights[3])
        if reads is None:
            of_given.addmm_(query, self.weights[1])
            return torch.addcmul(gradient, self._unit(0, of_given, normal), scale)
        of_given.index_add_(0, reads, query @ self.weights[1])
        return self._unit(0, of_given, normal).mul_(scale)

    def _rotated(self, gradient: Tensor, number: int, norm: list[Tensor]) -> Tensor:
        """Return the gradient of the products of queries (0) or keys (1), [tokens, heads x size]."""
        shape = self.inputs.shape
        back = rotate_back(gradient, *_angles(self.inputs, number == 0)) if shape.rotates else gradient
        if number == 0:
            back.mul_(shape.scaling)
        if norm:
            normal, scale = norm
            back = self._unit(7 + number, back, normal).mul_(scale)
        return back.view(len(back), -1)

    def _product(self, number: int, gradient: Tensor, given: Tensor) -> None:
        if self.needs[number]:
            found = self.found[number]
            self.found[number] = gradient.t() @ given if found is None else found.addmm_(gradient.t(), given)

    def _unit(self, number: int, gradient: Tensor, normal: Tensor) -> Tensor:
        """Return the gradient dy of weighted normal states n w as w dy - n mean(n w dy), in place; the factor of the norm is left out."""
        weight, size = self.weights[number], gradient.shape[-1]
        products = gradient * normal
        if self.needs[number]:
            total, found = products.flatten(0, -2).sum(0), self.found[number]
            self.found[number] = total if found is None else found.add_(total)
        mean = (products @ weight)[..., None]
        return gradient.mul_(weight).addcmul_(normal, mean, value=-1 / size)
