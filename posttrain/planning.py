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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.errors import ConfigError, ModelError
from posttrain.planning_gpu import kept_bytes

FLOAT32_BYTES = 4
UNCOMPILED_STEP, UNCOMPILED_WIDE_STEP = 13.25, 6
"""Float32 copies of a weight that one step of torchao's AdamW holds on a CPU, uncompiled (measured): with moments in 8 bits,
and for embeddings and heads, whose moments stay in 32 bits."""
MOMENT_BYTES = {32: 4, 8: 1 + 4 / 256}
"""Bytes of a number of a moment by its bits; in 8 bits, each block of 256 numbers has a float32 scale."""
AUTOCAST_SHARE = 0.75
"""Share of float32's activations that bfloat16 autocast stores on a CPU: norms and residuals stay in float32."""

RUNTIME_PERCENT, SMALLEST_PERCENT = 5, 10
"""Parts of a device's memory: for the runtimes of two processes, and the least with which a vLLM server is started."""
RUNTIME_BYTES = 440 * 2**20
"""Main memory of a step before it loads a model: torch and transformers (measured: 420 MiB), and what their first operation allocates."""


HIDDEN_NAMES = ("hidden_size", "n_embd", "d_model")
HEAD_NAMES = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
KEY_HEAD_NAMES = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
LAYER_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
INTERMEDIATE_NAMES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "dim_feedforward")
"""How configurations spell the same number."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that determine memory.

    Attributes:
        intermediate: width of the experts that one token passes through, together.
        outside: parameters outside the layers: embeddings and head.
        tied: the head's matrix is that of the embeddings.
        fused: norms and rotations store less on a CPU in float32 (posttrain/models/fused.py).
        joined: each layer is one function there and stores still less (posttrain/models/plain_layer.py).
        scores: the head is a single row, as of a reward model, so there are no logits.
        head_norms: queries and keys are normalised, as in Qwen 3.
    """

    parameters: int
    hidden: int
    layers: int
    query_width: int
    key_width: int
    intermediate: int
    vocabulary: int
    outside: int = 0
    tied: bool = False
    fused: bool = False
    joined: bool = False
    scores: bool = False
    head_norms: bool = False

    def with_scalar_head(self) -> Sizes:
        """Return the sizes of a reward model with the same layers."""
        embeddings = self.vocabulary * self.hidden
        parameters = self.parameters - (0 if self.tied else embeddings) + self.hidden
        outside = min(self.outside, embeddings + self.hidden)
        return replace(self, parameters=parameters, outside=outside, tied=False, scores=True)

    def gathered(self, processes: int, bf16: bool = False) -> int:
        """Return the bytes that a process of several holds for the others' parts: embeddings, head, and two layers of one model."""
        layer = (self.parameters - self.outside) / self.layers
        held = FLOAT32_BYTES * self.outside + 2 * layer * (FLOAT32_BYTES / 2 if bf16 else FLOAT32_BYTES)
        return math.ceil(held) if processes > 1 else 0

    @property
    def activations_per_token(self) -> int:
        """Return the bytes that the backward pass stores per token, in float32, if every token is read."""
        layer = 4 * self.intermediate + 4 * self.key_width + 4 * self.hidden + 8 * self.query_width
        picked_out = 2 * self.hidden + self.query_width  # copies of the tokens that the last layer computes
        return FLOAT32_BYTES * (self.layers * layer + picked_out + 4 * self.hidden)

    @property
    def fused_per_token(self) -> int:
        """Return `activations_per_token` with fused norms and rotations, which store their input only."""
        layer = 4 * self.intermediate + 3 * self.key_width + 4 * self.hidden + 5 * self.query_width
        return FLOAT32_BYTES * (self.layers * layer + 5 * self.hidden + self.query_width)

    @property
    def joined_per_token(self) -> int:
        """Return `activations_per_token` if each layer is one function (`posttrain.models.plain_layer`).

        A layer stores two normalised states, queries, keys and values as attention gathers them, its scores or outputs, the values that
        the tokens have read, and three tensors of the feed-forward network. The gradient of a layer starts with two more.
        """
        layer = 3 * self.intermediate + 2 * self.key_width + 2 * self.hidden + 3 * self.query_width
        layer += self.head_norms * (self.query_width + self.key_width)
        return FLOAT32_BYTES * (self.layers * layer + 2 * self.intermediate + 2 * self.hidden)

    @property
    def recomputed_per_token(self) -> int:
        """Return the bytes per token if each layer stores only its input, including the layer that is being recomputed."""
        layers = FLOAT32_BYTES * (self.layers * self.hidden + 4 * self.hidden)
        return layers + (self.activations_per_token - FLOAT32_BYTES * 4 * self.hidden) // self.layers

    def prefill_per_token(self, bf16: bool = False) -> int:
        """Return the bytes per token of one layer's pass without gradient.

        The embeddings, the layer's input and the sum of input and attention are float32. Next to them are either three tensors of the
        MLP and its input, or the input of attention, queries before and after rotation, two forms of its output, keys and values.
        """
        products = max(3 * self.intermediate + self.hidden, self.hidden + 4 * self.query_width + 3 * self.key_width)
        return FLOAT32_BYTES * 3 * self.hidden + FLOAT32_BYTES // (2 if bf16 else 1) * products

    @property
    def cache_per_token(self) -> int:
        """Return the bytes of one token's keys and values."""
        return FLOAT32_BYTES * 2 * self.layers * self.key_width


