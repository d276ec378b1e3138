"""Decide whether a challenger may replace the champion: a pure function of their answers to the same prompts and seeds.

Every check is one-sided towards caution: a gain that is not shown counts as a loss, and an answer without a reward is not
counted as right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.promotion.gain import Gain, gain
from posttrain.errors import DataError
from posttrain.evaluation.nearly_equal import no_interval
from posttrain.evaluation.statistics import Floats, Interval, Resampling

Prompt = tuple[int, str, str]
"""Identity of a prompt: its id, its text and its gold answer."""


@dataclass(frozen=True)
class SampledAnswers:
    """One model's sampled answers, [prompts, samples] each. An unknown reward is NaN."""

    name: str
    prompts: tuple[Prompt, ...]
    reward: Floats
    """The true reward, which `evaluation.accuracy` names."""
    scores: Mapping[str, Floats]
    """Score of each reward model, by its name."""
    kl: Floats
    """log policy - log supervised model, summed over the response, in nats."""
    tokens: Floats
    truncated: Floats
    """1 if the response was cut off before its end, else 0."""
    formatted: Floats | None = None
    """1 if the response has the required format, else 0; None if no format is required."""
    benchmarks: Mapping[tuple[str, str], Floats] = field(default_factory=dict)
    """Values over documents by task and metric of lm-eval; empty if the metric is no mean over documents."""
    groups: tuple[str, ...] | None = None
    """The value of `evaluation.groups` of each prompt; None if prompts are independent."""


@dataclass(frozen=True)
class BenchmarkMargin:
    """A benchmark to keep; `BenchmarkLimit` documents the fields."""

    task: str
    metric: str
    tolerated_loss: float
    lower_is_better: bool = False

    @property
    def name(self) -> str:
        """Return the check's name."""
        return f"benchmark/{self.task}/{self.metric}"


@dataclass(frozen=True)
class GateLimits:
    """The limits of the gate; `GateParams` documents each one."""

    tolerated_loss: float
    max_kl: float
    max_length_ratio: float
    max_truncated: float
    max_divergence: float
    min_prompts: int
    max_missing: float
    min_formatted: float | None = None
    benchmarks: tuple[BenchmarkMargin, ...] = ()


@dataclass(frozen=True)
class Check:
    """One check of the gate. `words` report the measured value and its limit."""

    name: str
    value: float
    limit: float
    passed: bool
    words: str


