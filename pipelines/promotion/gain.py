"""Does a challenger's reward exceed the champion's? A test that holds its level for few prompts.

The unit is the prompt: the answers to one prompt are averaged first, and `d` is the difference of the two means. Two questions
are asked, and both must be answered with yes:

* a sign-flip test (Fisher 1935): if the models are equal, every prompt's difference is as likely with the opposite sign. This holds
  for any number of prompts, with ties, and for any distribution of rewards;
* the lower limit of a t interval over prompts, which the page shows as well.

With a tolerated loss the models need not be equal, so there is no sign to flip. Then a loss that few prompts have shown must be
bounded: the interval counts z^2 / 2 further prompts with the worst possible difference, as Wilson's interval does for a share.
For 0 losses in n prompts this exceeds the exact limit ln(1 / level) / n.

Prompts of one group, such as questions about one text, are not independent. Then the unit is the group: signs are flipped for whole
groups, and the t interval is clustered (2411.00640, equation 4) with the groups' degrees of freedom.

Level and power are simulated in tests/pipelines/promotion/test_level.py. All functions take [..., prompts], so that a simulation
is one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.statistics import Floats, Interval, Resampling, floats

POWER = 0.8
_CHUNK = 4_000_000
"""Sums of sign patterns held at once (32 MB)."""
_ROUNDING = 1e-9
"""Sums in another order differ in the last bits; ties still count as reached."""


@dataclass(frozen=True)
class Gain:
    """The difference of true rewards, whether it is shown, and how much could have been shown.

    Attributes:
        interval: mean difference with its two-sided t interval.
        p: one-sided p-value of the sign-flip test; NaN with a tolerated loss.
        level: chance of promoting an equal model that is allowed, per candidate.
        detectable: true gain that is found with a chance of 80 % with these prompts; NaN if the prompts do not differ.
        shown: True if the gain is shown at the level.
    """

    interval: Interval
    p: float
    level: float
    detectable: float
    shown: bool


def gain(d: Floats, tolerated: float, span: float, resampling: Resampling, groups: Sequence[str] | None = None) -> Gain:
    """Judge the differences `d` [prompts].

    Args:
        tolerated: mean loss that is accepted.
        span: largest reward minus smallest reward, the worst difference that a prompt could show.
        resampling: its confidence is two-sided; the level of the one-sided test is half of the rest.
        groups: the group of each prompt; None if prompts are independent.
    """
    level = (1 - resampling.confidence) / 2
    flipped, spread = (d, d) if groups is None else units(d, groups)
    value, low, high = t_interval(spread, level, span if tolerated > 0 else 0.0)
    p = float(sign_flip_p(flipped, level, resampling)) if tolerated == 0 else float("nan")
    method = "t over prompts" if groups is None else f"t over {len(spread)} groups of prompts"
    interval = Interval(float(value), float(low), float(high), len(d), 0, method)
    reached = float(low) > -tolerated and (tolerated > 0 or p <= level)
    return Gain(interval, p, level, detectable(spread, level), reached)


def units(d: Floats, groups: Sequence[str]) -> tuple[Floats, Floats]:
    """Return one value per group, [groups] twice; both have the mean of all prompts, also if groups differ in size.

    The first are the groups' sums, scaled, whose signs can be flipped. The second have the clustered variance: the sums of the deviations
    from the mean.

    Example:
        >>> units(np.array([1.0, 0.0, 0.0, 0.0]), ["a", "a", "b", "b"])
        (array([0.5, 0. ]), array([0.5, 0. ]))
        >>> [part.tolist() for part in units(np.array([1.0, 1.0, 1.0, -1.0]), ["a", "a", "a", "b"])]
        [[1.5, -0.5], [1.25, -0.25]]
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    scale, mean = len(names) / len(d), float(d.mean())
    sums = np.bincount(member, weights=d, minlength=len(names))
    deviations = np.bincount(member, weights=d - mean, minlength=len(names))
    return floats(sums * scale), floats(mean + deviations * scale)


def shown(d: Floats, tolerated: float, span: float, resampling: Resampling) -> NDArray[np.bool_]:
    """Return the verdicts of many experiments [trials, prompts]; each is `gain(...).shown`."""
    level = (1 - resampling.confidence) / 2
    _, low, _ = t_interval(d, level, span if tolerated > 0 else 0.0)
    if tolerated > 0:
        return np.asarray(low > -tolerated)
    return np.asarray((low > 0) & (sign_flip_p(d, level, resampling) <= level))


def t_interval(d: Floats, level: float, worst: float = 0.0) -> tuple[Any, Any, Any]:
    """Return mean, lower and upper limit [...] of a t interval over prompts; `level` is the chance of error at each end.

    With `worst`, z^2 / 2 further prompts with that loss are counted in the lower limit. One prompt gives no interval: the limits
    are infinite.
    """
    n = d.shape[-1]
    value = d.mean(-1)
    if n < 2:
        return value, value - np.inf, value + np.inf
    from scipy import stats  # not above: it takes half a second, and a flow imports this module only for its types

    reach = float(stats.t.isf(level, n - 1))
    error = np.sqrt(d.var(-1, ddof=1) / n)
    extra = float(stats.norm.isf(level)) ** 2 / 2 if worst > 0 else 0.0
    total = n + extra
    mean = (d.sum(-1) - extra * worst) / total
    squares = (d**2).sum(-1) + extra * worst**2
    spread = np.sqrt(np.maximum(squares / total - mean**2, 0.0) / max(total - 1, 1.0))
    return value, mean - reach * spread, value + reach * error


def sign_flip_p(d: Floats, level: float, resampling: Resampling) -> Any:
    """Return the one-sided p-value [...]: the share of sign patterns whose sum reaches the observed one.

    Patterns are drawn, the observed one counts as one of them: (1 + hits) / (1 + patterns), so the test is exact for any number of
    draws (Phipson and Smyth 2010). There are at least 20 / level of them, since the least p is 1 / (1 + patterns).
    """
    draws = max(resampling.resamples, int(np.ceil(20 / level)))
    rows = np.atleast_2d(d)
    reached = rows.sum(-1) - _ROUNDING * np.abs(rows).sum(-1)
    generator, hits = resampling.generator(), np.zeros(len(rows))
    step = max(1, _CHUNK // max(rows.shape))
    for done in range(0, draws, step):
        signs = generator.integers(0, 2, (min(step, draws - done), rows.shape[-1]), dtype=np.int8) * 2.0 - 1.0
        hits += (signs @ rows.T >= reached).sum(0)
    return ((1 + hits) / (1 + draws)).reshape(d.shape[:-1])


def detectable(d: Floats, level: float, power: float = POWER) -> float:
    """Return the true gain that is found with the given power, at the observed spread over prompts; NaN without a spread."""
    n = len(d)
    spread = float(d.std(ddof=1)) if n > 1 else 0.0
    if spread == 0:
        return float("nan")
    from scipy import stats

    return float(stats.t.isf(level, n - 1) + stats.t.ppf(power, n - 1)) * spread / float(np.sqrt(n))
