"""What the report states, as numbers: intervals per model, paired tests, costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pipelines.report.load import SFT, Model, Results, Training, optimiser_steps
from posttrain.evaluation.crossed import Crossed, crossed_difference, crossed_mean
from posttrain.evaluation.statistics import (
    Floats,
    Interval,
    PairedTest,
    Resampling,
    bootstrap,
    holm,
    is_binary,
    mean_interval,
    paired,
    pass_at_k_by_prompt,
    per_prompt,
    wilson,
)

Estimate = Callable[[Floats, Resampling], Interval]


@dataclass(frozen=True)
class Question:
    """What is asked of the runs: which reward is accuracy, which are reward models, how sure to be."""

    accuracy: str
    rewards: tuple[str, ...]
    reward_models: tuple[str, ...]
    pass_k: tuple[int, ...]
    resampling: Resampling

    @property
    def alpha(self) -> float:
        return 1 - self.resampling.confidence


@dataclass(frozen=True)
class Summary:
    """One row of the report: base, sft, or an algorithm over all its seeds. None is a number that was not measured."""

    name: str
    seeds: tuple[int, ...]
    accuracy: Interval
    by_seed: tuple[float, ...]
    """Accuracy of every seed's model, in the order of `seeds`; for base and sft the one accuracy."""
    pass_at: dict[int, Interval | None]
    rewards: dict[str, Interval | None]
    win_rate: Interval | None
    """Against sft: see `wins`. None for sft itself."""
    kl: Interval | None
    length: Interval | None
    truncated: Interval | None
    entropy: Interval | None
    preference: float | None


@dataclass(frozen=True)
class Pair:
    """Is `a` better than `b`? `adjusted` is Holm's p over all pairs of the report."""

    a: str
    b: str
    test: PairedTest
    adjusted: float
    significant: bool


@dataclass(frozen=True)
class Cost:
    """Work that does not depend on the machine, as the journals count it; the mean over seeds for an algorithm."""

    name: str
    runs: int
    tokens_sampled: float | None
    tokens_trained: float | None
    optimiser_steps: float


@dataclass(frozen=True)
class Comparison:
    question: Question
    prompts: int
    summaries: list[Summary]
    pairs: list[Pair]
    costs: list[Cost]
    heldout: Interval | None
    """The reward model's accuracy on held-out pairs."""
    heldout_loss: float | None

    @property
    def about_training(self) -> bool:
        """True if every algorithm has two or more seeds, so that the tests speak of training and not of these runs only."""
        return min((len(summary.seeds) for summary in self.algorithms), default=0) > 1

    def of(self, name: str) -> Summary:
        return next(summary for summary in self.summaries if summary.name == name)

    def pair(self, a: str, b: str) -> Pair:
        """The test of two models in the order in which it was made."""
        return next(pair for pair in self.pairs if {pair.a, pair.b} == {a, b})

    @property
    def algorithms(self) -> list[Summary]:
        return [summary for summary in self.summaries if summary.seeds]


def compare(results: Results, question: Question) -> Comparison:
    """All numbers of the report."""
    heldout, loss = _reward_model(results.reward, question.resampling.confidence)
    return Comparison(
        question,
        len(results.prompts.prompt_ids),
        [_summary(name, results.of(name), results.of(SFT), question) for name in results.groups],
        _pairs(results, question),
        _costs(results),
        heldout,
        loss,
    )


def greedy(models: Sequence[Model], source: str) -> Floats:
    """[prompts, models]: the reward of each model's greedy answer."""
    return np.stack([model.predictions.numbers[f"reward_{source}"][:, 0] for model in models], axis=1)


def sampled(models: Sequence[Model], column: str) -> Floats:
    """[prompts, models x samples] without the greedy answers."""
    return np.concatenate([model.predictions.numbers[column][:, 1:] for model in models], axis=1)


def wins(values: Floats, others: Floats) -> Floats:
    """[prompts]: how often one of `values` [prompts, n] is above one of `others` [prompts, m] of its prompt, a tie counting as half.

    Over all pairs that are known; NaN for a prompt without one.
    """
    gaps = values[:, :, None] - others[:, None, :]
    return per_prompt(np.where(np.isnan(gaps), np.nan, 0.5 + 0.5 * np.sign(gaps)).reshape(len(values), -1))


