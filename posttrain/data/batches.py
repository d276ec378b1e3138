"""Lay rows out as one flat list of tokens, split a step's rows into micro-batches, and order rows over epochs.

Example:
    Two answers share a prompt of four tokens, which is laid out once; 4 + 2 + 1 tokens:

    >>> batch = collate([Tokens((1, 2, 3, 4), (5, 6)), Tokens((1, 2, 3, 4), (7,))])
    >>> batch.input_ids.tolist(), batch.positions.tolist()
    ([1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 4])
    >>> batch.source.tolist(), batch.mask.tolist()
    ([[3, 4], [3, 0]], [[True, True], [True, False]])

    The order of an epoch depends only on seed and step:

    >>> order = EpochOrder(rows=5, batch_size=2, epochs=1, seed=0)
    >>> sorted(order.indices(0) + order.indices(1) + order.indices(2)), order.steps
    ([0, 1, 2, 3, 4], 3)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.data.layout import Family, Parts, Reads, attended_parts, ending, predicting, take_parts
from posttrain.data.offsets import takes_offsets
from posttrain.data.tokens import Tokens
from posttrain.data.transfer import together

FindReads = Callable[[Sequence[Family], bool], Reads]
"""Returns which tokens of a batch are read, laid out by offsets or not: `predicting` or `ending`."""
SHARED_FROM_TOKENS = 4
"""Tokens. A shorter prompt is repeated for each of its rows, because one causal sequence is cheaper than a branch."""


@dataclass(frozen=True)
class TokenBatch:
    """Prompts and responses without padding; a prompt that several rows share is laid out and computed once.

    Attributes:
        input_ids: [tokens] ids.
        positions: [tokens] position of each token in its own row.
        families: flat ranges of prompts and responses.
        source: [batch, time] index of the token whose hidden state predicts the response token.
        targets: [batch, time] response ids.
        trained: [trained tokens] positions of True in mask.flatten().
        mask: [batch, time] bool, computed from lengths and weights and never from ids: pad may equal eos, and eos is trained.
        last: [batch] index of the row's last token.
        rows: [batch, length] indices of the row's tokens, padded on the right.
        place: [tokens] index of each token in rows.flatten().
        found: the reads that have been computed, on the batch's device.
        layouts: the result of `parts`, once it has been computed.
    """

    input_ids: Tensor
    positions: Tensor
    families: tuple[Family, ...]
    source: Tensor
    targets: Tensor
    trained: Tensor
    mask: Tensor
    last: Tensor
    rows: Tensor
    place: Tensor
    found: dict[FindReads, Reads] = field(default_factory=dict, compare=False, repr=False)
    layouts: list[Parts] = field(default_factory=list, compare=False, repr=False)

    @property
    def parts(self) -> Parts:
        """Return which token attends to which. Masks are made on the first use: a device that takes offsets needs none."""
        if not self.layouts:
            self.layouts.append(attended_parts(self.families))
        return self.layouts[0]

    def to(self, device: torch.device, reads: FindReads = predicting) -> TokenBatch:
        """Return the batch on `device`, with the reads that the model will ask for, in one copy."""
        return self.with_columns({}, device, reads)[0]

    def with_columns(
        self, columns: Mapping[str, Tensor], device: torch.device, reads: FindReads = predicting
    ) -> tuple[TokenBatch, dict[str, Tensor]]:
        """Return the batch and an objective's columns on `device`, all in one copy."""
        if takes_offsets(device):
            parts, found = attended_parts(self.families, offsets=True), reads(self.families, True)
        else:
            parts, found = self.parts, self._reads(reads)
        names = [name for name, value in vars(self).items() if isinstance(value, Tensor)]
        own, others = [getattr(self, name) for name in names], [*chain(*(part.tensors() for part in parts))]
        moved = iter(together([*own, *others, *found.tensors(), *columns.values()], device))
        fields: dict[str, Any] = {name: next(moved) for name in names}
        layouts = [take_parts(parts, moved)]
        batch = TokenBatch(families=self.families, layouts=layouts, found={reads: found.take(moved)}, **fields)
        return batch, dict(zip(columns, moved, strict=True))

    def predicting(self) -> Reads:
        """Return the tokens that `source` refers to under the mask."""
        return self._reads(predicting)

    def ending(self) -> Reads:
        """Return the tokens that `last` refers to."""
        return self._reads(ending)

    def _reads(self, find: FindReads) -> Reads:
        if find not in self.found:
            device = self.input_ids.device
            self.found[find] = find(self.families, takes_offsets(device)).to(device)
        return self.found[find]


def collate(tokens: Sequence[Tokens]) -> TokenBatch:
    """Concatenate rows into one flat batch; rows with the same prompt branch off from one copy of it."""
    ids: list[int] = []
    prompts: dict[int, range] = {}
    responses: dict[int, range] = {}
    families = []
    for members in _families([row.prompt for row in tokens], SHARED_FROM_TOKENS):
        # the prompt is appended once; each response of the family follows it
        stem = _append(ids, tokens[members[0]].prompt)
        for i in members:
            prompts[i], responses[i] = stem, _append(ids, tokens[i].response)
        families.append(Family(stem, tuple(responses[i] for i in members)))
    indices = [
        np.concatenate([np.arange(r.start, r.stop) for r in (prompts[i], responses[i])]) for i in range(len(tokens))
    ]
    time = max(1, max(len(row.response) for row in tokens))
    rows, real = _padded(indices, max(map(len, indices)))
    place, positions = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
    place[rows[real]] = np.flatnonzero(real)
    positions[rows[real]] = np.nonzero(real)[1]
    targets, mask = _padded([row.response for row in tokens], time)
    for i, row in enumerate(tokens):
        if row.weights is not None:
            mask[i, : len(row.weights)] = np.array(row.weights) != 0
    # hidden state t predicts token t + 1: from the prompt's last token to the response's last but one
    source, _ = _padded([row[len(t.prompt) - 1 : -1] for row, t in zip(indices, tokens, strict=True)], time)
    numbers = {
        "input_ids": np.array(ids), "positions": positions, "source": source, "targets": targets, "mask": mask,
        "trained": np.flatnonzero(mask),
        "last": np.array([row[-1] for row in indices]), "rows": rows, "place": place,
    }  # fmt: skip
    fields: dict[str, Any] = {name: torch.from_numpy(array) for name, array in numbers.items()}
    return TokenBatch(families=tuple(families), **fields)