def sizes(config: Any) -> Sizes:
    """Return the sizes of a causal language model from its transformers configuration, without allocating weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.models.fused import fuse
    from posttrain.models.plain_layer import join_layers

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # configurations of strangers fail in any way
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"transformers makes no language model of this configuration, model_type {config.model_type!r}"
            f" ({type(error).__name__}: {reason})"
        ) from error
    text = config.get_text_config()
    hidden = _number(text, HIDDEN_NAMES) or model.get_input_embeddings().embedding_dim
    heads = _number(text, HEAD_NAMES) or 1
    head_size = _number(text, ("head_dim",)) or hidden // heads
    key_heads = _number(text, KEY_HEAD_NAMES) or (1 if getattr(text, "multi_query", False) else heads)
    experts = _number(text, ("num_experts_per_tok",))
    width = _number(text, ("moe_intermediate_size",)) if experts else None
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        hidden=hidden,
        layers=_number(text, LAYER_NAMES) or 1,
        query_width=heads * head_size,
        key_width=key_heads * head_size,
        intermediate=(width or _number(text, INTERMEDIATE_NAMES) or 4 * hidden) * (experts or 1),
        vocabulary=model.get_input_embeddings().num_embeddings,
        outside=sum(p.numel() for p in {*model.get_input_embeddings().parameters(), *_head(model)}),
        tied=any(p is other for p in _head(model) for other in model.get_input_embeddings().parameters()),
        joined=join_layers(model) > 0,
        fused=fuse(model) >= 3 * (_number(text, LAYER_NAMES) or 1),
        head_norms=any(name.endswith(".q_norm") for name, _ in model.named_modules()),
    )


def _head(model: Any) -> list[Any]:
    head = model.get_output_embeddings()
    return [] if head is None else list(head.parameters())


def _number(config: Any, names: Sequence[str]) -> int | None:
    """Return the first of `names` that the configuration gives as a number; the largest if it differs between layers."""
    for name in names:
        value = _read(config, name)
        if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            return int(max(value))
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _read(config: Any, name: str) -> Any:
    """Return a number of the configuration; a list if it differs between layers, which transformers refuses to give as one number."""
    layers = getattr(config, "per_layer_config", None)
    try:
        return getattr(config, name, None)
    except Exception:
        if not layers:
            raise
    return [getattr(layer, name, 0) for layer in (layers.values() if isinstance(layers, dict) else layers)]


@dataclass(frozen=True)
class Memory:
    """Bytes of one phase by use.

    Attributes:
        temporary: gradients of embedding and head before they are added to those of earlier micro-batches.
        runtime: the libraries themselves, in main memory.
    """

    weights: int = 0
    optimiser: int = 0
    activations: int = 0
    cache: int = 0
    logits: int = 0
    temporary: int = 0
    runtime: int = 0

    @property
    def total(self) -> int:
        """Return the sum over all uses."""
        held = self.weights + self.optimiser + self.activations + self.cache
        return held + self.logits + self.temporary + self.runtime


def training(
    model: Sizes,
    micro_batch_tokens: int,
    *,
    trained: int = 1,
    frozen: int = 0,
    adapter: int | None = None,
    quantised: int = 0,
    moment_bits: int = 32,
    offloaded: bool = False,
    bf16: bool = False,
    recomputes: bool = False,
    device: str = "cpu",
    processes: int = 1,
    context: int = 1,
) -> Memory:
    """Return the memory of `trained` copies of the model with gradient and moments, `frozen` copies, and one micro-batch.

    Args:
        adapter: parameters of a low-rank adapter in each trained copy; then only it has gradient and moments.
        quantised: parameters of each trained copy that are kept in 4 bits, by every process.
        moment_bits: bits of a number of a moment.
        offloaded: the moments are in main memory.
        device: kind of the device, which determines the tiles of logits.
        processes: number of processes that share weights, gradients and moments (FSDP2).
        context: number of processes that share the tokens of each row.
    """
    from posttrain.models.logprobs import tile_elements

    own = model.parameters if adapter is None else adapter
    share = AUTOCAST_SHARE if bf16 else 1.0
    # all tokens' last hidden states and their gradient are gathered by each process
    gathered = 2 * FLOAT32_BYTES * micro_batch_tokens * model.hidden * trained if context > 1 else 0
    own_tokens = math.ceil(micro_batch_tokens / context)
    tile = 0 if model.scores else min(tile_elements(device), own_tokens * model.vocabulary)
    whole = model.activations_per_token
    if device == "cpu" and not bf16:
        whole = model.joined_per_token if model.joined and not quantised else whole
        whole = min(whole, model.fused_per_token) if model.fused else whole
    per_token = model.recomputed_per_token if recomputes else whole
    activations, logits = math.ceil(share * own_tokens * per_token * trained) + gathered, 2 * FLOAT32_BYTES * tile
    if bf16 and device != "cpu":
        # split weights are gathered in bfloat16, layer by layer
        cast = model.parameters - model.outside - quantised if processes == 1 else 0
        activations = trained * kept_bytes(model, own_tokens, recomputes, cast) + gathered
    return Memory(
        weights=_weights(model, trained, frozen, adapter, quantised, processes) + model.gathered(processes, bf16),
        optimiser=math.ceil(
            trained * (FLOAT32_BYTES * own + _moments(model, adapter, moment_bits, offloaded, device)) / processes
        ),
        activations=activations,
        logits=logits,
        temporary=0 if adapter is not None else _temporary(model, activations, logits, device, moment_bits, bf16),
    )


def _temporary(model: Sizes, activations: int, logits: int, device: str, moment_bits: int, bf16: bool) -> int:
    """Return the bytes that the gradients of embedding and head need until they are added, or one weight's step if that is more.

    A tied matrix has two such gradients at the end of the backward pass. By then most activations are freed: a GPU's allocator uses their
    memory again, glibc keeps it for other small blocks.
    """
    matrix = FLOAT32_BYTES * model.vocabulary * model.hidden
    at_end = (1 + model.tied) * matrix
    if device == "cpu":
        if moment_bits == 32:
            return at_end
        largest = FLOAT32_BYTES * model.hidden * model.intermediate
        return max(at_end, math.ceil(UNCOMPILED_STEP * largest), UNCOMPILED_WIDE_STEP * matrix)
    # a head's cast to bfloat16, and a tile's part of its gradient before it is added, are half of it each
    at_start = (2 if bf16 and not model.scores else 1) * matrix
    return max(at_start, at_end + activations // model.layers - activations - logits)


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
    quantised: int = 0,
    moment_bits: int = 32,
    offloaded: bool = False,
    bf16: bool = False,
    device: str = "cpu",
    processes: int = 1,
    device_bytes: int | None = None,
) -> Memory:
    """Return the memory of sampling `answers`, `samples` per prompt of `prompt` tokens, next to `trained` models with their moments.

    Room for all keys and values is made first. Next to it are the activations of prompts or the logits of new tokens, whichever are larger.

    Args:
        offloaded: the moments are in main memory.
        bf16: keys and values have two bytes, and matrices are cast once and kept while answers are sampled, unless weights are split.
        processes: number of processes that share weights and moments (FSDP2), and the answers.
        device_bytes: memory of a GPU, whose free part limits the stored tokens as it limits the sampler.
    """
    from posttrain.rollouts.budget import prefill_tokens, tokens_in
    from posttrain.rollouts.engine import DRAWN_ELEMENTS, MAX_ROWS, MAX_TOKENS

    # the matrix of embeddings is looked up, not multiplied, unless it is the head's, too
    multiplied = model.parameters - quantised - (0 if model.tied else model.vocabulary * model.hidden)
    cast = FLOAT32_BYTES // 2 * multiplied if bf16 and processes == 1 else 0
    held = Memory(
        weights=_weights(model, trained, frozen, adapter, quantised, processes) + model.gathered(processes) + cast,
        optimiser=math.ceil(trained * _moments(model, adapter, moment_bits, offloaded, device) / processes),
    )
    token_bytes = model.cache_per_token // (2 if bf16 else 1)
    limit = MAX_TOKENS
    if device != "cpu" and device_bytes is not None:
        limit = tokens_in(max(0, device_bytes - held.total), token_bytes)
    own = math.ceil(answers / processes)
    rows = min(own, MAX_ROWS)
    prompts, stored = math.ceil(rows / samples) * prompt, math.ceil(rows / samples) * prompt + rows * new_tokens
    tokens = min(stored, limit)
    cache = tokens * token_bytes
    # later prompts enter next to the answers that are under way, whose states move to larger tensors layer by layer
    if own > rows or stored > limit:
        cache += cache // model.layers
    computed = min(prompts, max(prompt, prefill_tokens(device) // max(1, prompt) * prompt), limit)
    # logits, probabilities, and cumulative probabilities in float64; logits in bfloat16 have a float32 copy
    drawn = min(rows * model.vocabulary, DRAWN_ELEMENTS) * (2 * FLOAT32_BYTES + 8 + 2 * bf16)
    prefill = computed * model.prefill_per_token(bf16)
    return (
        replace(held, cache=cache, activations=prefill) if prefill > drawn else replace(held, cache=cache, logits=drawn)
    )


def _moments(model: Sizes, adapter: int | None, bits: int, offloaded: bool, device: str) -> float:
    """Return the bytes of two moments of each trained weight; a CPU's memory is main memory; embeddings and head keep float32 ones."""
    if offloaded and device != "cpu":
        return 0
    if adapter is not None:
        return 2 * MOMENT_BYTES[bits] * adapter
    wide = (2 - model.tied) * model.vocabulary * model.hidden
    return 2 * (MOMENT_BYTES[bits] * (model.parameters - wide) + FLOAT32_BYTES * wide)


