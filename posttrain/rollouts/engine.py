"""The interface of all sampling engines: requests in, completions out.

Example:
    >>> uniforms((7, 0, 1), 2).tolist() == uniforms((7, 0, 1), 2).tolist()
    True
    >>> bool((uniforms((7, 0, 1), 1000) > 0).all())
    True
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

MAX_ROWS = 512
"""Most active answers of an engine in this process."""
MAX_TOKENS = 2**17
"""Most tokens whose keys and values an in-process engine stores on a CPU: every active prompt, and a full slot for every answer."""

DRAWN_ELEMENTS = 2**24
"""Most logits that tokens are drawn from at once."""


@dataclass(frozen=True)
class SamplingSettings:
    """Length and temperature of sampling; temperature 0 is greedy.

    There is no top-p or top-k: truncated sampling would bias the importance ratio.
    """

    max_new_tokens: int
    temperature: float


@dataclass(frozen=True)
class Request:
    """One prompt, answered once per seed. An answer depends on weights, prompt and seed, not on the rows in its batch.

    Attributes:
        asked: the text or the messages behind `prompt`; only conversations of several turns read it,
        columns: and the other columns of the prompt's row.
        known: first tokens of `prompt` that are an earlier prompt and its whole answer, whose states an engine may have kept.
    """

    prompt: tuple[int, ...]
    seeds: tuple[tuple[int, ...], ...]
    asked: Any = field(default=None, compare=False)
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    known: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Completion:
    """Sampled ids with their log-probabilities under the sampler.

    Attributes:
        finished: the answer ends with the end-of-sequence token, which is included.
        weights: of a conversation of several turns: 1 for sampled tokens, 0 for the environment's, whose log-probability is given as 0.
        messages: and its turns after the prompt.
        parts: (version of the weights, tokens) one after another, if several weights may have sampled it.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    weights: tuple[float, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    parts: tuple[tuple[int, int], ...] = ()

    @property
    def sampled(self) -> int:
        """Return the number of sampled tokens."""
        return len(self.tokens) if self.weights is None else sum(weight != 0 for weight in self.weights)


class Engine(Protocol):
    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        """Return the completions of each request, in order, one per seed."""
        ...


def end_ids(ends: int | Iterable[int]) -> tuple[int, ...]:
    """Return the ids that end an answer, given as one or several."""
    return (ends,) if isinstance(ends, int) else tuple(ends)


def uniforms(seed: Sequence[int], count: int) -> np.ndarray:
    """Return `count` numbers in (0, 1] that depend only on the seed."""
    return 1.0 - np.random.Generator(np.random.Philox(np.random.SeedSequence(list(seed)))).random(count)
