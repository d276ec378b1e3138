"""Rows to padded tensors, a step's rows to micro-batches, and the order of rows over epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from posttrain.data.tokens import Tokens

Row = TypeVar("Row")


@dataclass(frozen=True)
class TokenBatch:
    """Prompts and responses, padded on the right, with what is needed to read the response's log-probabilities.

    input_ids: [batch, length]. source: [batch, time] position whose hidden state predicts the response token. targets: [batch, time]
    response ids. mask: [batch, time] bool, from lengths and never from ids. last: [batch] position of the last real token.
    """

    input_ids: Tensor
    source: Tensor
    targets: Tensor
    mask: Tensor
    last: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(*(getattr(self, f).to(device) for f in ("input_ids", "source", "targets", "mask", "last")))


def collate(tokens: Sequence[Tokens]) -> TokenBatch:
    """Pad to the longest row. Padding comes after every real token, so causal attention never sees it and no mask is needed."""
    length = max(len(t) for t in tokens)
    time = max(1, max(len(t.response) for t in tokens))
    input_ids = torch.zeros(len(tokens), length, dtype=torch.long)
    source = torch.zeros(len(tokens), time, dtype=torch.long)
    targets = torch.zeros(len(tokens), time, dtype=torch.long)
    mask = torch.zeros(len(tokens), time, dtype=torch.bool)
    for i, t in enumerate(tokens):
        input_ids[i, : len(t)] = torch.tensor(t.prompt + t.response)
        n = len(t.response)
        source[i, :n] = torch.arange(len(t.prompt) - 1, len(t) - 1)
        targets[i, :n] = torch.tensor(t.response, dtype=torch.long)
        mask[i, :n] = True
    last = torch.tensor([len(t) - 1 for t in tokens])
    return TokenBatch(input_ids, source, targets, mask, last)


def pad(rows: Sequence[Sequence[float] | np.ndarray], time: int) -> Tensor:
    """Per-token numbers of uneven length as float32 [batch, time], 0 beyond each row's end."""
    padded = torch.zeros(len(rows), time)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.as_tensor(np.asarray(row, dtype=np.float32))
    return padded


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows grouped so that rows x longest row stays within `budget` tokens, similar lengths together.

    A row longer than the budget is a group of its own. Never empty: no rows give one empty group.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups: list[list[int]] = [[]]
    for i in order:
        if groups[-1] and (len(groups[-1]) + 1) * lengths[i] > budget:
            groups.append([])
        groups[-1].append(i)
    return groups


class EpochOrder:
    """Batches of row indices over shuffled epochs: a pure function of seed and step, so there is no cursor to lose.

    The last batch of an epoch may be smaller; no row is skipped and none repeated within an epoch.
    """

    def __init__(self, rows: int, batch_size: int, epochs: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps_per_epoch = math.ceil(rows / batch_size)
        self.steps = self.steps_per_epoch * epochs

    def indices(self, step: int) -> list[int]:
        epoch, within = divmod(step, self.steps_per_epoch)
        order = shuffled(self.rows, self.seed, epoch)
        return order[within * self.batch_size : (within + 1) * self.batch_size]


def shuffled(rows: int, *seed: int) -> list[int]:
    """A permutation of range(rows) that depends on the seeds alone."""
    return [int(i) for i in np.random.Generator(np.random.PCG64(list(seed))).permutation(rows)]
