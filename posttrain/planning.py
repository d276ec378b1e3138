"""What a training or sampling phase will hold in memory, from a model's configuration alone.

Weights, gradients and AdamW's two moments are exact. Activations are what the backward pass of a Llama-like layer keeps a token
(tests/test_planning.py holds the estimate against what autograd really saves); logits and key-value cache follow from the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

FLOAT32_BYTES = 4
AUTOCAST_SHARE = 0.75
"""Of float32's activations, what is kept under bfloat16 autocast: norms and residuals stay wide."""


@dataclass(frozen=True)
class Sizes:
    """What memory depends on. `intermediate` counts the experts that one token passes through."""

    parameters: int
    hidden: int
    layers: int
    query_width: int
    key_width: int
    intermediate: int
    vocabulary: int

    @property
    def activations_per_token(self) -> int:
        """Bytes that the backward pass needs of one token, in float32, where every token is read."""
        layer = 4 * self.intermediate + 4 * self.key_width + 4 * self.hidden + 8 * self.query_width
        picked_out = 2 * self.hidden + self.query_width  # what the last layer computes of some tokens, copied
        return FLOAT32_BYTES * (self.layers * layer + picked_out + 4 * self.hidden)

    @property
    def recomputed_per_token(self) -> int:
        """Bytes that are left where each layer keeps its input alone, with the one that is computed again."""
        layers = FLOAT32_BYTES * (self.layers * self.hidden + 4 * self.hidden)
        return layers + (self.activations_per_token - FLOAT32_BYTES * 4 * self.hidden) // self.layers

    @property
    def cache_per_token(self) -> int:
        """Bytes of keys and values of one token."""
        return FLOAT32_BYTES * 2 * self.layers * self.key_width


def sizes(config: Any) -> Sizes:
    """Sizes of the causal language model of a transformers configuration; its parameters are counted without making them."""
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
    """Bytes of one phase by what holds them."""

    weights: int = 0
    optimiser: int = 0
    activations: int = 0
    cache: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
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
    """`trained` copies of the model with gradient and moments, `frozen` ones beside them, one micro-batch under way.

    adapter: parameters of a low-rank adapter in each trained copy, which alone has gradient and moments then.
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
    """`answers` to be given, `samples` to each prompt of `prompt` tokens, beside `trained` models with their moments."""
    from posttrain.rollouts.engine import DRAWN_ELEMENTS, MAX_ROWS, MAX_TOKENS

    rows = min(answers, MAX_ROWS)
    tokens = min(math.ceil(rows / samples) * prompt + rows * new_tokens, MAX_TOKENS)
    held = FLOAT32_BYTES * model.parameters
    return Memory(
        weights=held * (trained + frozen) + _added(adapter, trained),
        optimiser=2 * (held * trained if adapter is None else _added(adapter, trained)),
        cache=tokens * model.cache_per_token,
        # logits, their probabilities, and these cumulated in float64
        logits=min(rows * model.vocabulary, DRAWN_ELEMENTS) * (2 * FLOAT32_BYTES + 8),
    )


def _added(adapter: int | None, trained: int) -> int:
    """Bytes of the adapters' own weights."""
    return FLOAT32_BYTES * (adapter or 0) * trained
