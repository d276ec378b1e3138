"""Keys and values of finished answers, so that the next turn of a conversation computes only its new tokens.

Example:
    Room for ten tokens: the states of an answer are stored under its ids, and given once to each request that continues it:

    >>> kept = KeptStates(max_tokens=10)
    >>> states = (torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    >>> kept.add((5, 6, 7, 8), states), kept.add((5, 6, 7, 8, 9, 1, 2), states)
    (True, False)
    >>> kept.expect([((5, 6, 7, 8, 9, 3), 5)])
    >>> kept.take((5, 6, 7, 8, 9, 3)) is states, kept.tokens
    (True, 0)
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from posttrain.rollouts.slots import Pair, Slots

Ids = tuple[int, ...]


class KeptStates:
    """The states of answers that a later request may continue, each [layers, key heads, tokens, size] for keys and for values."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens, self.tokens = max_tokens, 0
        self.states: dict[Ids, Pair] = {}
        self.known: dict[Ids, Ids] = {}
        """Prompts that are expected, with the ids whose states they continue."""
        self.uses: Counter[Ids] = Counter()

    def expect(self, prompts: Iterable[tuple[Ids, int]]) -> None:
        """Name the prompts that follow, each with its number of `known` tokens; states that none continues are dropped.

        The newest known token ended an answer: it was drawn, and its states were never computed.
        """
        pairs = [(prompt, prompt[: known - 1]) for prompt, known in prompts if prompt[: known - 1] in self.states]
        self.known, self.uses = dict(pairs), Counter(ids for _, ids in pairs)
        for ids in [ids for ids in self.states if ids not in self.uses]:
            self._drop(ids)

    def holds(self, prompt: Ids) -> bool:
        """Return True if states of the prompt's beginning are kept."""
        return self.known.get(prompt) in self.states

    def take(self, prompt: Ids) -> Pair:
        """Return the states of the prompt's beginning. They are dropped with the last prompt that continues them."""
        ids = self.known[prompt]
        states = self.states[ids]
        self.uses[ids] -= 1
        if not self.uses[ids]:
            self._drop(ids)
        return states

    def add(self, ids: Ids, states: Pair) -> bool:
        """Keep the states of `ids`. Return False if there is no room."""
        if ids in self.states or self.tokens + len(ids) > self.max_tokens:
            return ids in self.states
        self.states[ids] = states
        self.tokens += len(ids)
        return True

    def add_answer(self, slots: Slots, row: int, ids: Ids) -> None:
        """Keep the states of an active answer. `ids` are its prompt and its tokens but for the newest one."""
        if ids in self.states or self.tokens + len(ids) > self.max_tokens:
            return
        # from the counts that the host knows: reading a tensor would make a GPU wait
        group = bisect_right(list(accumulate(slots.counts)), row)
        prompt = slots.lengths[group]
        keys, values = (
            torch.stack(
                [
                    torch.cat([layer.prompts[i][group, :, :prompt], layer.answers[i][row, :, : len(ids) - prompt]], 1)
                    for layer in slots.layers
                ]
            )
            for i in (0, 1)
        )
        self.add(ids, (keys, values))

    def _drop(self, ids: Ids) -> None:
        del self.states[ids]
        self.tokens -= len(ids)


def side_by_side(states: Sequence[Pair]) -> list[Pair]:
    """Return the states of several prompts for every layer: keys and values [prompts, key heads, longest, size], zeros on the right."""
    longest = max(keys.shape[2] for keys, _ in states)
    placed = []
    for i in (0, 1):
        layers, heads, _, size = states[0][i].shape
        padded = states[0][i].new_zeros(layers, len(states), heads, longest, size)
        for row, pair in enumerate(states):
            padded[:, row, :, : pair[i].shape[2]] = pair[i]
        placed.append(padded)
    return list(zip(*placed, strict=True))


def closed_up(pair: Pair, known: Tensor, longest: int, new: int) -> Pair:
    """Move each row's `new` columns, which begin at column `longest`, to the end of its `known` ones."""
    columns = torch.arange(longest + new, device=known.device).expand(len(known), -1)
    columns = torch.where(columns < known[:, None], columns, columns - known[:, None] + longest)
    columns = columns.clamp(max=longest + new - 1)[:, None, :, None]
    keys, values = (states.gather(2, columns.expand(-1, states.shape[1], -1, states.shape[3])) for states in pair)
    return keys, values
