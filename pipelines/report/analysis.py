"""Compute the numbers of the report: intervals per model, paired tests, costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np

from pipelines.report.hacking import Watched, watched
from pipelines.report.load import SFT, Model, Results, Training, optimiser_steps
from pipelines.report.protocol import Currency, Protocol, main_panel, protocols
from pipelines.runtime.measures import GREEDY, SAMPLED, headline_name, in_words
from posttrain.evaluation.crossed import Crossed, Groups, crossed_difference, crossed_mean
from posttrain.evaluation.nearly_equal import UNBOUNDED
from posttrain.evaluation.runs import effect_size, interquartile_mean, probability_of_improvement
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
    share_interval,
    wilson,
)

Estimate = Callable[[Floats, Resampling], Interval]


@dataclass(frozen=True)
class Question:
    """Settings of the comparison: the accuracy reward, the reward models, and the confidence."""

    accuracy: str
    rewards: tuple[str, ...]
    reward_models: tuple[str, ...]
    pass_k: tuple[int, ...]
    resampling: Resampling
    headline: str = "sampled"
    """`sampled` or `greedy`: the answers whose mean reward `accuracy` ranks the models."""
    currency: Currency = "tokens_sampled"
    """The budget that must be equal for algorithms to be ranked together."""
    looks: int | Literal["always"] = 1
    """Looks that share the level, which `resampling` has already divided."""

    @property
    def measure(self) -> str:
        """Return the name of the headline measure in words."""
        return in_words(headline_name(self.headline))

    @property
    def alpha(self) -> float:
        """Return the significance level."""
        return 1 - self.resampling.confidence


@dataclass(frozen=True)
class Summary:
    """One row of the report: base, sft, or an algorithm over all its seeds. None means not measured."""

    name: str
    seeds: tuple[int, ...]
    headline: Interval
    """The measure that ranks the models, see `Question.headline`."""
    sampled: Interval
    """Mean of the reward `Question.accuracy` over the sampled answers: `sampled_accuracy`."""
    greedy: Interval
    """The same over the greedy answers: `greedy_accuracy`."""
    by_seed: tuple[float, ...]
    """The headline of each seed's model, in the order of `seeds`; one value for base and sft."""
    iqm: float | None
    """Interquartile mean of `by_seed` (2108.13264); None with one run."""
    pass_at: dict[int, Interval | None]
    rewards: dict[str, Interval | None]
    """Mean of each reward source over the sampled answers; that of `Question.accuracy` is `sampled`."""
    win_rate: Interval | None
    """Win rate against sft, see `wins`; None for sft itself."""
    kl: Interval | None
    length: Interval | None
    truncated: Interval | None
    not_found: float | None
    """Share of answers in which the judge `answer` found no answer; they count as wrong."""
    entropy: Interval | None
    preference: float | None
    second_task: float | None
    """Accuracy of the greedy answers to `evaluation.second_task`."""

    @property
    def measures(self) -> dict[str, Interval]:
        """Return both measures of accuracy by their names."""
        return {SAMPLED: self.sampled, GREEDY: self.greedy}


@dataclass(frozen=True)
class Pair:
    """The test of model `a` against model `b`; `adjusted` is Holm's p over all pairs of the report.

    Attributes:
        effect: Hedges' g of the runs' headline values; None unless both sides have several runs that differ.
        improvement: chance that a run of `a` scores above a run of `b` (2108.13264), ties counting half; None with one run each.
    """

    a: str
    b: str
    test: PairedTest
    adjusted: float
    significant: bool
    effect: float | None = None
    improvement: float | None = None


@dataclass(frozen=True)
class Cost:
    """Work from the journals, independent of the machine; for an algorithm, the mean over its seeds."""

    name: str
    runs: int
    tokens_sampled: float | None
    tokens_trained: float | None
    optimiser_steps: float

    @property
    def tokens(self) -> float:
        """Return the tokens sampled and trained on together."""
        return (self.tokens_sampled or 0.0) + (self.tokens_trained or 0.0)


