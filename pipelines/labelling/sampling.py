"""Sample answers to judge from one or several models."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipelines.labelling.session import Answer, Ask, Item, pair_up
from pipelines.runtime.redaction import printable
from posttrain.errors import DataError

if TYPE_CHECKING:
    from posttrain.api import Model

AT_ONCE = 64
"""Prompts that are answered in one batch."""
CANDIDATES = 4
"""Times as many items as wanted, from which the closest ones are chosen."""
Score = Callable[[Sequence[tuple[Any, str]]], list[float]]
"""Return one number for each (prompt, answer)."""


@dataclass(frozen=True)
class Sampling:
    """`answers` per model and prompt; the seed decides prompts and answers."""

    answers: int
    max_new_tokens: int
    temperature: float
    seed: int


def sample_items(
    models: Sequence[tuple[str, str, Model]], prompts: Sequence[Any], count: int, ask: Ask, sampling: Sampling
) -> list[Item]:
    """Return up to `count` items with different answers, from prompts in an order that the seed decides.

    Args:
        models: name, hash of the weights, and model.

    Raises:
        DataError: no prompt got two different answers.
    """
    order = random.Random(f"prompts/{sampling.seed}").sample(range(len(prompts)), len(prompts))
    found = list(islice(_items(models, [prompts[i] for i in order], ask, sampling), count))
    if not found:
        raise DataError(
            f"none of {len(prompts)} prompts got two different answers, so there is nothing to compare. Give a second model,"
            " or raise --temperature or --answers."
        )
    return found


def closest(items: Sequence[Item], score: Score, count: int) -> list[Item]:
    """Return the items whose answers have the closest scores, the closest first: the reward model is least sure about them."""
    flat = iter(score([(item.prompt, answer.text) for item in items for answer in item.answers]))
    scores = [[next(flat) for _ in item.answers] for item in items]
    order = sorted(range(len(items)), key=lambda i: (max(scores[i]) - min(scores[i]), i))
    return [items[i] for i in order[:count]]


def most_disputed(items: Sequence[Item], spread: Score, count: int) -> list[Item]:
    """Return the items on whose answers the heads of the reward model differ most on average, the most disputed first."""
    flat = iter(spread([(item.prompt, answer.text) for item in items for answer in item.answers]))
    spreads = [sum(next(flat) for _ in item.answers) / len(item.answers) for item in items]
    order = sorted(range(len(items)), key=lambda i: (-spreads[i], i))
    return [items[i] for i in order[:count]]


def _report(progress: str) -> None:
    """Print the progress on stderr, since sampling takes minutes on a slow machine."""
    print(f"label: {printable(progress)}", file=sys.stderr, flush=True)


def _items(
    models: Sequence[tuple[str, str, Model]], prompts: Sequence[Any], ask: Ask, sampling: Sampling
) -> Iterator[Item]:
    number = 0
    for start in range(0, len(prompts), AT_ONCE):
        batch = prompts[start : start + AT_ONCE]
        texts = []
        for place, (name, md5, model) in enumerate(models):
            for draw in range(sampling.answers):
                _report(
                    f"{name} answers {len(batch)} prompts, {draw + 1} of {sampling.answers} times; {number} items so far"
                )
                # every draw has its own random numbers
                seed = ((sampling.seed * 1009 + start) * 101 + place) * 101 + draw
                answered = model.generate(
                    batch, max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, seed=seed
                )
                texts.append((name, md5, answered))
        for i, prompt in enumerate(batch):
            answers = [Answer(written[i], name, md5) for name, md5, written in texts]
            if ask == "pairs":
                made = pair_up(prompt, answers, number)
            else:
                different = tuple({answer.text: answer for answer in answers}.values())
                made = [Item(str(number), prompt, different)] if len(different) > 1 else []
            yield from made
            number += len(made)
