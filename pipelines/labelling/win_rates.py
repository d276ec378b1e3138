"""How often people preferred one model's answer to another's, over all sessions in labels/."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pipelines.labelling.judgements import JUDGE, SKIP
from pipelines.labelling.session import AGAIN, FOLDER
from posttrain.errors import DataError
from posttrain.evaluation.statistics import wilson

Weights = tuple[str, str]
"""Name of a model as its session has it, and the hash of its weights."""


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons that a model won; a tie, or two bad answers, are half a win.

    Attributes:
        prompts: prompts with a comparison. Each counts once, however many people judged it and in however many pairs.
        low, high: Wilson's 95 % interval over prompts. It is wide enough for shares that are means of several judgements.
    """

    model: Weights
    against: Weights
    share: float
    low: float
    high: float
    prompts: int
    judgements: int

    @property
    def words(self) -> str:
        """Return the result in one sentence."""
        return (
            f"People preferred {self.model[0]} to {self.against[0]} in {100 * self.share:.0f} % of the comparisons (95 % interval"
            f" {100 * self.low:.0f} to {100 * self.high:.0f} %) of {self.prompts} prompts, {self.judgements} judgements."
        )


def win_rates(project: Path) -> list[WinRate]:
    """Return the win rate of every two models that people compared, sorted by hash. Raises DataError for a damaged file."""
    names: dict[str, str] = {}
    by_pair: dict[tuple[str, str], dict[str, list[float]]] = {}
    for record in _judgements(project):
        for one, other, score in _comparisons(record):
            names |= {md5: name for name, md5 in (one, other)}
            pair, gained = ((one[1], other[1]), score) if one[1] < other[1] else ((other[1], one[1]), 1 - score)
            prompt = json.dumps(record["prompt"], sort_keys=True)
            by_pair.setdefault(pair, {}).setdefault(prompt, []).append(gained)
    return [
        _rate((names[one], one), (names[other], other), [*scores.values()])
        for (one, other), scores in sorted(by_pair.items())
    ]


def win_rate(project: Path, md5: str, against: str) -> WinRate | None:
    """Return how often the first weights were preferred to the second; None if nobody compared them."""
    for rate in win_rates(project):
        if (rate.model[1], rate.against[1]) == (md5, against):
            return rate
        if (rate.model[1], rate.against[1]) == (against, md5):
            turned = (rate.against, rate.model, 1 - rate.share, 1 - rate.high, 1 - rate.low)
            return WinRate(*turned, rate.prompts, rate.judgements)
    return None


def _rate(model: Weights, against: Weights, scores: list[list[float]]) -> WinRate:
    """Return the mean over prompts of the mean over each prompt's judgements."""
    wins, prompts = sum(sum(each) / len(each) for each in scores), len(scores)
    return WinRate(model, against, wins / prompts, *wilson(wins, prompts), prompts, sum(map(len, scores)))


def _judgements(project: Path) -> Iterator[dict[str, Any]]:
    """Yield the judgements of people that count, of all sessions."""
    for path in sorted((project / FOLDER).glob("*/judgements.jsonl")):
        try:
            records = [json.loads(line) for line in path.read_bytes().splitlines()]
            yield from (
                r
                for r in records
                if r["value"] != SKIP and not r["task"].endswith(AGAIN) and not r["annotator"].startswith(JUDGE)
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is damaged ({error}); `posttrain label --summary {path.parent.name}` writes it anew"
            ) from error


def _counts(record: dict[str, Any]) -> bool:
    """Return True for a judgement of a person that was neither skipped nor repeated."""
    skipped = record["value"] == SKIP or record["task"].endswith(AGAIN)
    return not skipped and not record["annotator"].startswith(JUDGE)


def _comparisons(record: dict[str, Any]) -> Iterator[tuple[Weights, Weights, float]]:
    """Yield (model, other model, score of the first) for every two answers of different weights."""
    value, answers = record["value"], [(each["model"], each["md5"]) for each in record["answers"]]
    for i, j in combinations(range(len(answers)), 2):
        if answers[i][1] != answers[j][1]:
            yield answers[i], answers[j], _score(record["ask"], value, i, j)


def _score(ask: str, value: Any, i: int, j: int) -> float:
    """Return 1 if answer i was preferred to answer j, 0 for the reverse, else 1/2."""
    if ask == "pairs":
        return float(value == i) if isinstance(value, int) else 0.5
    level = {answer: -place for place, answer in enumerate(value)} if ask == "ranking" else dict(enumerate(value))
    return 0.5 * (1 + (level[i] > level[j]) - (level[i] < level[j]))
