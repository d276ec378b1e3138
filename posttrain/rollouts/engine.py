"""What every sampling engine takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

MAX_ROWS = 512
"""Answers that an engine in this process has under way at once."""
MAX_TOKENS = 2**17
"""Tokens whose keys and values an engine in this process keeps at once: of every prompt under way, and a full slot for every answer."""

DRAWN_ELEMENTS = 2**24
"""Logits that tokens are drawn from at once."""


@dataclass(frozen=True)
class SamplingSettings:
    """temperature 0 is greedy. There is no top-p or top-k: truncated sampling would bias the importance ratio."""

    max_new_tokens: int
    temperature: float


@dataclass(frozen=True)
class Request:
    """One prompt, answered once per seed. The answer depends on weights, prompt and seed, not on the rows it is batched with."""

    prompt: tuple[int, ...]
    seeds: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Completion:
    """Sampled ids with their log-probabilities under the sampler. `finished`: closed by the end of sequence, which is included."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


class Engine(Protocol):
    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        """Completions of each request, in order, one per seed."""
        ...


def uniforms(seed: Sequence[int], count: int) -> np.ndarray:
    """`count` numbers in (0, 1] that depend on the seed alone."""
    return 1.0 - np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed)))).random(count)