def _summary(name: str, models: Sequence[Model], sft: Sequence[Model], question: Question) -> Summary:
    source, draws = question.accuracy, question.resampling
    accuracy = greedy(models, source)

    def over_samples(column: str, estimate: Estimate) -> Interval | None:
        return _if_known(sampled(models, column), estimate, draws)

    won = wins(sampled(models, f"reward_{source}"), sampled(sft, f"reward_{source}"))
    preferences = [model.metrics["preference/accuracy"] for model in models if "preference/accuracy" in model.metrics]
    return Summary(
        name=name,
        seeds=tuple(model.seed for model in models if model.seed is not None),
        accuracy=_level(accuracy, draws),
        by_seed=tuple(float(np.nanmean(accuracy[:, i])) for i in range(accuracy.shape[1])),
        pass_at={k: _pass_at(models, k, question) for k in question.pass_k},
        rewards={reward: over_samples(f"reward_{reward}", mean_interval) for reward in question.rewards},
        win_rate=None if name == SFT else _if_known(won, mean_interval, draws),
        kl=over_samples("kl", bootstrap),
        length=over_samples("tokens", bootstrap),
        truncated=over_samples("truncated", mean_interval),
        entropy=over_samples("entropy", bootstrap),
        preference=float(np.mean(preferences)) if len(preferences) == len(models) else None,
    )


def _level(scores: Floats, draws: Resampling) -> Interval:
    """Estimate a model's mean over [prompts, runs]: over seeds and prompts if there are several runs, else over prompts."""
    if scores.shape[1] < 2:
        return mean_interval(scores, draws)
    return _interval(crossed_mean(scores, draws.confidence))


def _interval(found: Crossed) -> Interval:
    return Interval(found.value, found.low, found.high, found.prompts, found.missing, found.method)


def _test(a: Floats, b: Floats, draws: Resampling, tests: int) -> PairedTest:
    """Compare [prompts, runs] with the same prompts of another algorithm, or with the one model that training starts from.

    With several seeds runs are the unit of replication (posttrain/evaluation/crossed.py); with one the test is over prompts.
    """
    if a.shape[1] < 2:
        return paired(a, b, draws, tests)
    found = crossed_difference(a, b, draws.confidence)
    return PairedTest(_interval(found), found.p, found.method)


def _if_known(values: Floats, estimate: Estimate, draws: Resampling) -> Interval | None:
    return estimate(values, draws) if np.isfinite(values).any() else None


def _pass_at(models: Sequence[Model], k: int, question: Question) -> Interval | None:
    """None where the reward is not simply right or wrong, or too few samples were drawn."""
    tables = [model.predictions.numbers[f"reward_{question.accuracy}"][:, 1:] for model in models]
    if not all(is_binary(table) for table in tables):
        return None
    values = np.stack([pass_at_k_by_prompt(table, k) for table in tables], axis=1)
    return _if_known(values, mean_interval, question.resampling)


def _pairs(results: Results, question: Question) -> list[Pair]:
    """Every algorithm against sft, and every two algorithms; one family for Holm's correction."""
    names = [(name, SFT) for name in results.algorithms] + list(combinations(results.algorithms, 2))
    answers = {name: greedy(results.of(name), question.accuracy) for name in (SFT, *results.algorithms)}
    tests = [_test(answers[a], answers[b], question.resampling, len(names)) for a, b in names]
    adjusted = holm([test.p for test in tests])
    return [Pair(a, b, test, p, p < question.alpha) for (a, b), test, p in zip(names, tests, adjusted, strict=True)]


def _costs(results: Results) -> list[Cost]:
    first = [_cost(run.name, [run], [round(run.summary["steps"])]) for run in (results.sft, results.reward)]
    aligned = []
    for name in results.algorithms:
        runs = [model.training for model in results.of(name) if model.training is not None]
        aligned.append(_cost(name, runs, [optimiser_steps(run, name) for run in runs]))
    return [*first, *aligned]


def _cost(name: str, runs: Sequence[Training], steps: Sequence[int]) -> Cost:
    return Cost(
        name,
        len(runs),
        _mean([run.last("tokens/sampled") for run in runs]),
        _mean([run.last("tokens/trained") for run in runs]),
        float(np.mean(steps)),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _reward_model(run: Training, confidence: float) -> tuple[Interval | None, float | None]:
    """Held-out accuracy with Wilson's interval over pairs; a tie counts as half a success."""
    accuracy, pairs = run.summary.get("heldout/accuracy"), run.summary.get("heldout/pairs")
    loss = run.summary.get("heldout/loss")
    if accuracy is None:
        return None, loss
    if not pairs:
        return Interval(accuracy, float("nan"), float("nan"), 0, 0, "no number of pairs was recorded"), loss
    low, high = wilson(accuracy * pairs, round(pairs), confidence)
    return Interval(accuracy, low, high, round(pairs), 0, "Wilson"), loss
