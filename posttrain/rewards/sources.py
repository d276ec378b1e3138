"""Named sources of reward. A source that fails is named; a missing reward is missing, never 0."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Literal, Protocol

from tqdm import tqdm

from posttrain.data.tokens import Tokens
from posttrain.errors import NotFiniteError, RewardError, RewardTimeoutError
from posttrain.models.inference import scores
from posttrain.models.policy import Scorer
from posttrain.rewards.calling import Outcome, RewardFunction, call
from posttrain.rewards.worker import Worker

OnFailure = Literal["stop", "skip"]
NAMED_ROWS = 5
"""Rows that a message lists."""


@dataclass(frozen=True)
class RewardBatch:
    """Answers as a source sees them: texts, token ids, and the columns of their problems. All lists have one entry an answer.

    ids: which row of its table an answer's problem is; empty where nobody knows, and then messages count answers instead.
    """

    prompts: list[Any]
    completions: list[str]
    tokens: list[Tokens]
    columns: dict[str, list[Any]]
    ids: list[Any] = field(default_factory=list)


class RewardSource(Protocol):
    """`failures` counts the answers that got no reward because the source failed ("failed") or took too long ("timed_out")."""

    name: str
    failures: Counter[str]

    def score(self, answers: RewardBatch) -> list[float | None]: ...


class FunctionReward:
    """A function of texts and columns, called here or, as a Worker, in a process of its own.

    on_failure: stop raises RewardError with the rows involved; skip says so on stderr and leaves those rows without a reward.
    """

    def __init__(
        self,
        name: str,
        function: RewardFunction | Worker,
        arguments: Mapping[str, Any] | None = None,
        on_failure: OnFailure = "stop",
    ) -> None:
        self.name, self.arguments, self.on_failure = name, dict(arguments or {}), on_failure
        self.call = function if isinstance(function, Worker) else partial(call, function)
        self.failures: Counter[str] = Counter()

    def score(self, answers: RewardBatch) -> list[float | None]:
        count = len(answers.completions)
        kind = "failed"
        try:
            outcome = self.call(answers.prompts, answers.completions, answers.columns, self.arguments)
        except RewardError as error:
            kind = "timed_out" if isinstance(error, RewardTimeoutError) else "failed"
            outcome = Outcome([None] * count, dict.fromkeys(range(count), str(error)))
        if outcome.failures:
            self._failed(kind, answers, outcome)
        return _checked(self.name, outcome.values, answers)

    def _failed(self, kind: str, answers: RewardBatch, outcome: Outcome) -> None:
        rows, message = sorted(outcome.failures), next(iter(outcome.failures.values()))
        verb = "took too long" if kind == "timed_out" else "failed"
        ids = [answers.ids[row] for row in rows] if answers.ids else rows
        listed = ", ".join(str(i) for i in dict.fromkeys(ids[:NAMED_ROWS])) + (", …" if len(rows) > NAMED_ROWS else "")
        what = (
            f"reward {self.name!r} {verb} on {len(rows)} of {len(answers.completions)} answers ({'rows' if answers.ids else 'answers'}"
            f" {listed}; the first to prompt {_short(answers.prompts[rows[0]])}: {_short(answers.completions[rows[0]])}): {message}"
        )
        if self.on_failure == "stop":
            failure = (RewardTimeoutError if kind == "timed_out" else RewardError)(
                f"{what}. Correct the function, or let such answers go without a reward: rewards.{self.name}.on_failure: skip"
                + (f"; a longer limit is rewards.{self.name}.timeout_seconds" if kind == "timed_out" else "")
            )
            if outcome.trace:
                failure.add_note(outcome.trace)
            raise failure
        self.failures[kind] += len(rows)
        tqdm.write(f"{what}; they go without a reward", file=sys.stderr)


class ModelReward:
    """A reward model; its mean on the training pairs is subtracted, since the score is free up to a constant."""

    def __init__(self, name: str, scorer: Scorer, mean: float, budget: int, bf16: bool = False) -> None:
        self.name, self.scorer, self.mean, self.budget, self.bf16 = name, scorer, mean, budget, bf16
        self.failures: Counter[str] = Counter()

    def score(self, answers: RewardBatch) -> list[float | None]:
        values = scores(self.scorer, answers.tokens, self.budget, self.bf16)
        # a model has a score for every answer: NaN is no missing reward here
        return _checked(self.name, [value - self.mean for value in values], answers, nan_is_missing=False)


def _short(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "…" + shown[0]


def _checked(
    name: str, values: Sequence[Any], answers: RewardBatch, *, nan_is_missing: bool = True
) -> list[float | None]:
    expected = len(answers.completions)
    if len(values) != expected:
        raise RewardError(
            f"reward {name!r} gave {len(values)} numbers for {expected} answers; it must give one each, None where it has none"
        )
    checked: list[float | None] = []
    broken = []
    for i, value in enumerate(values):
        if value is None or (nan_is_missing and isinstance(value, Real) and math.isnan(value)):
            checked.append(None)
        elif isinstance(value, Real):
            checked.append(float(value))
            broken += [] if math.isfinite(value) else [i]
        else:
            raise RewardError(f"reward {name!r} gave {value!r}; it must be a finite number or None")
    if broken:
        ids = [f"problem {answers.ids[i]}" for i in broken] if answers.ids else []
        raise NotFiniteError(f"reward {name!r} gave {values[broken[0]]!r}; it must be a finite number or None", ids)
    return checked
