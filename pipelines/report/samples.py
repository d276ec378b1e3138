"""Select a few prompts and show every model's greedy answer side by side."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.report.analysis import Question, greedy
from pipelines.report.load import Model, Results


@dataclass(frozen=True)
class Card:
    """One model's answer. `mark` is right, wrong, partly or unjudged."""

    model: str
    group: str
    completion: str
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
    """Draw half of the prompts from those on which the models disagree, half from the rest; with several seeds, the first one answers."""
    models = [results.of(group)[0] for group in results.groups]
    rewards = greedy(models, question.accuracy)
    split = np.nanmax(np.nan_to_num(rewards), axis=1) != np.nanmin(np.nan_to_num(rewards), axis=1)
    generator = np.random.Generator(np.random.PCG64(seed))
    disagree, agree = (generator.permutation(np.flatnonzero(mask)).tolist() for mask in (split, ~split))
    first = disagree[: max((count + 1) // 2, count - len(agree))]
    rest = agree[: count - len(first)]
    rows = [(row, "selected because the models disagree") for row in first]
    rows += [(row, "selected from problems with equal scores") for row in rest]
    return [_example(results, models, question, row, why) for row, why in rows]


def _example(results: Results, models: list[Model], question: Question, row: int, why: str) -> Example:
    """Return one prompt with its cards."""
    shared = results.prompts
    return Example(shared.prompts[row], shared.answers[row], why, [_card(model, question, row) for model in models])


def _card(model: Model, question: Question, row: int) -> Card:
    """Return one model's answer."""
    numbers = {name: float(values[row, 0]) for name, values in model.predictions.numbers.items()}
    others = [name for name in question.rewards if name != question.accuracy]
    shown = [(name, numbers[f"reward_{name}"]) for name in others]
    return Card(
        model=model.name,
        group=model.group,
        completion=model.predictions.completions[row][0],
        tokens=round(numbers["tokens"]),
        truncated=numbers["truncated"] > 0,
        mark=_mark(numbers[f"reward_{question.accuracy}"]),
        rewards=[(name, "missing" if np.isnan(value) else f"{value:.2f}") for name, value in shown],
    )


def _mark(reward: float) -> str:
    """Return the mark for a reward."""
    if np.isnan(reward):
        return "unjudged"
    return {0.0: "wrong", 1.0: "right"}.get(reward, "partly")
