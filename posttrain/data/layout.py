"""Which token of a flat batch attends to which: whole rows causally, and answers to a shared prompt through its one copy.

The tree form of attention that PrefixGrouper (2506.05433) and shared-prefix DPO (2410.20305) use, as plain index tensors: it runs with
any attention kernel on any device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor


@dataclass(frozen=True)
class Attended:
    """Segments of similar length that one attention call computes.

    queries: [segments, longest] indices of tokens, padded on the right. keys: [segments, keys] indices of what they may see.
    mask: [segments, 1, longest, keys] bool; None means causal over keys that are the queries themselves, where padding on the right is
    never seen. real: [segments * longest] bool, the queries that are no padding.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    real: Tensor

    def to(self, device: torch.device) -> Attended:
        mask = None if self.mask is None else self.mask.to(device)
        return Attended(self.queries.to(device), self.keys.to(device), mask, self.real.to(device))


@dataclass(frozen=True)
class Reads:
    """tokens: [read] ascending indices of those whose last hidden states are read. parts: cover each of them, and maybe others."""

    tokens: Tensor
    parts: tuple[Attended, ...]

    def to(self, device: torch.device) -> Reads:
        return Reads(self.tokens.to(device), tuple(part.to(device) for part in self.parts))


@dataclass(frozen=True)
class Family:
    """A prompt and the responses that branch off from it, as ranges of flat indices."""

    prompt: range
    responses: tuple[range, ...]


@dataclass(frozen=True)
class _Segment:
    """Tokens in a row, `own`, after others that they see. first: among `own`, the first that attends; all before it are only seen."""

    seen: range
    own: range
    first: int = 0

    @property
    def queries(self) -> range:
        return self.own[self.first :]


def attended_parts(families: Iterable[Family]) -> tuple[Attended, ...]:
    """Parts that cover every token once.

    A prompt with one response is one causal sequence; with several, they are segments that each see the prompt before them.
    """
    segments: list[_Segment] = []
    for family in families:
        if len(family.responses) == 1:
            segments.append(_Segment(range(0), _whole(family)))
        else:
            segments.append(_Segment(range(0), family.prompt))
            segments += [_Segment(family.prompt, response) for response in family.responses]
    return _parts(segments)


def predicting(families: Sequence[Family]) -> Reads:
    """The tokens that predict a response's tokens: a prompt's last one, and all of a response but its last."""
    segments: list[_Segment] = []
    for family in families:
        prompt, last = family.prompt, max(0, len(family.prompt) - 1)
        if len(family.responses) == 1:
            own = _whole(family)[:-1]
            # a mask costs more than the causal queries that it saves, until these are most of the row
            segments.append(_Segment(range(0), own, last if 2 * last > len(own) else 0))
        else:
            segments.append(_Segment(range(0), prompt, last))
            segments += [_Segment(prompt, response[:-1]) for response in family.responses]
    parts = [part for f in families if any(f.responses) for part in (f.prompt[-1:], *(r[:-1] for r in f.responses))]
    return Reads(torch.tensor([*chain(*parts)], dtype=torch.long), _parts(segments))


def ending(families: Sequence[Family]) -> Reads:
    """The last token of every row."""
    segments: list[_Segment] = []
    for family in families:
        for response in family.responses:
            if len(family.responses) == 1:
                seen, own = range(0), _whole(family)
            else:
                seen, own = (family.prompt, response) if response else (range(0), family.prompt)
            segments.append(_Segment(seen, own, len(own) - 1))
    # rows that are the same prompt and nothing else end with the same token
    once = sorted(dict.fromkeys(segments), key=lambda segment: segment.own[-1])
    return Reads(torch.tensor([segment.own[-1] for segment in once], dtype=torch.long), _parts(once))


def _whole(family: Family) -> range:
    return range(family.prompt.start, family.responses[0].stop)


def _parts(segments: Iterable[_Segment]) -> tuple[Attended, ...]:
    """Segments of 2^k to 2^(k+1) - 1 queries, and so of keys, together, so that less than half of a part is padding."""
    buckets: dict[tuple[bool, int, int], list[_Segment]] = {}
    for segment in segments:
        if segment.queries:
            sizes = len(segment.queries).bit_length(), len(segment.own).bit_length()
            buckets.setdefault((bool(segment.seen or segment.first), *sizes), []).append(segment)
    return tuple(_part(buckets[sizes]) for sizes in sorted(buckets))


def _part(segments: Sequence[_Segment]) -> Attended:
    longest, before = (max(len(s.queries) for s in segments), max(len(s.seen) for s in segments))
    queries, real = _indices([s.queries for s in segments], longest)
    if not any(s.seen or s.first for s in segments):
        return Attended(queries, queries, None, real.flatten())
    own, _ = _indices([s.own for s in segments], max(len(s.own) for s in segments))
    # the prompt's keys end where the response's begin, so padding is on their left
    seen_lengths = torch.tensor([len(s.seen) for s in segments])
    offset = torch.arange(before) - (before - seen_lengths[:, None])
    seen = torch.tensor([s.seen.start for s in segments])[:, None] + offset.clamp(min=0)
    place = torch.tensor([s.first for s in segments])[:, None] + torch.arange(longest)
    causal = place[:, :, None] >= torch.arange(own.shape[1])
    mask = torch.cat([(offset >= 0)[:, None].expand(-1, longest, -1), causal], dim=2)
    return Attended(queries, torch.cat([seen, own], dim=1), mask[:, None], real.flatten())


def _indices(ranges: Sequence[range], longest: int) -> tuple[Tensor, Tensor]:
    """[ranges, longest], each padded on the right with its first index, and which entries are no padding."""
    starts, lengths = (
        torch.tensor(numbers)[:, None] for numbers in ([r.start for r in ranges], [len(r) for r in ranges])
    )
    step = torch.arange(longest)
    return torch.where(step < lengths, starts + step, starts), step < lengths
