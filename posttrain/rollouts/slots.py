"""Keys and values of the active answers: one copy of each prompt for its group, and one slot of full length for each answer.

Groups are in the order in which they entered, so the longest answers come first. All answers of a group are equally long.

Example:
    >>> slots = Slots(layers=1, capacity=8, device=torch.device("cpu"), shared=True)
    >>> prompt = torch.zeros(1, 1, 5, 4)
    >>> with slots.entering(lengths=[5], counts=[2]):
    ...     slots.layers[0].write(0, (prompt, prompt))
    >>> slots.tokens(), slots.row_lengths.tolist()
    (21, [5, 5])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from posttrain.data.transfer import together
from posttrain.rollouts.segments import Segment, segments

Pair = tuple[Tensor, Tensor]
"""Keys and values."""
ROOM = 64
"""Tokens. In a fixed layout the longest answer's tokens are rounded up to a multiple, so that it holds for so many steps."""
DENSE_TOKENS, DENSE_BYTES = 128, 2**23
"""An answer has little more room than it fills until it has so many tokens, if a layer's keys and values take at most so many bytes.
A step reads them faster without gaps. Large ones would leave gaps in the heap when they grow.
"""
_ARRANGEMENTS = count()


class Slots:
    """The active groups.

    Attributes:
        lengths: prompt tokens of every group.
        ages: tokens so far of every answer in the group.
        counts: answers of every group.
        arrangement: a number that changes with the tensors that hold keys and values, and with the shapes of a fixed layout.
    """

    def __init__(
        self,
        layers: int,
        capacity: int,
        device: torch.device,
        shared: bool,
        fixed: bool = False,
        kinds: Sequence[StateKind | None] = (),
    ) -> None:
        """Create empty slots.

        Args:
            kinds: of every layer's states, if known; then room for prompts is made before they are computed.
            fixed: keep the shapes of the layout for up to ROOM steps, and take what changes from `row_ages` on the device.
        """
        self.capacity, self.device, self.shared, self.fixed = capacity, device, shared, fixed
        self.layers = [SlotLayer(self, kind) for kind in kinds or [None] * layers]
        self.cache = Cache(layers=list(self.layers))
        self.layout: list[Segment] = []
        """Segments of the current step, if `shared`."""
        self.windows: dict[int, list[Segment]] = {}
        """The same for every window that a layer asked for."""
        self.lengths: list[int] = []
        self.ages: list[int] = []
        self.counts: list[int] = []
        self.columns = 0
        """Tokens for which every answer has room now."""
        self._arrange()

    @contextmanager
    def entering(self, lengths: Sequence[int], counts: Sequence[int]) -> Iterator[None]:
        """Give `counts` answers of each prompt their slots. Inside the block every layer gets the prompts' states (`SlotLayer.write`).

        Raises:
            ValueError: a layer got none.
        """
        room = _Room(len(self.lengths), len(lengths), max(lengths), sum(self.counts), sum(counts))
        self.columns = max(self.columns, self._columns_for(self.width, room.old_answers + room.answers))
        for layer in self.layers:
            layer.begin(room)
        yield
        if any(layer.room is not None for layer in self.layers):
            raise ValueError("a layer stored no keys and values")
        self.lengths += lengths
        self.ages += [0] * len(lengths)
        self.counts += counts
        self._arrange()

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the answers at the ascending indices `rows`; drop the others, and prompts without an answer left."""
        group_of = [g for g, count in enumerate(self.counts) for _ in range(count)]
        counts = [0] * len(self.counts)
        for row in rows:
            counts[group_of[row]] += 1
        groups = [g for g, count in enumerate(counts) if count]
        self.lengths, self.ages = [self.lengths[g] for g in groups], [self.ages[g] for g in groups]
        self.counts = [counts[g] for g in groups]
        indices = [torch.tensor(numbers, dtype=torch.long) for numbers in (groups, list(rows))]
        kept_groups, kept = together(indices, self.device)
        self.columns = self._columns_for(self.width, len(rows))
        for layer in self.layers:
            layer.keep(kept_groups, kept, max(self.lengths, default=0), max(self.ages, default=0))
        self._arrange()

    def tokens(self, lengths: Sequence[int] = (), counts: Sequence[int] = ()) -> int:
        """Return the tokens that need storage if `lengths` and `counts` also enter."""
        prompts, answers = [*self.lengths, *lengths], sum(self.counts) + sum(counts)
        return len(prompts) * max(prompts, default=0) + answers * self.capacity

    def settle(self) -> None:
        """Make room for one more token of every answer in a fixed layout, which a recorded step does not change."""
        if self.fixed and any(max(self.ages[part.groups]) >= part.own for part in self._shapes):
            self._arrange()

    def prepare(self) -> None:
        """Compute the layout of the next step, and make room for its token."""
        self.windows = {}
        if self.width > self.columns:
            self.columns = self._columns_for(self.width, len(self.row_ages))
            self.arrangement = next(_ARRANGEMENTS)
            for layer in self.layers:
                layer.widen()
        if self.fixed:
            self.layout = [replace(part, own_mask=self._own_mask(part)) for part in self._shapes]
        elif self.shared:
            self.layout = segments(self.lengths, self.ages, self.counts, self.device)

    def _columns_for(self, tokens: int, answers: int) -> int:
        """Return for how many tokens of an answer there is room if the longest has `tokens`: at most 4 or an eighth more."""
        kind = self.layers[0].kind if self.layers else None
        if self.fixed or kind is None or kind.stored(self.device) != torch.float32:
            return self.capacity
        if tokens > DENSE_TOKENS or answers * self.capacity * kind.nbytes > DENSE_BYTES:
            return self.capacity
        step = max(4, tokens // 32 * 4)
        return min(self.capacity, -(-tokens // step) * step)

    def within(self, window: int | None) -> list[Segment]:
        """Return the segments of the current step in which a token sees only the last `window` tokens, itself included."""
        if window is None:
            return self.layout
        if window not in self.windows:
            ages, lengths = (rows.index_select(0, self.group_rows) for rows in (self.row_ages, self.row_lengths))
            self.windows[window] = [
                part if part.prompt + part.own <= window else part.within(window, lengths, ages, self.row_ages)
                for part in self.layout
            ]
        return self.windows[window]

    def _own_mask(self, part: Segment) -> Tensor:
        """Return [answers, 1, 1, own]: 0 for an answer's tokens and the newest one, else minus infinity; computed on the device."""
        beyond = torch.arange(part.own, device=self.device) > self.row_ages[part.rows, None]
        return torch.zeros(beyond.shape, device=self.device).masked_fill_(beyond, float("-inf"))[:, None, None]

    def grow(self) -> None:
        """Add one token to the length of every answer on the device; `count_token` adds it on the host."""
        self.row_ages += 1

    def count_token(self) -> None:
        """Add one token to the length of every answer on the host, which a replayed step does not do."""
        self.ages = [age + 1 for age in self.ages]

    def _arrange(self) -> None:
        counts, ages, lengths = (torch.tensor(n, dtype=torch.long) for n in (self.counts, self.ages, self.lengths))
        rows = [numbers.repeat_interleave(counts) for numbers in (ages, lengths, torch.arange(len(counts)))]
        first = counts.cumsum(0) - counts
        self.row_ages: Tensor
        self.row_ages, self.row_lengths, self.row_groups, self.group_rows = together([*rows, first], self.device)
        self.rows = torch.arange(len(self.row_ages), device=self.device)
        self.level = len(set(self.ages)) == 1 and not self.fixed
        self.arrangement = next(_ARRANGEMENTS)
        self._shapes = self._fixed_shapes() if self.fixed and self.counts else []

    def _fixed_shapes(self) -> list[Segment]:
        """Return segments with room for more tokens of the answers. They still fit when all answers have grown by as many tokens."""
        parts = segments(self.lengths, self.ages, self.counts, self.device)
        return [replace(part, own=min(self.capacity, -(-part.own // ROOM) * ROOM)) for part in parts]

    @property
    def width(self) -> int:
        """Return the number of the oldest answer's own tokens, with the newest one."""
        return max(self.ages, default=0) + 1

    def mask(self) -> Tensor:
        """Return which columns of a layer's padded keys are real, [answers, longest prompt + longest answer]."""
        prompt = torch.arange(max(self.lengths), device=self.device) < self.row_lengths[:, None]
        own = torch.arange(self.width, device=self.device) <= self.row_ages[:, None]
        return torch.cat([prompt, own], 1)


@dataclass(frozen=True)
class StateKind:
    """Heads, sizes of keys and values, and the dtype of a layer's states as the model computes them."""

    heads: int
    sizes: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, states: Pair) -> StateKind:
        keys, values = states
        return cls(values.shape[1], (keys.shape[3], values.shape[3]), values.dtype)

    @property
    def nbytes(self) -> int:
        """Return the bytes of one token's key and value as the model computes them."""
        return self.heads * sum(self.sizes) * self.dtype.itemsize

    def stored(self, device: torch.device) -> torch.dtype:
        """Return autocast's dtype. Rotary embeddings widen keys and values, and products would narrow all of them in every step."""
        narrows = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if narrows else self.dtype


class _Room(NamedTuple):
    """Groups, their longest prompt and their answers that enter, next to those that have slots."""

    old_groups: int
    groups: int
    width: int
    old_answers: int
    answers: int


class SlotLayer(DynamicLayer):
    """One layer's keys and values: prompts [groups, heads, longest prompt, size], answers [answers, heads, columns, size]."""

    def __init__(self, slots: Slots, kind: StateKind | None) -> None:
        super().__init__()
        self.slots = slots
        self.kind = kind
        self.room: _Room | None = None
        """Expected prompts for which there is no room yet."""
        self.entered = 0
        """Groups that are older than the prompts that enter."""
        self.prompts: list[Tensor] = []
        self.answers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Store the newest token of every answer. `shared_attention` reads the slots; other attention gets padded copies."""
        slots = self.slots
        for own, states in zip(self.answers, (key_states, value_states), strict=True):
            if slots.level:
                own[:, :, slots.ages[0]] = states[:, :, 0]
            else:
                own[slots.rows, :, slots.row_ages] = states[:, :, 0].to(own.dtype)
        if slots.shared:
            return key_states, value_states
        keys, values = (
            torch.cat([prompt[slots.row_groups], own[:, :, : slots.width]], 2)
            for prompt, own in zip(self.prompts, self.answers, strict=True)
        )
        return keys, values

    def begin(self, room: _Room) -> None:
        """Expect prompts. Their room is made at once if the kind of the layer's states is known, else with the first of them."""
        self.room = room
        if self.kind is not None:
            self._make_room(room, self.kind)

    def write(self, start: int, states: Pair) -> None:
        """Store keys and values [prompts, heads, length, size] of entering prompts, the first of which has number `start` among them."""
        if self.room is not None:
            self.kind = self.kind or StateKind.of(states)
            self._make_room(self.room, self.kind)
        first = self.entered + start
        for prompts, own in zip(self.prompts, states, strict=True):
            length = min(own.shape[2], prompts.shape[2])
            prompts[first : first + len(own), :, :length] = own[:, :, :length]

    def _make_room(self, room: _Room, kind: StateKind) -> None:
        device, dtype = self.slots.device, kind.stored(self.slots.device)
        width = max([room.width, *(prompts.shape[2] for prompts in self.prompts)])
        for held, number, columns, old in (
            (self.prompts, room.old_groups + room.groups, width, room.old_groups),
            (self.answers, room.old_answers + room.answers, self.slots.columns, room.old_answers),
        ):
            for i, size in enumerate(kind.sizes):
                grown = torch.zeros(number, kind.heads, columns, size, dtype=dtype, device=device)
                if old:
                    grown[:old, :, : held[i].shape[2]] = held[i]
                    held[i] = grown
                else:
                    held[i:] = [grown]
        self.room, self.entered = None, room.old_groups

    def widen(self) -> None:
        """Give every answer the room that the slots have now."""
        for i, own in enumerate(self.answers):
            wider = own.new_zeros(*own.shape[:2], self.slots.columns, own.shape[3])
            wider[:, :, : own.shape[2]] = own
            self.answers[i] = wider

    def keep(self, groups: Tensor, rows: Tensor, longest: int, used: int) -> None:
        self.prompts = [prompt[groups, :, :longest] for prompt in self.prompts]
        for i, own in enumerate(self.answers):
            kept = own.new_zeros(len(rows), own.shape[1], self.slots.columns, own.shape[3])
            kept[:, :, :used] = own[rows, :, :used]
            self.answers[i] = kept

    def get_seq_length(self) -> int:
        return max(self.slots.lengths) + max(self.slots.ages)


class PromptLayer(DynamicLayer):
    """One layer of a cache while prompts are computed: their keys and values go to their slots, and nothing else keeps them."""

    def __init__(self, layer: SlotLayer, start: int) -> None:
        super().__init__()
        self.layer, self.start = layer, start

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
        self.layer.write(self.start, (key_states, value_states))
        return key_states, value_states