@dataclass(frozen=True)
class Comparison:
    """All numbers of the report."""

    question: Question
    prompts: int
    summaries: list[Summary]
    pairs: list[Pair]
    costs: list[Cost]
    heldout: Interval | None
    """The reward model's accuracy on held-out pairs."""
    heldout_loss: float | None
    protocols: Mapping[str, Protocol] = field(default_factory=dict)
    """The protocol of each algorithm; without one, all are ranked together."""
    graded: bool = False
    """True if the reward `question.accuracy` is not 0 or 1 for each answer, so that its mean is no share of right answers."""
    watched: Mapping[str, Watched] = field(default_factory=dict)
    """Algorithms whose runs logged a true reward and a reward model's score, with the runs that diverged."""

    @property
    def panel(self) -> list[Summary]:
        """Return the algorithms that the headline ranks: the largest group with equal protocols."""
        known = {s.name: s.headline.value for s in self.algorithms}
        names = main_panel({n: p for n, p in self.protocols.items() if n in known}, known) or list(known)
        return [summary for summary in self.algorithms if summary.name in names]

    def apart(self) -> dict[str, list[str]]:
        """Return the algorithms that are not ranked, each with the cells of its protocol that differ from the panel's."""
        names = [summary.name for summary in self.panel]
        return {
            s.name: self.protocols[s.name].differs(self.protocols[names[0]], self.question.currency)
            for s in self.algorithms
            if s.name not in names
        }

    @property
    def about_training(self) -> bool:
        """Return True if every algorithm has at least two seeds, so that the tests are about training and not only about these runs."""
        return min((len(summary.seeds) for summary in self.algorithms), default=0) > 1

    def of(self, name: str) -> Summary:
        """Return the summary of one model."""
        return next(summary for summary in self.summaries if summary.name == name)

    def pair(self, a: str, b: str) -> Pair:
        """Return the test of two models, in the order in which it was computed."""
        return next(pair for pair in self.pairs if {pair.a, pair.b} == {a, b})

    @property
    def algorithms(self) -> list[Summary]:
        """Return the summaries of the algorithms, without base and sft."""
        return [summary for summary in self.summaries if summary.seeds]


def compare(results: Results, question: Question, seconds: Mapping[str, float] | None = None) -> Comparison:
    """Compute all numbers of the report. `seconds` of one run of each algorithm is read if the currency is wall time."""
    heldout, loss = _reward_model(results.reward, question.resampling.confidence)
    costs = _costs(results)
    spent: Mapping[str, float | None] = seconds or {}
    if question.currency != "wall_time":
        spent = {cost.name: getattr(cost, question.currency) for cost in costs}
    return Comparison(
        question,
        len(results.prompts.prompt_ids),
        [_summary(name, results.of(name), results.of(SFT), question) for name in results.groups],
        _pairs(results, question),
        costs,
        heldout,
        loss,
        protocols(results, spent),
        _least(results.models, question.accuracy) == UNBOUNDED,
        watched(results, question.accuracy, question.reward_models),
    )


def greedy(models: Sequence[Model], source: str) -> Floats:
    """Return the reward of each model's greedy answer, [prompts, models]."""
    return np.stack([model.predictions.numbers[f"reward_{source}"][:, 0] for model in models], axis=1)


def sampled(models: Sequence[Model], column: str) -> Floats:
    """Return a column of the sampled answers, [prompts, models x samples]."""
    return np.concatenate([model.predictions.numbers[column][:, 1:] for model in models], axis=1)


def scored(models: Sequence[Model], question: Question) -> Floats:
    """Return each model's headline score per prompt, [prompts, models]: its greedy answer, or the mean of its sampled answers."""
    if question.headline == "greedy":
        return greedy(models, question.accuracy)
    return sampled_means(models, question.accuracy)


