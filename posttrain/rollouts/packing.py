"""Completions as a few flat arrays, to send them to a different process and to keep them in a checkpoint.

Example:
    >>> answers = [[Completion((5, 6), (-0.5, -1.5), True)], [Completion((7,), (-2.0,), False)]]
    >>> unpacked(packed(answers)) == answers
    True
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from posttrain.rollouts.engine import Completion

Arrays = Mapping[str, np.ndarray]


def packed(answers: Sequence[Sequence[Completion]]) -> dict[str, np.ndarray]:
    """Return the answers of single turns as arrays: tokens and log-probabilities one after another, counts, lengths, flags."""
    flat = [answer for group in answers for answer in group]
    parts = {
        "parts": np.array([part for answer in flat for part in answer.parts], dtype=np.int64).reshape(-1, 2),
        "parts_each": np.array([len(answer.parts) for answer in flat], dtype=np.int64),
    }
    return {
        "tokens": np.array([token for answer in flat for token in answer.tokens], dtype=np.int64),
        "logprobs": np.array([value for answer in flat for value in answer.logprobs], dtype=np.float64),
        "finished": np.array([answer.finished for answer in flat], dtype=np.bool_),
        "lengths": np.array([len(answer.tokens) for answer in flat], dtype=np.int64),
        "counts": np.array([len(group) for group in answers], dtype=np.int64),
        **(parts if len(parts["parts"]) else {}),
    }


def unpacked(arrays: Arrays) -> list[list[Completion]]:
    """Return the answers that `packed` converted, to the bit."""
    tokens, logprobs, finished = (arrays[name].tolist() for name in ("tokens", "logprobs", "finished"))
    bounds = pairwise(accumulate(arrays["lengths"].tolist(), initial=0))
    flat = [
        Completion(tuple(tokens[low:high]), tuple(logprobs[low:high]), done, parts=own)
        for (low, high), done, own in zip(bounds, finished, _parts(arrays, len(finished)), strict=True)
    ]
    answers = iter(flat)
    return [[next(answers) for _ in range(count)] for count in arrays["counts"].tolist()]


def _parts(arrays: Arrays, answers: int) -> list[tuple[tuple[int, int], ...]]:
    if "parts" not in arrays:
        return [()] * answers
    every = [(version, tokens) for version, tokens in arrays["parts"].tolist()]
    return [tuple(every[low:high]) for low, high in pairwise(accumulate(arrays["parts_each"].tolist(), initial=0))]


def to_bytes(arrays: Arrays) -> bytes:
    """Return the arrays in NumPy's format, which is read without executing anything."""
    written = io.BytesIO()
    np.savez(written, allow_pickle=False, **arrays)
    return written.getvalue()


def from_bytes(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays that `to_bytes` wrote."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def as_tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    """Return the arrays as a checkpoint holds them."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return the arrays of a checkpoint."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}
