"""Attention over a flat batch by offsets: segments of queries next to each other, each with its segment of keys, and no mask.

A prompt with several responses needs two calls, whose results are merged: `own` is causal within each segment, and in `shared` the
queries of all responses see the whole prompt. Both are linear in the number of tokens.

Example:
    A prompt at 0..1 with responses at 2..3 and 4:

    >>> layout = by_offsets([Segment(range(0), range(0, 2)), Segment(range(2), range(2, 4)), Segment(range(2), range(4, 5))])
    >>> layout.own.query_starts.tolist(), layout.own.longest_query, layout.in_order
    ([0, 2, 4, 5], 2, True)
    >>> layout.shared.queries.tolist(), layout.shared.query_starts.tolist(), layout.shared.keys.tolist()
    ([2, 3, 4], [0, 3], [0, 1])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby, islice
from typing import Any

import torch
from torch import Tensor

from posttrain.data.transfer import together

HALF = frozenset({torch.bfloat16, torch.float16})
OFFSETS: dict[str, frozenset[torch.dtype]] = {"cuda": HALF}
"""Kinds of devices whose kernel takes offsets, and the dtypes that it computes in (posttrain/models/varlen.py)."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens `own` that follow the tokens `seen`.

    Attributes:
        first: index in `own` of the first query; the tokens before it are only keys.
    """

    seen: range
    own: range
    first: int = 0

    @property
    def queries(self) -> range:
        """Return the tokens whose outputs are computed."""
        return self.own[self.first :]


@dataclass(frozen=True)
class Offsets:
    """One call of a kernel: segment i has the queries from query_starts[i] to query_starts[i + 1], and its keys likewise.

    Attributes:
        queries: [queries] int64; token indices, or in `ByOffsets.shared` positions among the queries of `own`.
        keys: [keys] int64 token indices.
        query_starts: [segments + 1] int32.
        key_starts: [segments + 1] int32.
        longest_query: tokens of the longest segment of queries, known without asking the device.
        longest_key: the same of keys.
    """

    queries: Tensor
    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int

    @staticmethod
    def of(queries: Sequence[Sequence[range]], keys: Sequence[Sequence[range]]) -> Offsets:
        """Return the call for segments, each of which is given as runs of consecutive indices."""
        lengths, key_lengths = ([sum(map(len, runs)) for runs in segments] for segments in (queries, keys))
        return Offsets(
            indices_of(chain(*queries)),
            indices_of(chain(*keys)),
            torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32),
            torch.tensor([*accumulate(key_lengths, initial=0)], dtype=torch.int32),
            max(lengths),
            max(key_lengths),
        )

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the order that `take` takes."""
        return [self.queries, self.keys, self.query_starts, self.key_starts]

    def take(self, moved: Iterator[Tensor]) -> Offsets:
        """Return the call with the next tensors of `moved`."""
        queries, keys, query_starts, key_starts = islice(moved, 4)
        return Offsets(queries, keys, query_starts, key_starts, self.longest_query, self.longest_key)


@dataclass(frozen=True)
class ByOffsets:
    """Attention of a flat batch in one or two calls.

    Attributes:
        own: causal, aligned at the ends: the last query of a segment sees all its keys.
        shared: without a mask; None if no row shares its prompt.
        in_order: True if the queries and keys of `own` are all tokens in order, so that nothing need be gathered.
        segments: the same on the host, for kernels that need masks.
        window: tokens that a query sees, itself included; None means all before it.
        masked: the parts with masks that have been made from it.
        windows: the layouts by window that have been made from it.
    """

    own: Offsets
    shared: Offsets | None
    in_order: bool
    segments: tuple[Segment, ...] = field(repr=False)
    window: int | None = None
    masked: list[Any] = field(default_factory=list, compare=False, repr=False)
    windows: dict[int, ByOffsets] = field(default_factory=dict, compare=False, repr=False)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the order that `with_tensors` takes."""
        return [*self.own.tensors(), *([] if self.shared is None else self.shared.tensors())]

    def with_tensors(self, tensors: Sequence[Tensor]) -> ByOffsets:
        """Return the layout with these tensors."""
        moved = iter(tensors)
        own = self.own.take(moved)
        shared = None if self.shared is None else self.shared.take(moved)
        return ByOffsets(own, shared, self.in_order, self.segments, self.window)

    def within(self, window: int | None) -> ByOffsets:
        """Return the layout in which a query sees only the last `window` tokens of its row, itself included. It is made once a batch."""
        if window is None:
            return self
        if window not in self.windows:
            if all(len(segment.seen) + len(segment.own) <= window for segment in self.segments):
                self.windows[window] = self
            else:
                layout = _by_window(self.segments, window)
                self.windows[window] = layout.with_tensors(together(layout.tensors(), self.own.queries.device))
        return self.windows[window]


def indices_of(runs: Iterable[range]) -> Tensor:
    """Return the indices in consecutive runs, int64; a list of them would take a Python object for each.

    Example:
        >>> indices_of([range(2, 4), range(7, 8)]).tolist()
        [2, 3, 7]
    """
    found = [torch.arange(run.start, run.stop) for run in runs]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def takes_offsets(device: torch.device) -> bool:
    """Return True if attention on the device is computed by offsets, in the dtype that autocast sets now."""
    kind = device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    return dtype in OFFSETS.get(kind, frozenset())


def by_offsets(segments: Sequence[Segment]) -> ByOffsets:
    """Return the layout of the segments, in the order of their tokens."""
    ordered = sorted((s for s in segments if s.queries), key=lambda s: (s.own.start, s.own.stop))
    own = Offsets.of([[s.queries] for s in ordered], [[s.own] for s in ordered])
    starts = list(accumulate((len(s.queries) for s in ordered), initial=0))
    placed = [
        (segment.seen, range(start, stop))
        for segment, start, stop in zip(ordered, starts, starts[1:], strict=False)
        if segment.seen
    ]
    # the responses of a prompt follow each other, so they are one segment of queries over its keys
    families = [(seen, [r for _, r in group]) for seen, group in groupby(placed, key=lambda pair: pair[0])]
    shared = Offsets.of([queries for _, queries in families], [[seen] for seen, _ in families]) if families else None
    return ByOffsets(own, shared, _in_order(own), tuple(ordered))


def _by_window(segments: Sequence[Segment], window: int) -> ByOffsets:
    """Return one call in which every segment has the end of its prompt among its keys.

    A kernel's window counts from the last query and key of a segment, and responses of different lengths have theirs at different
    distances from a prompt. So the prompt is not shared here; less than a window of its keys is gathered for each response.
    """
    keys = []
    for segment in segments:
        unseen = max(0, len(segment.seen) + segment.first + 1 - window)
        keys.append([segment.seen[unseen:], segment.own[max(0, unseen - len(segment.seen)) :]])
    own = Offsets.of([[segment.queries] for segment in segments], keys)
    return ByOffsets(own, None, _in_order(own), tuple(segments), window)


def _in_order(own: Offsets) -> bool:
    everything = torch.arange(len(own.queries))
    return torch.equal(own.queries, everything) and torch.equal(own.keys, everything)
