"""Estimate the memory of a training or sampling phase from a model's configuration.

Weights, gradients and AdamW's two moments are exact. Activations are the tensors that the backward pass of a Llama-like layer stores per
token (tests/test_planning.py compares the estimate with autograd's own count). Logits and key-value cache follow from the code.

Example:
    Weights, gradient and two moments of one model: 4 x 4 bytes per parameter:

    >>> model = Sizes(parameters=1000, hidden=8, layers=1, query_width=8, key_width=8, intermediate=16, vocabulary=10)
    >>> memory = training(model, micro_batch_tokens=1)
    >>> memory.weights, memory.optimiser
    (4000, 12000)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

FLOAT32_BYTES = 4
AUTOCAST_SHARE = 0.75
"""Share of float32's activations that bfloat16 autocast stores: norms and residuals stay in float32."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that determine memory. `intermediate` counts the experts that one token passes through."""

    parameters: int
    hidden: int
    layers: int
    query_width: int
    key_width: int
    intermediate: int
    vocabulary: int

    @property
    def activations_per_token(self) -> int:
        """Return the bytes that the backward pass stores per token, in float32, if every token is read."""
        layer = 4 * self.intermediate + 4 * self.key_width + 4 * self.hidden + 8 * self.query_width
        picked_out = 2 * self.hidden + self.query_width  # copies of the tokens that the last layer computes
        return FLOAT32_BYTES * (self.layers * layer + picked_out + 4 * self.hidden)

    @property
    def recomputed_per_token(self) -> int:
        """Return the bytes per token if each layer stores only its input, including the layer that is being recomputed."""
        layers = FLOAT32_BYTES * (self.layers * self.hidden + 4 * self.hidden)
        return layers + (self.activations_per_token - FLOAT32_BYTES * 4 * self.hidden) // self.layers

    @property
    def cache_per_token(self) -> int:
        """Return the bytes of one token's keys and values."""
        return FLOAT32_BYTES * 2 * self.layers * self.key_width


def sizes(config: Any) -> Sizes:
    """Return the sizes of a causal language model from its transformers configuration, without allocating weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "num_experts_per_tok", None)
    width = getattr(config, "moe_intermediate_size", None) if experts else config.intermediate_size
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        query_width=heads * head_size,
        key_width=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
        intermediate=(width or config.intermediate_size) * (experts or 1),
        vocabulary=config.vocab_size,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one phase by use."""

    weights: int = 0
    optimiser: int = 0
    activations: int = 0
    cache: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """Return the sum over all uses."""
        return self.weights + self.optimiser + self.activations + self.cache + self.logits


def training(
    model: Sizes,
    micro_batch_tokens: int,
    *,
    trained: int = 1,
    frozen: int = 0,
    adapter: int | None = None,
    bf16: bool = False,
    recomputes: bool = False,
) -> Memory:
    """Return the memory of `trained` copies of the model with gradient and moments, `frozen` copies, and one micro-batch.

    Args:
        adapter: parameters of a low-rank adapter in each trained copy; then only it has gradient and moments.
    """
    from posttrain.models.logprobs import TILE_ELEMENTS

    held = FLOAT32_BYTES * model.parameters
    share = AUTOCAST_SHARE if bf16 else 1.0
    tile = min(TILE_ELEMENTS, micro_batch_tokens * model.vocabulary)
    return Memory(
        weights=held * (trained + frozen) + _added(adapter, trained),
        optimiser=3 * (held * trained if adapter is None else _added(adapter, trained)),
        activations=math.ceil(
            share
            * micro_batch_tokens
            * (model.recomputed_per_token if recomputes else model.activations_per_token)
            * trained
        ),
        logits=2 * FLOAT32_BYTES * tile,
    )


def sampling(
    model: Sizes,
    answers: int,
    prompt: int,
    new_tokens: int,
    *,
    samples: int = 1,
    trained: int = 0,
    frozen: int = 1,
    adapter: int | None = None,
) -> Memory:
    """Return the memory of sampling `answers`, `samples` per prompt of `prompt` tokens, next to `trained` models with their moments."""
    from posttrain.rollouts.engine import DRAWN_ELEMENTS, MAX_ROWS, MAX_TOKENS

    rows = min(answers, MAX_ROWS)
    tokens = min(math.ceil(rows / samples) * prompt + rows * new_tokens, MAX_TOKENS)
    held = FLOAT32_BYTES * model.parameters
    return Memory(
        weights=held * (trained + frozen) + _added(adapter, trained),
        optimiser=2 * (held * trained if adapter is None else _added(adapter, trained)),
        cache=tokens * model.cache_per_token,
        # logits, probabilities, and cumulative probabilities in float64
        logits=min(rows * model.vocabulary, DRAWN_ELEMENTS) * (2 * FLOAT32_BYTES + 8),
    )


def _added(adapter: int | None, trained: int) -> int:
    """Return the bytes of the adapters' own weights."""
    return FLOAT32_BYTES * (adapter or 0) * trained
