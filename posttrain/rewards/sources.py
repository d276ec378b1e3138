"""Named sources of reward and their weighted sum. A source that fails is named; a missing reward is missing, never 0."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

from posttrain.data.tokens import Tokens
from posttrain.errors import ConfigError, NumericalError, RewardError
from posttrain.models.inference import scores
from posttrain.models.policy import Scorer
from posttrain.rewards.functions import BUILT_IN, RewardFunction
from posttrain.text import nearest


@dataclass(frozen=True)
class Judged:
    """Answers as a source sees them: texts, token ids, and the columns of their problems. All lists have one entry an answer."""

    prompts: list[Any]
    completions: list[str]
    tokens: list[Tokens]
    columns: dict[str, list[Any]]


class RewardSource(Protocol):
    name: str

    def score(self, answers: Judged) -> list[float | None]: ...


class FunctionReward:
    """A function of texts and columns."""

    def __init__(self, name: str, function: RewardFunction, arguments: Mapping[str, Any] | None = None) -> None:
        self.name, self.function, self.arguments = name, function, dict(arguments or {})

    def score(self, answers: Judged) -> list[float | None]:
        try:
            values = list(self.function(answers.prompts, answers.completions, **answers.columns, **self.arguments))
        except Exception as error:
            raise RewardError(
                f"reward {self.name!r} failed on {len(answers.completions)} answers: {type(error).__name__}: {error}"
            ) from error
        return _checked(self.name, values, len(answers.completions))


class ModelReward:
    """A reward model; its mean on the training pairs is subtracted, since the score is free up to a constant."""

    def __init__(self, name: str, scorer: Scorer, mean: float, budget: int, bf16: bool = False) -> None:
        self.name, self.scorer, self.mean, self.budget, self.bf16 = name, scorer, mean, budget, bf16

    def score(self, answers: Judged) -> list[float | None]:
        values = scores(self.scorer, answers.tokens, self.budget, self.bf16)
        return _checked(self.name, [value - self.mean for value in values], len(answers.tokens))


def find_function(name: str) -> RewardFunction:
    """A built-in by name, or `package.module:function`. Raises ConfigError where there is none."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(
            f"no reward function {name!r}{nearest(name, [*BUILT_IN, 'reward_model'])}, or give package.module:function"
        )
    try:
        function: RewardFunction = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot import the reward function {name!r}: {error}") from error
    return function


def weighted(rewards: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]) -> list[float]:
    """The weighted sum per answer; NaN where a source with a weight has no reward for it."""
    rows = len(next(iter(rewards.values())))
    totals = [0.0] * rows
    for name in sorted(weights):
        for i, value in enumerate(rewards[name]) if weights[name] else ():
            totals[i] += weights[name] * (math.nan if value is None else value)
    return totals


def _checked(name: str, values: Sequence[Any], expected: int) -> list[float | None]:
    if len(values) != expected:
        raise RewardError(
            f"reward {name!r} gave {len(values)} numbers for {expected} answers; it must give one each, None where it has none"
        )
    checked: list[float | None] = []
    for value in values:
        if value is None or (isinstance(value, Real) and math.isnan(value)):
            checked.append(None)
        elif isinstance(value, Real) and math.isfinite(value):
            checked.append(float(value))
        else:
            raise NumericalError(f"reward {name!r} gave {value!r}; it must be a finite number or None")
    return checked
