"""Groups of answers of similar length, computed together while tokens are sampled.

Example:
    Prompts of 40 and 38 tokens share a segment; a prompt of 3 tokens is too short to be padded to 40:

    >>> parts = segments(lengths=[40, 38, 3], ages=[0, 0, 0], counts=[2, 1, 1], device=torch.device("cpu"))
    >>> [(part.groups, part.prompt, part.most) for part in parts]
    [(slice(0, 2, None), 40, 2), (slice(2, 3, None), 3, 1)]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from posttrain.data.transfer import together
from posttrain.models.kernels import PLAIN, Scores

TENSORS = ("cells", "prompt_mask", "own_mask")
UNIFORM_BELOW = 32
"""Tokens. Groups whose lengths differ by at most this are computed together, whatever their ratio."""


@dataclass(frozen=True)
class Segment:
    """Neighbouring groups of similar length.

    Attributes:
        prompt: tokens of the longest prompt.
        own: tokens of the longest answer, with the newest one.
        most: answers of the largest group.
        cells: index of each answer in [groups x most]; None if every group has `most` answers.
        prompt_mask: added to scores [groups, key heads, most x repeats, prompt]; None if all prompts are equally long.
        own_mask: added to scores [answers, key heads, repeats, own]; None if all answers are equally long.
    """

    groups: slice
    rows: slice
    prompt: int
    own: int
    most: int
    cells: Tensor | None
    prompt_mask: Tensor | None
    own_mask: Tensor | None

    def attend(
        self, query: Tensor, prompts: Sequence[Tensor], answers: Sequence[Tensor], scores: Scores = PLAIN
    ) -> Tensor:
        """Return outputs [answers, key heads, repeats, size] of scaled queries in the same shape.

        Args:
            prompts: keys and values [groups, key heads, tokens, size] of all segments.
            answers: keys and values [answers, key heads, capacity, size] of all segments.
            scores: only the soft cap and the sinks are read; queries are scaled, and masks contain the window.
        """
        prompt_keys, prompt_values = (states[self.groups, :, : self.prompt] for states in prompts)
        own_keys, own_values = (states[self.rows, :, : self.own] for states in answers)
        # scores [groups, key heads, most x repeats, prompt] and [answers, key heads, repeats, own]
        on_prompt, on_own = self._by_group(query) @ prompt_keys.mT, query @ own_keys.mT
        if scores.softcap is not None:
            on_prompt, on_own = (torch.tanh(each / scores.softcap) * scores.softcap for each in (on_prompt, on_own))
        if self.prompt_mask is not None:
            on_prompt = on_prompt + self.prompt_mask
        if self.own_mask is not None:
            on_own = on_own + self.own_mask
        # one softmax over [answers, key heads, repeats, prompt + own]: two softmaxes would need their normalisers merged.
        # Masks come before it, since padded keys must get weight 0.
        columns = [self._by_row(on_prompt), on_own]
        if scores.sinks is not None:
            columns.append(scores.sinks.to(on_own.dtype).view(*query.shape[1:3], 1).expand(*query.shape[:3], 1))
        weights = torch.cat(columns, -1).softmax(-1, dtype=torch.float32).to(query.dtype)
        on_prompt, on_own = weights[..., : self.prompt + self.own].split([self.prompt, self.own], -1)
        # [answers, key heads, repeats, size]; the prompt's values are read once per group, which is the point of the scheme
        outputs = self._by_row(self._by_group(on_prompt) @ prompt_values).contiguous()
        outputs.flatten(0, 1).baddbmm_(on_own.flatten(0, 1), own_values.flatten(0, 1))
        return outputs

    def within(self, window: int, lengths: Tensor, ages: Tensor, row_ages: Tensor) -> Segment:
        """Return the segment with masks in which an answer's newest token sees only the last `window` tokens, itself included.

        Args:
            lengths: [groups] tokens of the prompts of all segments; `ages` are those of their answers so far.
            row_ages: [answers] the same for each answer.
        """
        lengths, ages, row_ages = lengths[self.groups, None], ages[self.groups, None], row_ages[self.rows, None]
        column = torch.arange(max(self.prompt, self.own), device=ages.device)
        of_prompt, of_own = column[: self.prompt], column[: self.own]
        return replace(
            self,
            prompt_mask=_hidden((of_prompt >= lengths) | (of_prompt <= lengths + ages - window)),
            own_mask=_hidden((of_own > row_ages) | (of_own <= row_ages - window)),
        )

    def _by_group(self, rows: Tensor) -> Tensor:
        """Arrange [answers, key heads, repeats, n] as [groups, key heads, most x repeats, n]."""
        if self.cells is not None:
            places = (self.groups.stop - self.groups.start) * self.most
            rows = rows.new_zeros(places, *rows.shape[1:]).index_copy_(0, self.cells, rows)
        grouped: Tensor = rows.unflatten(0, (-1, self.most)).transpose(1, 2).flatten(2, 3)
        return grouped

    def _by_row(self, groups: Tensor) -> Tensor:
        """Arrange [groups, key heads, most x repeats, n] as [answers, key heads, repeats, n]."""
        places: Tensor = groups.unflatten(2, (self.most, -1)).transpose(1, 2).flatten(0, 1)
        return places if self.cells is None else places.index_select(0, self.cells)


def segments(lengths: Sequence[int], ages: Sequence[int], counts: Sequence[int], device: torch.device) -> list[Segment]:
    """Split the groups, in order, into segments of similar length.

    A new segment starts if a prompt or an answer is less than half as long as the first one of its segment, so that padding stays small.
    """
    found, start, row = list[Segment](), 0, 0
    for end in range(1, len(counts) + 1):
        if end < len(counts) and _alike(lengths[start], lengths[end]) and _alike(ages[start], ages[end]):
            continue
        groups, rows = slice(start, end), slice(row, row + sum(counts[start:end]))
        found.append(_segment(groups, rows, lengths[groups], ages[groups], counts[groups]))
        start, row = end, rows.stop
    return _moved(found, device)


def _moved(found: Sequence[Segment], device: torch.device) -> list[Segment]:
    """Return the segments with their tensors on `device`, all in one copy."""
    if device.type == "cpu":
        return list(found)
    names = [[name for name in TENSORS if getattr(segment, name) is not None] for segment in found]
    given = [getattr(segment, name) for segment, own in zip(found, names, strict=True) for name in own]
    moved = iter(together(given, device) if given else [])
    placed = []
    for segment, own in zip(found, names, strict=True):
        tensors: dict[str, Any] = {name: next(moved) for name in own}
        placed.append(replace(segment, **tensors))
    return placed


def _alike(first: int, other: int) -> bool:
    return first - other <= UNIFORM_BELOW or first < 2 * other


def _segment(groups: slice, rows: slice, lengths: Sequence[int], ages: Sequence[int], counts: Sequence[int]) -> Segment:
    prompt, own, most = max(lengths), max(ages) + 1, max(counts)
    answers = torch.tensor(counts)
    cells = prompt_mask = own_mask = None
    if min(counts) < most:
        # answers are stored without gaps, group after group; `free` counts the empty cells of all groups before each one
        free = most * torch.arange(len(counts)) - (answers.cumsum(0) - answers)
        cells = torch.arange(len(free.repeat_interleave(answers))) + free.repeat_interleave(answers)
    if min(lengths) < prompt:
        prompt_mask = _beyond(torch.tensor(lengths), prompt)
    if min(ages) + 1 < own:
        own_mask = _beyond(torch.tensor(ages).repeat_interleave(answers) + 1, own)
    return Segment(groups, rows, prompt, own, most, cells, prompt_mask, own_mask)


def _beyond(lengths: Tensor, width: int) -> Tensor:
    """Return [rows, 1, 1, width]: 0 if a column is within its row's length, else minus infinity."""
    return _hidden(torch.arange(width) >= lengths[:, None])


def _hidden(outside: Tensor) -> Tensor:
    """Return [rows, 1, 1, width]: minus infinity if [rows, width] is True, else 0."""
    return torch.zeros(outside.shape, device=outside.device).masked_fill_(outside, float("-inf"))[:, None, None]
