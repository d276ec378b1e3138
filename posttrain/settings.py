"""Settings that the library and params.yaml share: plain values with their defaults, checked where they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW, with a learning-rate schedule that counts optimiser steps.

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


@dataclass(frozen=True)
class LoraSettings:
    """Settings of W x + (alpha / rank) B A x in the selected layers; B starts at 0 (arXiv 2106.09685).

    There is no dropout, because log-probabilities are computed without dropout.

    Attributes:
        target_modules: ends of the paths of the layers to adapt; `all-linear` selects every linear layer except the head.

    Example:
        >>> settings = LoraSettings(rank=8, alpha=16)
        >>> settings.alpha / settings.rank, settings.target_modules
        (2.0, 'all-linear')
    """

    rank: int
    alpha: float
    target_modules: str | tuple[str, ...] = "all-linear"