def _families(prompts: Sequence[tuple[int, ...]], shared_from: int = 1) -> list[list[int]]:
    """Group the indices of equal prompts, in order of first appearance; prompts below `shared_from` tokens are not grouped."""
    families: dict[tuple[object, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        families.setdefault(prompt if len(prompt) >= shared_from else ("single", i), []).append(i)
    return list(families.values())


def _append(ids: list[int], added: Sequence[int]) -> range:
    start = len(ids)
    ids.extend(added)
    return range(start, len(ids))


def _padded(rows: Sequence[Sequence[int] | np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows padded with 0 on the right, and the mask of real entries; both [rows, width]."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    real = np.arange(width) < lengths[:, None]
    padded = np.zeros(real.shape, dtype=np.int64)
    if all(isinstance(row, np.ndarray) for row in rows):
        padded[real] = np.concatenate(rows)
    else:
        padded[real] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
    return padded, real


def pad(rows: Sequence[Sequence[float] | np.ndarray], time: int) -> Tensor:
    """Return per-token values of uneven length as float32 [batch, time], padded with 0 on the right."""
    padded = np.zeros((len(rows), time), dtype=np.float32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


def micro_batches(rows: Sequence[Sequence[Tokens]], micro_batch_tokens: int) -> list[list[int]]:
    """Group rows so that `collate` lays out at most `micro_batch_tokens` tokens per group; return their indices.

    Rows with the same prompt stay together, and similar lengths are next to each other. A row longer than the limit gets its own group.
    Without rows the result is one empty group.

    Args:
        rows: one or more sequences each.
    """
    families = _families([row[0].prompt for row in rows])
    groups: list[list[int]] = [[]]
    used, present = 0, set[tuple[int, ...]]()
    for members in sorted(families, key=lambda members: max(len(t) for i in members for t in rows[i])):
        for i in members:
            cost = _added_tokens(rows[i], present)
            if groups[-1] and used + cost > micro_batch_tokens:
                groups.append([])
                used, present = 0, set()
                cost = _added_tokens(rows[i], present)
            groups[-1].append(i)
            used += cost
            present |= {t.prompt for t in rows[i] if len(t.prompt) >= SHARED_FROM_TOKENS}
    return groups


def _added_tokens(row: Sequence[Tokens], present: set[tuple[int, ...]]) -> int:
    """Return the number of tokens that `collate` adds for the row if the prompts in `present` are laid out already."""
    shared = {t.prompt for t in row if len(t.prompt) >= SHARED_FROM_TOKENS}
    repeated = sum(len(t.prompt) for t in row if len(t.prompt) < SHARED_FROM_TOKENS)
    return repeated + sum(map(len, shared - present)) + sum(len(t.response) for t in row)


def share_of(rows: Sequence[Sequence[Tokens]], process: int, processes: int) -> list[int]:
    """Return the indices of the rows that process `process` trains on: whole prompts if there are enough of them, else single rows.

    The longest unit is assigned first, each to the process with the fewest tokens so far, so that processes wait as little as possible.
    """
    families = _families([row[0].prompt for row in rows])
    units = families if len(families) >= processes else [[i] for i in range(len(rows))]
    tokens = [len(rows[unit[0]][0].prompt) + sum(len(t.response) for i in unit for t in rows[i]) for unit in units]
    given, owner = [0] * processes, [0] * len(units)
    for unit in sorted(range(len(units)), key=lambda unit: -tokens[unit]):
        owner[unit] = min(range(processes), key=lambda candidate: given[candidate])
        given[owner[unit]] += tokens[unit]
    return [i for unit, members in enumerate(units) if owner[unit] == process for i in members]


class EpochOrder:
    """Batches of row indices over shuffled epochs. They are a pure function of seed and step, so there is no cursor to save.

    The last batch of an epoch may be smaller; within an epoch no row is skipped or repeated.
    """

    def __init__(self, rows: int, batch_size: int, epochs: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.steps_per_epoch = math.ceil(rows / batch_size)
        self.steps = self.steps_per_epoch * epochs

    def indices(self, step: int) -> list[int]:
        """Return the row indices of the batch of optimiser step `step`, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = shuffled(self.rows, self.seed, epoch)
        return list(order[within * self.batch_size : (within + 1) * self.batch_size])


@lru_cache(maxsize=4)
def shuffled(rows: int, *seed: int) -> memoryview:
    """Return a permutation of range(rows) that depends only on the seeds, as a read-only sequence of integers.

    The newest are kept: each draw of a prompt asks for the permutation of its epoch, which takes 0.1 s for a million rows.
    """
    order = np.random.Generator(np.random.PCG64(list(seed))).permutation(rows)
    order.flags.writeable = False
    return order.data
