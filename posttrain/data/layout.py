"""Which token of a flat batch attends to which: whole rows causally, and answers to a shared prompt through its one copy.

The tree form of attention that PrefixGrouper (2506.05433) and shared-prefix DPO (2410.20305) use, as plain index tensors: it runs with
any attention kernel on any device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


Segment = tuple[range, range]
"""Indices of the tokens before a segment that it may see, and of its own."""


def attended_parts(families: Iterable[tuple[range, Sequence[range]]]) -> tuple[Attended, ...]:
    """Parts that cover every token once. A family is a prompt and its responses, as ranges of flat indices.

    A prompt with one response is one causal sequence; with several, they are segments that each see the prompt before them.
    """
    whole: list[Segment] = []
    branches: list[Segment] = []
    for prompt, responses in families:
        if len(responses) == 1:
            whole.append((range(0), range(prompt.start, responses[0].stop)))
        else:
            whole.append((range(0), prompt))
            branches += [(prompt, response) for response in responses if response]
    return tuple(_part(segments) for kind in (whole, branches) for segments in _of_similar_length(kind))


def _of_similar_length(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments of 2^k to 2^(k+1) - 1 tokens together, so that less than half of a part is padding."""
    buckets: dict[int, list[Segment]] = {}
    for segment in segments:
        buckets.setdefault(len(segment[1]).bit_length(), []).append(segment)
    return [buckets[k] for k in sorted(buckets)]


def _part(segments: Sequence[Segment]) -> Attended:
    longest, before = max(len(own) for _, own in segments), max(len(seen) for seen, _ in segments)
    lengths = torch.tensor([len(own) for _, own in segments])
    starts = torch.tensor([own.start for _, own in segments])
    step = torch.arange(longest)
    real = step < lengths[:, None]
    queries = torch.where(real, starts[:, None] + step, starts[:, None])
    if not before:
        return Attended(queries, queries, None, real.flatten())
    # the prompt's keys end where the response's begin, so padding is on their left
    seen_lengths = torch.tensor([len(seen) for seen, _ in segments])
    offset = torch.arange(before) - (before - seen_lengths[:, None])
    seen_starts = torch.tensor([seen.start for seen, _ in segments])[:, None]
    keys = torch.cat([seen_starts + offset.clamp(min=0), queries], dim=1)
    causal = (step[:, None] >= step).expand(len(segments), -1, -1)
    mask = torch.cat([(offset >= 0)[:, None].expand(-1, longest, -1), causal], dim=2)
    return Attended(queries, keys, mask[:, None], real.flatten())