def sampled_means(models: Sequence[Model], source: str) -> Floats:
    """Return the mean reward of each model's sampled answers per prompt, [prompts, models]."""
    return np.stack([per_prompt(sampled([model], f"reward_{source}")) for model in models], axis=1)


def run_means(scores: Floats) -> tuple[float, ...]:
    """Return each run's mean over the prompts that it has a score for, from [prompts, runs]."""
    return tuple(float(np.nanmean(scores[:, i])) for i in range(scores.shape[1]))


def wins(values: Floats, others: Floats) -> Floats:
    """Return the win rate of `values` [prompts, n] against `others` [prompts, m] per prompt, [prompts]; a tie counts half.

    Only pairs of known values count; a prompt without one gets NaN.
    """
    gaps = values[:, :, None] - others[:, None, :]
    return per_prompt(np.where(np.isnan(gaps), np.nan, 0.5 + 0.5 * np.sign(gaps)).reshape(len(values), -1))


def _summary(name: str, models: Sequence[Model], sft: Sequence[Model], question: Question) -> Summary:
    """Compute one row of the report."""
    source, draws, groups = question.accuracy, question.resampling, models[0].predictions.groups
    scores, least = scored(models, question), _least(models, source)

    def over_samples(column: str, estimate: Estimate) -> Interval | None:
        return _if_known(sampled(models, column), estimate, draws)

    measures = {
        "sampled": _level(sampled_means(models, source), draws, groups, least),
        "greedy": _level(greedy(models, source), draws, groups, least),
    }
    won = wins(sampled(models, f"reward_{source}"), sampled(sft, f"reward_{source}"))
    return Summary(
        name=name,
        seeds=tuple(model.seed for model in models if model.seed is not None),
        headline=measures[question.headline],
        **measures,
        by_seed=run_means(scores),
        iqm=interquartile_mean(run_means(scores)) if scores.shape[1] > 1 else None,
        pass_at={k: _pass_at(models, k, question) for k in question.pass_k},
        rewards={reward: over_samples(f"reward_{reward}", mean_interval) for reward in question.rewards}
        | {source: measures["sampled"]},
        win_rate=None if name == SFT else _if_known(won, share_interval, draws),
        kl=over_samples("kl", bootstrap),
        length=over_samples("tokens", bootstrap),
        truncated=over_samples("truncated", mean_interval),
        entropy=over_samples("entropy", bootstrap),
        not_found=_mean_metric(models, "answers/not_found"),
        preference=_mean_metric(models, "preference/accuracy"),
        second_task=_mean_metric(models, "second_task/accuracy"),
    )


def _mean_metric(models: Sequence[Model], name: str) -> float | None:
    """Return the mean of a metric over the models, None unless all have it."""
    values = [model.metrics[name] for model in models if name in model.metrics]
    return float(np.mean(values)) if len(values) == len(models) else None


def _least(models: Sequence[Model], source: str) -> float:
    """Return the least mean that the reward can have: 0 if every answer is right or wrong, which also bounds it by 1, else no bound."""
    return 0.0 if all(is_binary(m.predictions.numbers[f"reward_{source}"]) for m in models) else UNBOUNDED


def _level(scores: Floats, draws: Resampling, groups: Groups = None, least: float = UNBOUNDED) -> Interval:
    """Estimate a model's mean over [prompts, runs]: over seeds and prompts if there are several runs, else over prompts."""
    if scores.shape[1] < 2 and groups is None:
        return mean_interval(scores, draws, shares=least == 0)
    return _interval(crossed_mean(scores, draws.confidence, groups, least), least)


def _interval(found: Crossed, least: float) -> Interval:
    """Convert a crossed estimate to an interval, cut at the values that are possible: from 0 (or -1, of a difference) to 1."""
    low, high = (found.low, found.high) if least == UNBOUNDED else (max(found.low, least), min(found.high, 1.0))
    return Interval(found.value, low, high, found.prompts, found.missing, found.method)


