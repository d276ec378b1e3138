"""Settings that the library and params.yaml share: plain values with their defaults, checked where they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.errors import ConfigError

CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "n_ctx",
    "context_length",
)
"""How configurations of models spell the context length."""
LARGEST_LEARNING_RATE = 1.0
"""AdamW moves each weight by up to the learning rate at every step, and weights of language models are smaller than 1."""
TEMPERATURES = (0.001, 1000.0)
"""Least and greatest temperature: beyond them, samples are those of the limit, and gradients vanish or overflow."""


def context_limit(values: Mapping[str, Any]) -> int | None:
    """Return how many tokens a row may have at most by a model's configuration, None if it names no limit.

    With LongRoPE the positions of a whole batch change as soon as one row is longer than the original context. Rows would depend on their
    neighbours, so the original context is the limit.

    Example:
        >>> context_limit({"n_positions": 48})
        48
        >>> rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
        >>> context_limit({"max_position_embeddings": 131072, "rope_scaling": rope})
        4096
    """
    limits = [_length(values.get(name)) for name in CONTEXT_NAMES]
    longest = next((limit for limit in limits if limit), None)
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key)
        for kind in (rope, *rope.values()) if isinstance(rope, Mapping) else ():
            if isinstance(kind, Mapping) and "longrope" in (kind.get("rope_type"), kind.get("type")):
                original = _length(
                    kind.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
                )
                longest = min(longest or original, original) if original else longest
    return longest


def _length(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


TENSOR_PARALLEL = "POSTTRAIN_TENSOR_PARALLEL"
"""Environment variable with the number of processes that split each layer of a model."""
CONTEXT_PARALLEL = "POSTTRAIN_CONTEXT_PARALLEL"
"""Environment variable with the number of processes that share each row."""


def layer_processes() -> int:
    """Return the number of processes that split each layer, as the environment names it; 1 if each holds whole layers.

    Raises:
        ConfigError: it is no whole number from 1.
    """
    return _processes(TENSOR_PARALLEL, "split each layer")


def row_processes() -> int:
    """Return the number of processes that share each row, as the environment names it; 1 if each has its own rows.

    Raises:
        ConfigError: it is no whole number from 1.
    """
    return _processes(CONTEXT_PARALLEL, "share each row")


def _processes(variable: str, work: str) -> int:
    given = os.environ.get(variable, "").strip() or "1"
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(
            f"{variable} = {given!r}: must be the number of processes that {work}; correct it, or remove it"
        )
    return int(given)


JOIN_SECONDS = "POSTTRAIN_VLLM_JOIN_SECONDS"


def join_seconds() -> float:
    """Return how long a trainer and the workers of a vLLM server wait for each other before the first broadcast of weights.

    Raises:
        ConfigError: the environment names no such time.
    """
    given = os.environ.get(JOIN_SECONDS) or "30"
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ConfigError(
            f"{JOIN_SECONDS} = {given!r}: must be a number of seconds above 0, e.g. 30; correct it, or remove it"
        )
    return seconds


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW, with a learning-rate schedule that counts optimiser steps.

    Attributes:
        moment_bits: 8 for block-wise quantised moments (arXiv 2110.02861), which need torchao.
        offload: keep the moments and a second copy of the weights in main memory, and compute the step there.

    Example:
        >>> OptimizerSettings(learning_rate=1e-3).max_grad_norm
        1.0
    """

    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    moment_bits: Literal[8, 32] = 32
    offload: bool = False


@dataclass(frozen=True)
class LoraSettings:
    """Settings of W x + (alpha / rank) B A x in the selected layers; B starts at 0 (arXiv 2106.09685).

    There is no dropout, because log-probabilities are computed without dropout.

    Attributes:
        target_modules: ends of the paths of the layers to adapt; `all-linear` selects every linear layer except the head. For Mixtral,
            Qwen3-MoE, DeepSeek-V3 and architectures like them, peft reads the names of old checkpoints (`gate`, `gate_proj`, `up_proj`,
            `down_proj`, or `w1` to `w3`) as routers and experts; a line on stderr names what gets no adapter.
        base_bits: 4 keeps the frozen linear layers in NF4 (QLoRA, arXiv 2305.14314), which needs bitsandbytes.

    Example:
        >>> settings = LoraSettings(rank=8, alpha=16)
        >>> settings.alpha / settings.rank, settings.target_modules
        (2.0, 'all-linear')
    """

    rank: int
    alpha: float
    target_modules: str | tuple[str, ...] = "all-linear"
    base_bits: Literal[4, 32] = 32
