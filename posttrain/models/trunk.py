"""The hidden states of a batch that are read, as rows: for plain models on a CPU by a loop over their joined layers.

transformers' own loop returns the states of all tokens. The final norm, the choice of those that are read, and the gradients of both are
passes over memory, and its Python takes as long as a layer of a small model. Models and layers are those of
`posttrain.models.plain_layer`; others, and models that are compiled, keep their own loop.

Example:
    >>> from posttrain.data.batches import collate
    >>> from posttrain.data.tokens import Tokens
    >>> from posttrain.models.packed import prepare
    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=2, heads=2, kv_heads=1), seed=0)
    >>> batch = collate([Tokens((5, 6), (7, 8))])
    >>> read_states(model, batch, prepare(model), batch.predicting(), torch.tensor([2, 1, 1])).shape
    torch.Size([3, 16])
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.data.batches import TokenBatch
from posttrain.data.layout import Reads
from posttrain.models.context import active
from posttrain.models.last_layer import is_narrow
from posttrain.models.packed import computes_flat, hidden_states
from posttrain.models.plain_backward import LayerInputs
from posttrain.models.plain_family import is_plain_trunk
from posttrain.models.plain_layer import computed, joined_inputs
from posttrain.models.plain_weights import Weights


def read_states(model: PreTrainedModel, batch: TokenBatch, packs: bool, reads: Reads, index: Tensor) -> Tensor:
    """Return the last hidden states [..., hidden] of some tokens, without the head.

    Args:
        packs: the result of `prepare` for this model.
        index: [...] the tokens, which are among those of `reads`; the states of others are undefined.
    """
    flat = active() is None and computes_flat(model, batch, packs)
    states = _plain_states(model, batch, reads) if flat else None
    if states is None:
        states = hidden_states(model, batch, packs, reads)
    elif torch.equal(index, reads.tokens):
        return states
    else:
        rows = torch.arange(len(reads.tokens), device=index.device)
        index = index.new_zeros(len(batch.input_ids)).index_copy_(0, reads.tokens, rows)[index]
    return states.index_select(0, index.flatten()).unflatten(0, index.shape)


def _plain_states(model: PreTrainedModel, batch: TokenBatch, reads: Reads) -> Tensor | None:
    """Return the last hidden states [read, hidden] of the tokens `reads.tokens`; None if the model's own code has to compute them."""
    trunk: Any = model.base_model
    if not _takes(trunk):
        return None
    *others, last = trunk.layers[: trunk.config.num_hidden_layers]
    states = trunk.embed_tokens(batch.input_ids[None])
    angles = trunk.rotary_emb(states, batch.positions[None])
    for layer in others:
        joined = joined_inputs(layer, states, batch.parts, angles)
        if joined is None:
            return None
        states = _called(layer, states, *joined)
    joined = joined_inputs(last, states, reads.parts, angles, reads.tokens)
    if joined is None:
        return None
    inputs, weights = joined
    return trunk.norm(_called(last, states, inputs._replace(returns_reads=True), weights))[0]


def _takes(trunk: Any) -> bool:
    """Return True for a plain model whose last layer may compute only some tokens, and whose layers nothing wraps."""
    if torch.compiler.is_compiling() or not is_plain_trunk(trunk):
        return False
    layers = trunk.layers[: trunk.config.num_hidden_layers]
    return is_narrow(layers[-1]) and all(layer._compiled_call_impl is None for layer in layers)


def _called(layer: Any, states: Tensor, inputs: LayerInputs, weights: Weights) -> Tensor:
    """Return the states after a layer, which the backward pass computes again if the layer is set to that."""
    call = partial(computed, inputs=inputs, weights=weights)
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        again: Tensor = layer._gradient_checkpointing_func(call, states)
        return again
    return call(states)