def server_share(device_bytes: int, trainer: Memory) -> float:
    """Return the share of a device's memory for a vLLM server next to a trainer, in whole hundredths.

    Raises:
        ConfigError: less than SMALLEST_PERCENT is left.

    Example:
        >>> server_share(80 * 2**30, Memory(weights=10 * 2**30, optimiser=30 * 2**30))
        0.45
    """
    percent = (device_bytes * (100 - RUNTIME_PERCENT) - 100 * trainer.total) // device_bytes
    if percent < SMALLEST_PERCENT:
        raise ConfigError(
            f"training needs {trainer.total / 2**30:.1f} of the device's {device_bytes / 2**30:.1f} GiB, which leaves too little for a vLLM"
            " server on the same device; name another one in POSTTRAIN_VLLM_DEVICES, lower compute.micro_batch_tokens, or set lora"
        )
    return percent / 100


def _weights(model: Sizes, trained: int, frozen: int, adapter: int | None, quantised: int, processes: int) -> int:
    """Return the bytes of weights and adapters; float32 is split over the processes, 4 bits are not."""
    from posttrain.models.quantised import BYTES

    split = model.parameters * (trained + frozen) + (adapter or 0) * trained - quantised * trained
    return math.ceil(FLOAT32_BYTES * split / processes) + math.ceil(BYTES * quantised * trained)
