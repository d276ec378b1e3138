"""Which token of a flat batch attends to which: causal attention in each row, and through one shared copy of a common prompt.

This is the tree attention of PrefixGrouper (2506.05433) and shared-prefix DPO (2410.20305) as plain index tensors, so it runs with any
attention kernel on any device.

Example:
    A prompt at 0..1 with responses at 2..3 and 4. The prompt is causal; each response sees the prompt and its own tokens:

    >>> causal, *responses = attended_parts([Family(range(0, 2), (range(2, 4), range(4, 5)))])
    >>> causal.queries.tolist(), causal.mask is None
    ([[0, 1]], True)
    >>> [(part.queries.tolist(), part.keys.tolist()) for part in responses]
    [([[4]], [[0, 1, 4]]), ([[2, 3]], [[0, 1, 2, 3]])]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from posttrain.data.offsets import ByOffsets, Segment, by_offsets, indices_of
from posttrain.data.transfer import together


@dataclass(frozen=True)
class Attended:
    """Segments of similar length that one attention call computes.

    Attributes:
        queries: [segments, longest] token indices, padded on the right.
        keys: [segments, keys] token indices that the queries may see.
        mask: [segments, 1, longest, keys] bool; None means causal, with keys equal to queries, so that right padding is never seen.
        real: [real queries] positions in queries.flatten() that are not padding. Indices, because a boolean mask would make a GPU wait.
        tokens: [real queries] token index of each.
        masks: masks by window that have been made from it.
        layouts: layouts of the heads of all parts, which the first part keeps (`posttrain.models.head_rows`).
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    real: Tensor
    tokens: Tensor
    masks: dict[int, Tensor | None] = field(default_factory=dict, compare=False, repr=False)
    layouts: dict[tuple[int | bool | None, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the order that `with_tensors` takes."""
        return [self.queries, self.keys, self.real, self.tokens, *([] if self.mask is None else [self.mask])]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Attended:
        """Return the part with these tensors."""
        queries, keys, real, tokens, *mask = tensors
        return Attended(queries, keys, mask[0] if mask else None, real, tokens)

    def within(self, window: int | None) -> Tensor | None:
        """Return the mask in which a query sees only the last `window` of its keys, itself included. It is made once a batch."""
        if window is None or self.keys.shape[1] <= window:
            return self.mask
        if window not in self.masks:
            self.masks[window] = _within(self.mask, window, self.keys.shape[1], self.keys.device)
        return self.masks[window]


def _within(mask: Tensor | None, window: int, keys: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones(1, 1, keys, keys, dtype=torch.bool, device=device).tril().triu(1 - window)
    # the keys of a row follow each other, so those behind a key are as many as it is tokens away
    behind = mask.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    return mask & (behind <= window)


Parts = tuple[Attended | ByOffsets, ...]
"""The attention of a flat batch: parts with masks, or one layout by offsets."""


@dataclass(frozen=True)
class Reads:
    """Positions of a flat batch whose last hidden states are read.

    Attributes:
        tokens: [read] ascending token indices.
        parts: attention parts that cover at least these tokens.
    """

    tokens: Tensor
    parts: Parts

    def to(self, device: torch.device) -> Reads:
        """Return the reads on `device`."""
        return self.take(iter(together(self.tensors(), device)))

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in the order that `take` takes."""
        return [self.tokens, *chain(*(part.tensors() for part in self.parts))]

    def take(self, moved: Iterator[Tensor]) -> Reads:
        """Return the reads with the next tensors of `moved` in place of theirs."""
        return Reads(next(moved), take_parts(self.parts, moved))


def take_parts(parts: Parts, moved: Iterator[Tensor]) -> Parts:
    """Return the parts with the next tensors of `moved` in place of theirs."""
    return tuple(part.with_tensors([*islice(moved, len(part.tensors()))]) for part in parts)


@dataclass(frozen=True)
class Family:
    """A prompt and the responses that branch off from it, as ranges of flat indices."""

    prompt: range
    responses: tuple[range, ...]


def attended_parts(families: Iterable[Family], offsets: bool = False) -> Parts:
    """Return parts that cover every token once.

    A prompt with one response is one causal sequence. With several responses, each is a segment that sees the prompt before it.

    Args:
        offsets: return one layout by offsets instead of parts with masks.
    """
    segments: list[Segment] = []
    for family in families:
        if len(family.responses) == 1:
            segments.append(Segment(range(0), _whole(family)))
        else:
            segments.append(Segment(range(0), family.prompt))
            segments += [Segment(family.prompt, response) for response in family.responses]
    return _laid_out(segments, offsets)


def predicting(families: Sequence[Family], offsets: bool = False) -> Reads:
    """Return the tokens that predict response tokens: a prompt's last token, and all tokens of a response except its last."""
    segments: list[Segment] = []
    for family in families:
        prompt, last = family.prompt, max(0, len(family.prompt) - 1)
        if len(family.responses) == 1:
            own = _whole(family)[:-1]
            # skipping the prompt's queries needs a mask, or a gather, which pays off only if they are more than half of the row
            segments.append(Segment(range(0), own, last if 2 * last > len(own) else 0))
        else:
            segments.append(Segment(range(0), prompt, last))
            segments += [Segment(prompt, response[:-1]) for response in family.responses]
    parts = [part for f in families if any(f.responses) for part in (f.prompt[-1:], *(r[:-1] for r in f.responses))]
    return Reads(indices_of(parts), _laid_out(segments, offsets))


def ending(families: Sequence[Family], offsets: bool = False) -> Reads:
    """Return the last token of every row."""
    segments: list[Segment] = []
    for family in families:
        for response in family.responses:
            if len(family.responses) == 1:
                seen, own = range(0), _whole(family)
            else:
                seen, own = (family.prompt, response) if response else (range(0), family.prompt)
            segments.append(Segment(seen, own, len(own) - 1))
    # rows that consist of the same prompt without a response end with the same token
    once = sorted(dict.fromkeys(segments), key=lambda segment: segment.own[-1])
    return Reads(torch.tensor([segment.own[-1] for segment in once], dtype=torch.long), _laid_out(once, offsets))


def _whole(family: Family) -> range:
    return range(family.prompt.start, family.responses[0].stop)


def _laid_out(segments: Sequence[Segment], offsets: bool) -> Parts:
    if offsets:
        return (by_offsets(segments),) if any(segment.queries for segment in segments) else ()
    return masked_parts(segments)


def masked_parts(segments: Iterable[Segment]) -> tuple[Attended, ...]:
    """Bucket segments with 2^k to 2^(k+1) - 1 queries (and likewise keys), so that less than half of a part is padding."""
    buckets: dict[tuple[bool, int, int], list[Segment]] = {}
    for segment in segments:
        if segment.queries:
            sizes = len(segment.queries).bit_length(), len(segment.own).bit_length()
            buckets.setdefault((bool(segment.seen or segment.first), *sizes), []).append(segment)
    return tuple(_part(buckets[sizes]) for sizes in sorted(buckets))


def _part(segments: Sequence[Segment]) -> Attended:
    longest, before = (max(len(s.queries) for s in segments), max(len(s.seen) for s in segments))
    queries, real = _indices([s.queries for s in segments], longest)
    if not any(s.seen or s.first for s in segments):
        return Attended(queries, queries, None, *_real(queries, real))
    own, _ = _indices([s.own for s in segments], max(len(s.own) for s in segments))
    # keys are [prompt, own]; the prompt is aligned on the right, so its padding is on the left: [segments, before]
    seen_lengths = torch.tensor([len(s.seen) for s in segments])
    offset = torch.arange(before) - (before - seen_lengths[:, None])
    seen = torch.tensor([s.seen.start for s in segments])[:, None] + offset.clamp(min=0)
    # query i of a segment is token first + i of `own`, so it sees own keys up to there: [segments, longest, own keys]
    place = torch.tensor([s.first for s in segments])[:, None] + torch.arange(longest)
    causal = place[:, :, None] >= torch.arange(own.shape[1])
    # [segments, longest, before + own keys]; padded queries also get a mask row, and `real` drops their output
    mask = torch.cat([(offset >= 0)[:, None].expand(-1, longest, -1), causal], dim=2)
    return Attended(queries, torch.cat([seen, own], dim=1), mask[:, None], *_real(queries, real))


def _real(queries: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of the queries that are not padding, and their token indices."""
    positions = real.flatten().nonzero().squeeze(1)
    return positions, queries.flatten()[positions]


def _indices(ranges: Sequence[range], longest: int) -> tuple[Tensor, Tensor]:
    """Return [ranges, longest] indices, each padded on the right with its first index, and the mask of real entries."""
    starts, lengths = (
        torch.tensor(numbers)[:, None] for numbers in ([r.start for r in ranges], [len(r) for r in ranges])
    )
    step = torch.arange(longest)
    return torch.where(step < lengths, starts + step, starts), step < lengths