@dataclass(frozen=True)
class Decision:
    """The gate's decision about one challenger, with every reason."""

    challenger: str
    reference: str
    difference: Interval
    checks: tuple[Check, ...]
    detectable: float = float("nan")
    """True gain that is found with a chance of 80 % with these prompts."""
    level: float = float("nan")
    """Chance of promoting this candidate that is allowed if it equals the reference."""
    by_age: tuple[str, ...] = ()
    """The gain on earlier and on fresh prompts, if the evaluation has grown since the champion was judged."""

    @property
    def promote(self) -> bool:
        """Return True if every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def refusals(self) -> list[str]:
        """Return the words of every failed check."""
        return [check.words for check in self.checks if not check.passed]


def cautious(resampling: Resampling, candidates: int) -> Resampling:
    """Return the same resampling at a confidence that holds for all candidates at once (Bonferroni), because the best one is picked."""
    return Resampling(resampling.resamples, 1 - (1 - resampling.confidence) / candidates, resampling.seed)


def decide(
    challenger: SampledAnswers, reference: SampledAnswers, limits: GateLimits, resampling: Resampling
) -> Decision:
    """Compare a challenger with the champion, or with the supervised model if there is no champion yet.

    Raises DataError if the two did not answer the same prompts equally often.
    """
    _require_same_prompts(challenger, reference)
    differences = paired_differences(challenger.reward, reference.reward)
    known = np.concatenate([challenger.reward.ravel(), reference.reward.ravel()])
    known = known[np.isfinite(known)]
    span = float(known.max() - known.min()) if len(known) else 0.0
    groups = challenger.groups
    found = gain(differences, limits.tolerated_loss, span, resampling, groups)
    checks = [
        _loss(found, reference.name, limits.tolerated_loss, groups),
        _prompts(len(differences), groups, limits.min_prompts),
        _missing(challenger, reference, limits.max_missing),
        _judge(known, span),
        _at_most("kl", float(challenger.kl.mean()), limits.max_kl, "KL to the supervised model, nats per response"),
        _length(challenger, reference, limits.max_length_ratio),
        _at_most("truncated", float(challenger.truncated.mean()), limits.max_truncated, "share of responses cut off"),
    ]
    if challenger.formatted is not None and limits.min_formatted is not None:
        checks.append(_format(float(challenger.formatted.mean()), limits.min_formatted))
    for name in sorted(challenger.scores):
        gap = divergence(challenger, reference, name)
        words = f"standard deviations by which {name} gains more than the true reward"
        checks.append(_at_most(f"divergence/{name}", gap, limits.max_divergence, words))
    checks += [_benchmark(challenger, reference, margin, resampling) for margin in limits.benchmarks]
    return Decision(challenger.name, reference.name, found.interval, tuple(checks), found.detectable, found.level)


def not_judged(name: str, reference: str, reason: str) -> Decision:
    """Refuse a candidate whose answers cannot be used; the other candidates are judged all the same."""
    nothing = Interval(float("nan"), float("nan"), float("nan"), 0, 0, "none")
    return Decision(name, reference, nothing, (Check("answers", float("nan"), float("nan"), False, reason),))


def paired_differences(challenger: Floats, reference: Floats) -> Floats:
    """Return each prompt's mean reward of the challenger minus that of the reference, [prompts].

    A missing reward is not shown to be right: it counts as the lowest known reward for the challenger and as the highest one for the
    reference. A prompt without a single reward on either side counts as no difference.
    """
    known = np.isfinite(challenger), np.isfinite(reference)
    if not (known[0].any() or known[1].any()):
        return np.zeros(len(challenger))
    values = np.concatenate([challenger[known[0]], reference[known[1]]])
    mine = np.where(known[0], challenger, values.min()).mean(1)
    theirs = np.where(known[1], reference, values.max()).mean(1)
    judged = known[0].any(1) | known[1].any(1)
    return np.where(judged, mine - theirs, 0.0)


def _require_same_prompts(challenger: SampledAnswers, reference: SampledAnswers) -> None:
    if challenger.reward.shape != reference.reward.shape:
        raise DataError(
            f"the gate compares answers to the same prompts and seeds; {challenger.name} has {challenger.reward.shape} and"
            f" {reference.name} {reference.reward.shape} [prompts, samples]. Evaluate both again: `dvc repro`."
        )
    for mine, theirs in zip(challenger.prompts, reference.prompts, strict=True):
        if mine != theirs:
            raise DataError(
                f"the gate compares answers to the same prompts; {challenger.name} answered {mine[1]!r} (gold answer {mine[2]!r}) where"
                f" {reference.name} answered {theirs[1]!r} (gold answer {theirs[2]!r}). Evaluate both again: `dvc repro`."
            )


def divergence(challenger: SampledAnswers, reference: SampledAnswers, name: str) -> float:
    """Return how much more the reward model's score gained than the true reward, each in its own standard deviations.

    A model can learn to please the reward model and gain score without reward (over-optimisation, arXiv 2210.10760). The unit is the
    standard deviation over all answers of both models.
    """
    return standardised_gain(challenger.scores[name], reference.scores[name]) - standardised_gain(
        challenger.reward, reference.reward
    )


def standardised_gain(a: Floats, b: Floats) -> float:
    """(mean a - mean b) / standard deviation of all values; 0 if all values are equal. NaN values are left out; NaN if none is known."""
    if not (np.isfinite(a).any() and np.isfinite(b).any()):
        return float("nan")
    spread = float(np.nanstd(np.concatenate([a.ravel(), b.ravel()])))
    return 0.0 if spread == 0 else float(np.nanmean(a) - np.nanmean(b)) / spread


def _loss(found: Gain, reference: str, tolerated: float, groups: Sequence[str] | None) -> Check:
    difference, confidence = found.interval, 100 * (1 - 2 * found.level)
    sign_flip = "" if tolerated > 0 else f", sign-flip test p {found.p:.4g} (at most {found.level:.4g})"
    grouped = "" if groups is None else f" in {len({*groups})} groups"
    words = (
        f"true reward against {reference} {difference.value:+.4g}, {_limits(difference, confidence)} over {difference.n}"
        f" prompts{grouped} (must lie above {0.0 - tolerated:.4g}){sign_flip}"
    )
    return Check("loss", difference.low, -tolerated, found.shown, words)


def _limits(difference: Interval, confidence: float) -> str:
    """Return the interval in words; equal differences, with no further prompts counted, have none."""
    if difference.low == difference.high:
        return no_interval(difference.n)
    return f"{confidence:.4g} % interval {difference.low:+.4g} to {difference.high:+.4g}"


def _prompts(count: int, groups: Sequence[str] | None, limit: int) -> Check:
    """Count the independent units: groups if the prompts come in groups."""
    units = count if groups is None else len({*groups})
    kind = "prompts" if groups is None else "groups of prompts"
    words = f"{kind} that the interval rests on: {units} (at least {limit})"
    return Check("prompts", units, limit, units >= limit, words)


def _missing(challenger: SampledAnswers, reference: SampledAnswers, limit: float) -> Check:
    mine, theirs = (float(np.isnan(answers.reward).mean()) for answers in (challenger, reference))
    words = (
        f"share of answers without a true reward: {mine:.4g}, and {theirs:.4g} of {reference.name} (at most {limit:.4g}); such an"
        " answer is not counted as right"
    )
    return Check("missing", max(mine, theirs), limit, max(mine, theirs) <= limit, words)


def _judge(known: Floats, span: float) -> Check:
    if not len(known):
        words = "no answer of either model has a true reward"
    elif span == 0:
        words = f"the true reward is {known[0]:.4g} for every answer of both models; such a judge cannot compare them"
    else:
        words = f"the true reward ranges from {known.min():.4g} to {known.max():.4g}"
    return Check("judge", span, 0.0, span > 0, words)


def _at_most(name: str, value: float, limit: float, description: str) -> Check:
    """Check that a value does not exceed its limit."""
    return Check(name, value, limit, value <= limit, f"{description}: {value:.4g} (at most {limit:.4g})")


def _length(challenger: SampledAnswers, reference: SampledAnswers, limit: float) -> Check:
    """Check the ratio of the mean lengths."""
    mine, theirs = float(challenger.tokens.mean()), float(reference.tokens.mean())
    ratio = (
        max(mine, theirs) / min(mine, theirs) if min(mine, theirs) > 0 else (1.0 if mine == theirs else float("inf"))
    )
    words = f"mean length {mine:.4g} tokens against {theirs:.4g} of {reference.name}: a factor of {ratio:.3g} (at most {limit:.4g})"
    return Check("length", ratio, limit, ratio <= limit, words)


def _format(share: float, limit: float) -> Check:
    """Check the share of responses in the required format."""
    return Check("format", share, limit, share >= limit, f"share in the format: {share:.4g} (at least {limit:.4g})")


def _benchmark(
    challenger: SampledAnswers, reference: SampledAnswers, margin: BenchmarkMargin, resampling: Resampling
) -> Check:
    """Check that a benchmark is not worse by more than the margin: the interval of the paired difference lies above it.

    Every check must pass, so the level is not divided among the benchmarks (an intersection-union test); it is divided among the
    candidates, as for the reward. Values within 0 and 1 could differ by 1, which bounds a loss that few documents have not shown.
    """
    mine, theirs = (documents_of(answers, margin) for answers in (challenger, reference))
    if mine.shape != theirs.shape:
        raise DataError(
            f"{margin.name}: {challenger.name} has {len(mine)} documents and {reference.name} has {len(theirs)}, so they cannot be"
            " paired. Evaluate both again: `dvc repro`."
        )
    difference = theirs - mine if margin.lower_is_better else mine - theirs
    both = np.concatenate([mine, theirs])
    found = gain(difference, margin.tolerated_loss, max(1.0, float(both.max() - both.min())), resampling)
    own, confidence = found.interval, 100 * (1 - 2 * found.level)
    words = (
        f"{margin.metric} of {margin.task} against {reference.name}{', lower is better' if margin.lower_is_better else ''}:"
        f" {own.value:+.4g}, {_limits(own, confidence)} over {own.n} documents (must lie above"
        f" {-margin.tolerated_loss:.4g})"
    )
    if not found.shown and own.value > -margin.tolerated_loss:
        words += "; more documents may show it, since the loss itself is within the margin"
    return Check(margin.name, own.low, -margin.tolerated_loss, found.shown, words)


def documents_of(answers: SampledAnswers, margin: BenchmarkMargin) -> Floats:
    """Return a benchmark's values over documents. Raises DataError if the evaluation has none."""
    values = answers.benchmarks.get((margin.task, margin.metric))
    if values is None:
        known = ", ".join(f"{task} {metric}" for task, metric in sorted(answers.benchmarks)) or "none"
        raise DataError(
            f"gate.benchmarks: the evaluation of {answers.name} has no metric {margin.metric!r} of {margin.task!r}; it has: {known}."
            " Correct the name, or evaluate again: `dvc repro`."
        )
    if not len(values):
        raise DataError(
            f"gate.benchmarks: {margin.metric} of {margin.task} is no mean over documents, so a paired interval does not exist;"
            " name a different metric"
        )
    return values
