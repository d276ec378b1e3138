"""The gate: may a challenger replace the champion? A pure function of their answers to the same prompts and seeds.

Every check is one-sided towards caution: what cannot be told apart from a loss counts as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from posttrain.errors import DataError
from posttrain.evaluation.statistics import Floats, Interval, Resampling, paired


@dataclass(frozen=True)
class Answers:
    """One model's sampled answers, [prompts, samples] each. A reward that is not known is NaN."""

    name: str
    reward: Floats
    """The true reward: what `evaluation.accuracy` names."""
    scores: Mapping[str, Floats]
    """What each reward model says, by its name."""
    kl: Floats
    """log policy - log supervised model, summed over the response, in nats."""
    tokens: Floats
    truncated: Floats
    """1 where the response was cut off before its end, else 0."""
    formatted: Floats | None = None
    """1 where the response has the wanted format, else 0; None where no format is asked for."""


@dataclass(frozen=True)
class Limits:
    """What the gate allows; see `GateParams` for each."""

    tolerated_loss: float
    max_kl: float
    max_length_ratio: float
    max_truncated: float
    max_divergence: float
    min_formatted: float | None = None


@dataclass(frozen=True)
class Check:
    """One question of the gate. `words` say what was measured and what is allowed."""

    name: str
    value: float
    limit: float
    passed: bool
    words: str


@dataclass(frozen=True)
class Decision:
    """What the gate says about one challenger, with every reason."""

    challenger: str
    reference: str
    difference: Interval
    checks: tuple[Check, ...]

    @property
    def promote(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def refusals(self) -> list[str]:
        return [check.words for check in self.checks if not check.passed]


def cautious(resampling: Resampling, candidates: int) -> Resampling:
    """The same resampling, at a confidence that holds for all candidates at once (Bonferroni), since the best one is picked."""
    return Resampling(resampling.resamples, 1 - (1 - resampling.confidence) / candidates, resampling.seed)


def decide(challenger: Answers, reference: Answers, limits: Limits, resampling: Resampling) -> Decision:
    """Compare a challenger with the champion (or with the supervised model while there is none).

    Raises DataError where the two did not answer the same prompts equally often.
    """
    if challenger.reward.shape != reference.reward.shape:
        raise DataError(
            f"the gate compares answers to the same prompts and seeds; {challenger.name} has {challenger.reward.shape} and"
            f" {reference.name} {reference.reward.shape} [prompts, samples]. Evaluate both again: `dvc repro`."
        )
    difference = paired(challenger.reward, reference.reward, resampling).difference
    checks = [
        _loss(difference, reference.name, limits.tolerated_loss, resampling.confidence),
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
    return Decision(challenger.name, reference.name, difference, tuple(checks))


def divergence(challenger: Answers, reference: Answers, name: str) -> float:
    """How much more the reward model's score gained than the true reward, each in its own standard deviations.

    A model that learns what the reward model likes, and not what it stands for, gains score without gaining reward
    (over-optimisation, arXiv 2210.10760). The unit is the deviation over all answers of both models.
    """
    return standardised_gain(challenger.scores[name], reference.scores[name]) - standardised_gain(
        challenger.reward, reference.reward
    )


def standardised_gain(a: Floats, b: Floats) -> float:
    """(mean a - mean b) / standard deviation of all values; 0 where all values are equal. NaN values are left out."""
    spread = float(np.nanstd(np.concatenate([a.ravel(), b.ravel()])))
    return 0.0 if spread == 0 else float(np.nanmean(a) - np.nanmean(b)) / spread


def _loss(difference: Interval, reference: str, tolerated: float, confidence: float) -> Check:
    words = (
        f"true reward against {reference} {difference.value:+.4g}, {100 * confidence:.4g} % interval {difference.low:+.4g} to"
        f" {difference.high:+.4g} over {difference.n} prompts (must not reach below {0.0 - tolerated:.4g})"
    )
    return Check("loss", difference.low, -tolerated, difference.low >= -tolerated, words)


def _at_most(name: str, value: float, limit: float, what: str) -> Check:
    return Check(name, value, limit, value <= limit, f"{what}: {value:.4g} (at most {limit:.4g})")


def _length(challenger: Answers, reference: Answers, limit: float) -> Check:
    mine, theirs = float(challenger.tokens.mean()), float(reference.tokens.mean())
    ratio = max(mine, theirs) / min(mine, theirs)
    words = f"mean length {mine:.4g} tokens against {theirs:.4g} of {reference.name}: a factor of {ratio:.3g} (at most {limit:.4g})"
    return Check("length", ratio, limit, ratio <= limit, words)


def _format(share: float, limit: float) -> Check:
    return Check("format", share, limit, share >= limit, f"share in the format: {share:.4g} (at least {limit:.4g})")
