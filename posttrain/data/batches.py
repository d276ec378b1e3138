"""Rows to one flat list of tokens, a step's rows to micro-batches, and the order of rows over epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from posttrain.data.layout import Attended, Family, Reads, attended_parts, ending, predicting
from posttrain.data.tokens import Tokens

SHARED_FROM_TOKENS = 4
"""A shorter prompt is repeated for each of its rows: one causal sequence is cheaper than a branch."""


@dataclass(frozen=True)
class TokenBatch:
    """Prompts and responses without padding. A prompt that several rows share stands once, and is computed once.

    input_ids, positions: [tokens], every token with its position in its own row. families: where prompts and responses lie. parts: which
    token attends to which.
    source: [batch, time] index of the token whose hidden state predicts the response token. targets: [batch, time] response ids.
    mask: [batch, time] bool, from lengths and never from ids. last: [batch] index of the row's last token.
    rows: [batch, length] indices of the row's tokens, padded on the right. place: [tokens] where each token stands in rows.flatten().
    """

    input_ids: Tensor
    positions: Tensor
    families: tuple[Family, ...]
    parts: tuple[Attended, ...]
    source: Tensor
    targets: Tensor
    mask: Tensor
    last: Tensor
    rows: Tensor
    place: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return TokenBatch(families=self.families, parts=tuple(part.to(device) for part in self.parts), **moved)

    def predicting(self) -> Reads:
        """The tokens that `source` names under the mask."""
        return predicting(self.families).to(self.input_ids.device)

    def ending(self) -> Reads:
        """The tokens that `last` names."""
        return ending(self.families).to(self.input_ids.device)


def collate(tokens: Sequence[Tokens]) -> TokenBatch:
    """Lay rows out one behind the other; rows with the same prompt branch off from one copy of it."""
    ids: list[int] = []
    prompts: dict[int, range] = {}
    responses: dict[int, range] = {}
    families = []
    for members in _families([row.prompt for row in tokens], SHARED_FROM_TOKENS):
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
    source, _ = _padded([row[len(t.prompt) - 1 : -1] for row, t in zip(indices, tokens, strict=True)], time)
    numbers = {
        "input_ids": np.array(ids), "positions": positions, "source": source, "targets": targets, "mask": mask,
        "last": np.array([row[-1] for row in indices]), "rows": rows, "place": place,
    }  # fmt: skip
    return TokenBatch(
        families=tuple(families),
        parts=attended_parts(families),
        **{name: torch.from_numpy(array) for name, array in numbers.items()},
    )


def _families(prompts: Sequence[tuple[int, ...]], shared_from: int = 1) -> list[list[int]]:
    """Indices with equal prompts together, in order of first appearance; prompts below `shared_from` tokens stay alone."""
    families: dict[tuple[object, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        families.setdefault(prompt if len(prompt) >= shared_from else ("alone", i), []).append(i)
    return list(families.values())


def _append(ids: list[int], added: Sequence[int]) -> range:
    start = len(ids)
    ids.extend(added)
    return range(start, len(ids))


def _padded(rows: Sequence[Sequence[int] | np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled up with 0 on the right, and which entries are theirs; both [rows, width]."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    real = np.arange(width) < lengths[:, None]
    padded = np.zeros(real.shape, dtype=np.int64)
    padded[real] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
    return padded, real


def pad(rows: Sequence[Sequence[float] | np.ndarray], time: int) -> Tensor:
    """Per-token numbers of uneven length as float32 [batch, time], 0 beyond each row's end."""
    padded = np.zeros((len(rows), time), dtype=np.float32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


def micro_batches(rows: Sequence[Sequence[Tokens]], budget: int) -> list[list[int]]:
    """Indices of rows, each of one or more sequences, grouped so that `collate` lays out `budget` tokens at most.

    Rows with the same prompt stay together, similar lengths beside each other. A row longer than the budget is a group of its own.
    Never empty: no rows give one empty group.
    """
    families = _families([row[0].prompt for row in rows])
    groups: list[list[int]] = [[]]
    used, present = 0, set[tuple[int, ...]]()
    for members in sorted(families, key=lambda members: max(len(t) for i in members for t in rows[i])):
        for i in members:
            cost = _added_tokens(rows[i], present)
            if groups[-1] and used + cost > budget:
                groups.append([])
                used, present = 0, set()
                cost = _added_tokens(rows[i], present)
            groups[-1].append(i)
            used += cost
            present |= {t.prompt for t in rows[i] if len(t.prompt) >= SHARED_FROM_TOKENS}
    return groups


def _added_tokens(row: Sequence[Tokens], present: set[tuple[int, ...]]) -> int:
    """Tokens that `collate` lays out for the row, where the prompts in `present` are laid out already."""
    shared = {t.prompt for t in row if len(t.prompt) >= SHARED_FROM_TOKENS}
    alone = sum(len(t.prompt) for t in row if len(t.prompt) < SHARED_FROM_TOKENS)
    return alone + sum(map(len, shared - present)) + sum(len(t.response) for t in row)


def share_of(rows: Sequence[Sequence[Tokens]], process: int, processes: int) -> list[int]:
    """Indices of the rows that one of `processes` trains on: whole prompts where there are enough of them, else single rows.

    The longest goes first, and each to the process that has the fewest tokens yet, so that nobody waits for long.
    """
    families = _families([row[0].prompt for row in rows])
    units = families if len(families) >= processes else [[i] for i in range(len(rows))]
    tokens = [len(rows[unit[0]][0].prompt) + sum(len(t.response) for i in unit for t in rows[i]) for unit in units]
    given, owner = [0] * processes, [0] * len(units)
    for unit in sorted(range(len(units)), key=lambda unit: -tokens[unit]):
        owner[unit] = min(range(processes), key=lambda other: given[other])
        given[owner[unit]] += tokens[unit]
    return [i for unit, members in enumerate(units) if owner[unit] == process for i in members]


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
