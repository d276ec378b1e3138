"""Select a few prompts and show every model's greedy answer side by side."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from pipelines.report.analysis import Question, greedy
from pipelines.report.load import SFT, Model, Results

WHY = (
    "selected because the aligned models disagree",
    "selected because every aligned model fails",
    "selected from problems with equal scores",
)


@dataclass(frozen=True)
class Card:
    """One model's answer. `mark` is right, wrong, partly or unjudged."""

    model: str
    group: str
    same: str
    """The start of the answer that it shares with SFT's answer,"""
    differs: str
    """and the rest, which is marked."""
    tokens: int
    truncated: bool
    mark: str
    rewards: list[tuple[str, str]]


@dataclass(frozen=True)
class Example:
    """One prompt with the answers of all models."""

    prompt: str
    answer: str
    why: str
    cards: list[Card]


def examples(results: Results, question: Question, count: int, seed: int) -> list[Example]:
    """Draw half of the prompts from those on which the aligned models disagree, then some that all of them fail, then others.

    With several seeds, the first one answers.
    """
    models = [results.of(group)[0] for group in results.groups]
    aligned = np.nan_to_num(greedy([results.of(name)[0] for name in results.algorithms], question.accuracy))
    split = aligned.max(axis=1) != aligned.min(axis=1)
    failed = aligned.max(axis=1) <= 0
    generator = np.random.Generator(np.random.PCG64(seed))
    kinds = list(zip(WHY, (split, ~split & failed, ~split & ~failed), strict=True))
    drawn = [(why, generator.permutation(np.flatnonzero(mask)).tolist()) for why, mask in kinds]
    rows = [(row, why) for (why, found), most in zip(drawn, _shares(count), strict=True) for row in found[:most]]
    chosen = {row for row, _ in rows}
    rest = [(row, why) for why, found in drawn for row in found if row not in chosen]
    rows += rest[: count - len(rows)]
    return [_example(results, models, question, row, why) for row, why in rows]


def _shares(count: int) -> tuple[int, int, int]:
    """Return how many prompts of each kind are wanted: half, a quarter, a quarter."""
    half = (count + 1) // 2
    return half, (count - half + 1) // 2, (count - half) // 2


def _example(results: Results, models: list[Model], question: Question, row: int, why: str) -> Example:
    """Return one prompt with its cards."""
    shared = results.prompts
    before = next(model for model in models if model.group == SFT).predictions.completions[row][0]
    cards = [_card(model, question, row, before) for model in models]
    return Example(shared.prompts[row], shared.answers[row], why, cards)


def _card(model: Model, question: Question, row: int, before: str) -> Card:
    """Return one model's answer, split where it leaves SFT's answer `before`."""
    text = model.predictions.completions[row][0]
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, before, strict=False)))
    numbers = {name: float(values[row, 0]) for name, values in model.predictions.numbers.items()}
    others = [name for name in question.rewards if name != question.accuracy]
    shown = [(name, numbers[f"reward_{name}"]) for name in others]
    return Card(
        model=model.name,
        group=model.group,
        same=text[:shared],
        differs=text[shared:],
        tokens=round(numbers["tokens"]),
        truncated=numbers["truncated"] > 0,
        mark=_mark(numbers[f"reward_{question.accuracy}"]),
        rewards=[(name, "missing" if np.isnan(value) else f"{value:.2f}".replace("-", "−")) for name, value in shown],
    )


def _mark(reward: float) -> str:
    """Return the mark for a reward."""
    if np.isnan(reward):
        return "unjudged"
    return {0.0: "wrong", 1.0: "right"}.get(reward, "partly")