def _test(
    a: Floats, b: Floats, draws: Resampling, tests: int, groups: Groups = None, least: float = UNBOUNDED
) -> PairedTest:
    """Compare [prompts, runs] with the same prompts of a second algorithm, or with the model that training starts from.

    With several seeds, runs are the unit of replication (posttrain/evaluation/crossed.py); with one seed, the test is over prompts. If
    prompts come in groups, it is over groups.
    """
    if a.shape[1] < 2 and groups is None:
        return paired(a, b, draws, tests, shares=least == -1)
    found = crossed_difference(a, b, draws.confidence, groups=groups, least=least)
    return PairedTest(_interval(found, least), found.p, found.method)


def _if_known(values: Floats, estimate: Estimate, draws: Resampling) -> Interval | None:
    """Return the estimate, or None if all values are NaN."""
    return estimate(values, draws) if np.isfinite(values).any() else None


def _pass_at(models: Sequence[Model], k: int, question: Question) -> Interval | None:
    """Return pass@k, or None if the reward is not binary or the samples are too few."""
    tables = [model.predictions.numbers[f"reward_{question.accuracy}"][:, 1:] for model in models]
    if not all(is_binary(table) for table in tables):
        return None
    values = np.stack([pass_at_k_by_prompt(table, k) for table in tables], axis=1)
    return _if_known(values, share_interval, question.resampling)


def _pairs(results: Results, question: Question) -> list[Pair]:
    """Test every algorithm against sft, and every two algorithms, as one family for Holm's correction."""
    names = [(name, SFT) for name in results.algorithms] + list(combinations(results.algorithms, 2))
    answers = {name: scored(results.of(name), question) for name in (SFT, *results.algorithms)}
    groups, least = results.prompts.groups, _least(results.models, question.accuracy) - 1
    tests = [_test(answers[a], answers[b], question.resampling, len(names), groups, least) for a, b in names]
    adjusted = holm([test.p for test in tests])
    runs = {name: run_means(scores) for name, scores in answers.items()}
    return [
        Pair(a, b, test, p, p < question.alpha, *_over_runs(runs[a], runs[b]))
        for (a, b), test, p in zip(names, tests, adjusted, strict=True)
    ]


def _over_runs(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, float | None]:
    """Return Hedges' g and the probability of improvement of two algorithms' runs, None if there are too few runs."""
    if max(len(a), len(b)) < 2:
        return None, None
    effect = effect_size(a, b)
    return (None if np.isnan(effect) else effect), probability_of_improvement(a, b)


def _costs(results: Results) -> list[Cost]:
    """Return the costs of sft, the reward model and every algorithm."""
    first = [_cost(run.name, [run], [round(run.summary["steps"])]) for run in (results.sft, results.reward)]
    aligned = []
    for name in results.algorithms:
        runs = [model.training for model in results.of(name) if model.training is not None]
        aligned.append(_cost(name, runs, [optimiser_steps(run, name) for run in runs]))
    return [*first, *aligned]


def _cost(name: str, runs: Sequence[Training], steps: Sequence[int]) -> Cost:
    """Return the mean cost of the runs."""
    return Cost(
        name,
        len(runs),
        _mean([run.last("tokens/sampled") for run in runs]),
        _mean([run.last("tokens/trained") for run in runs]),
        float(np.mean(steps)),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if a value is missing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _reward_model(run: Training, confidence: float) -> tuple[Interval | None, float | None]:
    """Return the held-out accuracy with Wilson's interval over pairs (a tie counts half), and the loss."""
    accuracy, pairs = run.summary.get("heldout/accuracy"), run.summary.get("heldout/pairs")
    loss = run.summary.get("heldout/loss")
    if accuracy is None:
        return None, loss
    if not pairs:
        return Interval(accuracy, float("nan"), float("nan"), 0, 0, "no number of pairs was recorded"), loss
    low, high = wilson(accuracy * pairs, round(pairs), confidence)
    return Interval(accuracy, low, high, round(pairs), 0, "Wilson"), loss
