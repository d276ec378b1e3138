"""One decoding step of the plain family (Llama, Mistral, Qwen 2 and 3 and models with the same code) in few operators.

A step of transformers' layers has one token a row, so that short operators and Python take as long as the products. Here queries and
keys share one buffer, a norm and a rotation, residuals are added by the products, and nothing is transposed. The weights are the model's
own, without a copy; a linear module with a low-rank adapter is called. A model is taken by the code of its classes, as in
`posttrain.models.fused`; a trial confirms it.

Example:
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> len(plain_step(model).layers)
    1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from posttrain.models.fused import rotate, scale_of_norm
from posttrain.models.kernels import Scores
from posttrain.models.plain_family import is_adapted, is_plain_model, window_of
from posttrain.models.shards import is_sharded, is_tensor_parallel
from posttrain.rollouts.shared import slot_attention
from posttrain.rollouts.slots import Slots

FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose angles depend on the position only, not on the length of the row."""
TABLE_STEP = 256
"""Positions. The table of rotations has a multiple of these."""


class PlainStep:
    """The layers of a model as one step computes them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = [PlainLayer(layer) for layer in model.layers]
        self.table = torch.empty(0)
        """Cosines and sines of the first positions, [positions, 2 size]."""

    def __call__(self, tokens: Tensor, positions: Tensor, slots: Slots, casts: Mapping[str, Tensor]) -> Tensor:
        """Return the last hidden states [answers, hidden] of one new token per answer, and store its keys and values.

        Args:
            tokens: [answers, 1], as `positions`.
            casts: parameters of the model in the dtype of its products, by name; the others keep theirs.
        """
        states = self.model.embed_tokens(tokens[:, 0])
        cos, sin = self._rotation(states, positions, slots)
        # the dtypes of the products are those of their weights: autocast would look for casts in every one
        with torch.autocast(states.device.type, enabled=False):
            for number, layer in enumerate(self.layers):
                states = layer(states, cos, sin, slots, number, _Weights(casts, f"layers.{number}."))
            norm = self.model.norm
            return _normalised(states, norm.weight, norm.variance_epsilon)

    def is_current(self) -> bool:
        """Return True if the model still has the modules that a step computes: no adapter, hook or other function came since."""
        return is_plain_model(self.model, adapted=True) and all(
            own.layer is layer and own.attention is layer.self_attn and own.mlp is layer.mlp
            for own, layer in zip(self.layers, self.model.layers, strict=True)
        )

    def has_adapters(self) -> bool:
        """Return True if a linear module has a low-rank adapter, which computes in the dtypes of its weights, not in autocast's."""
        return any(map(is_adapted, self.model.modules()))

    def _rotation(self, states: Tensor, positions: Tensor, slots: Slots) -> tuple[Tensor, ...]:
        """Return cosines and sines [answers, 1, size]. Those of all positions in the slots are computed once."""
        rotary = self.model.rotary_emb
        if getattr(rotary, "rope_type", "") not in FIXED_ROTATIONS:
            computed: tuple[Tensor, Tensor] = rotary(states, positions)
            return computed
        # known on the host and the same for all steps that replay one another
        needed = max(slots.lengths) + slots.capacity
        if len(self.table) < needed or (self.table.dtype, self.table.device) != (states.dtype, states.device):
            rows = torch.arange(-(-needed // TABLE_STEP) * TABLE_STEP, device=states.device)
            self.table = torch.cat(rotary(states, rows[None]), -1)[0]
        return self.table.index_select(0, positions[:, 0])[:, None].chunk(2, -1)


class PlainLayer:
    """One layer. Its modules are read in every step, so that a trial may change their windows."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.attention, self.mlp = layer, layer.self_attn, layer.mlp
        linears = (self.attention.q_proj, self.attention.k_proj)
        self.size = self.attention.head_dim
        self.heads, self.key_heads = (linear.out_features // self.size for linear in linears)
        self.has_head_norms = hasattr(self.attention, "q_norm")

    def __call__(
        self, states: Tensor, cos: Tensor, sin: Tensor, slots: Slots, number: int, weights: _Weights
    ) -> Tensor:
        layer, attention, mlp = self.layer, self.attention, self.mlp
        given = _normalised(states, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
        mixed = self._attended(given, cos, sin, slots, number, weights)
        states = weights.added(states, mixed, attention.o_proj, "self_attn.o_proj")
        norm = layer.post_attention_layernorm
        given = weights.taken(_normalised(states, norm.weight, norm.variance_epsilon), mlp.gate_proj, "mlp.gate_proj")
        gate = mlp.act_fn(weights.product(given, mlp.gate_proj, "mlp.gate_proj"))
        gate = gate.mul_(weights.product(given, mlp.up_proj, "mlp.up_proj"))
        return weights.added(states, gate, mlp.down_proj, "mlp.down_proj")

    def _attended(
        self, given: Tensor, cos: Tensor, sin: Tensor, slots: Slots, number: int, weights: _Weights
    ) -> Tensor:
        """Return what the answers' new tokens read, [answers, heads x size]."""
        attention, heads, key_heads, size = self.attention, self.heads, self.key_heads, self.size
        given = weights.taken(given, attention.q_proj, "self_attn.q_proj")
        # queries and keys in one buffer, [answers, heads + key heads, size]
        both = given.new_empty(len(given), heads + key_heads, size)
        flat = both.flatten(1)
        weights.product(given, attention.q_proj, "self_attn.q_proj", flat[:, : heads * size])
        weights.product(given, attention.k_proj, "self_attn.k_proj", flat[:, heads * size :])
        values = weights.product(given, attention.v_proj, "self_attn.v_proj").unflatten(1, (key_heads, size))
        if self.has_head_norms:
            norms = attention.q_norm, attention.k_norm
            of_heads = [norm.weight.expand(n, size) for norm, n in zip(norms, (heads, key_heads), strict=True)]
            both = _normalised(both, torch.cat(of_heads), norms[0].variance_epsilon)
        rotated = rotate(both, cos, sin) if getattr(attention, "use_rope", True) else both
        slots.layers[number].update(rotated[:, heads:, None], values[:, :, None])
        scores = Scores(attention.scaling, window_of(attention))
        return slot_attention(rotated[:, :heads], slots, number, scores).flatten(1)


class _Weights:
    """The parameters of a layer's linear modules, some of them cast.

    Args:
        prefix: of the layer in the names of `casts`.
    """

    def __init__(self, casts: Mapping[str, Tensor], prefix: str) -> None:
        self.casts, self.prefix = casts, prefix

    def weight(self, linear: Any, name: str) -> Tensor:
        cast: Tensor = self.casts.get(f"{self.prefix}{name}.weight", linear.weight) if self.casts else linear.weight
        return cast

    def taken(self, given: Tensor, linear: Any, name: str) -> Tensor:
        """Return `given` in the dtype of the module's weight."""
        return given.to(self.weight(linear, name).dtype)

    def product(self, given: Tensor, linear: Any, name: str, out: Tensor | None = None) -> Tensor:
        """Return the module's output, in `out` if there is one."""
        if is_adapted(linear):
            adapted: Tensor = linear(given)
            return adapted if out is None else out.copy_(adapted)
        weight, bias = self.weight(linear, name), linear.bias
        bias = bias if bias is None else bias.to(weight.dtype)
        if out is None:
            return functional.linear(given, weight, bias)
        return torch.mm(given, weight.t(), out=out) if bias is None else torch.addmm(bias, given, weight.t(), out=out)

    def added(self, states: Tensor, given: Tensor, linear: Any, name: str) -> Tensor:
        """Return `states` plus the module's output; `states` are overwritten if the dtypes are equal."""
        weight = self.weight(linear, name)
        given = given.to(weight.dtype)
        if states.dtype != weight.dtype or linear.bias is not None or is_adapted(linear):
            return states + self.product(given, linear, name)
        return states.addmm_(given, weight.t())


def _normalised(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x w / sqrt(mean(x^2) + epsilon) over the last dimension, in the order and dtypes of transformers' norms."""
    wide = states.float()
    normal = (wide * scale_of_norm(wide, epsilon)).to(states.dtype)
    return normal.mul_(weight) if normal.dtype == weight.dtype else normal * weight


def plain_step(lm: PreTrainedModel) -> PlainStep | None:
    """Return the step of a model of the plain family, None for others and for weights that processes split."""
    model: Any = lm.base_model
    if is_sharded(lm) or is_tensor_parallel(lm):
        return None
    return PlainStep(model) if is_plain_model(model, adapted=True) else None
