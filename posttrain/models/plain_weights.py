"""The parameters of a plain layer in one order, with those of low-rank adapters.

A linear module with an adapter (2106.09685) returns x W^T + b + s (x A^T) B^T with A [rank, in] and B [out, rank].

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> weights, scalings = weights_of(model.model.layers[0])
    >>> len(weights), tuple(weights[KEY].shape), weights[KEY_BIAS], scalings[KEY]
    (28, (8, 16), None, 0.0)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.models.plain_family import is_adapted

NORM, QUERY, KEY, VALUE, QUERY_BIAS, KEY_BIAS, VALUE_BIAS, QUERY_NORM, KEY_NORM = range(9)
OUT, SECOND_NORM, GATE, UP, DOWN = range(9, 14)
"""Places of a layer's own parameters; those of adapters follow."""
LINEARS = QUERY, KEY, VALUE, OUT, GATE, UP, DOWN
WEIGHTS = 14 + 2 * len(LINEARS)
"""Number of parameters of a layer, with those that it may lack."""
PLACES = {linear: 14 + 2 * number for number, linear in enumerate(LINEARS)}
"""Place of a linear module's A; its B follows."""
Weights = tuple[Any, ...]


class Linear(NamedTuple):
    """A linear module: weight, bias, and A, B and s of its adapter, which are None and 0 without one."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 0.0


def linear_of(module: Any) -> Linear | None:
    """Return the parts of a linear module; None if its adapter is more than one product of two matrices, or is already in the weight."""
    if not is_adapted(module):
        return Linear(module.weight, module.bias)
    base = module.base_layer
    if module.disable_adapters:
        return None if module.merged else Linear(base.weight, base.bias)
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged or len(active) != 1 or active[0] in module.lora_variant:
        return None
    a, b = (half[active[0]] for half in (module.lora_A, module.lora_B))
    drop = module.lora_dropout[active[0]]
    changes = type(drop) is not nn.Identity or _is_hooked(drop)
    if changes or b.bias is not None or not all(type(half) is nn.Linear and not _is_hooked(half) for half in (a, b)):
        return None
    return Linear(base.weight, base.bias, a.weight, b.weight, float(module.scaling[active[0]]))


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def weights_of(layer: Any) -> tuple[Weights, tuple[float, ...]] | None:
    """Return the parameters of a layer, None for those that it lacks, and the scaling of each one's adapter; None for other adapters."""
    attention, mlp = layer.self_attn, layer.mlp
    modules = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj)
    found = [linear_of(module) for module in (*modules, mlp.down_proj)]
    linears = [linear for linear in found if linear is not None]
    if len(linears) < len(found) or any(linear.bias is not None for linear in linears[3:]):
        return None
    query, key, value, out, gate, up, down = linears
    norms = [getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm")]
    own = (
        layer.input_layernorm.weight,
        query.weight,
        key.weight,
        value.weight,
        query.bias,
        key.bias,
        value.bias,
        *norms,
    )
    rest = (out.weight, layer.post_attention_layernorm.weight, gate.weight, up.weight, down.weight)
    scalings = [0.0] * WEIGHTS
    for place, linear in zip(LINEARS, linears, strict=True):
        scalings[place] = linear.scaling
    return (*own, *rest, *(half for linear in linears for half in (linear.a, linear.b))), tuple(scalings)


def adapted(outputs: Tensor, given: Tensor, weights: Weights, scalings: tuple[float, ...], place: int) -> Tensor:
    """Return the outputs of a linear module plus those of its adapter for `given`, if it has one; `outputs` are overwritten."""
    a, b = weights[PLACES[place] : PLACES[place] + 2]
    return outputs if a is None else outputs.addmm_(torch.mm(given, a.t()), b.t(), alpha=scalings[place])
