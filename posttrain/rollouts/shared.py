"""Attention of the newest tokens where answers share their prompt: the prompt's keys are read once for all answers of a group.

As in Hydragen (arXiv 2402.05099): queries of a group meet the prompt's keys in one matrix product, each answer's own keys in another;
one softmax goes over both. Exact to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from posttrain.models.packed import refuse_more_than_plain

if TYPE_CHECKING:
    from posttrain.rollouts.slots import Slots

NAME = "posttrain_shared_prompts"
UNIFORM_BELOW = 32
"""Groups whose widths differ by no more than this are computed together whatever their ratio."""


@dataclass(frozen=True)
class Segment:
    """Neighbouring groups of similar length.

    prompt, own: tokens of the longest prompt, and of the longest answer with the newest one. most: answers of the largest group.
    cells: each answer's place among [groups x most], None where every place is taken. The masks are added to scores
    [groups, key heads, most x repeats, prompt] and [answers, key heads, repeats, own]; None where all are equally long.
    """

    groups: slice
    rows: slice
    prompt: int
    own: int
    most: int
    cells: Tensor | None
    prompt_mask: Tensor | None
    own_mask: Tensor | None

    def attend(self, query: Tensor, prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
        """Outputs [answers, key heads, repeats, size] of scaled queries in the same shape; keys and values of all segments."""
        prompt_keys, prompt_values = (states[self.groups, :, : self.prompt] for states in prompts)
        own_keys, own_values = (states[self.rows, :, : self.own] for states in answers)
        on_prompt, on_own = self._by_group(query) @ prompt_keys.mT, query @ own_keys.mT
        if self.prompt_mask is not None:
            on_prompt = on_prompt + self.prompt_mask
        if self.own_mask is not None:
            on_own = on_own + self.own_mask
        weights = torch.cat([self._by_row(on_prompt), on_own], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
        on_prompt, on_own = weights.split([self.prompt, self.own], -1)
        outputs: Tensor = on_own @ own_values + self._by_row(self._by_group(on_prompt) @ prompt_values)
        return outputs

    def _by_group(self, rows: Tensor) -> Tensor:
        """[answers, key heads, repeats, n] as [groups, key heads, most x repeats, n]."""
        if self.cells is not None:
            places = (self.groups.stop - self.groups.start) * self.most
            rows = rows.new_zeros(places, *rows.shape[1:]).index_copy_(0, self.cells, rows)
        grouped: Tensor = rows.unflatten(0, (-1, self.most)).transpose(1, 2).flatten(2, 3)
        return grouped

    def _by_row(self, groups: Tensor) -> Tensor:
        places: Tensor = groups.unflatten(2, (self.most, -1)).transpose(1, 2).flatten(0, 1)
        return places if self.cells is None else places.index_select(0, self.cells)


def segments(lengths: Sequence[int], ages: Sequence[int], counts: Sequence[int], device: torch.device) -> list[Segment]:
    """Groups in their order, apart where a prompt or an answer is less than half as long as its segment's first: little padding."""
    found, start, row = [], 0, 0
    for end in range(1, len(counts) + 1):
        if end < len(counts) and _alike(lengths[start], lengths[end]) and _alike(ages[start], ages[end]):
            continue
        groups, rows = slice(start, end), slice(row, row + sum(counts[start:end]))
        found.append(_segment(groups, rows, lengths[groups], ages[groups], counts[groups], device))
        start, row = end, rows.stop
    return found


def _alike(first: int, other: int) -> bool:
    return first - other <= UNIFORM_BELOW or first < 2 * other


def _segment(
    groups: slice, rows: slice, lengths: Sequence[int], ages: Sequence[int], counts: Sequence[int], device: torch.device
) -> Segment:
    prompt, own, most = max(lengths), max(ages) + 1, max(counts)
    answers = torch.tensor(counts)
    cells = prompt_mask = own_mask = None
    if min(counts) < most:
        free = most * torch.arange(len(counts)) - (answers.cumsum(0) - answers)
        cells = (torch.arange(len(free.repeat_interleave(answers))) + free.repeat_interleave(answers)).to(device)
    if min(lengths) < prompt:
        prompt_mask = _beyond(torch.tensor(lengths), prompt).to(device)
    if min(ages) + 1 < own:
        own_mask = _beyond(torch.tensor(ages).repeat_interleave(answers) + 1, own).to(device)
    return Segment(groups, rows, prompt, own, most, cells, prompt_mask, own_mask)


def _beyond(lengths: Tensor, width: int) -> Tensor:
    """0 where a column is within its row's length, minus infinity elsewhere, [rows, 1, 1, width]."""
    outside = torch.arange(width) >= lengths[:, None]
    return torch.zeros(outside.shape).masked_fill_(outside, float("-inf"))[:, None, None]


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    slots: Slots | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token an answer, [answers, heads, 1, size], over what `slots` holds, to which its key and value were written.

    Without slots, what `sdpa` computes: prompts are prefilled so.
    """
    if slots is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    refuse_more_than_plain(kwargs)
    layer = slots.layers[cast(int, module.layer_idx)]
    own = layer.answers[0]
    scaled = query[:, :, 0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    grouped = scaled.to(own.dtype).unflatten(1, (own.shape[1], -1))
    with torch.autocast(query.device.type, enabled=False):
        parts = [part.attend(grouped[part.rows], layer.prompts, layer.answers) for part in slots.layout]
    return torch.cat(parts).flatten(1, 2)[:, None], None


AttentionInterface.register(NAME, shared_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
